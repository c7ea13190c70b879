"""Run folders: which runs a command line asks for, what a folder holds, and errors as lines."""

import argparse
import csv
import json
import os
from contextlib import contextmanager
from pathlib import Path

from cli.flags import device_of, settle
from glue.mini import TASKS as MINI_TASKS
from hub.checkpoints import read_json, read_torch

PROGRAM_FLAGS = ("out", "resume", "evaluate", "predict")  # about this call of the program, not about the run


def write_atomically(path, write):
    """Call write(path of a temporary file), then put the file in place: readers see all of it or nothing."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def append(path, row):
    """Add a row, {column: value}, to a CSV file, with a header line if the file is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


@contextmanager
def errors_as_lines(parser, *kinds, folder=None):
    """Errors of these kinds (by default ValueError and OSError) end the program with one line and exit status 2.

    An interruption ends it with exit status 130, and says how to go on with the run in `folder`.
    """
    try:
        yield
    except kinds or (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        begun = folder is not None and (folder / "checkpoint.pt").is_file()
        hint = f"go on from the last whole epoch with --resume {folder}" if begun else "no epoch was finished"
        parser.exit(130, f"\ninterrupted; {hint}\n")


def write_settings(settings, folder):
    """settings.json: the values that are used. What does not apply to the run is left out."""
    used = {k: v for k, v in vars(settings).items() if v is not None and k not in PROGRAM_FLAGS}
    text = json.dumps(used, indent=1) + "\n"
    write_atomically(folder / "settings.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_run(args, parser, flag, *allowed):
    """(settings, folder) of the run that `flag` names; no other flag but the allowed ones may stand beside it."""
    more = [k for k, v in vars(args).items() if v != parser.get_default(k) and k not in (flag, *allowed)]
    if more:
        raise ValueError(f"--{flag} takes its settings from the run: drop --{more[0].replace('_', '-')}")
    folder = Path(getattr(args, flag))
    blank = {name: None for name in vars(args)}
    try:
        settings = read_json(folder / "settings.json")
        known = {"task", "method", "seed", "weights"} <= set(settings) <= set(blank)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no settings.json in {folder}; expected the folder of a run") from None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{folder}/settings.json is damaged, or of another version of this program")
    settings = argparse.Namespace(**{**blank, **settings})
    settings.device = device_of(args.device or settings.device)
    return settings, folder


def read_finished(args, parser):
    """What --evaluate and --predict ask for: (settings, folder, test file or None)."""
    if args.evaluate is None:
        raise ValueError("--predict needs --evaluate RUN, the finished run whose model is to label the rows")
    settings, folder = read_run(args, parser, "evaluate", "predict", "data", "device")
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"the run in {folder} is not finished: go on with --resume {folder}")
    settings.data = args.data or settings.data
    return settings, folder, args.predict


def plan(args, parser):
    """The runs that the command line asks for: a list of (settings, folder, checkpoint or None)."""
    if args.resume is not None:
        return [interrupted(args, parser)]
    settle(args)
    if len(set(args.seed)) < len(args.seed) or max(map(abs, args.seed)) >= 10**9:
        raise ValueError(f"--seed takes different numbers below 10^9, got {' '.join(map(str, args.seed))}")
    tasks = list(MINI_TASKS) if args.task == "all" else [args.task]
    several = len(tasks) * len(args.seed) > 1
    folder = new_folder(args, several)
    jobs = []
    for task in tasks:
        for seed in args.seed:
            settings = argparse.Namespace(**{**vars(args), "task": task, "seed": seed})
            jobs.append((settings, folder / f"{task}-s{seed}" if several else folder, None))
    return jobs


def interrupted(args, parser):
    """(settings, folder, checkpoint) of the run that --resume names."""
    settings, folder = read_run(args, parser, "resume", "device")
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: the run is finished, or did not get through its first epoch")
    saved = read_torch(path)
    if not isinstance(saved, dict) or saved.get("format") != "salora-run-2":
        raise ValueError(f"{path} is not a checkpoint of this program")
    return settings, folder, saved


def new_folder(args, several):
    """--out, or the first of runs/NAME, runs/NAME-1, runs/NAME-2 ... that is not there or empty."""
    if args.out:
        folder = Path(args.out)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty: choose another --out, or --resume an interrupted run")
        return folder
    recipe = [] if args.recipe in (None, "ours") else [args.recipe]
    seed = [] if several else [f"s{args.seed[0]}"]
    name, number = "-".join([args.task, args.method, *recipe, *seed]), 0
    while True:
        folder = Path("runs") / (f"{name}-{number}" if number else name)
        if not folder.exists() or not any(folder.iterdir()):
            return folder
        number += 1
