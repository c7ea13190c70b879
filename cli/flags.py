"""The command line of the main job: its flags, and the defaults that depend on each other."""

import argparse
import os
from dataclasses import fields

import torch

from budget import CONTROLLERS, RULES, SURVIVORS, Recipe, check_density, check_window
from glue.tasks import NAMES, TASKS
from peers import PEERS

ABOUT = "Fine-tune an encoder on a GLUE task, or on a generated stand-in for one, with SaLoRA."
RECIPES = {"ours": Recipe.ours, "paper": Recipe.paper}
METHODS = {  # what trains, and the learning rates that do well on generated and on official tasks
    "salora": (2e-3, 1e-3),
    "lora": (2e-3, 1e-3),
    "full": (5e-4, 5e-5),
    "head": (3e-3, 1e-3),
    "adalora": (1e-2, 5e-3),
    "sora": (2e-3, 1e-3),
    "alora": (2e-3, 1e-3),
    "rm-lora": (2e-3, 1e-3),
    "adapter-h": (4e-3, 1e-3),
    "adapter-p": (4e-3, 1e-3),
    "prefix": (3e-2, 1e-2),
    "prompt": (2e-2, 1e-2),
    "bitfit": (5e-3, 1e-3),
    "ia3": (2e-2, 5e-3),
}
TRIPLET_METHODS = ["salora", "lora", *(name for name, peer in PEERS.items() if peer.install is None)]
SIZED_METHODS = ["salora", "lora", *(name for name, peer in PEERS.items() if peer.sized)]
BUDGETED_METHODS = ["salora", *(name for name, peer in PEERS.items() if peer.budgeted)]
LEAST_LENGTH = 6  # tokens: four special ones and a word of both sentences
SHARED_DECISIONS = ["warmup", "dropout"]  # of a recipe: these are about every method, the others about trained gates
GATE_FLAGS = ["recipe", *(f.name for f in fields(Recipe) if f.name not in SHARED_DECISIONS)]


LARGEST = 1e36  # of a number on the command line: ten times as much must still fit float32


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
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    if value >= LARGEST:
        raise argparse.ArgumentTypeError(f"expected a number below {LARGEST:g}, got {text!r}")
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


def path(text):
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return text


def auto_or_above_zero(text):
    return None if text == "auto" else above_zero(text, "auto or a number above 0")


