"""The parts of a run, from its settings: data, tokens, and a model with its adapters."""

import os
import random

import torch

from cli.files import digest_of
from cli.flags import LEAST_LENGTH
from cli.settings import used
from glue.mini import TASKS as MINI_TASKS
from glue.tasks import load_task, task_of
from glue.tokens import tokenizer_for
from hub.adapters import ids_of_adapters
from hub.roberta import load_pretrained
from peers import METHODS, install
from tiny_transformer import SequenceClassifier


def seed_of(*names):
    """A seed for each source of randomness in a run, so that no two of them draw the same numbers."""
    return random.Random(repr(names)).getrandbits(63)


def build(settings):
    """The model of a run, with its adapters, and `encode`: rows of sentences -> rows of token ids."""
    hidden, attention = settings.dropout
    rates = dict(hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
    encoder, config = load_pretrained(settings.weights, **rates)
    width = config.hidden_size
    if METHODS[settings.method].low_rank and settings.rank > width:
        raise ValueError(f"--rank {settings.rank} is above {width}, the width of the encoder: "
                         "more triplets than that add nothing")  # fmt: skip
    if settings.rank and settings.rank > 4 * width:
        raise ValueError(f"--rank {settings.rank} is above {4 * width}, four times the encoder's width")
    encoder.recompute = settings.recompute
    tokenizer = tokenizer_for(settings.weights, config, settings.task in MINI_TASKS)

    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not be used
    torch.use_deterministic_algorithms(bool(settings.deterministic))
    torch.manual_seed(seed_of(settings.seed, "weights"))
    model = SequenceClassifier(encoder, task_of(settings.task).num_labels)
    install(model, settings.method, settings.rank, settings.alpha, settings.quantize)
    length = min(settings.max_length, model.encoder.config.max_length)  # a prompt takes up some of its encoder's
    if length < LEAST_LENGTH:
        raise ValueError(f"--rank {settings.rank} leaves room for {length} tokens of a row: take a shorter prompt")
    return model.to(settings.device), lambda rows: tokenizer.encode(rows, length)


def prepare(settings):
    """Everything that bad input can break: (model, train, dev), the rows encoded."""
    train, dev = load_task(settings.task, settings.data)
    model, encode = build(settings)
    return model, encode(train[: settings.rows]), encode(dev)


def fingerprint(settings, model, train):
    """What a resumed run must have in common with the interrupted one: all that decides its numbers, as a dict.

    Where the data and the encoder lie may change, what they hold may not. The allocator checks its own decisions.
    """
    elsewhere = ("device", "weights", "data", "gate_lr")
    decisive = {name: value for name, value in used(settings).items() if name not in elsewhere}
    rows = f"{len(train)}, digest {digest_of(repr(train))}"
    return {**decisive, "training rows": rows, "frozen weights": frozen_digest(model)}


def frozen_digest(model):
    """A digest of the weights that came with the checkpoint and do not train."""
    ours = ids_of_adapters(model)
    return digest_of({name: p for name, p in model.named_parameters() if not (p.requires_grad or id(p) in ours)})
