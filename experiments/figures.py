"""The paper's figures and tables in miniature: python experiments/figures.py ITEM.

    fig1      LoRA in one kind of matrix, in one block, or with one rank in all matrices
    fig3      density of the Hard-Concrete distribution, sampled and in closed form
    fig4      loss against the rank at the start: LoRA, and SaLoRA that keeps half of it
    fig5      loss against density b, from r = 8, and LoRA of the same size
    fig6      C, lambda, and both terms of the orthogonality penalty over training
    fig7      the rank of every matrix, averaged over seeds
    table1    scores of all methods on all tasks, from the rows of experiments/compare.py in --from
    table3    ablation: without the Lagrangian, and without orthogonality
    table4    peak memory and time per step: see experiments/cost.py

Instead of GLUE scores, which saturate on generated tasks, all losses are masked-word losses after a shift of the
language (experiments/shift.py; lower is better), each arm with the learning rate and scale that tuning found there.
SaLoRA comes as `ours` (the default recipe) and `paper` (the published one). Rows go to ITEM.csv in --out, and those
that are there are not run again; the picture is ITEM.png. Left out: Figure 2, which is a drawing, and Table 2.
"""

import argparse
import json
import sys
import time
from math import inf, nan
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from budget import FixedRanks, RankAllocator, Recipe
from cli.files import append, has_row, make_folder, read_table, rows_with
from cli.flags import device_of, positive
from cli.journal import Journal
from cli.pictures import split_name
from cli.runs import STUDY, errors_as_lines
from cli.setup import TARGETS
from experiments import compare, cost, plots, shift
from experiments.arms import Arm, tuned
from experiments.transplant import place
from hard_concrete import GAMMA, TAU, ZETA, prob_above, prob_one, prob_open, sample_gate
from salora import salora_layers


