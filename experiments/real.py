"""Real data, few rows to train on and thousands to score: is SaLoRA better than LoRA, worse, or the same?

    python experiments/real.py --data GLUE --weights MINILM --tune      learning rate of every arm, on seed 100
    python experiments/real.py --data GLUE --weights MINILM             every arm, seeds 0 to 4
    python experiments/real.py --report                                 the tables of what is there, no training

Official dev sets have 400 to 1,000 rows, which alone is a standard error of .01 to .03: more than ranks can be worth.
So the official *training* rows are split once and for all into rows to train on, rows to tune on, and rows to score,
10,000 of SST-2, 3,000 of CoLA and 1,000 of MRPC. A seed draws 2,000 of the first (--rows), for 8 epochs of batches of
32, the start and the order; arms of one seed share all of it and are compared in pairs. Dev rows are not used.

Arms are those of experiments/shift.py, METHOD-R, of the size of LoRA of rank R: LoRA; `restart`, the same with a
learning rate that restarts at half-time, as SaLoRA's does; `late`, the main job's default, from rank 8; `narrow`, the
same with the window .2-.5; `ours`, from rank 16; `svd`, cut without gates. Two more are fresh LoRAs with the ranks that
ours-4 found on the same seed, as they are (found-4) or shuffled among matrices of one shape (shuffled-4);
experiments/transplant.py has more about them. All have scale 2 and their own learning rate. Rows that are in
DIR/real.csv are not run again.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from budget import FixedRanks, Recipe
from cli.files import append, has_row, make_folder, read_table, rows_with
from cli.flags import above_zero, positive
from cli.runs import STUDY, errors_as_lines
from cli.setup import TARGETS
from experiments import shift, transplant
from experiments.arms import TUNE_SEED, arm_of, ranking
from experiments.intervals import interval, paired
from glue.metrics import METRICS
from glue.tasks import load_task, task_of
from glue.tokens import batch_of, tokenizer_for
from salora import adapt, salora_layers
from tiny_transformer import SequenceClassifier, load_pretrained, read_config
from train_glue_mini import fine_tune

SPLIT = {"sst2": (2000, 10_000), "cola": (1000, 3000), "mrpc": (500, 1000)}  # rows to tune on, rows to score
ARMS = ["lora-8", "lora-4", "restart-4", "narrow-4", "late-4", "ours-4", "svd-4", "found-4", "shuffled-4"]
RIVALS = {
    "lora-4": ["lora-8"],
    "restart-4": ["lora-4"],
    "narrow-4": ["lora-8", "lora-4"],
    "late-4": ["lora-8", "lora-4", "restart-4", "narrow-4"],
    "ours-4": ["lora-8", "lora-4", "svd-4", "narrow-4"],
    "svd-4": ["lora-8", "lora-4"],
    "found-4": ["shuffled-4", "lora-4"],
}
RATES = [5e-4, 1e-3, 2e-3]
BATCH, EPOCHS, SCALE, LONGEST = 32, 8, 2, 128
POOL = 8 * BATCH  # rows of similar length within a pool share a batch, which halves the padding
SAME = 0.005  # two scores that differ by less are called the same


class Data(NamedTuple):
    """Encoded rows of one task and seed."""

    task: str
    train: list
    test: list
    pad: int


def data_of(task, folder, weights, seed, rows):
    """The rows of a seed: `rows` of those to train on, and those to score; for the tuning seed, those to tune on."""
    everything, _ = load_task(task, folder)
    everything = random.Random(f"split {task}").sample(everything, len(everything))
    n_tune, n_score = SPLIT[task]
    tune, score, rest = everything[:n_tune], everything[n_tune : n_tune + n_score], everything[n_tune + n_score :]
    train = random.Random(f"rows {task} {seed}").sample(rest, min(rows, len(rest)))
    config = read_config(Path(weights))
    tokenizer = tokenizer_for(weights, config, mini=False)
    encoded = [tokenizer.encode(some, LONGEST) for some in (train, tune if seed == TUNE_SEED else score)]
    return Data(task, *encoded, config.pad_token_id)


def batches_of(rows, epochs, seed):
    """All batches of all epochs: each epoch is shuffled, cut into pools, and these into batches of similar length."""
    rng, batches = random.Random(f"batches {seed}"), []
    for _ in range(epochs):
        shuffled = rng.sample(rows, len(rows))
        for i in range(0, len(rows), POOL):
            pool = sorted(shuffled[i : i + POOL], key=lambda row: len(row[0]))
            batches += [pool[j : j + BATCH] for j in range(0, len(pool), BATCH)]
    return batches


@torch.no_grad()
def score(model, data, autocast):
    """(the task's metric, mean cross-entropy in nats) over the rows to score."""
    model.eval()
    rows = sorted(data.test, key=lambda row: len(row[0]))
    logits, labels = [], []
    for i in range(0, len(rows), 4 * BATCH):
        inputs, gold = batch_of(rows[i : i + 4 * BATCH], model, "cpu")
        with autocast:
            logits.append(model(*inputs).float())
        labels.append(gold)
    logits, labels = torch.cat(logits), torch.cat(labels)
    metric = METRICS[task_of(data.task).metric](logits.argmax(1).tolist(), labels.tolist())
    return metric, F.cross_entropy(logits, labels).item()


def measure(data, name, lr, seed, args, ranks=None):
    """A row of one run. ranks: of every matrix, for an arm that is a LoRA with given ranks, or with these shuffled."""
    arm = None if ranks else arm_of(name)
    with redirect_stdout(None):
        encoder, _ = load_pretrained(args.weights)
    torch.manual_seed(seed)
    model = SequenceClassifier(encoder, task_of(data.task).num_labels)
    r0 = 16 if ranks else arm.r0
    adapt(model, TARGETS, r0, alpha=SCALE * r0).classifier.requires_grad_(True)
    if ranks:
        if name == "shuffled-4":
            shapes = [tuple(layer.base.weight.shape) for layer in salora_layers(model).values()]
            ranks = transplant.shuffled(ranks, shapes, random.Random(f"shuffle {seed}"))
        transplant.place(model, ranks)
    batches = batches_of(data.train, args.epochs, seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    if ranks:
        allocator = FixedRanks(model, len(batches), Recipe.ours().warmup)
    else:
        allocator = arm.allocator(model, optimizer, len(batches), seed)
    autocast = torch.autocast("cpu", torch.bfloat16) if args.precision == "bf16" else nullcontext()
    started = time.time()
    try:
        with redirect_stdout(None):
            fine_tune(model, batches, optimizer, allocator, lr=lr, batch_size=1, seed=seed, autocast=autocast,
                      batch_of=lambda rows, model, device: batch_of(rows[0], model, device))  # fmt: skip
        seconds, (metric, loss) = round(time.time() - started, 1), score(model, data, autocast)
    except FloatingPointError:
        seconds, metric, loss = round(time.time() - started, 1), 0.0, float("inf")
    found = [layer.r for layer in salora_layers(model).values()]
    row = {"task": data.task, "arm": name, "seed": seed, "lr": lr, "size": round(shift.size_of(model), 4)}
    return {**row, "score": round(metric, 5), "loss": round(loss, 5), "ranks": found, "seconds": seconds}


def ranks_for(name, path, task, seed):
    """The ranks that ours-4 found on this task and seed; None for an arm that has its own."""
    if name not in ("found-4", "shuffled-4"):
        return None
    found = rows_with(path, task=task, arm="ours-4", seed=seed)
    if not found:
        raise ValueError(f"{name} needs ours-4's ranks on {task}, seed {seed}: run that arm first")
    return json.loads(found[0]["ranks"])


def rate_of(name, task, out):
    """The learning rate of the best score on the tuning seed; found and shuffled take lora-4's."""
    name = "lora-4" if name in ("found-4", "shuffled-4") else name
    rows = rows_with(out / "tune.csv", task=task, arm=name)
    if not rows:
        raise ValueError(f"{name} has not been tuned on {task}: run with --tune first")
    return float(max(rows, key=lambda row: float(row["score"]))["lr"])


def study(args, out):
    """Every arm, task and seed, or with --tune every learning rate; what is there is not run again."""
    path = out / ("tune.csv" if args.tune else "real.csv")
    for seed in [TUNE_SEED] if args.tune else args.seeds:
        for task in args.tasks:
            data = None
            for name in args.arms:
                if args.tune and name in ("found-4", "shuffled-4"):
                    continue
                for lr in args.lr or RATES if args.tune else [rate_of(name, task, out)]:
                    key = {"task": task, "arm": name, "seed": seed} | ({"lr": lr} if args.tune else {})
                    if has_row(path, **key):
                        continue
                    data = data or data_of(task, args.data, args.weights, seed, args.rows)
                    row = measure(data, name, lr, seed, args, ranks_for(name, path, task, seed))
                    append(path, row)
                    print(", ".join(f"{key} {row[key]}" for key in row if key != "ranks"), flush=True)


def best_of(rows):
    """A line a task and arm: the scores that tuning saw, with their learning rates, best first."""
    trials = defaultdict(dict)
    for row in rows:
        trials[row["task"], row["arm"]][float(row["lr"])] = float(row["score"])
    lines = ["score (learning rate), best first"]
    lines += [f"{task}, {arm:<11}{ranking(scores, highest=True)}" for (task, arm), scores in trials.items()]
    return "\n".join(lines)


def report(rows):
    """For every task and over all: means, and paired differences with their 95 % bootstrap intervals over seeds.

    "same" where the 90 % interval lies within +-.005, two one-sided tests at 5 %.
    """
    lines = []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for column in ("score", "loss"):
        found = defaultdict(lambda: defaultdict(dict))  # {task: {arm: {seed: value}}}
        for row in rows:
            found[row["task"]][row["arm"]][row["seed"]] = float(row[column])
        if len(tasks) > 1:
            arms = [arm for arm in found[tasks[0]] if all(arm in found[task] for task in tasks)]
            for arm in arms:
                for seed in set.intersection(*(set(found[task][arm]) for task in tasks)):
                    found["mean"][arm][seed] = mean(found[task][arm][seed] for task in tasks)
        for task, losses in found.items():
            means = ", ".join(f"{arm} {mean(some.values()):.4f} ({len(some)})" for arm, some in losses.items())
            lines.append(f"{task}, {column}: {means}")
            for arm, rival in ((arm, rival) for arm in RIVALS for rival in RIVALS[arm]):
                if arm not in losses or rival not in losses:
                    continue
                gaps = [a - b for a, b in zip(*paired(losses, arm, rival))]
                if len(gaps) > 1:
                    low, high = interval(gaps)
                    least, most = interval(gaps, 0.9)
                    verdict = "same" if -SAME < least and most < SAME else ""
                    lines.append(f"  {f'{arm} - {rival}':<24}{mean(gaps):>+8.4f}  [{low:+.4f}, {high:+.4f}]  {verdict}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="folder with GLUE's official files")
    parser.add_argument("--weights", metavar="DIR", help="checkpoint folder of the encoder")
    parser.add_argument("--tasks", nargs="+", choices=SPLIT, default=list(SPLIT), metavar="TASK",
                        help=f"of {', '.join(SPLIT)} (default all)")  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM",
                        help=f"of {', '.join(ARMS)} (default all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), metavar="S", help="default 0 to 4")
    parser.add_argument("--tune", action="store_true", help="try the learning rates on seed 100 and its rows")
    parser.add_argument("--lr", type=above_zero, nargs="+", metavar="LR", help="what --tune tries "
                        f"(default {' '.join(map(str, RATES))})")  # fmt: skip
    parser.add_argument("--rows", type=positive, default=2000, metavar="N", help="to train on (default 2000)")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, metavar="N", help=f"default {EPOCHS}")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default fp32")
    parser.add_argument("--report", action="store_true", help="only the tables of what is there")
    parser.add_argument("--out", default="runs/real", metavar="DIR", help="default runs/real")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if not args.report and not (args.data and args.weights):
        parser.error("--data and --weights are needed, the folders of GLUE's files and of the encoder")
    with errors_as_lines(parser, hint=STUDY):
        if not args.report:
            make_folder(out)
            study(args, out)
        rows = read_table(out / ("tune.csv" if args.tune else "real.csv"))
        print(f"no rows in {out}" if not rows else best_of(rows) if args.tune else report(rows))
        return rows


if __name__ == "__main__":
    main()
