"""SaLoRA beside its peers: what trains, what is left in the end, the score, and what a step costs.

    python experiments/compare.py --tune --tasks mini-cola mini-mrpc mini-rte      learning rates of all arms
    python experiments/compare.py                            with the best of them, on the eight generated tasks
    ... --tasks words reverse --out runs/compare-shift       the same two for the losses of experiments/shift.py

Arms that have a size end at about that of LoRA with r = 4. Prefix and prompt have 8 vectors, since more made the tiny
encoder worse; BitFit's and (IA)^3's sizes follow from the encoder, and SoRA's from its lambda: see REACH. All get as
many trials on seed 100: on generated tasks half of the main job's default learning rate, the default, 2, 4 and 8 times
that; on a shift ten. Generated tasks are tuned on dev rows, and a report is about rows that were generated after them.
An arm that was not tuned takes the default.

compare.png shows the score against the final number of parameters.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.afterwards import predict
from cli.flags import positive
from cli.journal import Journal
from cli.setup import seed_of
from experiments import plots, shift
from experiments.arms import WARMUP
from experiments.study import TUNE_SEED, Study
from experiments.tables import distinct, values_of
from glue.metrics import METRICS
from glue.mini import TASKS, examples
from glue.pretrain import mini_encoder
from glue.tasks import DEV_ROWS, TRAIN_ROWS, load_task, task_of
from glue.tokens import MiniTokenizer
from hub.roberta import load_pretrained
from peers import METHODS, install
from peers.alora import hold_out
from peers.sora import lambda_at
from rank_allocator import lr_factor
from tiny_transformer import SequenceClassifier
from train_glue_mini import fine_tune, loss_of

ARMS = ["salora-8-to-4", "salora-16-to-4", "lora-8", "lora-4", "adalora-8-to-4", "sora-8", "alora-8-to-4", "rm-lora-4",
        "adapter-h-16", "adapter-p-35", "prefix-8", "prompt-8", "bitfit", "ia3", "full", "head"]  # fmt: skip
# What SoRA's thresholds add up to over a run: a gate ends at 0 if it starts closer to 0 and no gradient moves it. By
# size alone, on seed 100: of LoRA r = 8, .58 and .34 stayed with .7 and 1.2 on mini-cola, .51 with 2 on words.
REACH = {"tasks": 0.8, "shift": 2.0}
WIDE = [(lr, scale) for lr in (6e-3, 1.2e-2, 2.4e-2, 4.8e-2) for scale in (1, 2, 4, 8) if lr * scale <= 4.8e-2]
COSTS = ["trained", "final", "ms"]  # parameters that train, and that are left; milliseconds a step
FRESH_ROWS = 4000  # of a generated task, for reports
BATCH = 32


def lambda_of(reach, lr, steps):
    """SoRA's highest lambda with which all thresholds eta_t lambda_t of a run add up to `reach`."""
    total = sum(lr * lr_factor(step, steps, WARMUP) * lambda_at(step, steps, 1.0) for step in range(steps))
    if not total:
        raise ValueError(f"SoRA's lambda has no time to rise in {steps} steps: take more")
    return reach / total


def measure(args, task, arm, seed, trial):
    """One run on a generated task, with the seeds and the steps of the main job."""
    [lr], metric = trial, METRICS[task_of(task).metric]
    train, dev = load_task(task)
    scored = dev if seed == TUNE_SEED else fresh_rows(task)
    model, encode = model_of(arm, task, seed)
    train, options = encode(train[: args.rows]), {}
    if arm.method == "alora":
        train, held_out = hold_out(train, BATCH)
        options["score"] = lambda: -loss_of(model, held_out)
    if arm.method == "sora":
        options["sparse_lambda"] = lambda_of(REACH["tasks"], lr, args.steps)
    trained, journal = shift.parameters_of(model), Journal(args.steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    allocator = arm.allocator(model, optimizer, args.steps, seed_of(seed, "gates"), **options)
    with redirect_stdout(None):
        fine_tune(model, train, optimizer, allocator, lr=lr, batch_size=BATCH, seed=seed, journal=journal)
    ms = 1000 * journal.seconds / args.steps
    score = metric(predict(model, encode(scored), "cpu"), [row[2] for row in scored])
    return {"score": score, "trained": trained, "final": shift.parameters_of(model), "ms": ms}


def model_of(arm, task, seed):
    """(the tiny encoder with a new head and what an arm trains, rows of sentences -> rows of token ids)"""
    encoder, _ = load_pretrained(mini_encoder())
    torch.manual_seed(seed_of(seed, "weights"))
    model = SequenceClassifier(encoder, task_of(task).num_labels)
    install(model, arm.method, arm.start, max(16, 2 * (arm.start or 0)))
    return model, lambda rows: MiniTokenizer().encode(rows, model.encoder.config.max_length)


def fresh_rows(task):
    """Rows of a generated task that come after its training and dev rows, and differ from all of them."""
    return examples(task, TRAIN_ROWS + DEV_ROWS + FRESH_ROWS)[TRAIN_ROWS + DEV_ROWS :]


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


def add_flags(parser):
    parser.add_argument("--rows", type=positive, metavar="N", help=f"to train on (default {TRAIN_ROWS})")


STUDY = Study(
    doc=__doc__,
    name="compare",
    measure=measure,
    columns=["score", *COSTS],
    more=COSTS,
    tasks=list(TASKS),
    arms=ARMS,
    steps=1500,
    lowest=False,
    trials=trials,
    default=lambda args, task, arm: trials(args, task, arm)[1],
    rivals=rivals,
    draw=draw,
    add_flags=add_flags,
    same=("steps", "rows"),
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
