"""The parts of a run, from its settings: data, tokens, and a model with its adapters."""

import os
import random
from pathlib import Path

import torch

from cli.files import digest_of
from cli.flags import LEAST_LENGTH, TRIPLET_METHODS
from cli.runs import used
from glue.mini import TASKS as MINI_TASKS
from glue.pretrain import mini_encoder
from glue.tasks import load_task, task_of
from glue.tokens import tokenizer_for
from peers import PEERS
from salora import adapt
from tiny_transformer import SequenceClassifier, load_pretrained

TARGETS = ["query", "key", "value", "out", "up", "down"]  # all six matrices of a layer, as in the paper
DROPOUTS = ["hidden_dropout_prob", "attention_probs_dropout_prob"]


def seed_of(*names):
    """A seed for every use of chance in a run, so that no two of them draw the same numbers."""
    return random.Random(repr(names)).getrandbits(63)


def build(settings):
    """The model of a run, with its adapters, and `encode`: rows of sentences -> rows of token ids.

    Notes in the settings which folder and which dropout rates were used.
    """
    task, mini = task_of(settings.task), settings.task in MINI_TASKS
    if settings.weights is None and not mini:
        raise ValueError(f"task {settings.task} needs --weights DIR, the checkpoint of a RoBERTa or BERT encoder")
    folder = settings.weights or mini_encoder(device=settings.device)
    rates = {} if settings.dropout is None else dict(zip(DROPOUTS, settings.dropout))
    encoder, config = load_pretrained(folder, **rates)
    if settings.method in TRIPLET_METHODS and settings.rank > config.hidden_size:
        raise ValueError(f"--rank {settings.rank} is above {config.hidden_size}, the width of the encoder: "
                         "more triplets than that add nothing")  # fmt: skip
    if settings.rank and settings.rank > 4 * config.hidden_size:
        raise ValueError(f"--rank {settings.rank} is above {4 * config.hidden_size}, four times the encoder's width")
    encoder.recompute = settings.recompute
    tokenizer = tokenizer_for(folder, config, mini)
    settings.weights = str(Path(folder).resolve())  # so that --evaluate and --resume find it from anywhere
    settings.dropout = [getattr(config, name) for name in DROPOUTS]

    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may not be used
    torch.use_deterministic_algorithms(bool(settings.deterministic))
    torch.manual_seed(seed_of(settings.seed, "weights"))
    model = SequenceClassifier(encoder, task.num_labels)
    if settings.method in TRIPLET_METHODS:
        adapt(model, TARGETS, settings.rank, settings.alpha).classifier.requires_grad_(True)
    elif settings.method in PEERS:
        size = [] if settings.rank is None else [settings.rank]
        PEERS[settings.method].install(model, *size)
    elif settings.method == "head":
        model.encoder.requires_grad_(False)
    length = min(settings.max_length, model.encoder.config.max_length)  # a prompt takes up some of its encoder's
    if length < LEAST_LENGTH:
        raise ValueError(f"--rank {settings.rank} leaves room for {length} tokens of a row: take a shorter prompt")
    return model.to(settings.device), lambda rows: tokenizer.encode(rows, length)


def prepare(settings):
    """All that bad input can break: (model, train, dev), the rows encoded."""
    train, dev = load_task(settings.task, settings.data)
    model, encode = build(settings)
    return model, encode(train[: settings.rows]), encode(dev)


def plan_of(settings, model, train):
    """What a resumed run must have in common with the interrupted one: all that decides its numbers, as a dict.

    Where the data and the encoder lie may change, what they hold may not.
    """
    plan = {name: value for name, value in used(settings).items() if name not in ("device", "weights", "data")}
    tokens = sum(len(ids) for ids, *_ in train)
    return {**plan, "training rows": f"{len(train)} of {tokens} tokens", "frozen weights": frozen_digest(model)}


def frozen_digest(model):
    """A digest of the weights that came with the checkpoint and do not train."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    return digest_of({name: p for name, p in frozen.items() if not name.endswith("log_theta")})