def build_parser():
    """Every flag with its help. None stands for a default that depends on other flags: see `settle`."""
    p = Parser(prog="train_glue_mini.py", description=ABOUT)
    p.set_defaults(command=None)  # the command line as typed: main notes it here
    yes_or_no = argparse.BooleanOptionalAction

    g = p.add_argument_group("what to train")
    g.add_argument(
        "--task", choices=[*NAMES, "all"], default="mini-cola", metavar="TASK",
        help="mini-cola (default), all (the eight generated tasks), or one of " + ", ".join(NAMES[1:]),
    )
    g.add_argument(
        "--method", choices=list(METHODS), default="salora", metavar="METHOD",
        help="salora (default); lora: the same, every gate open; full: every weight; head: only the head; "
        "or a method of peers/: " + ", ".join(PEERS),
    )
    g.add_argument("--data", type=path, metavar="DIR", help="folder with GLUE's official files, for an official task")
    g.add_argument(
        "--weights", type=path, metavar="DIR",
        help="checkpoint folder of a RoBERTa- or BERT-family encoder; without it a tiny encoder is pre-trained "
        "on first use",
    )
    g.add_argument("--rows", type=positive, metavar="N", help="use only the first N training rows")

    g = p.add_argument_group("adapters and their budget")
    g.add_argument("--rank", type=positive, metavar="R", help="triplets per matrix at the start; units of an adapter; "
                   "vectors of a prefix or prompt (default 8)")
    g.add_argument("--alpha", type=above_zero, help="the scale of an update is alpha / rank (default 16)")
    g.add_argument(
        "--density", type=float, metavar="B",
        help="the budget: share of the adapter parameters to keep (default 0.5)",
    )
    g.add_argument(
        "--reach", type=above_zero, metavar="X",
        help="sora: a gate that starts within X of 0 and that no gradient moves ends at 0; more triplets go the larger "
        "it is (default: what follows from the authors' lambda, 0.6)",
    )
    g.add_argument(
        "--recipe", choices=list(RECIPES),
        help="ours (default): what measured best; paper: the published algorithm. The flags below override "
        "single decisions of a recipe",
    )
    g.add_argument(
        "--window", type=float, nargs=2, metavar=("START", "END"),
        help="the gates train between these fractions of all steps (default 0.4 0.5; paper: 0.2 0.5)",
    )
    g.add_argument(
        "--controller", choices=CONTROLLERS,
        help="what drives the expected density to the budget: the quadratic penalty by Adam, the same by SGD, "
        "or after every step one shift of all log theta (default projection; paper: quadratic)",
    )
    g.add_argument(
        "--gate-lr", type=auto_or_above_zero, metavar="ETA",
        help="step length of log theta and lambda (default auto: max(0.01, 14 / steps of the window))",
    )
    g.add_argument("--beta", type=zero_or_above, help="weight of the orthogonal regularizer (default 0; paper: 0.1)")
    g.add_argument(
        "--canonical", action=yes_or_no,
        help="rotate the triplets into their singular basis when the window opens (default yes; paper: no)",
    )
    g.add_argument(
        "--spread", type=zero_or_above, metavar="X",
        help="how much better the odds of large triplets are at first: log theta = X log(size / "
        "sqrt(parameters)) + constant (default 8; paper: 0, all alike)",
    )
    g.add_argument(
        "--rule", choices=RULES,
        help="which triplets stay: the best that fit the budget, or those whose median gate is positive "
        "(default budget; paper: median)",
    )
    g.add_argument(
        "--survivors", choices=SURVIVORS,
        help="what the gate of a kept triplet becomes: 1, or its median (default one; paper: median)",
    )
    g.add_argument(
        "--restart", action=yes_or_no,
        help="when the window closes the learning rate starts again from --lr and falls to 0 (default yes; "
        "paper: no)",
    )

    g = p.add_argument_group("training")

    length = g.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=positive, metavar="N",
        help="passes over the training rows (default 12 on a generated task, 3 on an official one)",
    )
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps, instead of --epochs")
    g.add_argument("--batch-size", type=positive, default=32, metavar="N", help="rows per step (default 32)")
    g.add_argument("--lr", type=above_zero, help="learning rate of A, B and the head (default by method)")
    g.add_argument(
        "--warmup", type=share, metavar="F",
        help="the learning rate rises from 0 over this share of all steps: at the start, and at both ends of "
        "the window (default 0.05; paper: 0)",
    )
    g.add_argument(
        "--dropout", type=share, nargs="+", metavar="P",
        help="in the encoder and its head while they train, for hidden states and attention alike or one rate "
        "each (default 0 with adapters; for full, head and the paper's recipe what config.json says)",
    )
    g.add_argument(
        "--max-length", type=positive, default=128, metavar="N",
        help="tokens per row at most (default 128)",
    )
    g.add_argument("--seed", type=int, nargs="+", default=[0], metavar="S", help="one or several runs (default 0)")

    g = p.add_argument_group("hardware")
    g.add_argument(
        "--device",
        help="auto (default), cpu, cuda, cuda:N or mps; several processes share a batch under torchrun "
        "--nproc-per-node=N train_glue_mini.py ...",
    )
    g.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32",
        help="precision of the model's matrix products; weights, gates and penalties stay in fp32 (default fp32)",
    )
    g.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="split each batch into N parts to save memory"
    )
    g.add_argument(
        "--recompute", action="store_true", default=None,
        help="activation checkpointing: compute the activations of a block again for its gradient instead of "
        "keeping them, for memory",
    )
    g.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    g.add_argument(
        "--deterministic", action="store_true", default=None,
        help="let torch use deterministic algorithms only: on CUDA, too, equal seeds then give equal bits, "
        "more slowly",
    )

    g = p.add_argument_group("output")
    g.add_argument(
        "--out", type=path, metavar="DIR",
        help="a new folder for the run (default runs/TASK-METHOD-sSEED, with the recipe in it unless it is the "
        "default, with -1, -2 ... appended if that exists)",
    )
    g.add_argument(
        "--trace", action="store_true", default=None,
        help="log every matrix's gates and orthogonality, too, in RUN/trace.csv and RUN/trace.png",
    )
    g.add_argument(
        "--resume", type=path, metavar="RUN",
        help="go on with an interrupted run; its other settings come from there",
    )

    g = p.add_argument_group("afterwards")
    g.add_argument(
        "--evaluate", type=path, metavar="RUN", help="score a finished run; can be combined with --data and --device"
    )
    g.add_argument(
        "--export", type=path, metavar="RUN",
        help="write a finished run's model for other programs: RUN/peft, an adapter that peft opens, and "
        "RUN/merged, a checkpoint that transformers opens",
    )
    g.add_argument(
        "--predict", type=path, metavar="FILE",
        help="with --evaluate: label the rows of a test file in GLUE's format and write the submission file "
        "into the run's folder",
    )

    return p


