"""SaLoRA beside its peers: what trains, what is left in the end, the score, and what a step costs.

    python experiments/compare.py --seeds 0 1                                  every method on the eight generated tasks
    python experiments/compare.py --tasks mini-cola mini-rte --steps 500       flags of the main job go there
    python experiments/compare.py --methods salora adalora lora-4 --tasks sst2 --data GLUE --weights MODEL

Methods that have a size end at about that of LoRA with r = 4, half of SaLoRA's at its start. SoRA's follows from its
lambda, BitFit's and (IA)3's from the encoder; prefix and prompt have 8 vectors, since more made the tiny encoder worse.
Counts are without the classifier and without gates. Learning rates are the main job's defaults.

Every run is added to compare.csv in --out, and a run that is there is not done again, so a study can be stopped,
continued, and split over processes. Rows are told apart by method, task and seed alone: a study with other flags for
the main job needs another --out. compare.png shows the score against the final number of parameters.
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, stdev
from time import time_ns

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_glue_mini
from cli.files import append, read_table
from glue.mini import TASKS as MINI_TASKS
from hub.checkpoints import write_atomically

METHODS = {
    "salora": [],
    "lora-8": ["--method", "lora", "--rank", "8"],
    "lora-4": ["--method", "lora", "--rank", "4"],
    "adalora": ["--method", "adalora"],
    "sora": ["--method", "sora"],
    "alora": ["--method", "alora"],
    "rm-lora": ["--method", "rm-lora", "--rank", "4"],
    "adapter-h": ["--method", "adapter-h", "--rank", "16"],  # a block of LoRA has 18 d r parameters, one of this 4 d m
    "adapter-p": ["--method", "adapter-p", "--rank", "35"],  # 2 d m
    "prefix": ["--method", "prefix", "--rank", "8"],
    "prompt": ["--method", "prompt", "--rank", "8"],
    "bitfit": ["--method", "bitfit"],
    "ia3": ["--method", "ia3"],
    "full": ["--method", "full"],
    "head": ["--method", "head"],
}


def sizes(adapter):
    """(parameters that train, parameters in the end) of a saved adapter: its triplets, and all but the classifier."""
    layers = adapter["layers"].values()
    others = sum(p.numel() for name, p in adapter["others"].items() if not name.startswith("classifier."))
    final = sum(layer["A"].numel() + layer["B"].numel() for layer in layers)
    trained = sum(layer["r0"] * (layer["A"].shape[1] + layer["B"].shape[0]) for layer in layers)
    return trained + others, final + others


def one(method, task, seed, flags, out):
    """Run the main job; returns a row."""
    with redirect_stdout(None):
        summary = train_glue_mini.main([*METHODS[method], "--task", task, "--seed", str(seed), *flags, "--out", out])
    trained, final = sizes(torch.load(Path(out) / "adapter.pt", map_location="cpu", weights_only=True))
    row = {"method": method, "task": task, "seed": seed, "score": summary["score"], "trained": trained, "final": final}
    return {**row, "seconds_per_step": summary["seconds"] / summary["steps"], "device": summary["device"]}


def seed_means(rows, method, tasks):
    """The mean score over the tasks of every seed that has run on all of them."""
    scores = {}
    for row in rows:
        if row["method"] == method:
            scores.setdefault(row["seed"], {})[row["task"]] = float(row["score"])
    return [mean(found.values()) for found in scores.values() if len(found) == len(tasks)]


def in_order(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def average(rows, method, column):
    return mean(float(row[column]) for row in rows if row["method"] == method)


def table(rows):
    """A line a method: parameters that train and that are left, scores, their mean +- deviation over seeds, time."""
    tasks = in_order(rows, "task")
    head = f"{'':<10}{'trained':>10}{'final':>10}" + "".join(f"{task.removeprefix('mini-'):>8}" for task in tasks)
    lines = [head + f"{'mean':>9}{'+-':>8}{'seeds':>7}{'s/step':>9}"]
    for method in in_order(rows, "method"):
        line = f"{method:<10}{average(rows, method, 'trained'):>10,.0f}{average(rows, method, 'final'):>10,.0f}"
        for task in tasks:
            cell = [float(row["score"]) for row in rows if (row["method"], row["task"]) == (method, task)]
            line += f"{mean(cell):>8.3f}" if cell else f"{'-':>8}"
        means = seed_means(rows, method, tasks)
        line += f"{mean(means):>9.4f}" if means else f"{'-':>9}"
        line += f"{stdev(means):>8.4f}" if len(means) > 1 else f"{'-':>8}"
        lines.append(f"{line}{len(means):>7}{average(rows, method, 'seconds_per_step'):>9.4f}")
    return "\n".join(lines)


def draw(rows, path):
    """Mean score over tasks and seeds against the parameters in the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, tasks = figure.subplots(), in_order(rows, "task")
    for method in in_order(rows, "method"):
        means, final = seed_means(rows, method, tasks), average(rows, method, "final")
        if not means or not final:  # not yet on all tasks, or nothing but a classifier
            continue
        error = stdev(means) if len(means) > 1 else 0
        axis.errorbar(final, mean(means), error, fmt="o", color="tab:orange" if method == "salora" else "tab:blue")
        axis.annotate(method, (final, mean(means)), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.margins(0.1)  # room for the names
    axis.set(xlabel="parameters in the end, without the classifier", ylabel=f"mean score of {len(tasks)} tasks")
    figure.savefig(path, format="png", dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(MINI_TASKS), metavar="T", help="default: all generated ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="S", help="default 0 1")
    parser.add_argument("--out", default="runs/compare", metavar="DIR", help="default runs/compare")
    args, flags = parser.parse_known_args(argv)  # the rest goes to the main job
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "compare.csv"
    for seed in args.seeds:
        for task in args.tasks:
            for method in args.methods:
                rows = read_table(path)
                if any((row["method"], row["task"], row["seed"]) == (method, task, str(seed)) for row in rows):
                    continue
                row = one(method, task, seed, flags, str(out / f"{method}-{task}-s{seed}-{time_ns()}"))
                append(path, row)
                print(f"{method}, {task}, seed {seed}: {row['score']:.4f}", flush=True)
    rows = read_table(path)
    print(table(rows))
    write_atomically(out / "compare.png", lambda path: draw(rows, path))
    print(f"see {path} and {out / 'compare.png'}")
    return rows


if __name__ == "__main__":
    main()
