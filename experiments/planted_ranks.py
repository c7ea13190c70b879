"""Does SaLoRA find the ranks that are there? A student learns a teacher: the same frozen network plus known updates.

    python experiments/planted_ranks.py                                      a bank of 16 linear maps of 32 x 32
    python experiments/planted_ranks.py --tasks transformer --seeds 0 1 2    the tiny encoder with its word scores

Every matrix of the teacher has an update of a planted rank from 0 to 8. The student sees only the teacher's outputs, in
maps-.1 and maps-1 with noise of that standard deviation, and may keep as many parameters as those updates need. Arms:

    salora-8, salora-8-paper    SaLoRA from rank 8, by the default recipe and by the published one
    lora-8-svd                  LoRA of rank 8, cut by singular values to the same budget after training
    lora                        LoRA of one rank in all matrices, the largest that fits the budget

and, if --arms names them, salora-8 with one decision taken differently, and the rungs of experiments/ladder.py (a name
that means nothing lists all).
"""

import argparse
import copy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import peers
from budget import freeze_gates
from experiments import plots
from experiments.ladder import RUNGS
from experiments.study import Study
from glue.metrics import spearman
from glue.pretrain import mini_encoder
from hub.roberta import load_pretrained
from rank_allocator import Recipe
from salora import adapt, canonicalize, prune, salora_layers
from tiny_transformer import MaskedLM
from train_glue_mini import fine_tune

RANK = 8
ARMS = {  # name -> recipe; without one it is LoRA
    "salora-8": Recipe.ours(),
    "salora-8-paper": Recipe.paper(),
    "lora-8-svd": None,
    "lora": None,
    "salora-8-spread-0": Recipe.ours(spread=0.0),
    "salora-8-not-canonical": Recipe.ours(canonical=False, spread=0.0),
    "salora-8-beta-.1": Recipe.ours(beta=0.1),
    "salora-8-warmup-0": Recipe.ours(warmup=0.0),
    "salora-8-median": Recipe.ours(rule="median"),
    "salora-8-quadratic": Recipe.ours(controller="quadratic"),
    "salora-8-no-restart": Recipe.ours(restart=False),
    "salora-8-window-.5-.8": Recipe.ours(window=(0.5, 0.8)),
}
ARMS |= {name.replace("-to-4", ""): arm.recipe for name, arm in RUNGS.items() if arm.start == RANK}


class Maps(nn.ModuleList):
    """Independent linear maps: x (batch, maps, k) -> (batch, maps, d)."""

    def forward(self, x):
        return torch.stack([f(x[:, i]) for i, f in enumerate(self)], dim=1)


class WordScores(MaskedLM):
    """Token ids (batch, seq) -> the scores of every word at every position (batch, seq, vocab)."""

    def forward(self, ids):
        return super().forward(self.encoder(ids))


def maps(seed, rows):
    """(a new network, its targets, inputs)"""
    torch.manual_seed(seed)
    return Maps(nn.Linear(32, 32, bias=False) for _ in range(16)), [r"\d+"], torch.randn(rows, 16, 32)


def transformer(seed, rows):
    torch.manual_seed(seed)
    with redirect_stdout(None):
        encoder, config = load_pretrained(mini_encoder())
    return WordScores(encoder).eval(), peers.TARGETS, torch.randint(5, config.vocab_size, (rows, 12))


TASKS = {  # network, noise, steps, batch size, learning rate
    "maps-.1": (maps, 0.1, 1200, 64, 5e-3),
    "maps-1": (maps, 1.0, 1200, 64, 5e-3),
    "transformer": (transformer, 0.0, 8000, 32, 3e-3),
}


def plant(network, targets, generator):
    """Give every target an update of a random rank with singular values from 0.5 to 1.5. Returns the ranks."""
    adapt(network, targets, RANK, alpha=RANK)
    ranks = []
    for layer in salora_layers(network).values():
        for p in (layer.B, layer.A.T):
            p.data.copy_(torch.linalg.qr(torch.randn(p.shape, generator=generator))[0])  # orthonormal columns
        layer.B.data *= 0.5 + torch.rand(RANK, generator=generator)
        ranks.append(int(torch.randint(RANK + 1, (), generator=generator)))
        layer.gate.fix((torch.arange(RANK) < ranks[-1]).float())
    return ranks


def cut_by_svd(layers, budget):
    """Keep the largest singular values of all updates, as many as fit the budget."""
    for layer in layers:
        canonicalize(layer)
        layer.gate.log_theta.data = layer.B.norm(dim=0) * layer.A.norm(dim=1)
    freeze_gates(layers, budget)
    for layer in layers:
        prune(layer)


def measure(args, task, arm, seed, trial):
    """Plant, train, count."""
    make, noise, steps, batch_size, lr = TASKS[task]
    steps = args.steps or steps
    network, targets, inputs = make(seed, steps * batch_size)
    test = make(seed + 10**6, 256)[2]
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(network)
    planted = plant(teacher, targets, generator)
    sizes = [layer.triplet_size for layer in salora_layers(teacher).values()]
    needed = sum(rank * size for rank, size in zip(planted, sizes, strict=True))
    budget = needed / (RANK * sum(sizes))

    def batch_of(rows, model, device):
        x = torch.stack([row for row, in rows])  # a row of data is (its input,)
        with torch.no_grad():
            y = teacher.eval()(x)
        return (x,), y + noise * torch.randn(y.shape, generator=generator)

    torch.manual_seed(seed)
    rank = needed // sum(sizes) if arm.name == "lora" else RANK
    adapt(network, targets, rank, alpha=rank)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr)
    options = {"recipe": arm.recipe, "budget": budget} if arm.recipe else {"warmup": Recipe.ours().warmup}
    method = "salora" if arm.recipe else "lora"
    allocator = peers.allocator_for(method, network, optimizer, steps, seed=seed, **options)
    with redirect_stdout(None):
        fine_tune(network, [(x,) for x in inputs], optimizer, allocator, lr=lr, batch_size=batch_size, seed=seed,
                  batch_of=batch_of)  # fmt: skip
    layers = salora_layers(network).values()
    if arm.name == "lora-8-svd":
        cut_by_svd(layers, budget)
    learned = [layer.r for layer in layers]
    with torch.no_grad():
        loss = (network.eval()(test) - teacher(test)).square().mean().item()
    right = mean(a == b for a, b in zip(learned, planted, strict=True))
    kept = sum(layer.r * layer.triplet_size for layer in layers) / needed
    found = {"right": right, "correlation": spearman(learned, planted), "share": kept, "loss": loss}
    return {**found, "planted": planted, "learned": learned}


def arm_of(name):
    if name not in ARMS:
        raise argparse.ArgumentTypeError(f"{name!r} is not an arm of this study: {', '.join(ARMS)}")
    return SimpleNamespace(name=name, recipe=ARMS[name])


STUDY = Study(
    doc=__doc__,
    name="planted",
    measure=measure,
    columns=["right", "correlation", "share", "loss", "planted", "learned"],
    more=["correlation", "share", "loss"],
    tasks=list(TASKS),
    default_tasks=["maps-.1", "maps-1"],
    arms=list(ARMS)[:4],
    seeds=range(20),
    lowest=False,
    arm_of=arm_of,
    draw=lambda rows: plots.planted(rows, RANK),
)
main = STUDY.main

if __name__ == "__main__":
    main()
