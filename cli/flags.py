"""The command line of the main job: its flags and their types. What follows from them is in cli/settings.py."""

import argparse
import os
from dataclasses import fields
from pathlib import Path

import torch

from budget import RULES, SURVIVORS
from cli.program import Parser
from glue.tasks import NAMES
from peers import METHODS
from rank_allocator import CONTROLLERS, Recipe

ABOUT = "Fine-tune an encoder on a GLUE task, or on a generated stand-in for one, with SaLoRA."
LEAST_LENGTH = 6  # tokens: four special ones and a word of both sentences
# The flags about trained gates: the recipe and its decisions, but for those that are about every method
GATE_FLAGS = ["recipe", *(f.name for f in fields(Recipe) if f.name not in ("warmup", "dropout"))]
LARGEST = 1e36  # of a number on the command line: ten times as much must still fit float32
MOST = 10**12  # of whole numbers: what is made of them must still fit 64 bits


def positive(text):
    if not text.isdecimal() or float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    if float(text) >= MOST:
        raise argparse.ArgumentTypeError(f"expected a number below {MOST:g}, got {text!r}")
    return int(text)


def whole(text):
    try:
        value = int(text)
    except ValueError:
        value = MOST
    if abs(value) >= 10**9:
        raise argparse.ArgumentTypeError(f"expected a whole number below 10^9, got {text!r}")
    return value


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


def folder(text):
    return Path(path(text))


def build_parser():
    """Every flag with its help. None stands for a default that depends on other flags: see cli/settings.py."""
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
        "or a method of peers/: " + ", ".join(list(METHODS)[4:]),
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
    g.add_argument(
        "--quantize", choices=["nf4"],
        help="nf4: keep the frozen matrices under the triplets in 4 bits each (default: as the checkpoint has them; "
        "qlora: nf4)",
    )
    g.add_argument("--alpha", type=above_zero, help="the scale of an update is alpha / rank (default 16)")
    g.add_argument(
        "--budget", type=float, metavar="B",
        help="share of the adapter parameters to keep (default 0.5)",
    )
    g.add_argument(
        "--sparse-lambda", type=above_zero, metavar="X",
        help="sora: its lambda at the highest level; the larger it is, the more triplets are removed (default 0.0007)",
    )
    g.add_argument(
        "--recipe", choices=["ours", "paper", "paper-scaled", "svd"],
        help="ours (default): what measured best; paper: the published algorithm; paper-scaled: the same, with a "
        "gate-lr that lets short runs reach the budget; svd: no gates, one cut by singular values. The flags below "
        "override single decisions",
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
        "--gate-lr", type=above_zero, metavar="ETA",
        help="step size of log theta and lambda (default max(0.01, 14 / steps of the window); paper: 0.01)",
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
        help="the learning rate rises from 0 over this share of all steps, at the start and where it restarts "
        "(default 0.05; paper: 0)",
    )
    g.add_argument(
        "--dropout", type=share, nargs="+", metavar="P",
        help="in the encoder and its head while they train, for hidden states and attention alike or one rate "
        "each (default 0 with adapters; for full, child-tuning, head and the paper's recipe what config.json says)",
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
        "--precision", choices=["fp32", "bf16"],
        help="precision of the model's matrix products; weights, gates and penalties stay in fp32 (default fp32; "
        "qlora: bf16)",
    )
    g.add_argument(
        "--accumulate", type=positive, default=1, metavar="N", help="split each batch into N parts to save memory"
    )
    g.add_argument(
        "--recompute", action="store_true", default=None,
        help="activation checkpointing: compute the activations of a block again for its gradient instead of "
        "keeping them, for memory; implies --eager",
    )
    g.add_argument(
        "--eager", action="store_true", default=None,
        help="on CUDA, run steps kernel by kernel, for a debugger or to save memory, instead of recording them as CUDA "
        "graphs",
    )
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
        help="go on with an interrupted run, whose settings are used",
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
