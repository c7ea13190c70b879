"""SaLoRA beside its peers: how much trains, how much is left at the end, the score, and the time per step.

    python experiments/compare.py --tune --tasks mini-cola mini-mrpc mini-rte      learning rates of all arms
    python experiments/compare.py                                   with the best of them, on the eight generated tasks
    ... --tasks words reverse --out runs/compare-shift              the losses of experiments/shift.py
    ... --tasks cola mrpc sst2 --data GLUE --weights MINILM --out runs/compare-glue           real tasks and encoders

These are three settings, each with an --out of its own, and with --tune first. Arms that have a size end at about that
of LoRA with r = 4; ProPELT's, if the masks that it ends with count as bits. Prefix and prompt have 8 vectors, since
more made the tiny encoder worse; the sizes of BitFit and (IA)^3 follow from the encoder, and SoRA's from its lambda:
see REACH. All arms get equally many trials on seed 100: on an official task half, once and twice the main job's default
learning rate; on a generated one 4 and 8 times that as well; on a shift ten pairs of learning rate and scale. An arm
that was not tuned takes the default.

Tuning and reports score different rows. On an official task tuning holds out every tenth training row, and a report is
about dev rows. A generated task is tuned on dev rows, and a report is about rows that were generated after them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

import torch

from cli.afterwards import predict
from cli.flags import build_parser, positive
from cli.journal import Journal
from cli.settings import flags_of, settle
from cli.setup import build, seed_of
from experiments import shift
from experiments.arms import WARMUP
from experiments.study import TUNE_SEED, Study
from glue import mini
from glue.metrics import METRICS
from glue.tasks import DEV_ROWS, TASKS, TRAIN_ROWS, load_task, task_of
from peers import METHODS
from peers.sora import lambda_at
from rank_allocator import lr_factor
from train_glue_mini import data_for, fine_tune

ARMS = ["salora-8-to-4", "salora-16-to-4", "lora-8", "lora-4", "adalora-8-to-4", "sora-8", "alora-8-to-4", "rm-lora-4",
        "adapter-h-16", "adapter-p-35", "prefix-8", "prompt-8", "bitfit", "ia3", "full", "head",
        "child-tuning", "mam-33", "propelt-adapter-96", "propelt-prefix-8", "propelt-lora-11", "qlora-4"]  # fmt: skip
# What SoRA's thresholds add up to over a run: a gate ends at 0 if it starts closer to 0 and no gradient moves it. By
# size alone, on seed 100: of LoRA r = 8, .49 and .51 stayed on mini-cola (at rate .004), .52 and .51 on words (at .012
# and .024).
REACH = {"sora": {"tasks": 0.8, "shift": 0.9}, "sora-eq-10": {"tasks": 0.8, "shift": 2.0}}
WIDE = [(lr, scale) for lr in (6e-3, 1.2e-2, 2.4e-2, 4.8e-2) for scale in (1, 2, 4, 8) if lr * scale <= 4.8e-2]
COSTS = ["trained", "final", "ms"]  # parameters that train, and that are left; milliseconds per step
FRESH_ROWS = 4000  # of a generated task, for reports


def lambda_of(reach, arm, lr, steps):
    """SoRA's highest lambda with which all thresholds of a run add up to `reach`."""
    rates = [lr * lr_factor(step, steps, WARMUP) if "times_lr" in arm.options else 1.0 for step in range(steps)]
    total = sum(rate * lambda_at(step, steps, 1.0) for step, rate in enumerate(rates))
    if not total:
        raise ValueError(f"SoRA's lambda has no time to rise in {steps} steps: take more")
    return reach / total


def measure(args, task, arm, seed, trial):
    """One run on a task, with the settings and the seeds that the main job would have."""
    settings, [lr], metric = settings_of(args, task, arm, seed, trial), trial, METRICS[task_of(task).metric]
    train, scored = rows_of(task, args.data, seed)
    with redirect_stdout(None):
        model, encode = build(settings)
    train, options = data_for(arm.method, model, encode(train[: args.rows]), settings.batch_size)
    if arm.method == "sora":
        options["sparse_lambda"] = lambda_of(REACH[arm.family]["tasks"], arm, lr, args.steps)
    trained, journal = shift.parameters_of(model), Journal(args.steps)
    cuda = torch.device(settings.device).type == "cuda"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=cuda)
    allocator = arm.allocator(model, optimizer, args.steps, seed_of(seed, "gates"), **options)
    bf16 = torch.autocast(torch.device(settings.device).type, torch.bfloat16)
    with redirect_stdout(None):
        fine_tune(model, train, optimizer, allocator, lr=lr, batch_size=settings.batch_size, seed=seed, journal=journal,
                  autocast=bf16 if args.precision == "bf16" else nullcontext(), recorded=cuda)  # fmt: skip
    ms = 1000 * journal.seconds / args.steps
    score = metric(predict(model, encode(scored), settings.device), [row[2] for row in scored])
    return {"score": score, "trained": trained, "final": shift.parameters_of(model), "ms": ms}


