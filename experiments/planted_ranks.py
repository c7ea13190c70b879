"""Does SaLoRA find the ranks that are there? A student learns a teacher: the same frozen maps plus known updates.

    python experiments/planted_ranks.py

Each of 16 linear maps of 32 x 32 has an update of a planted rank from 0 to 8 in the teacher. The student sees only the
teacher's outputs, with noise of standard deviation .1 or 1, and may keep as many parameters as those updates need:

    salora-8                    SaLoRA from rank 8, by the default recipe
    salora-8-paper-scaled       the same by the published recipe, eta_c scaled to the window
    lora-8-svd                  LoRA of rank 8, cut by singular values to the same budget after training
    lora                        LoRA of one rank in all maps, the largest that fits the budget

and, if --arms names them, the rungs of experiments/ladder.py that start at rank 8, such as salora-8-until-budget-rule.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import copy
from contextlib import redirect_stdout
from statistics import mean
from types import SimpleNamespace

import torch
from torch import nn

import peers
from budget import freeze_gates
from experiments import plots
from experiments.ladder import RUNGS
from experiments.study import Study
from glue.metrics import spearman
from rank_allocator import Recipe
from salora import adapt, canonicalize, prune, salora_layers
from train_glue_mini import fine_tune

RANK, BATCH, LR, MAPS, D = 8, 64, 5e-3, 16, 32
NOISE = {"maps-.1": 0.1, "maps-1": 1.0}
RECIPES = {name.replace("-to-4", ""): arm.recipe for name, arm in RUNGS.items() if arm.start == RANK}
RECIPES |= {"lora-8-svd": None, "lora": None}


class Maps(nn.ModuleList):
    """Independent linear maps: x (batch, maps, k) -> (batch, maps, d)."""

    def forward(self, x):
        return torch.stack([f(x[:, i]) for i, f in enumerate(self)], dim=1)


def network_of(seed, rows):
    """(new maps, their inputs)"""
    torch.manual_seed(seed)
    return Maps(nn.Linear(D, D, bias=False) for _ in range(MAPS)), torch.randn(rows, MAPS, D)


def plant(network, generator):
    """Give every map an update of a random rank with singular values from 0.5 to 1.5. Returns the ranks."""
    adapt(network, [r"\d+"], RANK, alpha=RANK)
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
    network, inputs = network_of(seed, args.steps * BATCH)
    _, test = network_of(seed + 10**6, 256)
    generator = torch.Generator().manual_seed(seed)
    teacher = copy.deepcopy(network)
    planted = plant(teacher, generator)
    budget = sum(planted) / (MAPS * RANK)

    def batch_of(rows, model, device):
        x = torch.stack([row for (row,) in rows])  # a row of data is (its input,)
        with torch.no_grad():
            y = teacher.eval()(x)
        return (x,), y + NOISE[task] * torch.randn(y.shape, generator=generator)

    torch.manual_seed(seed)
    rank = sum(planted) // MAPS if arm.name == "lora" else RANK
    adapt(network, [r"\d+"], rank, alpha=rank)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=LR)
    options = {"recipe": arm.recipe, "budget": budget} if arm.recipe else {"warmup": Recipe.ours().warmup}
    method = "salora" if arm.recipe else "lora"
    allocator = peers.allocator_for(method, network, optimizer, args.steps, seed=seed, **options)
    with redirect_stdout(None):
        fine_tune(network, [(x,) for x in inputs], optimizer, allocator, lr=LR, batch_size=BATCH, seed=seed,
                  batch_of=batch_of)  # fmt: skip
    layers = salora_layers(network).values()
    if arm.name == "lora-8-svd":
        cut_by_svd(layers, budget)
    learned = [layer.r for layer in layers]
    with torch.no_grad():
        loss = (network.eval()(test) - teacher(test)).square().mean().item()
    right = mean(a == b for a, b in zip(learned, planted, strict=True))
    share = sum(learned) / sum(planted)  # of the budget that was spent
    found = {"right": right, "correlation": spearman(learned, planted), "share": share, "loss": loss}
    return {**found, "planted": planted, "learned": learned}


def arm_of(name):
    if name not in RECIPES:
        raise argparse.ArgumentTypeError(f"{name!r} is not an arm of this study: {', '.join(RECIPES)}")
    return SimpleNamespace(name=name, recipe=RECIPES[name])


STUDY = Study(
    doc=__doc__,
    name="planted",
    measure=measure,
    columns=["right", "correlation", "share", "loss", "planted", "learned"],
    more=["correlation", "share", "loss"],
    tasks=list(NOISE),
    arms=["salora-8", "salora-8-paper-scaled", "lora-8-svd", "lora"],
    seeds=range(20),
    steps=1200,
    lowest=False,
    arm_of=arm_of,
    draw=lambda rows: plots.planted(rows, RANK),
)
main = STUDY.main

if __name__ == "__main__":
    main()
