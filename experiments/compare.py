"""SaLoRA beside its peers: what trains, what is left in the end, the score, and what a step costs.

    python experiments/compare.py --tune                     learning rates, every method on three generated tasks
    python experiments/compare.py --seeds 0 1 2 3 4          with the best of them, on the eight generated tasks
    python experiments/compare.py --memory                   peak memory of every method, for the table
    ... --tasks words reverse --out runs/compare-shift       the same three for the losses of experiments/shift.py
    ... --tasks mrpc cola --data GLUE --weights MODEL --out runs/compare-glue      other flags go to the main job

experiments/methods.py says which methods, at what size, and how SoRA gets there. All get as many trials, with seed 100,
which no report uses: half of the main job's default learning rate, the default and its double, on generated tasks 4 and
8 times it as well; on a shift ten, see WIDE in experiments/arms.py. Tuning and reports score different rows. An
official task is tuned on a tenth of its training rows, on which that run does not train, and reports are about dev
rows; a generated task is tuned on dev rows, and reports are about rows that were generated after them. A report takes
the trial with the best mean over the tasks of tune.csv, and without one the default, which the table marks.

Rows go to tune.csv, compare.csv and memory.csv in --out. A run that is there is not done again, so a study can be
stopped, continued, and split over processes. Rows are told apart by method, task, seed and trial alone: a study with
other flags needs another --out. A run that diverges is the worst of trials, and no row of a report. compare.png shows
the score against the final number of parameters. On GLUE the time of a step has its share of scoring the dev rows.
Intervals are 95 % bootstrap intervals over seeds.
"""

import argparse
import sys
import tempfile
from math import inf
from pathlib import Path
from statistics import mean
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_glue_mini
from cli.files import append, has_row, make_folder, read_table
from cli.flags import positive
from cli.runs import STUDY, errors_as_lines
from experiments import cost, plots, shift
from experiments.arms import TUNE_SEED
from experiments.intervals import interval
from experiments.methods import METHODS, default_trial, hold_out, kind_of, run, trials
from glue.mini import TASKS as MINI_TASKS
from glue.pretrain import mini_encoder
from glue.tasks import NAMES
from hub.checkpoints import write_atomically
from train_glue_mini import fine_tune

TUNING_TASKS = ["mini-cola", "mini-mrpc", "mini-rte"]
OWN = {"--lr", "--method", "--seed", "--task"}  # flags of the main job that are not the user's to give here


def in_order(rows, key):
    return list(dict.fromkeys(row[key] for row in rows))


def text_of(trial):
    """(0.006, 2.0) -> 0.006:2, and 0.006 alone where the scale is the main job's own."""
    return ":".join(f"{number:g}" for number in trial if number != "")


# Tuning


def tune(args):
    """Try what is not yet in tune.csv, with the seed that no report uses. Returns all of its rows."""
    path = args.out / "tune.csv"
    if kind_of(args.tasks[0]) == "official":
        for task in args.tasks:
            hold_out(task, args.data, args.out / "tuning-data")
        args.data = args.out / "tuning-data"
    for task in args.tasks:
        for method in args.methods:
            for trial in trials(method, task):
                lr, scale = trial
                key = {"method": method, "task": task, "lr": lr, "scale": scale, "seed": TUNE_SEED}
                if has_row(path, **key):
                    continue
                try:
                    score, _, final, *_ = run(method, task, TUNE_SEED, trial, args)
                except FloatingPointError:
                    score, final = (inf if kind_of(task) == "shift" else -inf), 0
                append(path, {**key, "score": score, "final": final})
                print(f"{method}, {task}, {text_of(trial)}: {score:.4f}, {final:,} parameters", flush=True)
    return read_table(path)


