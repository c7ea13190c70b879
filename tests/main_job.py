"""The main job in this process and at tiny size, and what the tests of it look at."""

import csv
import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import train_glue_mini
from cli import report
from glue import tasks

FILES = ["adapter.pt", "log.csv", "ranks.png", "settings.json", "summary.json", "training.png"]
SMALL = {"--rows": 48, "--batch-size": 8, "--steps": 20, "--device": "cpu"}  # six steps an epoch
FEW_ROWS = dict(TRAIN_ROWS=200, DEV_ROWS=100)  # of a generated task: making the usual number takes longer than a run


def touch(*values):
    """In the place of a picture, which takes longer than such a run as well."""
    next(value for value in values if isinstance(value, Path)).touch()


def main_job(*flags, weights=None, pictures=False):
    """Run the main job; without --resume, --evaluate or --export the flags of SMALL are added to those that are given.
    weights: the encoder's folder. Returns the summary."""
    flags = [str(flag) for flag in flags]
    if not {"--resume", "--evaluate", "--export"} & set(flags):
        missing = {"--weights": weights, **SMALL}
        if "--epochs" in flags:
            del missing["--steps"]
        for flag, value in missing.items():
            if flag not in flags:
                flags += [flag, str(value)]
    with ExitStack() as stack:
        stack.enter_context(patch.multiple(tasks, **FEW_ROWS))
        for name in () if pictures else ("draw_training", "draw_ranks", "draw_trace"):
            stack.enter_context(patch.object(report, name, touch))
        return train_glue_mini.main(flags)


def refused(capsys, call, *flags):
    """The call must end with one line on standard error, exit status 2 and no traceback. Returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        call(*flags)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("train_glue_mini.py: error: "), lines
    return lines[0]


def interrupt(call, *flags, after):
    """A run that is interrupted in the step after so many."""
    task_loss, calls = train_glue_mini.task_loss, []

    def loss(outputs, labels):
        if torch.is_grad_enabled():  # not where ALoRA scores its ranks
            calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return task_loss(outputs, labels)

    with patch.object(train_glue_mini, "task_loss", loss), pytest.raises(SystemExit) as exit_:
        call(*flags)
    assert exit_.value.code == 130


@contextmanager
def spoiled_update(last):
    """The update of this number makes a weight infinite."""
    calls = []

    def spoil(optimizer, *_):
        if isinstance(optimizer, torch.optim.AdamW):  # and not that of the gates
            calls.append(1)
            if len(calls) == last:
                optimizer.param_groups[0]["params"][-1].data.view(-1)[0] = float("inf")

    handle = register_optimizer_step_post_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def json_of(folder, name="summary"):
    return json.loads((folder / f"{name}.json").read_text())


def edit_settings(folder, **changes):
    (folder / "settings.json").write_text(json.dumps({**json_of(folder, "settings"), **changes}))


def copy_of(folder, path):
    return Path(shutil.copytree(folder, path))


def log_of(folder, name="log.csv"):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def losses_of(folder):
    """Loss, expected and kept density of every logged step: (steps, 3)."""
    return torch.tensor([[float(row[key] or 0) for key in ("loss", "C", "kept")] for row in log_of(folder)])


def adapter_of(folder):
    """All numbers of a saved adapter, as nested lists, so that == compares exactly."""
    state = torch.load(folder / "adapter.pt", weights_only=True)
    plain = {name: value.tolist() for name, value in state["others"].items()}
    for name, layer in state["layers"].items():
        plain[name] = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in layer.items()}
    return plain
