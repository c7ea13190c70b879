"""Which recipe? Variants of the main job on the generated tasks, one row a run, compared with plain LoRA.

    python experiments/recipe.py --variants budget --seeds 0 1 2        the budget at four densities
    python experiments/recipe.py --variants size --seeds 0 1 2 3 4      SaLoRA against LoRA of equal and of double size
    python experiments/recipe.py --variants ablation --seeds 100 101    one decision at a time; not the seeds reported
    python experiments/recipe.py --variants size --tasks sst2 --data GLUE --weights MODEL --rows 4000 --epochs 2

A variant is a name below, or a group of names. Every run is added to recipe.csv in --out, and a run that is there is
not done again, so a study can be stopped, continued, and split over processes; recipe.png and the table show all rows.
Rows are told apart by variant, task and seed alone: a study with other flags for the main job needs another --out.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.files import append, has_row, make_folder, read_table
from cli.runs import STUDY, errors_as_lines
from experiments.methods import main_job
from glue.mini import TASKS as MINI_TASKS
from hub.checkpoints import write_atomically

LORA = ["--method", "lora", "--rank"]
VARIANTS = {
    "ours": [], "lora-8": [*LORA, "8"], "lora-4": [*LORA, "4"], "lora-1": [*LORA, "1"],
    "full": ["--method", "full"], "head": ["--method", "head"],
    "b=0.75": ["--density", "0.75"], "b=0.25": ["--density", "0.25"], "b=0.125": ["--density", "0.125"],
    "wide": ["--rank", "16", "--alpha", "32", "--density", "0.25"],
    "early": ["--window", "0.2", "0.5"],
    "paper": ["--recipe", "paper"], "paper, sgd": ["--recipe", "paper", "--controller", "sgd"],
    "paper, no regularizer": ["--recipe", "paper", "--beta", "0"],
    "paper, budget rule": ["--recipe", "paper", "--rule", "budget", "--survivors", "one"],
    "lora-8, restarted": ["--density", "1", "--window", "0.5", "0.5", "--no-canonical", "--spread", "0"],
    "not canonical": ["--no-canonical", "--spread", "0"], "spread 0": ["--spread", "0"], "beta 0.1": ["--beta", "0.1"],
    "warmup 0": ["--warmup", "0"], "no restart": ["--no-restart"], "window 0.5-0.8": ["--window", "0.5", "0.8"],
    "survivors median": ["--survivors", "median"], "rule median": ["--rule", "median"],
    "quadratic": ["--controller", "quadratic"],
}  # fmt: skip
GROUPS = {
    "methods": ["ours", "lora-8", "full", "head"],
    "budget": ["ours", "b=0.75", "b=0.25", "b=0.125"],
    "size": ["ours", "lora-8", "lora-4", "b=0.125", "lora-1"],
    "paper": ["lora-8", *[name for name in VARIANTS if name.startswith("paper")]],
    "ablation": ["ours", *list(VARIANTS)[list(VARIANTS).index("not canonical") :]],
}
COLUMNS = ["variant", "task", "seed", "score", "density_target", "density_expected", "density_kept", "spare", "seconds"]


def one(variant, task, seed, flags, out):
    """Run the main job; returns a row. `spare` is how many of the cheapest triplets would still fit the budget."""
    summary = main_job([*VARIANTS[variant], "--task", task, "--seed", str(seed), *flags, "--out", out])
    spare = None
    if summary["ranks"]:
        layers = torch.load(Path(out) / "adapter.pt", weights_only=True)["layers"].values()
        cheapest = min(layer["A"].shape[1] + layer["B"].shape[0] for layer in layers)
        left = summary["density_target"] * summary["adapter_params_total"] - summary["adapter_params_kept"]
        spare = left / cheapest
    values = [summary[key] for key in COLUMNS[3:7]]
    return dict(zip(COLUMNS, [variant, task, seed, *values, spare, summary["seconds"]], strict=True))


def table(rows):
    """A line a variant: mean score of each task and of all, distance from each LoRA over the seeds of both, kept, C."""
    tasks, variants = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "variant"))
    rivals = [variant for variant in variants if variant.startswith("lora-")]
    head = f"{'':<22}" + "".join(f"{task.removeprefix('mini-'):>7}" for task in tasks) + f"{'mean':>8}"
    lines = [head + "".join(f"{f'- {rival} +- s.e.':>28}" for rival in rivals) + f"  {'kept':<13}{'C':<11}"]
    means = {v: seed_means(rows, v, tasks) for v in variants}
    for variant in variants:
        some = [row for row in rows if row["variant"] == variant]
        cells = [[float(row["score"]) for row in some if row["task"] == task] for task in tasks]
        line = f"{variant:<22}" + "".join(f"{mean(cell):>7.4f}" if cell else f"{'-':>7}" for cell in cells)
        line += f"{mean(means[variant].values()):>8.4f}" if means[variant] else f"{'-':>8}"
        for rival in rivals:
            gaps = [score - means[rival][s] for s, score in means[variant].items() if s in means[rival]]
            line += f"{mean(gaps):>+20.4f}" if gaps else f"{'-':>20}"
            line += f"{stdev(gaps) / len(gaps) ** 0.5:>8.4f}" if len(gaps) > 1 else f"{'-':>8}"
        kept, C = ([float(row[key]) for row in some if row[key]] for key in ("density_kept", "density_expected"))
        ranges = [f"{min(v):.3f}-{max(v):.3f}" if v else f"{'-':<11}" for v in (kept, C)]
        lines.append(f"{line}  {'  '.join(ranges)}  n={len(some)}")
    return "\n".join(lines)


def seed_means(rows, variant, tasks):
    """{seed: mean score over the tasks}, of the seeds that have run on all tasks."""
    scores = {}
    for row in rows:
        if row["variant"] == variant:
            scores.setdefault(int(row["seed"]), {})[row["task"]] = float(row["score"])
    return {seed: mean(found.values()) for seed, found in scores.items() if len(found) == len(tasks)}


def draw(rows, path):
    """Mean score over tasks and seeds against the share of rank-8 LoRA's parameters that was kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for variant in dict.fromkeys(row["variant"] for row in rows):
        scores = list(seed_means(rows, variant, tasks).values())
        sizes = [float(row["density_kept"] or 0) for row in rows if row["variant"] == variant]
        if not scores or not any(sizes):  # not yet on all tasks, or without adapters
            continue
        kept = mean(sizes)
        lora = variant.startswith("lora-")
        size = int(variant[5]) / 8 if lora else kept
        error = stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0
        axis.errorbar(size, mean(scores), error, fmt="s" if lora else "o", color="tab:gray" if lora else "tab:blue")
        place = (5, -13 if lora else 6)
        axis.annotate(variant, (size, mean(scores)), xytext=place, textcoords="offset points", fontsize=8)
    axis.margins(0.1)  # room for the names
    axis.set(xlabel="adapter parameters, of LoRA's at rank 8", ylabel=f"mean score of {len(tasks)} tasks, +- s.e.")
    figure.savefig(path, format="png", dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*GROUPS, *VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=["size"], metavar="V",
                        help=f"groups: {', '.join(GROUPS)}; single ones: {'; '.join(VARIANTS)} (default size)")
    parser.add_argument("--tasks", nargs="+", default=list(MINI_TASKS), metavar="T", help="default: all generated ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default 0 1 2")
    parser.add_argument("--quick", action="store_true", help="one task, one seed, 100 steps: to see that it works")
    parser.add_argument("--out", metavar="DIR", help="default runs/recipe, or runs/recipe-quick")
    args, flags = parser.parse_known_args(argv)  # the rest goes to the main job
    if args.quick:
        args.tasks, args.seeds, flags = args.tasks[:1], args.seeds[:1], [*flags, "--steps", "100"]
    out = Path(args.out or ("runs/recipe-quick" if args.quick else "runs/recipe"))
    path = out / "recipe.csv"
    variants = dict.fromkeys(v for name in args.variants for v in GROUPS.get(name, [name]))
    with errors_as_lines(parser, hint=STUDY):
        make_folder(out)
        for seed in args.seeds:
            for task in args.tasks:
                for variant in variants:
                    if has_row(path, variant=variant, task=task, seed=seed):
                        continue
                    name = f"{variant}-{task}-s{seed}-{time.time_ns()}".replace(" ", "")
                    row = one(variant, task, seed, flags, str(out / name))
                    append(path, row)
                    print(f"{variant}, {task}, seed {seed}: {row['score']:.4f}, {row['seconds']:.0f} s", flush=True)
        rows = read_table(path)
        print(table(rows))
        write_atomically(out / "recipe.png", lambda path: draw(rows, path))
        print(f"see {path} and {out / 'recipe.png'}")
        return rows


if __name__ == "__main__":
    main()