def ranking(rows, method, kind):
    """[(mean over the tasks of this kind, trial)] of a method, the best first; without trials that lack a task."""
    rows = [row for row in rows if kind_of(row["task"]) == kind]
    tasks, scores = in_order(rows, "task"), {}
    for row in rows:
        if row["method"] == method:
            trial = float(row["lr"]), float(row["scale"]) if row["scale"] else ""
            scores.setdefault(trial, {})[row["task"]] = float(row["score"])
    means = [(mean(found.values()), trial) for trial, found in scores.items() if len(found) == len(tasks)]
    return sorted(means, key=lambda pair: pair[0], reverse=kind != "shift")


# Reports


def compare(args):
    """Every method on every task and seed, with its best trial."""
    path, tuned = args.out / "compare.csv", read_table(args.out / "tune.csv")
    for seed in args.seeds:
        for task in args.tasks:
            for method in args.methods:
                key = {"method": method, "task": task, "seed": seed}
                if has_row(path, **key):
                    continue
                found = ranking(tuned, method, kind_of(task))
                trial = found[0][1] if found else default_trial(method, task)
                try:
                    score, trained, final, seconds, device = run(method, task, seed, trial, args)
                except FloatingPointError as error:
                    print(f"{method}, {task}, seed {seed}: {error}", flush=True)
                    continue
                row = {**key, "score": score, "trained": trained, "final": final, "trial": text_of(trial)}
                row |= {"tuned": "yes" if found else "no", "seconds_per_step": seconds, "device": device}
                append(path, row)
                print(f"{method}, {task}, seed {seed}: {score:.4f}", flush=True)


def peak_memory(method, task, args):
    """(the peak of this process in MiB, device) in ten steps of training, without scores and pictures after them."""
    peaks = []

    def measured(model, *rest, **options):
        journal = fine_tune(model, *rest, **options)
        peaks.append(cost.peak_of_process(next(model.parameters()).device.type))
        return journal

    with tempfile.TemporaryDirectory() as folder:
        short = argparse.Namespace(**{**vars(args), "out": Path(folder), "steps": 10})
        with patch.object(train_glue_mini, "fine_tune", measured), patch.object(shift, "fine_tune", measured):
            *_, device = run(method, task, 0, default_trial(method, task), short)
    return peaks[0], device


def measure_memory(args):
    """A row of memory.csv for every method, on the first task."""
    path, task = args.out / "memory.csv", args.tasks[0]
    if kind_of(task) != "official" and "--weights" not in args.flags:
        mini_encoder()  # pre-training is not what is measured
    for method in args.methods:
        if not has_row(path, method=method, task=task):
            [(MiB, device)] = cost.in_processes(peak_memory, [(method, task, args)])
            append(path, {"method": method, "task": task, "device": device, "MiB": round(MiB, 1)})
            print(f"{method}, {task}: {MiB:.1f} MiB", flush=True)


def seed_means(rows, method, tasks):
    """The mean score over the tasks of every seed that has run on all of them."""
    scores = {}
    for row in rows:
        if row["method"] == method:
            scores.setdefault(row["seed"], {})[row["task"]] = float(row["score"])
    return [mean(found.values()) for found in scores.values() if len(found) == len(tasks)]


def average(rows, method, column):
    return mean(float(row[column]) for row in rows if row["method"] == method)


def table(rows, memory=()):
    """A line a method: parameters that train and that are left, scores, their mean with its interval, and the cost."""
    tasks = in_order(rows, "task")
    head = f"{'':<10}{'trial':>11}{'trained':>10}{'final':>10}"
    head += "".join(f"{task.removeprefix('mini-'):>8}" for task in tasks)
    lines = [head + f"{'mean':>9}{'95 % interval':>19}{'seeds':>7}{'s/step':>9}{'MiB':>8}"]
    for method in in_order(rows, "method"):
        mine = [row for row in rows if row["method"] == method]
        used = dict.fromkeys(row["trial"] + ("" if row["tuned"] == "yes" else "*") for row in mine)
        line = f"{method:<10}{' '.join(used):>11}"
        line += f"{average(rows, method, 'trained'):>10,.0f}{average(rows, method, 'final'):>10,.0f}"
        for task in tasks:
            cell = [float(row["score"]) for row in mine if row["task"] == task]
            line += f"{mean(cell):>8.3f}" if cell else f"{'-':>8}"
        means = seed_means(rows, method, tasks)
        line += f"{mean(means):>9.4f}" if means else f"{'-':>9}"
        bounds = "[{:.4f}, {:.4f}]".format(*interval(means)) if len(means) > 1 else "-"
        line += f"{bounds:>19}{len(means):>7}{average(rows, method, 'seconds_per_step'):>9.4f}"
        known = any(row["method"] == method for row in memory)
        lines.append(line + (f"{average(memory, method, 'MiB'):>8.1f}" if known else f"{'-':>8}"))
    notes = ["*: the default, not tuned"] if any(row["tuned"] == "no" for row in rows) else []
    return "\n".join(lines + notes)


