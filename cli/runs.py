"""Run folders: which runs a command line asks for, what a folder says of its run, and errors as lines."""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from cli.files import check_free, digest_of
from cli.flags import build_parser, device_of, settle
from glue.mini import TASKS as MINI_TASKS
from hub.checkpoints import read_json, read_torch, write_atomically

PROGRAM_FLAGS = ("out", "resume", "evaluate", "export", "predict", "command")  # of this call, not of the run


STUDY = "the same command goes on with this run"  # the hint of a study, which keeps a row of every run that is done


@contextmanager
def errors_as_lines(parser, folder=None, hint=None):
    """What the user can mend ends the program with one line and exit status 2.

    An interruption ends it with exit status 130, and says how to go on: by `hint`, or with the run in `folder`.
    """
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends
        parser.error("standard output was closed")
    except (ValueError, OSError, FloatingPointError, torch.linalg.LinAlgError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        begun = folder is not None and (folder / "checkpoint.pt").is_file()
        hint = hint or (f"go on from the last whole epoch with --resume {folder}" if begun else "no epoch was finished")
        parser.exit(130, f"\ninterrupted; {hint}\n")


def used(settings):
    """The settings as settings.json has them: what does not apply to the run is left out."""
    values = {k: v for k, v in vars(settings).items() if v is not None and k not in PROGRAM_FLAGS}
    return json.loads(json.dumps(values))


def write_settings(settings, folder):
    text = json.dumps(used(settings), indent=1) + "\n"
    write_atomically(folder / "settings.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_settings(folder, device=None):
    """The settings of the run in a folder, on another device if one is given.

    They pass through the parser, like flags. Raises ValueError where this program would not have written them so.
    """
    try:
        found = read_json(folder / "settings.json")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no settings.json in {folder}; expected the folder of a run") from None
    damaged = ValueError(f"{folder}/settings.json is damaged, or of another version of this program")

    def refuse(message):
        raise damaged

    parser = build_parser()
    parser.error = refuse
    settings = parser.parse_args(flags_of({**found, "device": "cpu"}))
    settings.seed = settings.seed[0]
    try:
        same = used(settle(settings)) == {**found, "device": "cpu"}
    except ValueError:
        same = False
    if not same:
        raise damaged
    settings.device = device_of(device or str(found.get("device")))
    return settings


def flags_of(settings):
    """The flags that give these settings, as a list of texts."""
    flags = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={value}")
    return flags


def read_run(args, parser, flag, *allowed):
    """(settings, folder) of the run that `flag` names; no other flag but the allowed ones may stand beside it."""
    more = [k for k, v in vars(args).items() if v != parser.get_default(k) and k not in (flag, "command", *allowed)]
    if more:
        raise ValueError(f"--{flag} takes its settings from the run: drop --{more[0].replace('_', '-')}")
    folder = Path(getattr(args, flag))
    settings = read_settings(folder, args.device)
    settings.command = args.command
    return settings, folder


def read_finished(args, parser):
    """What --evaluate, --predict and --export ask for: (settings, folder, summary) of a finished run."""
    flag = "export" if args.export is not None else "evaluate"
    if flag == "evaluate" and args.evaluate is None:
        raise ValueError("--predict needs --evaluate RUN, the finished run whose model is to label the rows")
    settings, folder = read_run(args, parser, flag, *(["predict", "data", "device"] if flag == "evaluate" else []))
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(f"the run in {folder} is not finished: go on with --resume {folder}")
    settings.data = args.data or settings.data
    return settings, folder, read_json(folder / "summary.json")


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
    if not isinstance(saved, dict) or saved.get("format") != "salora-run-4":
        raise ValueError(f"{path} is not a checkpoint of this program")
    try:
        whole = saved.pop("digest", None) == digest_of(saved)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged: what it holds is not what was saved")
    return settings, folder, saved


def new_folder(args, several):
    """--out, or the first of runs/NAME, runs/NAME-1, runs/NAME-2 ... that is free."""
    if args.out:
        check_free(Path(args.out))
        return Path(args.out)
    recipe = [] if args.recipe in (None, "ours") else [args.recipe]
    seed = [] if several else [f"s{args.seed[0]}"]
    name, number = "-".join([args.task, args.method, *recipe, *seed]), 0
    while True:
        folder = Path("runs") / (f"{name}-{number}" if number else name)
        try:
            check_free(folder)
            return folder
        except FileExistsError:
            number += 1
