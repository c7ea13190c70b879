"""From the published algorithm to ours, one change at a time: what does each change buy?

    python experiments/ladder.py --tune                  learning rate and scale of every rung, by both shifts
    python experiments/ladder.py                         every rung after both shifts, seeds 0 to 4
    python experiments/ladder.py --report                the table of what is there, no training

A rung is the one above it with one change: eta_c is scaled to the window, then come CHANGES (until-X has all up to X).
All end at the size of LoRA r = 4. Below the ladder stand alternatives to its last rung. The measure is the masked-word
loss after a shift of the language (experiments/shift.py); experiments/planted_ranks.py knows the same rungs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from argparse import ArgumentTypeError
from dataclasses import replace

from experiments import shift
from experiments.arms import arm_of
from rank_allocator import Recipe

GRID = [(6e-3, 1), (6e-3, 2), (1.2e-2, 1), (1.2e-2, 2)]  # learning rate, scale: where shift.GRID has its best points
PUBLISHED = ["salora-8-to-4-paper", "salora-8-to-4-paper-scaled"]
CHANGES = {  # to the paper's recipe with a scaled eta_c, in this order
    "budget-rule": dict(rule="budget", survivors="one"),
    "no-regularizer": dict(beta=0.0),
    "canonical": dict(canonical=True),
    "informed-start": dict(spread=8.0),
    "projection": dict(controller="projection"),
    "warm-up": dict(warmup=0.05),
}
NEXT = ["salora-8-to-4-window-.2-.5", "salora-8-to-4", "salora-16-to-4"]  # restart, then the late window, then rank 16
ALTERNATIVES = [f"salora-16-to-4-{change}" for change in ("window-.2-.5", "quadratic", "no-restart")] + ["svd-16-to-4"]


def rungs():
    """{name: Arm}, from the paper's recipe up; then the alternatives to the last rung."""
    found, recipe = {name: arm_of(name) for name in PUBLISHED}, Recipe.paper_scaled()
    for change, values in CHANGES.items():
        recipe = replace(recipe, **values)
        name = f"salora-8-to-4-until-{change}"
        found[name] = replace(arm_of("salora-8-to-4"), name=name, recipe=recipe)
    return found | {name: arm_of(name) for name in NEXT + ALTERNATIVES}


RUNGS = rungs()


def rung_of(name):
    if name not in RUNGS:
        raise ArgumentTypeError(f"{name!r} is not a rung: {', '.join(RUNGS)}")
    return RUNGS[name]


def above(name, names):
    """The rung that another is compared with: the one before it, or for an alternative the last of the ladder."""
    order = list(RUNGS)
    rival = NEXT[-1] if name in ALTERNATIVES else order[max(0, order.index(name) - 1)]
    return [rival] if rival in names and rival != name else []


STUDY = replace(
    shift.STUDY,
    doc=__doc__,
    name="ladder",
    tasks=["words", "reverse"],
    arms=list(RUNGS),
    arm_of=rung_of,
    trials=lambda args, task, arm: GRID,
    default=None,
    rivals=above,
    draw=None,
)
main = STUDY.main

if __name__ == "__main__":
    main()
