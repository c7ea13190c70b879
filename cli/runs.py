"""Run folders: which runs a command line asks for, and what is in the folder of an earlier one."""

import argparse
from pathlib import Path

from cli.files import check_free, digest_of
from cli.settings import read_settings, settle
from glue.mini import TASKS as MINI_TASKS
from hub.checkpoints import read_json, read_torch

CHECKPOINT = "salora-run-5"  # the format of checkpoint.pt


def runs_of(args, parser):
    """The runs that the command line asks for: a list of (settings, folder, checkpoint or None)."""
    if args.resume is not None:
        return [interrupted(args, parser)]
    if len(set(args.seed)) < len(args.seed) or max(map(abs, args.seed)) >= 10**9:
        raise ValueError(f"--seed takes different numbers below 10^9, got {' '.join(map(str, args.seed))}")
    tasks = list(MINI_TASKS) if args.task == "all" else [args.task]
    pairs = [(task, seed) for task in tasks for seed in args.seed]
    runs = [f"{task}-s{seed}" for task, seed in pairs] if len(pairs) > 1 else []
    folder = new_folder(args, runs)  # refused before an encoder is pre-trained, which settle may do
    settled = [settle(argparse.Namespace(**{**vars(args), "task": task, "seed": seed})) for task, seed in pairs]
    if len(pairs) == 1:
        return [(settled[0], folder, None)]
    return [(settings, folder / run, None) for settings, run in zip(settled, runs, strict=True)]


def new_folder(args, runs):
    """--out, or the first of runs/NAME, runs/NAME-1, runs/NAME-2 ... that is free. runs: see check_free."""
    if args.out:
        check_free(Path(args.out), runs)
        return Path(args.out)
    recipe = [] if args.recipe in (None, "ours") else [args.recipe]
    seed = [] if runs else [f"s{args.seed[0]}"]
    name, number = "-".join([args.task, args.method, *recipe, *seed]), 0
    while True:
        folder = Path("runs") / (f"{name}-{number}" if number else name)
        try:
            check_free(folder, runs)
            return folder
        except FileExistsError:
            number += 1


def interrupted(args, parser):
    """(settings, folder, checkpoint) of the run that --resume names."""
    settings, folder = read_run(args, parser, "resume", "data", "device")
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: the run is finished, or left no checkpoint, so it cannot be resumed")
    saved = read_torch(path)
    if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT:
        raise ValueError(f"{path} is not a checkpoint of this program")
    try:
        intact = saved.pop("digest", None) == digest_of(saved)
    except ValueError:
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged: what it holds is not what was saved")
    return settings, folder, saved


def read_run(args, parser, flag, *allowed):
    """(settings, folder) of the run that `flag` names; no other flag but the allowed ones may stand beside it."""
    more = [k for k, v in vars(args).items() if v != parser.get_default(k) and k not in (flag, "command", *allowed)]
    if more:
        raise ValueError(f"--{flag} takes its settings from the run: drop --{more[0].replace('_', '-')}")
    folder = Path(getattr(args, flag))
    changes = {"command": args.command, **({} if args.data is None else {"data": args.data})}
    return read_settings(folder, args.device, **changes), folder


def read_finished(args, parser):
    """What --evaluate, --predict and --export ask for: (settings, folder, summary) of a finished run."""
    flag = "export" if args.export is not None else "evaluate"
    if flag == "evaluate" and args.evaluate is None:
        raise ValueError("--predict needs --evaluate RUN, the finished run whose model is to label the rows")
    settings, folder = read_run(args, parser, flag, *(["predict", "data", "device"] if flag == "evaluate" else []))
    if not (folder / "summary.json").is_file():
        way = f"go on with --resume {folder}" if (folder / "checkpoint.pt").is_file() else "run it again"
        raise FileNotFoundError(f"the run in {folder} is not finished: {way}")
    return settings, folder, read_json(folder / "summary.json")