class FreeGates(RankAllocator):
    """Algorithm 1 whose lambda stays 0: log_theta goes down the gradient of the task's loss alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lagrangian.ascend = lambda: None


ARMS = {  # name -> (allocator, recipe, whose tuned learning rate and scale it takes)
    "lora": (None, None, "lora"),
    "ours": (RankAllocator, Recipe.ours(), "late"),
    "paper": (RankAllocator, Recipe.paper(), "paper"),
    "no Lagrangian": (FreeGates, Recipe.paper(), "paper"),
    "no orthogonality": (RankAllocator, Recipe.paper(beta=0.0), "paper"),
}
FIRST_OUT = "encoder.layers.0.out"  # W^O of the first block, as in Figure 6


class Run(NamedTuple):
    """One training run."""

    arm: str
    r: int  # at the start
    density: float = 1.0
    where: str = "all"  # or one kind of matrix ("query"), or one block ("block 0")
    kind: str = "words"
    seed: int = 0


def is_adapted(name, where):
    """Whether a matrix belongs to the place that `where` names."""
    block, matrix = split_name(name)
    return where in ("all", matrix, f"block {block}")


def measure(run, steps, texts, journal=None):
    """Train one run. Returns its row; a run that diverges has an infinite loss, no C and no ranks."""
    data = shift.data_of(run.kind, run.seed, texts)
    Allocator, recipe, tuned_as = ARMS[run.arm]
    lr, scale = tuned(Arm(run.arm, tuned_as, run.r * run.density))
    model = shift.adapted(run.r, scale, run.seed)
    if run.where != "all":
        place(model, [run.r if is_adapted(name, run.where) else 0 for name in salora_layers(model)])

    def allocator_of(model, optimizer):
        if Allocator is None:
            return FixedRanks(model, steps, Recipe.ours().warmup)
        return Allocator(model, optimizer, steps, run.density, recipe, run.seed)

    try:
        allocator = shift.fit(model, data, lr, run.seed, steps, allocator_of, journal)
    except FloatingPointError:
        result = {"size": round(run.r * run.density / 8, 4), "C": nan, "loss": inf, "ranks": "{}"}
    else:
        ranks = {name: layer.r for name, layer in salora_layers(model).items()}
        result = {"size": round(shift.size_of(model), 4), "C": round(allocator.C_end, 4)}
        result |= {"loss": round(data.loss(model), 4), "ranks": json.dumps(ranks)}
    return {**run._asdict(), "steps": steps, "texts": texts, **result}


def rows_of(runs, path, args):
    """The rows of these runs: from the CSV file, or measured now and added to it; runs of one data set in sequence."""
    for run in sorted(runs, key=lambda run: (run.seed, run.kind)):
        if has_row(path, **run._asdict(), steps=args.steps, texts=args.texts):
            continue
        started = time.time()
        row = measure(run, args.steps, args.texts)
        append(path, row)
        name = f"{run.arm} r={run.r} b={run.density:g} {run.where}, {run.kind}, seed {run.seed}"
        print(f"{name}: loss {row['loss']:.3f}, {time.time() - started:.0f} s", flush=True)
    wanted = [row for run in runs for row in rows_with(path, **run._asdict(), steps=args.steps, texts=args.texts)]
    return [row for row in read_table(path) if row in wanted]


def table(rows, *names):
    """Means over seeds of size, expected density and loss, a line for every combination of these columns."""
    header = "".join(f"{name:<18}" for name in names)
    lines = [f"{header}{'seeds':>6}{'size':>8}{'C':>8}{'loss':>8}"]
    for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        some = [row for row in rows if tuple(row[name] for name in names) == key]
        size, C, loss = (mean(float(row[name]) for row in some) for name in ("size", "C", "loss"))
        lines.append("".join(f"{value:<18}" for value in key) + f"{len(some):>6}{size:>8.3f}{C:>8.3f}{loss:>8.3f}")
    return "\n".join(lines)


def fig1(args, path):
    names = salora_layers(shift.adapted(1, 1, seed=0))
    blocks = [f"block {i}" for i in sorted({split_name(name)[0] for name in names})]
    runs = [Run("lora", 8, where=where, seed=seed) for seed in args.seeds for where in (*TARGETS, *blocks)]
    runs += [Run("lora", r, seed=seed) for seed in args.seeds for r in (1, 2, 4, 8)]
    rows = rows_of(runs, path, args)
    print(table(rows, "where", "r"))
    plots.places(rows, TARGETS, blocks, path.with_suffix(".png"))


def density_of(log_theta, t):
    """The density of a gate at t in (0, 1): minus the derivative of prob_above in t."""
    p = prob_above(log_theta, t)
    return p * (1 - p) * TAU * (1 / (t - GAMMA) + 1 / (ZETA - t))


def fig3(args, path):
    """Sampled with args.samples draws, in 20 bins; the masses at 0 and 1 are rows of their own."""
    path.unlink(missing_ok=True)  # a second's work: always done anew
    generator = torch.Generator().manual_seed(0)
    edges = torch.linspace(0, 1, 21, dtype=torch.float64)
    for log_theta in torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64):
        u = torch.rand(args.samples, generator=generator, dtype=torch.float64)
        g = sample_gate(log_theta, u)
        inside = g[(g > 0) & (g < 1)]
        density = torch.histc(inside, 20, 0, 1) * 20 / len(g)
        parts = [("mass at 0", 0.0, 1 - prob_open(log_theta), (g == 0).double().mean())]
        for low, high, sampled in zip(edges[:-1], edges[1:], density):
            t = ((low + high) / 2).item()
            parts.append(("density", t, density_of(log_theta, t), sampled))
        parts.append(("mass at 1", 1.0, prob_one(log_theta), (g == 1).double().mean()))
        for part, t, exact, sampled in parts:
            values = (part, round(t, 4), round(exact.item(), 5), round(sampled.item(), 5))
            append(path, {"log_theta": log_theta.item(), **dict(zip(("part", "g", "exact", "sampled"), values))})
    rows = read_table(path)
    for row in rows:
        if row["part"] != "density":
            print(f"log theta {row['log_theta']:>4}  {row['part']}: {row['exact']}, sampled {row['sampled']}")
    plots.hard_concrete(rows, path.with_suffix(".png"))


def fig4(args, path):
    runs = []
    for seed in args.seeds:
        for r in (2, 4, 8, 16):
            runs += [Run("lora", r, seed=seed), Run("ours", r, 0.5, seed=seed), Run("paper", r, 0.5, seed=seed)]
    rows = rows_of(runs, path, args)
    print(table(rows, "arm", "r"))
    plots.curves(rows, "r", "rank r at the start (SaLoRA keeps half)", path.with_suffix(".png"))


def fig5(args, path):
    runs = []
    for seed in args.seeds:
        for density in (0.125, 0.25, 0.5, 0.75):
            runs += [Run("lora", int(8 * density), seed=seed)]
            runs += [Run("ours", 8, density, seed=seed), Run("paper", 8, density, seed=seed)]
        runs.append(Run("lora", 8, seed=seed))
    rows = rows_of(runs, path, args)
    print(table(rows, "arm", "r", "density"))
    plots.curves(rows, "size", "adapter parameters at the end, relative to LoRA r = 8", path.with_suffix(".png"))


def fig6(args, path):
    for seed in args.seeds:
        for arm in ("paper", "ours"):
            if has_row(path, arm=arm, seed=seed, steps=args.steps, texts=args.texts):
                continue
            journal = Journal(args.steps, tracing=True)
            measure(Run(arm, 8, 0.5, seed=seed), args.steps, args.texts, journal)
            first_out = [row for row in journal.trace if row["layer"] == FIRST_OUT]
            for row, traced in zip(journal.rows, first_out, strict=True):
                values = {key: row[key] for key in ("step", "phase", "C", "lam")}
                values |= {key: traced[key] for key in ("orth_A", "orth_B")}
                append(path, {"arm": arm, "seed": seed, "steps": args.steps, "texts": args.texts, **values})
    rows = rows_with(path, steps=args.steps, texts=args.texts)
    rows = [row for row in rows if int(row["seed"]) in args.seeds]
    print(f"{'arm':<8}{'seed':>5}{'step':>6}{'phase':>8}{'C':>8}{'lambda':>9}{'orth A':>10}{'orth B':>10}")
    for before, row in zip(rows, [*rows[1:], None]):
        if row is None or row["phase"] != before["phase"]:  # the last row of each phase
            C, lam, orth_A, orth_B = (float(before[name]) for name in ("C", "lam", "orth_A", "orth_B"))
            start = f"{before['arm']:<8}{before['seed']:>5}{before['step']:>6}{before['phase']:>8}"
            print(f"{start}{C:>8.3f}{lam:>9.4f}{orth_A:>10.1e}{orth_B:>10.1e}")
    plots.traces(rows, path.with_suffix(".png"))


def fig7(args, path):
    runs = [Run(arm, 8, 0.5, seed=seed) for seed in args.seeds for arm in ("paper", "ours")]
    rows = rows_of(runs, path, args)
    means = {}
    for arm in ("paper", "ours"):
        found = [json.loads(row["ranks"]) for row in rows if row["arm"] == arm and row["loss"] != "inf"]
        if found:
            means[arm] = {name: mean(ranks[name] for ranks in found) for name in found[0]}
    for arm, ranks in means.items():
        for where in (*TARGETS, "block 0", "block 1", "block 2"):
            some = [rank for name, rank in ranks.items() if is_adapted(name, where)]
            if some:
                print(f"{arm:<8}{where:<10}{mean(some):.2f}")
    if means:
        plots.ranks(means, path.with_suffix(".png"))


def table1(args, path):
    """Means over seeds of what compare.py has measured, and the mean of a method that has run on all tasks."""
    rows = read_table(Path(args.source) / "compare.csv")
    if not rows:
        raise ValueError(f"no rows in {args.source}/compare.csv: run experiments/compare.py first")
    kinds = {compare.kind_of(row["task"]) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"{args.source}/compare.csv has tasks of several kinds ({', '.join(sorted(kinds))}): their "
                         "mean would mean nothing; give each kind an --out of its own")  # fmt: skip
    path.unlink(missing_ok=True)  # nothing is measured: always done anew
    tasks, found = compare.in_order(rows, "task"), {}
    for method in compare.in_order(rows, "method"):
        mine = [row for row in rows if row["method"] == method]
        values = [[float(row["score"]) for row in mine if row["task"] == task] for task in tasks]
        found[method] = [mean(some) if some else None for some in values]
        found[method].append(None if None in found[method] else mean(found[method]))
    for method, values in found.items():
        cells = ["" if value is None else round(value, 4) for value in values]
        append(path, {"method": method, **dict(zip([*tasks, "mean"], cells))})
    print(f"{'':<12}" + "".join(f"{task.removeprefix('mini-'):>9}" for task in [*tasks, "mean"]))
    for method, values in found.items():
        print(f"{method:<12}" + "".join(f"{'-':>9}" if value is None else f"{value:>9.4f}" for value in values))
    plots.scores(found, [*tasks, "mean"], compare.kind_of(tasks[0]) == "shift", path.with_suffix(".png"))


def table3(args, path):
    runs = []
    for seed in args.seeds:
        for kind in ("words", "reverse"):
            for arm in ("paper", "no Lagrangian", "no orthogonality"):
                runs.append(Run(arm, 8, 0.5, kind=kind, seed=seed))
    rows = rows_of(runs, path, args)
    print(table(rows, "kind", "arm"))
    plots.ablation(rows, path.with_suffix(".png"))


def table4(args, path):
    cost.compare(args, path)


ITEMS = {item.__name__: item for item in (fig1, fig3, fig4, fig5, fig6, fig7, table1, table3, table4)}


def draw(args):
    """Measure and draw the item. Returns the rows of its CSV file."""
    args.device = device_of(args.device)
    several = range(5) if args.full else range(2) if args.item in ("fig7", "table3") else range(1)
    args.seeds = args.seeds or list(several)
    args.steps = args.steps or (1000 if args.full else 300)
    out = Path(args.out)
    make_folder(out)
    path = out / f"{args.item}.csv"
    ITEMS[args.item](args, path)
    print("see", ", ".join(str(file) for file in (path, path.with_suffix(".png")) if file.is_file()))
    return read_table(path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", choices=ITEMS, metavar="ITEM", help=", ".join(ITEMS))
    parser.add_argument("--out", default="runs/figures", metavar="DIR", help="default runs/figures")
    parser.add_argument("--full", action="store_true", help="seeds 0 to 4 and 1000 steps (table4: RoBERTa-base too); "
                        "without it, at most five minutes on two cores")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="default 0 (fig7, table3: 0 1)")
    parser.add_argument("--steps", type=positive, metavar="N", help="of training (default 300)")
    parser.add_argument("--texts", type=positive, default=8000, metavar="N", help="to train on (default 8000)")
    parser.add_argument("--samples", type=positive, default=200_000, metavar="N", help="of fig3 (default 200,000)")
    parser.add_argument("--from", dest="source", default="runs/compare", metavar="DIR", help="of table1: --out of "
                        "compare.py (default runs/compare)")  # fmt: skip
    cost.add_flags(parser)
    args = parser.parse_args(argv)
    with errors_as_lines(parser, hint=STUDY):
        return draw(args)


if __name__ == "__main__":
    main()