def draw(rows, path):
    """The mean over tasks and seeds, with its interval, against the parameters in the end."""
    tasks, points = in_order(rows, "task"), []
    for method in in_order(rows, "method"):
        means = seed_means(rows, method, tasks)
        if means:  # it has run on all tasks
            points.append((method, average(rows, method, "final"), *plots.mean_and_bars(means)))
    lower = kind_of(tasks[0]) == "shift"
    label = "loss (nats; lower is better)" if lower else "score"
    over = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    plots.methods(points, f"{label}, {over}", lower, path)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=[*NAMES, *shift.KINDS], metavar="T", help="all generated, all "
                        "official, or kinds of shift (default: all generated ones; with --tune "
                        f"{' '.join(TUNING_TASKS)})")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="S", help="default 0 1")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--tune", action="store_true", help=f"try learning rates, on seed {TUNE_SEED}")
    instead.add_argument("--memory", action="store_true", help="measure peak memory, on the first of --tasks")
    parser.add_argument("--data", type=Path, metavar="DIR", help="GLUE's official files, for official tasks")
    parser.add_argument("--steps", type=positive, metavar="N", help="default: the main job's; 1000 on a shift")
    parser.add_argument("--texts", type=positive, default=8000, metavar="N", help="of a shift (default 8000)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="default runs/compare")
    args, args.flags = parser.parse_known_args(argv)  # the rest goes to the main job
    args.tasks = args.tasks or (TUNING_TASKS if args.tune else list(MINI_TASKS))
    if len(set(map(kind_of, args.tasks))) > 1:
        parser.error(f"--tasks {' '.join(args.tasks)} are not of one kind: their mean would mean nothing")
    kind = kind_of(args.tasks[0])
    if kind == "official" and args.data is None:
        parser.error("official tasks need --data DIR, the folder of GLUE's official files")
    if kind == "shift" and args.flags:
        parser.error(f"{args.flags[0]}: on a shift no flag goes to the main job; see --help for those that there are")
    for flag in args.flags:
        if flag.split("=")[0] in OWN:
            parser.error(f"{flag.split('=')[0]} is what this study chooses itself")
    if TUNE_SEED in args.seeds:
        parser.error(f"--seeds: {TUNE_SEED} is the seed for tuning")
    with errors_as_lines(parser, hint=STUDY):
        make_folder(args.out)
        if args.tune:
            rows = tune(args)
            for method in in_order(rows, "method"):
                found = ranking(rows, method, kind)
                trials = ", ".join(f"{score:.4f} ({text_of(trial)})" for score, trial in found)
                print(f"{method:<10} {trials or 'no trial has run on every task of tune.csv'}")
            return rows
        if args.memory:
            measure_memory(args)
            return read_table(args.out / "memory.csv")
        compare(args)
        rows = read_table(args.out / "compare.csv")
        rows = [row for row in rows if row["task"] in args.tasks and int(row["seed"]) in args.seeds]
        memory = [row for row in read_table(args.out / "memory.csv") if kind_of(row["task"]) == kind]
        print(table(rows, memory))
        write_atomically(args.out / "compare.png", lambda path: draw(rows, path))
        print(f"see {args.out / 'compare.csv'} and {args.out / 'compare.png'}")
        return rows


if __name__ == "__main__":
    main()
