"""Is it the ranks? Fresh LoRA with the ranks that SaLoRA found, with the same ranks shuffled, and with one rank.

    python experiments/transplant.py --kinds words reverse --seeds 0 1 2

A SaLoRA of LoRA r=4's size is trained after a shift of the language (experiments/shift.py), and thrown away but for its
ranks. Then three LoRAs of that size train from the start, with one schedule, learning rate and scale, those that tuning
gave LoRA r=4:

    found      every matrix has the rank that SaLoRA gave it
    shuffled   the same ranks, in another order among the matrices of one shape
    uniform    rank 4 everywhere

Found against shuffled says whether it matters where the rank is; found against uniform, what that is worth. What then
is left between SaLoRA and `found` comes from training many triplets and cutting them, not from the ranks. Rows go to
transplant.csv in --out, and those that are there are not run again.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from budget import FixedRanks, Recipe
from cli.files import append, has_row, make_folder, read_table, rows_with
from cli.flags import positive
from cli.runs import STUDY, errors_as_lines
from experiments import shift
from experiments.arms import arm_of, tuned
from experiments.intervals import interval, paired
from salora import salora_layers

PLACEMENTS = ["found", "shuffled", "uniform"]


def found_ranks(out, data, arm, seed, steps):
    """The ranks of this arm's run: from ranks.csv where experiments/shift.py left them, or from a run of it now."""
    found = rows_with(out / "ranks.csv", kind=data.kind, arm=arm.name, seed=seed)
    if found:
        return json.loads(found[0]["ranks"])
    return shift.measure(data, arm, *tuned(arm), seed, steps)["ranks"]


def shuffled(ranks, shapes, rng):
    """The ranks in another order, each among the matrices of its shape."""
    ranks = list(ranks)
    for shape in dict.fromkeys(shapes):
        places = [i for i, other in enumerate(shapes) if other == shape]
        for place, rank in zip(places, rng.sample([ranks[i] for i in places], len(places)), strict=True):
            ranks[place] = rank
    return ranks


def place(model, ranks):
    """Give every matrix its rank: the first triplets of it stay."""
    for layer, rank in zip(salora_layers(model).values(), ranks, strict=True):
        layer.keep(torch.arange(rank))


def one(data, placement, ranks, seed, steps):
    """A row: LoRA with these ranks, or with the placement that is made of them."""
    lr, scale = tuned(arm_of("lora-4"))
    model = shift.adapted(16, scale, seed)
    shapes = [tuple(layer.base.weight.shape) for layer in salora_layers(model).values()]
    ranks = {
        "found": ranks,
        "shuffled": shuffled(ranks, shapes, random.Random(f"shuffle {seed}")),
        "uniform": [4] * len(ranks),
    }[placement]
    place(model, ranks)
    shift.fit(model, data, lr, seed, steps, lambda model, optimizer: FixedRanks(model, steps, Recipe.ours().warmup))
    size, loss = shift.size_of(model), data.loss(model)
    values = [data.kind, placement, round(size, 4), seed, round(loss, 4), ranks]
    return dict(zip(["kind", "placement", "size", "seed", "loss", "ranks"], values, strict=True))


def table(rows):
    """Means, and paired differences with 95 % bootstrap intervals over seeds."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        losses = {name: {} for name in PLACEMENTS}
        for row in rows:
            if row["kind"] == kind:
                losses[row["placement"]][row["seed"]] = float(row["loss"])
        means = ", ".join(f"{name} {mean(found.values()):.4f}" for name, found in losses.items() if found)
        lines.append(f"{kind}: {means}")
        for rival in PLACEMENTS[1:]:
            gaps = [a - b for a, b in zip(*paired(losses, "found", rival))]
            if len(gaps) > 1:
                low, high = interval(gaps)
                wins = sum(gap < 0 for gap in gaps)
                lines.append(f"  found - {rival:<9}{mean(gaps):>+8.4f}  [{low:+.4f}, {high:+.4f}]"
                             f"  below 0 in {wins} of {len(gaps)}")  # fmt: skip
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=shift.KINDS, default=["words", "reverse"], metavar="KIND",
                        help="default words reverse")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default 0 1 2")
    parser.add_argument("--arm", type=arm_of, default=arm_of("ours-4"), metavar="METHOD-4",
                        help="whose ranks (default ours-4)")  # fmt: skip
    parser.add_argument("--steps", type=positive, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--texts", type=positive, default=8000, metavar="N", help="to train on (default 8000)")
    parser.add_argument("--out", default="runs/shift", metavar="DIR", help="default runs/shift")
    args = parser.parse_args(argv)
    out = Path(args.out)
    path = out / "transplant.csv"
    with errors_as_lines(parser, hint=STUDY):
        make_folder(out)
        for seed in args.seeds:
            for kind in args.kinds:
                missing = [name for name in PLACEMENTS if not has_row(path, kind=kind, seed=seed, placement=name)]
                if not missing:
                    continue
                data = shift.data_of(kind, seed, args.texts)
                ranks = found_ranks(out, data, args.arm, seed, args.steps)
                for placement in missing:
                    started = time.time()
                    row = one(data, placement, ranks, seed, args.steps)
                    append(path, row)
                    seconds = time.time() - started
                    print(f"{kind}, {placement}, seed {seed}: {row['loss']:.4f}, {seconds:.0f} s", flush=True)
        rows = read_table(path)
        print(table(rows))
        return rows


if __name__ == "__main__":
    main()
