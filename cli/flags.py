"""The command line of the main job: flags, the defaults that depend on each other, and the runs that they ask for."""

import argparse
import os
from pathlib import Path

import torch

from budget import CONTROLLERS, GateSchedule, Lagrangian
from glue.mini import TASKS as MINI_TASKS
from glue.tasks import NAMES, TASKS
from hub.checkpoints import read_json, read_torch

ABOUT = "Fine-tune an encoder on a GLUE task, or on a generated stand-in for one, with SaLoRA."
RECIPES = {  # decisions that go together; a single flag overrides its part
    "exact": {"canonical": True, "spread": 8.0, "warmup": 0.05, "beta": 0.0, "controller": "projection",
              "rule": "budget", "survivors": "one", "window": [0.2, 0.5], "restart": True},
    "paper": {"canonical": False, "spread": 0.0, "warmup": 0.0, "beta": 0.1, "controller": "quadratic",
              "rule": "median", "survivors": "median", "window": [0.2, 0.5], "restart": False},
}  # fmt: skip
LR = {"salora": (2e-3, 1e-3), "lora": (2e-3, 1e-3), "full": (5e-4, 5e-5), "head": (3e-3, 1e-3)}  # mini, official
GATE_FLAGS = "recipe density rule survivors canonical spread beta controller gate_lr window restart".split()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, without the usage


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def above_zero(text, what="a number above 0"):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


def zero_or_above(text):
    try:
        zero = float(text) == 0
    except ValueError:
        zero = False
    return 0.0 if zero else above_zero(text, "a number, 0 or above")


def share(text):
    value = zero_or_above(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")
    return value


def auto_or_above_zero(text):
    return None if text == "auto" else above_zero(text, "auto or a number above 0")


def build_parser():
    """Every flag with its help. None stands for a default that depends on other flags: see `settle`."""
    p = Parser(prog="train_glue_mini.py", description=ABOUT)
    g = p.add_argument_group("what to train")
    g.add_argument("--task", choices=[*NAMES, "all"], default="mini-cola", metavar="TASK",
                   help="mini-cola (default), all (the eight generated tasks), or one of " + ", ".join(NAMES[1:]))
    g.add_argument("--method", choices=list(LR), default="salora", metavar="METHOD",
                   help="salora (default); lora: the same with all gates open; full: every weight; head: only the head")
    g.add_argument("--data", metavar="DIR", help="folder with GLUE's official files, for an official task")
    g.add_argument("--weights", metavar="DIR", help="checkpoint folder of a RoBERTa- or BERT-family encoder; "
                   "without it a tiny encoder is pre-trained on first use")
    g.add_argument("--rows", type=positive, metavar="N", help="use only the first N training rows")
    g = p.add_argument_group("adapters and their budget")
    g.add_argument("--rank", type=positive, metavar="R", help="triplets a matrix at the start (default 8)")
    g.add_argument("--alpha", type=above_zero, help="an update's scale is alpha / rank (default 16)")
    g.add_argument("--recipe", choices=list(RECIPES), help="exact (default): what measures best; "
                   "paper: as published, but for SGD, which hardly moves; other flags override parts of it")
    g.add_argument("--density", type=float, metavar="B", help="share of the adapter parameters to keep (default 0.5)")
    g.add_argument("--rule", choices=["budget", "median"], help="which triplets stay: the best that fit the budget, "
                   "or those whose median gate is positive")
    g.add_argument("--survivors", choices=["one", "median"], help="what a kept gate becomes")
    g.add_argument("--canonical", action=argparse.BooleanOptionalAction,
                   help="rotate the triplets into their singular basis when the gates' window opens")
    g.add_argument("--spread", type=zero_or_above, metavar="X", help="how much better the odds of large triplets are "
                   "at the start: log theta = X log(size / sqrt(parameters)) + constant; 0: all the same")
    g.add_argument("--beta", type=zero_or_above, help="weight of the orthogonal regulariser")
    g.add_argument("--controller", choices=CONTROLLERS, help="what drives C to the density: a quadratic penalty by "
                   "Adam, the same by SGD, linear + quadratic with target warm-up, or a common shift of all log theta")
    g.add_argument("--gate-lr", type=auto_or_above_zero, metavar="ETA", help="step length of log theta and lambda; "
                   "auto (default): max(0.01, 14 / steps in the window)")
    g.add_argument("--window", type=float, nargs=2, metavar=("START", "END"), help="the gates train between these "
                   "fractions of all steps (default 0.2 0.5)")
    g.add_argument("--restart", action=argparse.BooleanOptionalAction,
                   help="where the window ends the learning rate starts again from --lr and falls to 0 "
                   "(default yes; paper: no)")
    g = p.add_argument_group("training")
    length = g.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, metavar="N", help="passes over the training rows (default 12 on a "
                        "generated task, 3 on an official one)")
    length.add_argument("--steps", type=positive, metavar="N", help="optimiser steps, instead of --epochs")
    g.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows a step (default 32)")
    g.add_argument("--lr", type=above_zero, help="learning rate of A, B and the head (default by method)")
    g.add_argument("--warmup", type=share, metavar="F", help="the learning rate rises from 0 over this share "
                   "of all steps: at the start, where the window opens, where triplets go (default 0.05; paper: 0)")
    g.add_argument("--dropout", type=share, metavar="P", help="in the encoder and its head while they train "
                   "(default 0 with adapters; without them, and for the paper's recipe, what config.json says)")
    g.add_argument("--pool", type=positive, default=1, metavar="N", help="cut N batches at a time from rows sorted by "
                   "length: less padding, but batches that are less alike (default 1: not sorted)")
    g.add_argument("--max-length", type=positive, default=128, metavar="N", help="tokens a row at most (default 128)")
    g.add_argument("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or several runs (default 0)")
    g = p.add_argument_group("hardware")
    g.add_argument("--device", help="auto (default), cpu, cuda, cuda:N or mps; several processes "
                   "share a batch under torchrun --nproc-per-node=N train_glue_mini.py ...")
    g.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the model's matrix products; "
                   "weights, gates and penalties stay in fp32 (default fp32)")
    g.add_argument("--accumulate", type=positive, default=1, metavar="N", help="take a batch in N parts, for memory")
    g.add_argument("--recompute", action="store_true", help="activation checkpointing: forget what a block computed "
                   "and compute it again for its gradient, for memory")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g = p.add_argument_group("output")
    g.add_argument("--out", metavar="DIR", help="a new folder for the run (default runs/TASK-METHOD-sSEED, "
                   "with -1, -2 ... behind it where that is taken)")
    g.add_argument("--resume", metavar="RUN", help="go on with an interrupted run; its other settings come from there")
    g = p.add_argument_group("afterwards")
    g.add_argument("--evaluate", metavar="RUN", help="score a finished run; goes with --data and --device")
    g.add_argument("--predict", metavar="FILE", help="with --evaluate: label the rows of a test file in GLUE's format "
                   "and write the submission file into the run's folder")
    return p  # fmt: skip


