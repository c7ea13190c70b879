"""Is it the ranks? Fresh LoRA with the ranks that SaLoRA found, with the same ranks shuffled, and with one rank.

    python experiments/transplant.py --seeds 0 1 2

A SaLoRA of LoRA r = 4's size is trained after a shift of the language (experiments/shift.py), and thrown away but for
its ranks. Then three LoRAs of that size train from the start, with the learning rate and scale of LoRA r = 4:

    lora-4-found      every matrix has the rank that SaLoRA gave it
    lora-4-shuffled   the same ranks, in another order among the matrices of one shape
    lora-4-uniform    rank 4 everywhere: LoRA r = 4 with another draw of A

Found against shuffled says whether it matters where the rank is; found against uniform, what that is worth. What then
is left between SaLoRA and lora-4-found comes from training many triplets and cutting them, not from the ranks.
"""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.files import rows_with
from experiments import shift
from experiments.arms import Arm, arm_of
from salora import salora_layers

SOURCE = "salora-16-to-4"
PLACED = {name: Arm(name, "lora", 16, 4) for name in ("lora-4-found", "lora-4-shuffled", "lora-4-uniform")}


def shuffled(ranks, shapes, rng):
    """The ranks in another order, each among the matrices of its shape."""
    ranks = list(ranks)
    for shape in dict.fromkeys(shapes):
        indices = [i for i, other in enumerate(shapes) if other == shape]
        for i, rank in zip(indices, rng.sample([ranks[i] for i in indices], len(indices)), strict=True):
            ranks[i] = rank
    return ranks


def ranks_for(args, task, arm, seed, model):
    """The ranks of a placed arm, from the row of SOURCE. Raises ValueError where there is none yet."""
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


def place(model, ranks):
    """Give every matrix its rank: the first triplets of it stay."""
    for layer, rank in zip(salora_layers(model).values(), ranks, strict=True):
        layer.keep(torch.arange(rank))


def measure(args, task, arm, seed, trial):
    if arm.name not in PLACED:
        return shift.measure(args, task, arm, seed, trial)
    lr, scale = trial
    data, model = shift.data_of(task, seed, args.texts), shift.model_of(arm, scale, seed)
    place(model, ranks_for(args, task, arm, seed, model))
    shift.train(model, data, arm, lr, seed, args.steps)
    return shift.result_of(model, data)


def rivals(name, names):
    return [other for other in names if other in PLACED and other != name] if name == "lora-4-found" else []


STUDY = replace(
    shift.STUDY,
    doc=__doc__,
    name="transplant",
    measure=measure,
    arms=[SOURCE, *PLACED],
    seeds=range(3),
    arm_of=lambda name: PLACED.get(name) or arm_of(name),
    rivals=rivals,
    report=None,
    draw=None,
)
main = STUDY.main

if __name__ == "__main__":
    main()
