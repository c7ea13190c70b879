"""The engine of all studies. A study is its question, data, model, score and arms; what studies share is here: flags,
tuning, runs that are skipped once they are done, runs that diverge, and reports.

    def measure(args, task, arm, seed, trial):          # one run; FloatingPointError means that it diverged
        data, (lr, scale) = data_of(task, seed), trial
        model = adapt(new_model(seed), TARGETS, arm.start, alpha=scale * arm.start)
        fit(model, data.batches, arm, lr=lr, seed=seed, steps=args.steps, batch_of=data.batch_of)
        return {"loss": data.loss(model), "size": size_of(model)}

    STUDY = Study(
        doc=__doc__,
        name="noise",                                   # runs/noise/noise.csv
        measure=measure,
        columns=["loss", "size"],
        more=["size"],
        tasks=["little", "much"],
        arms=["lora-8", "lora-4", "salora-8-to-4"],     # see experiments/arms.py
        steps=300,
        trials=lambda args, task, arm: [(6e-3, 1), (6e-3, 2)],      # learning rates and scales that --tune tries
    )
    main = STUDY.main

An arm is a method with its size; a trial is a learning rate, and a scale where that is tuned as well. Tuning has seeds
of its own, which no report uses. `--tune` runs every arm with each of its trials, into tune.csv; a run then takes the
trial with the best mean over the tasks and seeds there. Every run is a row of NAME.csv, and none is done twice, so a
study can be interrupted, resumed, and split over processes. A run that diverges gets an infinite score: the worst of
all trials, named in reports but part of no mean.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from statistics import mean

import torch

from cli.files import made
from cli.flags import folder, positive, whole
from cli.program import Parser, errors_as_lines
from cli.table import append, has_row, read_table
from experiments.arms import arm_of
from experiments.tables import differences, distinct, gaps_closed, groups, means, values_of
from hub.checkpoints import write_atomically
from train_glue_mini import fine_tune

TUNE_SEED = 100
AGAIN = "the same command goes on with this run"  # after an interruption: what is done has its row


def fit(model, rows, arm, *, lr, seed, steps, batch_of, batch_size=1, journal=None, autocast=nullcontext(), **options):
    """Train what requires gradients, in place. Returns the arm's allocator, which gets the options.

    rows: to train on or, with batch_size 1, ready-made batches. batch_of(rows, model, device) -> (inputs, labels).
    Raises FloatingPointError for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    allocator = arm.allocator(model, optimizer, steps, seed, **options)
    with redirect_stdout(None):
        fine_tune(model, rows, optimizer, allocator, lr=lr, batch_size=batch_size, seed=seed, batch_of=batch_of,
                  journal=journal, autocast=autocast)  # fmt: skip
    return allocator


