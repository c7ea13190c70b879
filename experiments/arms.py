"""Arms: METHOD-R, a method at the size of LoRA of rank R, with the learning rate and scale that tuning gave it.

experiments/shift.py says what each method is, and tunes and compares them; other experiments take arms from here.
"""

import argparse
from typing import NamedTuple

from budget import FixedRanks, RankAllocator, Recipe
from cli.flags import METHODS as MAIN_METHODS
from peers import PEERS, Peer

TUNE_SEED = 100  # which no report uses

# The arms: the rank at creation (None: R) and the recipe (None: LoRA as it is), or a peer.


def head_only(model):
    model.encoder.requires_grad_(False)
    model.lm_head.requires_grad_(True)


RESTART = Recipe.ours(window=(0.5, 0.5), canonical=False, spread=0.0)  # nothing is cut at density 1
METHODS = {
    "lora": (None, None),
    "restart": (None, RESTART),
    "ours": (16, Recipe.ours()),
    "early": (16, Recipe.ours(window=(0.2, 0.5))),
    "short": (16, Recipe.ours(window=(0.48, 0.5))),
    "svd": (16, Recipe.ours(window=(0.5, 0.5))),
    "paper": (8, Recipe.paper()),
    "narrow": (8, Recipe.ours(window=(0.2, 0.5))),
    "late": (8, Recipe.ours()),
    "wider": (32, Recipe.ours()),
    "quadratic": (16, Recipe.ours(controller="quadratic")),
    **{name: (8 if peer.budgeted else None, peer) for name, peer in PEERS.items()},
    "full": (None, Peer(lambda model: model.encoder.requires_grad_(True), sized=False)),
    "head": (None, Peer(head_only, sized=False)),
}


# Methods without triplets
INSTALLED = {name: peer for name, (_, peer) in METHODS.items() if isinstance(peer, Peer) and peer.install}
UNSIZED = [name for name, peer in INSTALLED.items() if not peer.sized]


class Arm(NamedTuple):
    name: str
    method: str
    rank: float  # R: the size is that of LoRA of this rank, or the units of what is installed

    @property
    def r0(self):
        """The rank at creation."""
        return METHODS[self.method][0] or int(self.rank)

    @property
    def recipe(self):
        """That of the method, or its peer."""
        return METHODS[self.method][1]

    def allocator(self, model, optimizer, steps, seed, **options):
        """options: of a peer's allocator."""
        recipe = self.recipe
        if recipe is None or self.method in INSTALLED:
            return FixedRanks(model, steps, Recipe.ours().warmup)
        if isinstance(recipe, Peer):
            options |= {"density": self.rank / self.r0} if recipe.budgeted else {}
            return recipe.allocator(model, optimizer, steps, warmup=Recipe.ours().warmup, seed=seed, **options)
        return RankAllocator(model, optimizer, steps, self.rank / self.r0, recipe, seed)


def arm_of(name):
    """ours-4 -> its Arm. Raises ArgumentTypeError for a name that means nothing."""
    if name in UNSIZED:
        return Arm(name, name, 0)
    method, _, rank = name.rpartition("-")
    try:
        arm = Arm(name, method, float(rank))
        has_ranks = method in METHODS and method not in UNSIZED
        fits = has_ranks and 0 < arm.rank <= arm.r0 and (METHODS[method][0] or arm.rank == int(arm.rank))
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"{name!r} is not METHOD-R with a method of {', '.join(METHODS)} and a rank R "
                                         f"that it can have ({', '.join(UNSIZED)} have none)")  # fmt: skip
    return arm


def triangle(top):
    """[(learning rate, scale)] whose product is at most top."""
    return [(lr, scale) for lr in (6e-3, 1.2e-2, 2.4e-2, 4.8e-2) for scale in (1, 2, 4, 8) if lr * scale <= top]


GRID = triangle(2.4e-2)
WIDE = triangle(4.8e-2)  # of experiments/compare.py: the best of some competing methods is at the edge of GRID

# Learning rate and scale (alpha / rank at creation) of the arms: the smallest mean over words and reverse in tune.csv,
# since the best on words alone is often at the edge of divergence, and beyond it on reverse. All of these arms saw all
# of GRID on both kinds.

TUNED = {
    "lora-8": (6e-3, 4),
    "lora-4": (1.2e-2, 2),
    "lora-2": (1.2e-2, 2),
    "lora-1": (2.4e-2, 1),
    "restart-8": (6e-3, 2),
    "restart-4": (1.2e-2, 1),
    "restart-2": (1.2e-2, 2),
    "restart-1": (1.2e-2, 2),
    "ours-4": (6e-3, 2),
    "ours-2": (6e-3, 2),
    "ours-1": (6e-3, 2),
    "ours-0.5": (6e-3, 2),
    "early-1": (1.2e-2, 1),
    "early-0.5": (6e-3, 2),
    "svd-4": (6e-3, 2),
    "svd-2": (6e-3, 2),
    "svd-1": (6e-3, 2),
    "svd-0.5": (6e-3, 2),
    "narrow-4": (6e-3, 2),
    "late-4": (1.2e-2, 1),
    "wider-4": (6e-3, 1),
    "wider-2": (6e-3, 1),
    "wider-1": (6e-3, 1),
    "paper-4": (1.2e-2, 2),
}


def grid_of(arm, grid):
    """What tuning tries: a grid, and for an arm without triplets as many learning rates, and no scale.

    LoRA's best ones are 3 to 12 times as high here as in the main job, so these start at half of the main job's.
    """
    if arm.method not in INSTALLED:
        return grid
    middle, _ = MAIN_METHODS[arm.method]
    return [(middle * 2 ** (i - 1), 1) for i in range(len(grid))]


def ranking(values, highest=False):
    """{learning rate: loss or score} -> text, the best first: the lowest, or the highest."""
    best = sorted(values, key=values.get, reverse=highest)
    return ", ".join(f"{values[lr]:.4f} ({lr:g})" for lr in best)


def trial(text):
    """0.006:2 -> (0.006, 2.0): a learning rate and a scale."""
    lr, _, scale = text.partition(":")
    try:
        return float(lr), float(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LR:SCALE, such as 0.006:2") from None


def tuned(arm, values=TUNED):
    """(lr, scale) of an arm; one that was not tuned takes those of its method, or of LoRA, at the nearest rank.

    Without triplets it takes one from the middle of its grid.
    """
    if arm.method in INSTALLED:
        return grid_of(arm, GRID)[3]
    for method in (arm.method, "lora" if METHODS[arm.method][0] is None else "ours"):
        names = [name for name in values if name.startswith(method + "-")]
        if names:
            return values[min(names, key=lambda name: abs(float(name.rpartition("-")[2]) - arm.rank))]
