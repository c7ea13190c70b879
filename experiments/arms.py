"""Arms: what studies compare, by one name in all of them.

    lora-4                        METHOD-START: a method of peers.METHODS that ends at the size it starts with
    salora-16-to-4                METHOD-START-to-SIZE: from rank 16, cut to the number of parameters of LoRA r = 4
    salora-8-to-4-window-.2-.5    then, where it is not the default recipe, what differs: see VARIANTS
    svd-16-to-4                   the same cut by singular values alone, without gates
    lora-4-restart                LoRA with SaLoRA's learning rate, which restarts halfway
    rm-lora-4-beta-0              a peer, and what differs from its default: see PEERS
    lora-4-found                  fresh LoRA with the ranks that SaLoRA found on the same task and seed: see PLACEMENTS
    bitfit, ia3, full, head       methods without a size

START is the rank at creation, or the number of units of an adapter, or of vectors of a prefix or prompt.
"""

import argparse
import json
import random
import re
from dataclasses import dataclass, field, replace

import torch

from cli.table import rows_with
from peers import METHODS, allocator_for
from rank_allocator import Recipe
from salora import orthogonality, salora_layers

WARMUP = Recipe.ours().warmup
VARIANTS = {  # of SaLoRA, "" being the default recipe
    "": Recipe.ours(),
    "-paper": Recipe.paper(),
    "-paper-scaled": Recipe.paper_scaled(),
    "-quadratic": Recipe.ours(controller="quadratic"),
    "-window-.2-.5": Recipe.ours(window=(0.2, 0.5)),
    "-no-restart": Recipe.ours(restart=False),
}
SVD = Recipe.svd()
RESTART = replace(SVD, canonical=False, spread=0.0)  # with a budget of 1 nothing is cut
PEERS = {  # variants of other methods: options of their allocators
    "rm-lora": {"-beta-0": {"beta": 0.0}, "-share-1": {"share": 1.0}},  # GM-LoRA, R-LoRA
    "adalora": {"-eq-4": {"regularizer": orthogonality}},  # as in the paper, not as in its authors' code
    "sora": {"-eq-10": {"times_lr": True}},  # so, too
}
# LoRA with the ranks that SaLoRA found from rank 16, with the same ranks shuffled among matrices of one shape, and with
# one rank everywhere; all three have the same draw of A. Found against shuffled shows whether their places matter.
PLACEMENTS = ("-found", "-shuffled", "-uniform")


@dataclass(frozen=True)
class Arm:
    name: str
    family: str  # the name without its size: lora, lora-restart, salora-16, salora-8-paper, svd-16, adapter-h, bitfit
    method: str  # of peers.METHODS
    start: int | None = None  # None: a method without a size
    size: float = 0  # that of LoRA of this rank, or START of what has no triplets
    recipe: Recipe | None = None
    placement: str = ""  # of PLACEMENTS
    options: dict = field(default_factory=dict)  # of PEERS

    @property
    def is_cut(self):
        return "-to-" in self.name

    @property
    def has_triplets(self):
        return METHODS[self.method].low_rank

    def allocator(self, model, optimizer, steps, seed, **options):
        """options: what the allocator of this method alone has."""
        if METHODS[self.method].budgeted:
            options["budget"] = self.size / self.start
        options |= {"warmup": WARMUP, "recipe": self.recipe, **self.options}
        return allocator_for(self.method, model, optimizer, steps, seed=seed, **options)


def arm_of(name):
    """salora-16-to-4 -> its Arm. Raises ArgumentTypeError for any other name."""
    if name in METHODS and not METHODS[name].sized:
        return Arm(name, name, name)
    parts = re.fullmatch(r"(?P<word>.+?)-(?P<start>[1-9]\d*)(-to-(?P<size>\d*\.?\d+))?(?P<variant>-.+)?", name)
    word, start, size, variant = parts.group("word", "start", "size", "variant") if parts else 4 * [""]
    lora = {"": None, "-restart": RESTART, **dict.fromkeys(PLACEMENTS)}
    recipes = {"salora": VARIANTS, "svd": {"": SVD}, "lora": lora}.get(word, {"": None})
    variant = variant or ""
    recipe = recipes.get(variant)
    options = PEERS.get(word, {})
    method = "salora" if recipe else word
    known = (variant in recipes or variant in options) and method in METHODS and METHODS[method].sized
    if not known or (size and not (METHODS[method].budgeted and 0 < float(size) <= int(start))):
        raise argparse.ArgumentTypeError(f"{name!r} is not an arm, such as lora-4, salora-16-to-4 or bitfit; methods "
                                         f"are {', '.join(METHODS)} and svd")  # fmt: skip
    family = (f"{word}-{start}" if size else word) + variant
    if variant in PLACEMENTS:
        return Arm(name, family, method, 16, float(start), placement=variant)
    return Arm(name, family, method, int(start), float(size or start), recipe, options=options.get(variant, {}))


def nearest(arm, table):
    """What a table {name of an arm: value} has for an arm: its own value, or its family's at the nearest size.

    Where its family is not there, SaLoRA from rank 16 stands in for what is cut, and LoRA for what is not.
    """
    for family in (arm.family, "salora-16" if arm.is_cut else "lora"):
        relatives = [arm_of(name) for name in table if arm_of(name).family == family]
        if relatives:
            return table[min(relatives, key=lambda other: abs(other.size - arm.size)).name]
    return None


def place_ranks(args, task, arm, seed, model):
    """Give a model of rank 16 the ranks that SaLoRA has in the study's table, placed as the arm says."""
    source = f"salora-16-to-{arm.size:g}"
    found = rows_with(args.table, task=task, arm=source, seed=seed)
    if not found or not found[0]["ranks"]:
        raise ValueError(f"{arm.name} needs the ranks of {source} on {task}, seed {seed}: run that arm first")
    ranks = json.loads(found[0]["ranks"])
    if arm.placement == "-shuffled":
        shapes = [tuple(layer.base.weight.shape) for layer in salora_layers(model).values()]
        ranks = shuffled(ranks, shapes, random.Random(f"shuffle {seed}"))
    elif arm.placement == "-uniform":
        ranks = [int(arm.size)] * len(ranks)
    for layer, rank in zip(salora_layers(model).values(), ranks, strict=True):
        layer.keep(torch.arange(rank))  # the first triplets of it


def shuffled(ranks, shapes, rng):
    """The ranks in another order, each among the matrices of its shape."""
    ranks = list(ranks)
    for shape in dict.fromkeys(shapes):
        indices = [i for i, other in enumerate(shapes) if other == shape]
        for i, rank in zip(indices, rng.sample([ranks[i] for i in indices], len(indices)), strict=True):
            ranks[i] = rank
    return ranks


def ranks_of(model):
    return [layer.r for layer in salora_layers(model).values()]


def size_of(model):
    """The parameters of a model's triplets, relative to LoRA of rank 8."""
    layers = salora_layers(model).values()
    return sum(layer.r * layer.triplet_size for layer in layers) / sum(8 * layer.triplet_size for layer in layers)
