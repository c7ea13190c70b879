"""The settings of a run: made once, from the flags of a command line or from the settings.json of an earlier run."""

import argparse
import json
import os
from dataclasses import fields, replace
from pathlib import Path

from budget import check_budget
from cli.flags import GATE_FLAGS, LEAST_LENGTH, build_parser, device_of
from glue.mini import TASKS as MINI_TASKS
from glue.pretrain import mini_encoder
from glue.tasks import TASKS
from hub.checkpoints import read_json, write_atomically
from hub.roberta import read_config
from peers import METHODS
from rank_allocator import Recipe

RECIPES = {"ours": Recipe.ours, "paper": Recipe.paper, "paper-scaled": Recipe.paper_scaled, "svd": Recipe.svd}
NOT_OF_THE_RUN = ("out", "resume", "evaluate", "export", "predict", "command", "decisions")  # but of this call


def settle(args):
    """The settings of one run, from parsed flags: every default that depends on other flags is filled in, and None is
    left where a flag does not apply. Pre-trains the tiny encoder if it is needed and not there yet.

    settings.decisions is the Recipe. Raises ValueError where flags do not go together, FileNotFoundError where the
    checkpoint of --weights is not there.
    """
    check_flags(args)
    method, official = METHODS[args.method], args.task in TASKS
    settings = argparse.Namespace(**vars(args))
    settings.device = device_of(args.device or "auto")

    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    given |= {"window": tuple(args.window)} if args.window else {}
    given.pop("dropout", None)  # there may be two rates: see dropout_rates
    recipe = RECIPES[args.recipe or "ours"](**given)
    settings.decisions = replace(recipe, dropout=None)  # applied here, where the encoder is loaded

    weights = args.weights or mini_encoder(device=settings.device)  # all that can be refused before has been
    settings.weights = os.path.realpath(weights)  # so that --evaluate and --resume find it from anywhere
    if args.data is not None:
        settings.data = os.path.realpath(args.data)

    defaults = {"lr": method.lr[official], "warmup": settings.decisions.warmup, "precision": method.precision}
    if not args.steps:
        defaults["epochs"] = 3 if official else 12
    if method.sized:
        defaults["rank"] = 8
    if method.low_rank:
        defaults["alpha"] = 16.0
    if method.quantize:
        defaults["quantize"] = method.quantize
    if method.budgeted:
        defaults["budget"] = 0.5
    if args.method == "salora":
        defaults["recipe"] = "ours"
        defaults |= {name: getattr(settings.decisions, name) for name in GATE_FLAGS if name != "recipe"}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(settings, name, value)
    settings.dropout = dropout_rates(args, recipe, weights)
    return settings


def check_flags(args):
    """Raises ValueError where flags do not go together."""
    method = METHODS[args.method]
    applies = {  # the flags that not every method has: what they are about, and whether this method has that
        "trained gates": (GATE_FLAGS, args.method == "salora"),
        "a budget": (["budget"], method.budgeted),
        "a threshold": (["sparse_lambda"], args.method == "sora"),
        "adapters": (["rank"], method.sized),
        "low-rank adapters": (["alpha", "quantize", "trace"], method.low_rank),
    }
    for what, (flags, there) in applies.items():
        given = [flag for flag in flags if getattr(args, flag) is not None]
        if given and not there:
            flag = "--" + given[0].replace("_", "-")
            raise ValueError(f"{flag} is about {what}, and --method {args.method} has none: drop one of them")
    if method.budgeted and args.budget is not None:
        check_budget(args.budget)
    if args.max_length < LEAST_LENGTH:
        room = "room for four special tokens and a word of both sentences"
        raise ValueError(f"--max-length must be at least {LEAST_LENGTH}, {room}, got {args.max_length}")
    if args.dropout is not None and len(args.dropout) > 2:
        raise ValueError(f"--dropout takes one rate or two, got {len(args.dropout)}")
    if args.weights is None and args.task not in MINI_TASKS:
        raise ValueError(f"task {args.task} needs --weights DIR, the checkpoint of a RoBERTa or BERT encoder")


def dropout_rates(args, recipe, weights):
    """[rate of hidden states, rate of attention], from --dropout, the recipe or the checkpoint's config.json."""
    rates = args.dropout
    keeps = args.method in ("full", "child-tuning", "head")  # what trains whole keeps its checkpoint's dropout
    if rates is None and not keeps:
        rates = recipe.dropout
    if rates is None:
        config = read_config(Path(weights))
        return [config.hidden_dropout_prob, config.attention_probs_dropout_prob]
    rates = rates if isinstance(rates, list) else [rates]
    return rates * 2 if len(rates) == 1 else rates


def used(settings, **more):
    """The settings as settings.json has them: a dict without those that do not apply."""
    values = {k: v for k, v in vars(settings).items() if k not in NOT_OF_THE_RUN}
    return json.loads(json.dumps({k: v for k, v in {**values, **more}.items() if v is not None}))


def write_settings(settings, folder, gate_lr=None):
    """Write settings.json. gate_lr: the value that the default took in this run."""
    text = json.dumps(used(settings, gate_lr=gate_lr), indent=1) + "\n"
    write_atomically(folder / "settings.json", lambda path: path.write_text(text, encoding="utf-8"))


def read_settings(folder, device=None, **changes):
    """The settings of the run in a folder, on another device if one is given, and with these changes.

    They pass through the parser, like flags. Raises ValueError where this program would not have written them so.
    """
    try:
        found = read_json(folder / "settings.json")
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no settings.json in {folder}; expected the folder of a run") from None
    damaged = ValueError(f"{folder}/settings.json is damaged, or of another version of this program")

    def refuse(*_):
        raise damaged

    if "weights" not in found:  # or the tiny encoder would be pre-trained before it is refused
        raise damaged
    parser = build_parser()
    parser.error = parser.print_help = refuse
    args = parser.parse_args(flags_of({**found, "device": "cpu"}))
    args.seed = args.seed[0]
    args.device = "cpu"
    try:
        settings = settle(args)
    except ValueError:
        raise damaged from None
    if used(settings) != {**found, "device": "cpu"}:
        raise damaged
    return argparse.Namespace(**{**vars(settings), "device": device_of(device or str(found.get("device"))), **changes})


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