def by_length(rows, size):
    """Batches of encoded rows, those of similar length together, so that little is padded."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def text_of(trial):
    """(learning rate,) or (learning rate, scale) -> 0.006 or 0.006:2, as in tables and on the command line"""
    return ":".join(f"{number:.12g}" for number in trial)


def trial_of(text):
    """0.006:2 -> (0.006, 2.0)"""
    try:
        trial = tuple(float(number) for number in text.split(":")) if text else ()
    except ValueError:
        trial = (nan,)
    if not all(0 < number < inf for number in trial):
        raise argparse.ArgumentTypeError(f"{text!r} is not LR or LR:SCALE, such as 0.006:2")
    return trial


@dataclass(frozen=True)
class Study:
    doc: str  # the text of --help
    name: str  # of its table, its picture and its folder in runs/
    measure: Callable  # measure(args, task, arm, seed, trial) -> {column: value} of one run
    columns: list  # what it returns, the score first
    more: list  # the columns whose means a report shows beside the score's
    tasks: list
    arms: list  # names of those that run by default
    default_tasks: list | None = None  # None: all
    seeds: range | list = range(5)
    steps: int | None = None  # None: there is no --steps
    lowest: bool = True  # whether the lowest score is the best
    trials: Callable = lambda args, task, arm: []  # what --tune tries, if there is anything to tune
    tune_seeds: tuple = (TUNE_SEED,)
    default: Callable | None = None  # default(args, task, arm) -> the trial of an arm that was not tuned
    by_task: bool = False  # whether every task has a best trial of its own
    arm_of: Callable = arm_of  # name -> arm, or ArgumentTypeError
    rivals: Callable = lambda name, names: []  # those of the names that an arm is compared with
    draw: Callable | None = None  # draw(rows) -> a matplotlib figure, or None where there is nothing to show yet
    add_flags: Callable | None = None  # add_flags(parser)
    needs: tuple = ()  # flags that a run cannot do without
    equal: float | None = None  # scores that differ by less count as the same
    same: tuple = ("steps",)  # flags that all rows of a table share: other values need another --out

    def parser(self):
        parser = Parser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        some = " ".join(self.default_tasks or self.tasks)
        parser.add_argument("--tasks", nargs="+", choices=self.tasks, metavar="TASK",
                            help=f"of {', '.join(self.tasks)} (default {some})")  # fmt: skip
        parser.add_argument("--arms", nargs="+", type=self.arm_of, metavar="ARM", help="METHOD-START or METHOD-START-"
                            f"to-SIZE, see experiments/arms.py (default {' '.join(self.arms)})")  # fmt: skip
        parser.add_argument("--seeds", nargs="+", type=whole, metavar="S", help="default "
                            f"{' '.join(map(str, self.seeds))}; a report covers all without it")  # fmt: skip
        mode = parser.add_mutually_exclusive_group()
        mode.add_argument("--tune", action="store_true", help="run every trial of every arm, on seed "
                          f"{' '.join(map(str, self.tune_seeds))}")  # fmt: skip
        mode.add_argument("--report", action="store_true", help="no training: report on the runs so far")
        parser.add_argument("--minus", type=self.arm_of, metavar="ARM", help="report how all arms differ from this one")
        parser.add_argument("--grid", nargs="+", type=trial_of, metavar="LR[:SCALE]", help="trials for --tune")
        if self.steps:
            parser.add_argument("--steps", type=positive, default=self.steps, metavar="N",
                                help=f"of a run (default {self.steps})")  # fmt: skip
        parser.add_argument("--out", type=folder, default=Path("runs") / self.name, metavar="DIR",
                            help=f"default runs/{self.name}")  # fmt: skip
        if self.add_flags:
            self.add_flags(parser)
        return parser

    def main(self, argv=None):
        """The program of a study: tune, or run and report. Returns the rows of the table."""
        parser = self.parser()
        with errors_as_lines(parser, hint=AGAIN):
            args = parser.parse_args(argv)
            for seed in set(args.seeds or []) & set(self.tune_seeds):
                raise ValueError(f"--seeds: {seed} is a seed for tuning")
            if args.grid and not args.tune:
                raise ValueError("--grid is what --tune tries: it needs --tune")
            args.tasks = args.tasks or list(self.default_tasks or self.tasks)
            args.table = args.out / f"{self.name}.csv"
            if args.report:
                return self.show(args, args.arms)
            if not all(getattr(args, name) for name in self.needs):
                raise ValueError(f"a run needs --{' and --'.join(self.needs)}")
            args.arms = args.arms or [self.arm_of(name) for name in self.arms]
            with made(args.out):
                if args.tune:
                    return self.tune(args)
                self.compare(args)
                return self.show(args)

    def tune(self, args):
        """Every arm with all of its trials. Returns the rows of tune.csv."""
        path = args.out / "tune.csv"
        for task in args.tasks:
            for arm in args.arms:
                trials = self.trials(args, task, arm)
                for trial in (args.grid or trials) if trials else []:
                    if len(trial) != len(trials[0]):
                        raise ValueError(f"--grid {text_of(trial)}: expected one such as {text_of(trials[0])}")
                    for seed in self.tune_seeds:
                        key = {"task": task, "arm": arm.name, "trial": text_of(trial), "seed": seed}
                        self.run(args, path, key, task, arm, seed, trial)
        rows = self.rows_of(path)
        if not rows:
            raise ValueError("nothing to tune: none of these arms has trials")
        print(f"{self.columns[0]} (trial), best first")
        for arm in distinct(rows, "arm"):
            for tasks in groups(rows):
                ranked = self.ranking(rows, arm, tasks)
                found = [f"{score:.4f} ({text_of(trial)})" for score, trial in ranked]
                if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
                    found.append("a tie, so runs take the first")
                print(f"{arm} on {' and '.join(tasks)}: {', '.join(found) or 'no trial has run on all of them'}")
        return rows

    def ranking(self, rows, arm, tasks):
        """[(mean score, trial)] of an arm, the best first, and of equal ones that with the lowest rate.

        The mean is over the tasks and the seeds for tuning. Trials that lack a run are left out.
        """
        scores = defaultdict(dict)
        for row in rows:
            if row["arm"] == arm and row["task"] in tasks:
                scores[row["trial"]][row["task"], row["seed"]] = float(row[self.columns[0]])
        runs = len(tasks) * len(self.tune_seeds)
        complete = [(mean(found.values()), trial_of(trial)) for trial, found in scores.items() if len(found) == runs]
        return sorted(complete, key=lambda pair: (pair[0] if self.lowest else -pair[0], pair[1]))

    def trial_for(self, args, task, arm):
        """The best trial of an arm, or its default. Raises ValueError where it has neither."""
        rows = self.rows_of(args.out / "tune.csv")
        tasks = [task] if self.by_task else distinct(rows, "task")
        ranked = self.ranking(rows, arm.name, tasks)
        if not self.trials(args, task, arm):
            return ()
        if ranked:
            return ranked[0][1]
        if self.default is None:
            raise ValueError(f"{arm.name} has not been tuned: first run with --tune and the same --out")
        return self.default(args, task, arm)

    def compare(self, args):
        """Every arm on every task and seed, with its best trial, or none of them where an arm has no trial."""
        trials = [(task, arm, self.trial_for(args, task, arm)) for task in args.tasks for arm in args.arms]
        for seed in self.seeds if args.seeds is None else args.seeds:
            for task, arm, trial in trials:
                key = {"task": task, "arm": arm.name, "seed": seed}
                self.run(args, args.table, key, task, arm, seed, trial)

    def rows_of(self, path):
        """The rows of a table of this study; none if it is not there. Raises ValueError for any other file."""
        return read_table(path, ["task", "arm", "seed", "trial", *self.columns, *self.same, "seconds"], self.check)

    def check(self, row):
        """Raises ValueError for a row that this study cannot have written."""
        if row["task"] not in self.tasks:
            raise ValueError(f"{row['task']!r} is not a task of this study")
        int(row["seed"])
        try:
            self.arm_of(row["arm"])
            trial_of(row["trial"])
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
        score, *others = self.columns
        if isfinite(float(row[score])):  # else it diverged, and has no other values
            for column in others:
                read = float if column in self.more else json.loads
                read(row[column])

    def run(self, args, path, key, task, arm, seed, trial):
        """Measure one run and add its row, unless the table has one with this key; its runs must share `same`."""
        rows, same = self.rows_of(path), {name: str(getattr(args, name)) for name in self.same}
        for name, value in same.items():
            if any(row.get(name) != value for row in rows):
                raise ValueError(f"{path} has runs with another --{name.replace('_', '-')}: choose another --out")
        if has_row(path, **key):
            return
        started, said = time.time(), ""
        try:
            values = self.measure(args, task, arm, seed, trial)
            if not isfinite(values[self.columns[0]]):
                raise FloatingPointError(f"the {self.columns[0]} is {values[self.columns[0]]}")
        except FloatingPointError as error:
            values = dict.fromkeys(self.columns, "") | {self.columns[0]: inf if self.lowest else -inf}
            said = f" ({error})"
        seconds = round(time.time() - started, 1)
        append(path, {**key, "trial": text_of(trial), **values, **same, "seconds": seconds})
        print(f"{', '.join(map(str, key.values()))}: {values[self.columns[0]]:.4f}{said}, {seconds:.0f} s", flush=True)

    def show(self, args, arms=None):
        """Print the report on the tasks, seeds and arms asked for (None: all), and draw them. Returns their rows."""
        rows = [row for row in self.rows_of(args.table) if row["task"] in args.tasks]
        rows = [row for row in rows if args.seeds is None or int(row["seed"]) in args.seeds]
        rows = [row for row in rows if arms is None or row["arm"] in [arm.name for arm in arms]]
        if not rows:
            raise ValueError(f"no such runs in {args.table}")
        done = [row for row in rows if isfinite(float(row[self.columns[0]]))]
        lost = [f"{row['arm']} on {row['task']}, seed {row['seed']}" for row in rows if row not in done]
        if args.minus and args.minus.name not in distinct(rows, "arm"):
            raise ValueError(f"--minus {args.minus.name}: none of these runs is of that arm")
        if done:
            print(self.report(done, args.minus))
        if lost:
            print(f"diverged, and in no mean: {'; '.join(lost)}")
        figure = self.draw(done) if self.draw and done else None
        if figure is not None:
            path = args.table.with_suffix(".png")
            write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=110))
            print(f"see {path}")
        return rows

    def report(self, rows, minus=None):
        """For every task and their mean: means over seeds, differences from rivals, shares of the gap between LoRAs.

        minus: an arm from which all others' differences are wanted instead, in every column.
        """
        parts = []
        for tasks in groups(rows):
            name = tasks[0] if len(tasks) == 1 else f"mean of {' and '.join(tasks)}"
            values = values_of(rows, self.columns[0], *tasks)
            more = {column: values_of(rows, column, *tasks) for column in self.more}
            parts.append(means(values, f"{name}: {self.columns[0]}", more))
            if minus:
                for column, found in {self.columns[0]: values, **more}.items():
                    title = f"{name}: differences in {column} over shared seeds"
                    equal = self.equal if found is values else None
                    parts.append(differences(found, lambda arm, _: {minus.name} - {arm}, title, equal))
                continue
            parts.append(differences(values, self.rivals, f"{name}: differences over shared seeds", self.equal))
            parts.append(gaps_closed(values, f"{name}: of the gap from lora-4 to lora-8"))
        return "\n".join(filter(None, parts))
