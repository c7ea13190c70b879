"""The parts of a run, from its settings: data, tokens, and a model with its adapters."""

import random
from pathlib import Path

import torch

from cli.flags import LEAST_LENGTH, TRIPLET_METHODS
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
    encoder.recompute = settings.recompute
    tokenizer = tokenizer_for(folder, config, mini)
    settings.weights = str(Path(folder).resolve())  # so that --evaluate and --resume find it from anywhere
    settings.dropout = [getattr(config, name) for name in DROPOUTS]

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


def prepare(settings, folder):
    """All that bad input can break: (model, train, dev), rows encoded. Makes the run's folder when the rest is done."""
    train, dev = load_task(settings.task, settings.data)
    model, encode = build(settings)
    train, dev = encode(train[: settings.rows]), encode(dev)
    folder.mkdir(parents=True, exist_ok=True)
    return model, train, dev