def device_of(name):
    """A device that is there, under torchrun the one of this process. Raises ValueError for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()  # the meta device can make it, but has nothing to read
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} here; use --device auto, cpu, or another that is there") from None
    return name


def settle(args):
    """Fill in the defaults that depend on other flags. Raises ValueError where flags do not go together."""
    lacks = {"trained gates": GATE_FLAGS} if args.method != "salora" else {}
    lacks |= {"adapters": ["rank", "alpha"]} if args.method in ("full", "head") else {}
    for what, flags in lacks.items():
        for flag in flags:
            if getattr(args, flag) is not None:
                flag = "--" + flag.replace("_", "-")
                raise ValueError(f"{flag} is about {what}, which --method {args.method} has not: drop one of them")
    if args.max_length < 6:
        room = "room for four special tokens and a word of both sentences"
        raise ValueError(f"--max-length must be at least 6, {room}, got {args.max_length}")
    for flag, value in {**RECIPES[args.recipe or "exact"], "density": 0.5, "rank": 8, "alpha": 16.0}.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.method != "salora":  # the gates, if any, stay open to the end, and all triplets are kept
        args.density, args.window, args.beta = 1.0, [1.0, 1.0], 0.0
    official = args.task in TASKS
    args.lr = args.lr or LR[args.method][official]
    args.epochs = args.epochs or (3 if official else 12)
    if args.dropout is None and args.method in ("salora", "lora") and args.recipe != "paper":
        args.dropout = 0.0
    Lagrangian(args.density), GateSchedule(1, *args.window)  # they check their values
    args.device = device_of(args.device or "auto")
    return args


def read_run(args, parser, flag, *allowed):
    """(settings, folder) of the run that `flag` names; no other flag but the allowed ones may stand beside it."""
    more = [k for k, v in vars(args).items() if v != parser.get_default(k) and k not in (flag, *allowed)]
    if more:
        raise ValueError(f"--{flag} takes its settings from the run: drop --{more[0].replace('_', '-')}")
    folder = Path(getattr(args, flag))
    try:
        settings = read_json(folder / "settings.json")
        known = set(settings) == set(vars(args))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no settings.json in {folder}; expected the folder of a run") from None
    except ValueError:
        known = False
    if not known:
        raise ValueError(f"{folder}/settings.json is damaged, or of another version of this program")
    settings = argparse.Namespace(**settings)
    settings.device = device_of(args.device or settings.device)
    return settings, folder


def finished(args, parser):
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
        settings, folder = read_run(args, parser, "resume", "device")
        path = folder / "checkpoint.pt"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: the run is finished, or did not get through its first epoch")
        saved = read_torch(path)
        if not isinstance(saved, dict) or saved.get("format") != "salora-run-1":
            raise ValueError(f"{path} is not a checkpoint of this program")
        return [(settings, folder, saved)]
    settle(args)
    if len(set(args.seed)) < len(args.seed) or max(map(abs, args.seed)) >= 10**9:
        raise ValueError(f"--seed takes different numbers below 10^9, got {' '.join(map(str, args.seed))}")
    tasks = list(MINI_TASKS) if args.task == "all" else [args.task]
    many = len(tasks) * len(args.seed) > 1
    name = f"{args.task}-{args.method}" + ("" if many else f"-s{args.seed[0]}")
    folders = [Path(args.out)] if args.out else (Path("runs") / (name + (f"-{i}" if i else "")) for i in range(10**6))
    folder = next((folder for folder in folders if not folder.exists() or not any(folder.iterdir())), None)
    if folder is None:
        raise FileExistsError(f"{args.out} is not empty: choose another --out, or --resume an interrupted run")
    jobs = []
    for task in tasks:
        for seed in args.seed:
            settings = argparse.Namespace(**{**vars(args), "task": task, "seed": seed})
            jobs.append((settings, folder / f"{task}-s{seed}" if many else folder, None))
    return jobs
