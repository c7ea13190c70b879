"""What is done with a trained model: predictions, and scoring or labelling with a finished run."""

from pathlib import Path

import torch

from cli import report
from cli.setup import build
from glue.metrics import METRICS
from glue.tasks import load_task, read_rows, task_of
from glue.tokens import batch_of
from hub.checkpoints import read_torch
from salora import load_adapter_state


@torch.no_grad()
def predict(model, rows, device, batch_of=batch_of):
    """A class index or a score for every encoded row."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # rows of like length meet: little padding
    batches = [order[i : i + 128] for i in range(0, len(rows), 128)]
    outputs = torch.cat([model(*batch_of([rows[i] for i in batch], model, device)[0]) for batch in batches])
    outputs = outputs[torch.tensor(order).argsort().to(device)].float()  # (rows, labels), as they came
    return (outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)).tolist()


def evaluate(settings, folder, test=None):
    """Score a finished run on its dev rows or, given a test file without labels, write what GLUE wants submitted."""
    task = task_of(settings.task)
    if test is None:
        rows = load_task(settings.task, settings.data)[1]
    else:
        rows = read_rows(Path(test), task, labelled=False)
    model, encode = build(settings)
    load_adapter_state(model, read_torch(folder / "adapter.pt"))
    predicted = predict(model, encode(rows), settings.device)
    if test is not None:
        path = report.write_predictions(folder, task, Path(test).name, predicted)
        print(f"{settings.task}: {len(rows)} rows of {test} labelled; see {path}")
        return {"predictions": str(path)}
    gold = [row[2] for row in rows]
    print(f"{settings.task}: {report.scores(task, predicted, gold)} on {len(rows)} dev rows with {folder}")
    return {"task": settings.task, "metric": task.metric, "score": METRICS[task.metric](predicted, gold)}
