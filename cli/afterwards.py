"""What comes after training: predictions, and scoring, labeling or exporting a finished run."""

from functools import partial
from pathlib import Path

import torch

from cli import report
from cli.files import digest_of
from cli.setup import build, frozen_digest
from glue.metrics import METRICS
from glue.tasks import load_task, read_rows, task_of
from glue.tokens import batch_of
from hub.adapters import adapter_state, load_adapter_state
from hub.checkpoints import read_torch
from hub.peft import export_peft
from hub.roberta import hub_name, save_pretrained
from hub.tokenizers import copy_tokenizer
from peers import METHODS, made_plain
from salora import merge, salora_layers

# What transformers and peft call our NF4
IN_4_BITS = (
    "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
    "bnb_4bit_use_double_quant=True, llm_int8_skip_modules=['classifier'])"
)


@torch.no_grad()
def predict(model, rows, device, batch_of=batch_of):
    """A class index or a score for every encoded row."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # rows of like length meet: little padding
    batches = [order[i : i + 128] for i in range(0, len(rows), 128)]
    outputs = torch.cat([model(*batch_of([rows[i] for i in batch], model, device)[0]) for batch in batches])
    outputs = outputs[torch.tensor(order).argsort().to(device)].float()  # (rows, labels), as they came
    return (outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)).tolist()


def reopen(settings, folder, summary):
    """(model, encode) of a finished run, as it was when the run ended.

    Raises ValueError where the encoder's folder or the adapter's file holds other weights than then.
    """
    model, encode = build(settings)
    if frozen_digest(model) != summary.get("frozen_digest"):
        raise ValueError(f"{settings.weights} holds other weights than those that the run in {folder} was trained on")
    load_adapter_state(model, read_torch(folder / "adapter.pt"))
    if digest_of(adapter_state(model)) != summary.get("adapter_digest"):
        raise ValueError(f"{folder}/adapter.pt is not the adapter that the run left there")
    return model, encode


def evaluate(settings, folder, summary, test=None):
    """Score a finished run on its dev rows or, given a test file without labels, write what GLUE wants submitted."""
    task = task_of(settings.task)
    if test is None:
        rows = load_task(settings.task, settings.data)[1]
    else:
        rows = read_rows(Path(test), task, labeled=False)
    model, encode = reopen(settings, folder, summary)
    predicted = predict(model, encode(rows), settings.device)
    if test is not None:
        path = report.write_predictions(folder, task, Path(test).name, predicted)
        print(f"{settings.task}: {len(rows)} rows of {test} labeled; see {path}")
        return {"predictions": str(path)}
    gold = [row[2] for row in rows]
    print(f"{settings.task}: {report.scores(task, predicted, gold)} on {len(rows)} dev rows with {folder}")
    return {"task": settings.task, "metric": task.metric, "score": METRICS[task.metric](predicted, gold)}


def export(settings, folder, summary):
    """Write RUN/peft, where the run has an adapter, and RUN/merged, and say what opens them.

    Raises ValueError for a method whose modules have no place in a checkpoint.
    """
    if METHODS[settings.method].adds_modules:
        raise ValueError(f"--method {settings.method} adds modules to the encoder, which no checkpoint has room for")
    model = made_plain(reopen(settings, folder, summary)[0])
    written = {}
    if salora_layers(model):
        names = partial(hub_name, model_type=model.encoder.config.model_type)
        export_peft(model, folder / "peft", names, base_model=settings.weights, task_type="SEQ_CLS")
        written["peft"] = str(folder / "peft")
        print(f"{folder}/peft: an adapter for peft.AutoPeftModelForSequenceClassification.from_pretrained")
        if settings.quantize:
            print(f"it belongs onto a base in 4 bits: {IN_4_BITS}")
    save_pretrained(merge(model), folder / "merged")
    copy_tokenizer(settings.weights, folder / "merged")
    written["merged"] = str(folder / "merged")
    print(f"{folder}/merged: a checkpoint for transformers.AutoModelForSequenceClassification.from_pretrained")
    return written