def settings_of(args, task, arm, seed, trial):
    """The settings of the main job for an arm, made from its flags. The recipe and the budget are the arm's own."""
    flags = {name: getattr(args, name) for name in ("steps", "rows", "data", "weights", "device", "precision")}
    flags |= {"task": task, "method": arm.method, "lr": trial[0], "seed": seed}
    if arm.start:
        flags["rank"] = arm.start
    if arm.has_triplets:
        flags["alpha"] = max(16, 2 * arm.start)
    given = {name: value for name, value in flags.items() if value is not None}
    settings = build_parser().parse_args(flags_of(given))
    settings.seed = seed
    return settle(settings)


def rows_of(task, folder, seed):
    """(rows to train on, rows to score), other ones for tuning than for a report."""
    train, dev = load_task(task, folder)
    if seed != TUNE_SEED:
        return train, fresh_rows(task) if task in mini.TASKS else dev
    if task in mini.TASKS:
        return train, dev
    return [row for i, row in enumerate(train) if i % 10], train[::10]


def fresh_rows(task):
    """Rows of a generated task that come after its training and dev rows, and differ from all of them."""
    return mini.examples(task, TRAIN_ROWS + DEV_ROWS + FRESH_ROWS)[TRAIN_ROWS + DEV_ROWS :]


def measure_on_shift(args, task, arm, seed, trial):
    lr, scale = trial
    data, model, journal = shift.data_of(task, seed, args.texts), shift.model_of(arm, scale, seed), Journal(args.steps)
    options = {}
    if arm.method == "sora":
        options["sparse_lambda"] = lambda_of(REACH[arm.family]["shift"], arm, lr, args.steps)
    trained = shift.parameters_of(model)
    shift.train(model, data, arm, lr, seed, args.steps, journal=journal, **options)
    ms = 1000 * journal.seconds / args.steps
    return {"loss": data.loss(model), "trained": trained, "final": shift.parameters_of(model), "ms": ms}


def trials(args, task, arm):
    rate = METHODS[arm.method].lr[task in TASKS]
    factors = (0.5, 1, 2) if task in TASKS else (0.5, 1, 2, 4, 8)
    return [(float(f"{factor * rate:g}"),) for factor in factors]


def rivals(name, names):
    return [other for other in ("lora-4", "lora-8") if other in names and not name.startswith("lora")]


def add_flags(parser):
    parser.add_argument("--rows", type=positive, metavar="N", help="to train on (default all)")
    parser.add_argument("--data", metavar="DIR", help="folder with GLUE's official files, for official tasks")
    parser.add_argument("--weights", metavar="DIR", help="checkpoint folder of an encoder (default the tiny encoder)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default fp32")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")


STUDY = Study(
    doc=__doc__,
    name="compare",
    measure=measure,
    columns=["score", *COSTS],
    more=COSTS,
    tasks=list(mini.TASKS),
    arms=ARMS,
    steps=1500,
    lowest=False,
    trials=trials,
    default=lambda args, task, arm: trials(args, task, arm)[1],
    rivals=rivals,
    add_flags=add_flags,
    same=("steps", "rows", "precision"),
)
ON_GLUE = replace(STUDY, tasks=list(TASKS), needs=("data", "weights"))
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
    draw=None,
)


def main(argv=None):
    """The program, in the setting of the tasks asked for: all of one kind, or their mean would mean nothing."""
    argv = sys.argv[1:] if argv is None else argv
    for study in (ON_SHIFT, ON_GLUE):
        if set(argv) & set(study.tasks):
            return study.main(argv)
    return STUDY.main(argv)


if __name__ == "__main__":
    main()
