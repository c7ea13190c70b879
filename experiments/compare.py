"""SaLoRA beside its peers: what trains, what is left in the end, the score, and what a step costs.

    python experiments/compare.py --tune --tasks mini-cola mini-mrpc mini-rte      learning rates of all arms
    python experiments/compare.py                            with the best of them, on the eight generated tasks
    ... --tasks words reverse --out runs/compare-shift       the same two for the losses of experiments/shift.py

Arms that have a size end at about that of LoRA with r = 4. Prefix and prompt have 8 vectors, since more made the tiny
encoder worse; BitFit's and (IA)^3's sizes follow from the encoder, and SoRA's from its lambda: see REACH. All get as
many trials on seed 100: on generated tasks half of the main job's default learning rate, the default, 2, 4 and 8 times
that; on a shift ten. Generated tasks are tuned on dev rows, and a report is about rows that were generated after them.
An arm that was not tuned takes the default. Other flags go to the main job.

compare.png shows the score against the final number of parameters.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import time_ns

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_glue_mini
from cli.afterwards import predict, reopen
from cli.files import claimed
from cli.flags import build_parser
from cli.journal import Journal
from cli.runs import runs_of
from cli.settings import read_settings
from cli.setup import prepare
from experiments import plots, shift
from experiments.arms import WARMUP
from experiments.study import TUNE_SEED, Study
from experiments.tables import distinct, values_of
from glue.metrics import METRICS
from glue.mini import TASKS as MINI_TASKS
from glue.mini import examples
from glue.tasks import DEV_ROWS, TRAIN_ROWS
from peers import METHODS
from peers.sora import lambda_at
from rank_allocator import lr_factor

ARMS = ["salora-8-to-4", "salora-16-to-4", "lora-8", "lora-4", "adalora-8-to-4", "sora-8", "alora-8-to-4", "rm-lora-4",
        "adapter-h-16", "adapter-p-35", "prefix-8", "prompt-8", "bitfit", "ia3", "full", "head"]  # fmt: skip
# What SoRA's thresholds add up to over a run: a gate ends at 0 if it starts closer to 0 and no gradient moves it. By
# size alone, on seed 100: of LoRA r = 8, .58 and .34 stayed with .7 and 1.2 on mini-cola, .51 with 2 on words.
REACH = {"tasks": 0.8, "shift": 2.0}
WIDE = [(lr, scale) for lr in (6e-3, 1.2e-2, 2.4e-2, 4.8e-2) for scale in (1, 2, 4, 8) if lr * scale <= 4.8e-2]
COSTS = ["trained", "final", "ms"]  # parameters that train, and that are left; milliseconds a step
FRESH_ROWS = 4000  # of a generated task, for reports
OWN = {"--lr", "--method", "--rank", "--alpha", "--budget", "--sparse-lambda"}  # flags that this study chooses itself


def lambda_of(reach, lr, steps):
    """SoRA's highest lambda with which all thresholds eta_t lambda_t of a run add up to `reach`."""
    total = sum(lr * lr_factor(step, steps, WARMUP) * lambda_at(step, steps, 1.0) for step in range(steps))
    return reach / total


def measure(args, task, arm, seed, trial):
    """One run of the main job."""
    [lr], out = trial, args.out / f"{arm.name}-{task}-s{seed}-{time_ns()}"
    flags = flags_of(arm) + ["--task", task, "--seed", seed, "--lr", lr, "--steps", args.steps, "--out", out]
    if arm.method == "sora":
        flags += ["--sparse-lambda", lambda_of(REACH["tasks"], lr, args.steps)]
    summary = main_job([*args.flags, *(str(flag) for flag in flags)])
    score = summary["score"] if seed == TUNE_SEED else score_on(fresh_rows(task), out, summary)
    trained, final = sizes(torch.load(out / "adapter.pt", map_location="cpu", weights_only=True))
    return {"score": score, "trained": trained, "final": final, "ms": 1000 * summary["seconds"] / summary["steps"]}


def main_job(flags):
    """The summary of a run of the main job, in silence."""
    parser = build_parser()
    args = parser.parse_args(flags)
    args.command = " ".join(flags)
    [(settings, folder, _)] = runs_of(args, parser)
    with redirect_stdout(None), claimed(folder, new=True):
        return train_glue_mini.run(settings, folder, *prepare(settings))


def flags_of(arm):
    """The flags of the main job that make an arm."""
    flags = ["--method", arm.method]
    if arm.start:
        flags += ["--rank", arm.start]
    if arm.has_triplets:
        flags += ["--alpha", max(16, 2 * arm.start)]
    if METHODS[arm.method].budgeted:
        flags += ["--budget", arm.size / arm.start]
    return flags


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


def measure_on_shift(args, task, arm, seed, trial):
    lr, scale = trial
    data, model, journal = shift.data_of(task, seed, args.texts), shift.model_of(arm, scale, seed), Journal(args.steps)
    options = {"sparse_lambda": lambda_of(REACH["shift"], lr, args.steps)} if arm.method == "sora" else {}
    trained = shift.parameters_of(model)
    shift.train(model, data, arm, lr, seed, args.steps, journal=journal, **options)
    ms = 1000 * journal.seconds / args.steps
    return {"loss": data.loss(model), "trained": trained, "final": shift.parameters_of(model), "ms": ms}


def trials(args, task, arm):
    middle, _ = METHODS[arm.method].lr
    return [(float(f"{factor * middle:g}"),) for factor in (0.5, 1, 2, 4, 8)]


def draw(rows):
    """The mean over tasks and seeds, with its interval, against the parameters in the end."""
    score, tasks, points = "loss" if "loss" in rows[0] else "score", distinct(rows, "task"), []
    for arm, values in values_of(rows, score, *tasks).items():
        final = mean(float(row["final"]) for row in rows if row["arm"] == arm)
        points.append((arm, final, *plots.mean_and_bars(list(values.values()))))
    label = "loss (nats; lower is better)" if score == "loss" else "score"
    over = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    return plots.methods(points, f"{label}, {over}", score == "loss") if points else None


def rivals(name, names):
    return [other for other in ("lora-4", "lora-8") if other in names and not name.startswith("lora")]


def check(args):
    for flag in args.flags:
        if flag.split("=")[0] in OWN:
            raise ValueError(f"{flag.split('=')[0]} is what this study chooses itself")


STUDY = Study(
    doc=__doc__,
    name="compare",
    measure=measure,
    columns=["score", *COSTS],
    more=COSTS,
    tasks=list(MINI_TASKS),
    arms=ARMS,
    steps=1500,
    lowest=False,
    trials=trials,
    default=lambda args, task, arm: trials(args, task, arm)[1],
    rivals=rivals,
    draw=draw,
    check=check,
    for_main_job=True,
)
ON_SHIFT = replace(
    shift.STUDY,
    doc=__doc__,
    name="compare",
    measure=measure_on_shift,
    columns=["loss", *COSTS],
    more=COSTS,
    arms=ARMS,
    trials=lambda args, task, arm: shift.trials(args, task, arm, WIDE),
    rivals=rivals,
    draw=draw,
)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    return (ON_SHIFT if set(argv) & set(ON_SHIFT.tasks) else STUDY).main(argv)


if __name__ == "__main__":
    main()