def device_of(name):
    """A device that is there, under torchrun the one of this process. Raises ValueError for one that is not."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()  # the meta device can make it, but has nothing to read
    except (RuntimeError, AssertionError, ImportError):
        raise ValueError(f"no device {name!r} here; use --device auto, cpu, or another that is there") from None
    return name


def settle(args):
    """Fill in the defaults that depend on other flags; None is left where a flag does not apply.

    Raises ValueError where flags do not go together.
    """
    gates, triplets, sized = args.method == "salora", args.method in TRIPLET_METHODS, args.method in SIZED_METHODS
    budgeted = args.method in BUDGETED_METHODS
    lacks = {} if gates else {"trained gates": GATE_FLAGS}
    lacks |= {} if budgeted else {"a budget": ["density"]}
    lacks |= {} if args.method == "sora" else {"a threshold": ["reach"]}
    lacks |= {} if sized else {"adapters": ["rank"]}
    lacks |= {} if triplets else {"low-rank adapters": ["alpha", "trace"]}
    for what, flags in lacks.items():
        for flag in flags:
            if getattr(args, flag) is not None:
                flag = "--" + flag.replace("_", "-")
                raise ValueError(f"{flag} is about {what}, and --method {args.method} has none: drop one of them")
    if args.max_length < LEAST_LENGTH:
        room = "room for four special tokens and a word of both sentences"
        raise ValueError(f"--max-length must be at least {LEAST_LENGTH}, {room}, got {args.max_length}")

    official = args.task in TASKS
    defaults = {"lr": METHODS[args.method][official]}
    defaults |= {} if args.steps else {"epochs": 3 if official else 12}
    defaults |= {"rank": 8} if sized else {}
    defaults |= {"alpha": 16.0} if triplets else {}
    defaults |= {"density": 0.5} if budgeted else {}
    defaults |= {"recipe": "ours"} if gates else {}
    recipe = RECIPES[args.recipe or "ours"]()
    whole = args.method in ("full", "head")  # what trains whole keeps its checkpoint's dropout
    shared = ["warmup"] if whole else SHARED_DECISIONS
    defaults |= {name: getattr(recipe, name) for name in [*(GATE_FLAGS[1:] if gates else []), *shared]}
    for flag, value in defaults.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.dropout is not None:
        rates = args.dropout if isinstance(args.dropout, list) else [args.dropout]
        args.dropout = rates * 2 if len(rates) == 1 else rates  # of hidden states, of attention
        if len(args.dropout) != 2:
            raise ValueError(f"--dropout takes one rate or two, got {len(args.dropout)}")
    if budgeted:
        check_density(args.density)
    if gates:
        check_window(*args.window)
    args.device = device_of(args.device or "auto")
    return args


def recipe_of(settings):
    """The Recipe of a SaLoRA run's settings. Raises ValueError for an impossible window."""
    decisions = {f.name: getattr(settings, f.name) for f in fields(Recipe) if f.name != "dropout"}
    return Recipe(**{**decisions, "window": tuple(settings.window)})
