"""One run of one method, on GLUE or on the shift study, for experiments/compare.py; and `main_job`, a run of the main
job that prints nothing, for any study. There is no program here.

Methods that have a size end at about that of LoRA with r = 4: SaLoRA from rank 8, its default, and from rank 16. Prefix
and prompt have 8 vectors, since more made the tiny encoder worse; BitFit's and (IA)3's sizes follow from the encoder,
and SoRA's from how far its thresholds reach (peers/sora.py). That was chosen with the tuning seed, by size alone: the
shares of LoRA r = 8 that stayed were

    mini-cola and mini-rte    0.58 and 0.52 with a reach of 0.7, 0.34 and 0.32 with 1.2
    words                     0.81 with 0.8 at two learning rates, 0.51 with 2

All counts are without heads and without gates.
"""

from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from time import time_ns

import torch

import train_glue_mini
from cli.afterwards import predict, reopen
from cli.flags import METHODS as MAIN_METHODS
from cli.journal import Journal
from cli.runs import read_settings
from experiments import shift
from experiments.arms import TUNE_SEED, WIDE, arm_of, grid_of, tuned
from glue.metrics import METRICS
from glue.mini import TASKS as MINI_TASKS
from glue.mini import examples
from glue.tasks import DEV_ROWS, TASKS, TRAIN_ROWS
from hub.checkpoints import write_atomically

GLUE_REACH, SHIFT_REACH = 0.8, 2.0
FRESH_ROWS = 4000  # of a generated task, for reports
METHODS = {  # name -> (flags of the main job, arm of the shift study)
    "salora": ("--method salora", "late-4"),
    "salora-16": ("--method salora --rank 16 --alpha 32 --density 0.25", "ours-4"),
    "lora-8": ("--method lora --rank 8", "lora-8"),
    "lora-4": ("--method lora --rank 4", "lora-4"),
    "adalora": ("--method adalora", "adalora-4"),
    "sora": (f"--method sora --reach {GLUE_REACH}", "sora-8"),
    "alora": ("--method alora", "alora-4"),
    "rm-lora": ("--method rm-lora --rank 4", "rm-lora-4"),
    "adapter-h": ("--method adapter-h --rank 16", "adapter-h-16"),  # a block of LoRA has 18 d r parameters, this 4 d m
    "adapter-p": ("--method adapter-p --rank 35", "adapter-p-35"),  # 2 d m
    "prefix": ("--method prefix --rank 8", "prefix-8"),
    "prompt": ("--method prompt --rank 8", "prompt-8"),
    "bitfit": ("--method bitfit", "bitfit"),
    "ia3": ("--method ia3", "ia3"),
    "full": ("--method full", "full"),
    "head": ("--method head", "head"),
}


def kind_of(task):
    return "shift" if task in shift.KINDS else "generated" if task in MINI_TASKS else "official"


def trials(method, task):
    """[(learning rate, scale)] that tuning tries; a scale of "" is the main job's own."""
    flags, arm = METHODS[method]
    if kind_of(task) == "shift":
        return [(lr, float(scale)) for lr, scale in grid_of(arm_of(arm), WIDE)]
    middle = MAIN_METHODS[flags.split()[1]][task in TASKS]
    factors = (0.5, 1, 2) if kind_of(task) == "official" else (0.5, 1, 2, 4, 8)
    return [(float(f"{factor * middle:g}"), "") for factor in factors]


def default_trial(method, task):
    """That of an untuned method."""
    if kind_of(task) == "shift":
        return tuned(arm_of(METHODS[method][1]))
    return trials(method, task)[1]


def run(method, task, seed, trial, args):
    """(score or loss, parameters that train, parameters in the end, seconds a step, device) of one run.

    args: of compare.py. Raises FloatingPointError for a run that diverges.
    """
    if kind_of(task) == "shift":
        return run_on_shift(method, task, seed, trial, args)
    return run_on_glue(method, task, seed, trial, args)


def main_job(flags):
    """The summary of a run of the main job, in silence.

    Raises what it would end with: KeyboardInterrupt, FloatingPointError for a loss that is not finite, or ValueError.
    """
    try:
        with redirect_stdout(None), redirect_stderr(StringIO()) as said:
            return train_glue_mini.main(flags)
    except SystemExit as stopped:  # after one line that says why
        if stopped.code == 130:
            raise KeyboardInterrupt from None
        why = said.getvalue().strip()
        raise (FloatingPointError if "not finite" in why else ValueError)(why.partition("error: ")[2] or why) from None


def run_on_glue(method, task, seed, trial, args):
    flags = [*METHODS[method][0].split(), "--task", task, *args.flags, "--seed", str(seed), "--lr", str(trial[0])]
    flags += ["--data", str(args.data)] if kind_of(task) == "official" else []
    flags += ["--steps", str(args.steps)] if args.steps else []
    out = args.out / f"{method}-{task}-s{seed}-{time_ns()}"
    summary = main_job([*flags, "--out", str(out)])
    trained, final = sizes(torch.load(out / "adapter.pt", map_location="cpu", weights_only=True))
    fresh = kind_of(task) == "generated" and seed != TUNE_SEED
    score = score_on(fresh_rows(task), out, summary) if fresh else summary["score"]
    return score, trained, final, summary["seconds"] / summary["steps"], summary["device"]


def fresh_rows(task):
    """Rows of a generated task that come after its training and dev rows, and differ from all of them."""
    return examples(task, TRAIN_ROWS + DEV_ROWS + FRESH_ROWS)[TRAIN_ROWS + DEV_ROWS :]


def score_on(rows, folder, summary):
    """The score of a finished run on other rows than its own."""
    settings = read_settings(folder, summary["device"])
    model, encode = reopen(settings, folder, summary)
    return METRICS[summary["metric"]](predict(model, encode(rows), settings.device), [row[2] for row in rows])


def sizes(adapter):
    """(parameters that train, parameters in the end) of a saved adapter: its triplets, and all but the classifier."""
    layers = adapter["layers"].values()
    others = sum(p.numel() for name, p in adapter["others"].items() if not name.startswith("classifier."))
    final = sum(layer["A"].numel() + layer["B"].numel() for layer in layers)
    trained = sum(layer["r0"] * (layer["A"].shape[1] + layer["B"].shape[0]) for layer in layers)
    return trained + others, final + others


def run_on_shift(method, kind, seed, trial, args):
    arm, (lr, scale), steps = arm_of(METHODS[method][1]), trial, args.steps or 1000
    data, model = shift.data_of(kind, seed, args.texts), shift.model_of(arm, scale, seed)
    options = {"reach": SHIFT_REACH} if method == "sora" else {}
    trained, journal = shift.parameters_of(model), Journal(steps)
    shift.train(model, data, arm, lr, seed, steps, journal, **options)
    seconds = journal.seconds / steps
    return data.loss(model), trained, shift.parameters_of(model), seconds, "cpu"


def hold_out(task, data, folder):
    """Write into a GLUE folder what tuning uses of an official task: training rows alone, every tenth as a dev row."""
    task = TASKS[task]
    source = data / task.folder if (data / task.folder).is_dir() else data
    lines = [line for line in (source / "train.tsv").read_bytes().split(b"\n") if line.strip()]
    header = [] if task.header else [lines.pop(0)]
    parts = {"train.tsv": [line for i, line in enumerate(lines) if i % 10], task.dev: lines[::10]}
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        text = b"\n".join([*header, *rows]) + b"\n"
        write_atomically(folder / task.folder / name, lambda path: path.write_bytes(text))
