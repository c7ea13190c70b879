"""Is it the ranks? Three arms more: fresh LoRA with the ranks that SaLoRA found, with these shuffled, with one rank.

    lora-4-found      every matrix has the rank that salora-16-to-4 gave it in its run on the same task and seed
    lora-4-shuffled   the same ranks, in another order among the matrices of one shape
    lora-4-uniform    rank 4 everywhere: LoRA r = 4 with another draw of A

Found against shuffled says whether it matters where the rank is; found against uniform, what that is worth. What then
is left between SaLoRA and lora-4-found comes from training many triplets and cutting them, not from the ranks.
"""

import json
import random

import torch

from cli.files import rows_with
from experiments.arms import Arm
from salora import salora_layers

SOURCE = "salora-16-to-4"
PLACED = {name: Arm(name, "lora", "lora", 16, 4) for name in ("lora-4-found", "lora-4-shuffled", "lora-4-uniform")}


def ranks_for(args, task, arm, seed, model):
    """The ranks of a placed arm, from the row of SOURCE in the study's table. Raises ValueError where there is none."""
    found = rows_with(args.table, task=task, arm=SOURCE, seed=seed)
    if not found or not found[0]["ranks"]:
        raise ValueError(f"{arm.name} needs the ranks of {SOURCE} on {task}, seed {seed}: run that arm first")
    ranks = json.loads(found[0]["ranks"])
    shapes = [tuple(layer.base.weight.shape) for layer in salora_layers(model).values()]
    return {
        "lora-4-found": ranks,
        "lora-4-shuffled": shuffled(ranks, shapes, random.Random(f"shuffle {seed}")),
        "lora-4-uniform": [4] * len(ranks),
    }[arm.name]


def shuffled(ranks, shapes, rng):
    """The ranks in another order, each among the matrices of its shape."""
    ranks = list(ranks)
    for shape in dict.fromkeys(shapes):
        indices = [i for i, other in enumerate(shapes) if other == shape]
        for i, rank in zip(indices, rng.sample([ranks[i] for i in indices], len(indices)), strict=True):
            ranks[i] = rank
    return ranks


def place(model, ranks):
    """Give every matrix its rank: the first triplets of it stay."""
    for layer, rank in zip(salora_layers(model).values(), ranks, strict=True):
        layer.keep(torch.arange(rank))
