"""What comes after training: predictions, and scoring, labeling or exporting a finished run."""

from functools import partial
from pathlib import Path

import torch

from cli import report
from cli.files import digest_of
from cli.setup import build, frozen_digest
from glue.metrics import METRICS
from glue.tasks import folder_of, has_labels, load_task, read_rows, task_of
from glue.tokens import batch_of
from hub.adapters import adapter_state, load_adapter_state
from hub.checkpoints import read_torch
from hub.peft import export_peft
from hub.roberta import hub_name, label_names, save_pretrained
from hub.tokenizers import copy_tokenizer
from peers import METHODS, made_plain
from salora import merge, salora_layers

# What transformers and peft call our NF4
IN_4_BITS = (
    "quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
    "bnb_4bit_use_double_quant=True, llm_int8_skip_modules=['classifier'])"
)


@torch.no_grad()
def predict(model, rows, device, batch_of=batch_of):
    """A class index or a score for every encoded row. Raises FloatingPointError where an output is not finite."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))  # rows of like length meet: little padding
    batches = [order[i : i + 128] for i in range(0, len(rows), 128)]
    outputs = torch.cat([model(*batch_of([rows[i] for i in batch], model, device)[0]) for batch in batches])
    if not outputs.isfinite().all():  # argmax would choose a class all the same
        raise FloatingPointError("the model's outputs are not finite, since training diverged: try a smaller --lr")
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
    """Score a finished run on its dev rows, MNLI on both kinds, or label the rows of the file `test`.

    Returns a dict with the task, its metric and the score, and the score on dev rows of the second kind; or with the
    path of the predictions.
    """
    if test is not None:
        return label(settings, folder, summary, Path(test))
    task = task_of(settings.task)
    dev = {"score": ("dev rows", load_task(settings.task, settings.data)[1])}
    if settings.data is not None and task.more_dev:
        path = folder_of(task, settings.data) / task.more_dev
        if path.is_file():
            dev[path.stem] = (f"rows of {path.name}", read_rows(path, task))
    model, encode = reopen(settings, folder, summary)
    result = {"task": settings.task, "metric": task.metric}
    for key, (what, rows) in dev.items():
        predicted = predict(model, encode(rows), settings.device)
        result[key] = say_score(settings, predicted, rows, f"{what} with {folder}")
    return result


def label(settings, folder, summary, path):
    """Write what GLUE wants submitted for the rows of an official file, and score them where they have labels."""
    task = task_of(settings.task)
    labeled = has_labels(path, task)
    rows = read_rows(path, task, labeled)
    model, encode = reopen(settings, folder, summary)
    predicted = predict(model, encode(rows), settings.device)
    written = report.write_predictions(folder, task, path.name, predicted)
    print(f"{settings.task}: {len(rows)} rows of {path} labeled; see {written}")
    result = {"predictions": str(written)}
    if labeled:
        result["score"] = say_score(settings, predicted, rows, f"rows of {path}")
    return result


def say_score(settings, predicted, rows, what):
    """Print all metrics of a task for predictions of labeled rows. Returns the first."""
    task, gold = task_of(settings.task), [row[2] for row in rows]
    print(f"{settings.task}: {report.scores(task, predicted, gold)} on {len(rows)} {what}")
    return METRICS[task.metric](predicted, gold)


def export(settings, folder, summary):
    """Write RUN/peft, where the run has an adapter, and RUN/merged, and say what opens them.

    Raises ValueError for a method whose modules have no place in a checkpoint.
    """
    if METHODS[settings.method].adds_modules:
        raise ValueError(f"--method {settings.method} adds modules to the encoder, which no checkpoint has room for")
    model = made_plain(reopen(settings, folder, summary)[0])
    labels = task_of(settings.task).labels or ("score",)
    written = {}
    if salora_layers(model):
        names = partial(hub_name, model_type=model.encoder.config.model_type)
        export_peft(model, folder / "peft", names, base_model=settings.weights, task_type="SEQ_CLS")
        written["peft"] = str(folder / "peft")
        # The head of the checkpoint underneath may be of another size, and its classes have other names
        said = "".join(f", {key}={value}" for key, value in label_names(labels).items())
        said += f", {IN_4_BITS}" if settings.quantize else ""
        print("an adapter, which opens with\n    peft.AutoPeftModelForSequenceClassification.from_pretrained("
              f"{written['peft']!r}{said}, ignore_mismatched_sizes=True)")  # fmt: skip
    save_pretrained(merge(model), folder / "merged", labels, safetensors=True)
    copy_tokenizer(settings.weights, folder / "merged")
    written["merged"] = str(folder / "merged")
    print("a checkpoint, which opens with\n    transformers.AutoModelForSequenceClassification.from_pretrained("
          f"{written['merged']!r})")  # fmt: skip
    return written
