"""Arms: what studies compare, by one name in all of them.

    lora-4                        METHOD-START: a method of peers.METHODS that ends at the size it starts with
    salora-16-to-4                METHOD-START-to-SIZE: from rank 16, cut to the number of parameters of LoRA r = 4
    salora-8-to-4-window-.2-.5    then, where it is not the default recipe, what differs: see VARIANTS
    svd-16-to-4                   the same cut by singular values alone, without gates
    lora-4-restart                LoRA with SaLoRA's learning rate, which restarts half-way
    bitfit, ia3, full, head       methods without a size

START is the rank at creation, or how many units or vectors an adapter, a prefix or a prompt has.
"""

import argparse
import re
from dataclasses import dataclass, replace

from peers import METHODS, allocator_for
from rank_allocator import Recipe
from salora import salora_layers

WARMUP = Recipe.ours().warmup
VARIANTS = {  # of SaLoRA, "" being the default recipe
    "": Recipe.ours(),
    "-paper": Recipe.paper(),
    "-quadratic": Recipe.ours(controller="quadratic"),
    "-window-.2-.5": Recipe.ours(window=(0.2, 0.5)),
    "-window-.48-.5": Recipe.ours(window=(0.48, 0.5)),
}
SVD = Recipe.ours(window=(0.5, 0.5))  # there is no step in which gates train
RESTART = replace(SVD, canonical=False, spread=0.0)  # with a budget of 1 nothing is cut


@dataclass(frozen=True)
class Arm:
    name: str
    family: str  # the name without its size: lora, lora-restart, salora-16, salora-8-paper, svd-16, adapter-h, bitfit
    method: str  # of peers.METHODS
    start: int | None = None  # None: a method without a size
    size: float = 0  # that of LoRA of this rank, or START of what has no triplets
    recipe: Recipe | None = None

    @property
    def is_cut(self):
        return "-to-" in self.name

    @property
    def has_triplets(self):
        return METHODS[self.method].low_rank

    def allocator(self, model, optimizer, steps, seed, **options):
        """options: those of a peer's allocator."""
        if METHODS[self.method].budgeted:
            options["budget"] = self.size / self.start
        options |= {"warmup": WARMUP, "recipe": self.recipe}
        return allocator_for(self.method, model, optimizer, steps, seed=seed, **options)


def arm_of(name):
    """salora-16-to-4 -> its Arm. Raises ArgumentTypeError for a name that means nothing."""
    if name in METHODS and not METHODS[name].sized:
        return Arm(name, name, name)
    parts = re.fullmatch(r"(?P<word>.+?)-(?P<start>[1-9]\d*)(-to-(?P<size>\d*\.?\d+))?(?P<variant>-.+)?", name)
    word, start, size, variant = parts.group("word", "start", "size", "variant") if parts else 4 * [""]
    recipes = {"salora": VARIANTS, "svd": {"": SVD}, "lora": {"": None, "-restart": RESTART}}.get(word, {"": None})
    variant = variant or ""
    recipe = recipes.get(variant)
    method = "salora" if recipe else word
    known = variant in recipes and method in METHODS and METHODS[method].sized
    if not known or (size and not (METHODS[method].budgeted and 0 < float(size) <= int(start))):
        raise argparse.ArgumentTypeError(f"{name!r} is not an arm, such as lora-4, salora-16-to-4 or bitfit; methods "
                                         f"are {', '.join(METHODS)} and svd")  # fmt: skip
    family = (f"{word}-{start}" if size else word) + variant
    return Arm(name, family, method, int(start), float(size or start), recipe)


def nearest(arm, table):
    """What a table {name of an arm: value} has for an arm: its own value, or its family's at the nearest size.

    Where its family is not there, SaLoRA from rank 16 stands in for what is cut, and LoRA for what is not.
    """
    for family in (arm.family, "salora-16" if arm.is_cut else "lora"):
        relatives = [arm_of(name) for name in table if arm_of(name).family == family]
        if relatives:
            return table[min(relatives, key=lambda other: abs(other.size - arm.size)).name]
    return None


def ranks_of(model):
    return [layer.r for layer in salora_layers(model).values()]


def size_of(model):
    """The parameters of a model's triplets, relative to LoRA of rank 8."""
    layers = salora_layers(model).values()
    return sum(layer.r * layer.triplet_size for layer in layers) / sum(8 * layer.triplet_size for layer in layers)
