"""From the published algorithm to ours, one change at a time: what does each change buy?

    python experiments/ladder.py shift --tune                  learning rate and scale of every rung, on seed 100
    python experiments/ladder.py shift planted tasks           every rung on every measure, seeds 0 to 4
    python experiments/ladder.py --report                      the table of what is there, no training

A rung is the one above it with one change. All of them end at the size of LoRA r=4 (--size). The measures:

    words, reverse    masked-word loss after a shift of the language (experiments/shift.py), each rung with its own
                      learning rate and scale, the best of GRID
    planted           share of the matrices whose planted rank is found, noise 1 (experiments/planted_ranks.py), for
                      rungs that start at rank 8; 600 steps, since at 1,200 nearly all are right
    three tasks       scores of mini-cola, mini-mrpc and mini-rte by the main job, for rungs that its flags can express

Below the ladder stand alternatives to its last rung. Two of them have ideas of their own: `energy` ranks a triplet by
what it adds to the outputs, |B_i| rms(A_i x), instead of |B_i| |A_i|; `four cuts` removes triplets at .2, .3, .4 and .5
of all steps, each time the smallest singular values, so that the others can make up for them.
Every run is a row of ladder.csv in --out; rows that are there are not run again.
"""

import argparse
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from budget import C_START, RankAllocator, Recipe, lr_factor, project
from cli.files import append, has_row, make_folder, read_table
from cli.flags import positive
from cli.runs import STUDY, errors_as_lines
from experiments import planted_ranks, shift
from experiments.arms import TUNE_SEED
from experiments.methods import main_job

TASKS = ["mini-cola", "mini-mrpc", "mini-rte"]
GRID = [(6e-3, 1), (6e-3, 2), (1.2e-2, 1), (1.2e-2, 2)]  # learning rate, scale: where arms.GRID has its best points


class ByEnergy(RankAllocator):
    """The informed start by |B_i| rms(A_i x) instead of |B_i| |A_i|, over the inputs x of the last 50 steps before."""

    def before_step(self, step):
        if step == max(0, self.schedule.T_start - 50):
            self.watch()
        super().before_step(step)

    def watch(self):
        layers = self.layers.values()
        self.second_moments = {layer: torch.zeros(2 * [layer.A.shape[1]]) for layer in layers}  # sums of x x^T (k, k)
        self.places = dict.fromkeys(layers, 0)
        self.hooks = [layer.register_forward_pre_hook(self.see) for layer in layers]

    @torch.no_grad()
    def see(self, layer, inputs):
        x = inputs[0].flatten(0, -2)  # (places, k)
        self.second_moments[layer] += x.T @ x
        self.places[layer] += len(x)

    @torch.no_grad()
    def _release(self):
        super()._release()
        for hook in self.hooks:
            hook.remove()
        for layer in self.layers.values():
            squares = ((layer.A @ self.second_moments[layer]) * layer.A).sum(1)  # of A_i x, summed over x: (r,)
            rms = (squares / self.places[layer]).clamp_min(0).sqrt()
            size = layer.B.norm(dim=0) * rms / layer.triplet_size**0.5
            layer.gate.log_theta.copy_(self.recipe.spread * torch.log(size.clamp_min(1e-6)))
        project(self.layers, C_START)


class FourCuts(RankAllocator):
    """Instead of one cut at T_end four, .1 of all steps apart, whose densities fall by one and the same factor."""

    @property
    def earlier(self):
        """{step: density} of the cuts before the last."""
        end, apart = self.schedule.T_end, round(0.1 * self.total_steps)
        return {end - (4 - i) * apart: self.density ** (i / 4) for i in (1, 2, 3)}

    def lr_factor(self, step):
        rises = (0, *self.earlier, self.schedule.T_end)
        falls_from = self.schedule.T_end if step >= self.schedule.T_end else 0
        return lr_factor(step, self.total_steps, self.recipe.warmup, rises, falls_from)

    def _enter_phase(self):
        if self.step in self.earlier:
            final, self.density = self.density, self.earlier[self.step]
            self._release()
            self._decide()
            self.density = final
        super()._enter_phase()


class Rung(NamedTuple):
    """A method at the size of LoRA of `rank`; what experiments/shift.py measures as an arm."""

    name: str
    rank: float
    r0: int
    recipe: Recipe
    Allocator: type
    method: str = "ours"

    def model(self, scale, seed):
        return shift.adapted(self.r0, scale, seed)

    def allocator(self, model, optimizer, steps, seed, density=None):
        return self.Allocator(model, optimizer, steps, density or self.rank / self.r0, self.recipe, seed)


def ladder(rank=4):
    """{name: Rung}, from the paper's recipe up; then the alternatives to the last rung."""
    recipe = Recipe.paper()
    rungs = {"paper": (8, recipe, RankAllocator)}

    def rung(name, r0=8, **changes):
        nonlocal recipe
        recipe = replace(recipe, **changes)
        rungs[name] = (r0, recipe, RankAllocator)

    def alternative(name, Allocator=RankAllocator, **changes):
        rungs[name] = (16, replace(recipe, **changes), Allocator)

    rung("budget rule", rule="budget", survivors="one")
    rung("no regularizer", beta=0.0)
    rung("canonical", canonical=True)
    rung("informed start", spread=8.0)
    rung("projection", controller="projection")
    rung("warm-up", warmup=0.05)
    rung("restart", restart=True, dropout=0.0)  # the tiny encoder has no dropout to leave out
    rung("late", window=(0.4, 0.5))  # the main job's default
    rung("wide", r0=16)
    alternative("early", window=(0.2, 0.5))
    alternative("quadratic", controller="quadratic")
    alternative("energy", ByEnergy)
    alternative("no gates", window=(0.5, 0.5))
    alternative("no gates, energy", ByEnergy, window=(0.5, 0.5))
    alternative("four cuts", FourCuts, window=(0.5, 0.5))
    return {name: Rung(name, rank, *parts) for name, parts in rungs.items()}


def above(rungs):
    """{name: the rung that it is compared with}: the one before; for an alternative, the last of the ladder."""
    names = list(rungs)
    last = names.index("wide")
    return {name: names[min(i, last + 1) - 1] for i, name in enumerate(names) if i > 0}


# One run on each measure: (its value, the density kept, C at T_end where it is known).


def tuned(rows, rung):
    """(lr, scale): the smallest mean loss over both kinds on the tuning seed; raises ValueError for an untuned rung."""
    losses = {}
    for row in rows:
        if (row["rung"], row["rank"], row["seed"]) == (rung.name, f"{rung.rank:g}", str(TUNE_SEED)):
            losses.setdefault((float(row["lr"]), float(row["scale"])), []).append(float(row["value"]))
    whole = {trial: mean(some) for trial, some in losses.items() if len(some) == 2}
    if not whole:
        raise ValueError(f"{rung.name} has not been tuned at this size: first run ladder.py shift --tune with the same "
                         "--size and --out")  # fmt: skip
    return min(whole, key=whole.get)


def on_shift(rung, kind, seed, steps, lr, scale):
    found = shift.measure(shift.data_of(kind, seed, 8000), rung, lr, scale, seed, steps or 1000)
    return found["loss"], found["size"] * 8 / rung.r0, found["C"]


def on_planted(rung, seed, steps):
    def allocator_of(model, optimizer, steps, density):
        return rung.allocator(model, optimizer, steps, seed, density)

    row = planted_ranks.learn("bank", steps or 600, rung.name, 1.0, seed, allocator_of)
    return row["right"], row["share"], None


def flags_of(rung):
    """The main job's flags for a rung."""
    decisions = {name: value for name, value in asdict(rung.recipe).items() if value is not None}
    flags = ["--rank", str(rung.r0), "--alpha", str(2 * rung.r0), "--density", str(rung.rank / rung.r0)]
    for name, value in decisions.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag if value else f"--no-{name}"]
        elif isinstance(value, tuple):
            flags += [flag, *map(str, value)]
        else:
            flags += [flag, str(value)]
    return flags


def on_task(rung, task, seed, steps, out):
    folder = out / f"{rung.name}-{task}-s{seed}-{time.time_ns()}".replace(" ", "")
    flags = flags_of(rung) + (["--steps", str(steps)] if steps else [])
    summary = main_job([*flags, "--task", task, "--seed", str(seed), "--out", str(folder)])
    return summary["score"], summary["density_kept"], summary["density_expected"]


def runs_of(args, rungs, rows):
    """(rung, measure, seed, lr, scale, what to call) of all that is asked for, an hour of work or many."""
    for seed in [TUNE_SEED] if args.tune else args.seeds:
        for measure in args.measures:
            for rung in rungs:
                if measure == "shift":
                    for kind in ("words", "reverse"):
                        for lr, scale in GRID if args.tune else [tuned(rows, rung)]:
                            yield rung, kind, seed, lr, scale, (on_shift, rung, kind, seed, args.steps, lr, scale)
                elif measure == "planted" and rung.r0 == planted_ranks.RANK:
                    yield rung, "planted", seed, "", "", (on_planted, rung, seed, args.steps)
                elif measure == "tasks" and rung.Allocator is RankAllocator:
                    for task in TASKS:
                        yield rung, task, seed, "", "", (on_task, rung, task, seed, args.steps, Path(args.out))


def climb(args, rungs, path):
    for rung, measure, seed, lr, scale, (function, *inputs) in runs_of(args, rungs, read_table(path)):
        row = {"rung": rung.name, "rank": f"{rung.rank:g}", "measure": measure, "seed": seed, "lr": lr, "scale": scale}
        if has_row(path, **row):
            continue
        started = time.time()
        with redirect_stdout(None):
            value, kept, C = function(*inputs)
        seconds = round(time.time() - started, 1)
        found = {"value": round(value, 4), "kept": round(kept, 4), "C": C, "seconds": seconds}
        append(path, {**row, **found})
        print(f"{measure}, {rung.name}, seed {seed}, {lr} {scale}: {value:.4f}, {seconds:.0f} s", flush=True)


def report(rows, rungs):
    """A line a rung: the mean of every measure, and its difference from the rung above, +- two standard errors."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    found = {}
    for row in rows:
        if int(row["seed"]) != TUNE_SEED:
            found.setdefault((row["rung"], row["measure"]), {})[row["seed"]] = float(row["value"])
    lines = [f"{'':<18}" + "".join(f"{measure:>26}" for measure in measures)]
    for name in rungs:
        line, rival = f"{name:<18}", above(rungs).get(name)
        for measure in measures:
            ours, theirs = found.get((name, measure), {}), found.get((rival, measure), {})
            gaps = torch.tensor([ours[seed] - theirs[seed] for seed in ours if seed in theirs], dtype=torch.float64)
            cell = f"{mean(ours.values()):.4f}" if ours else "-"
            if len(gaps) > 1:
                cell += f" {gaps.mean():+.4f} +- {2 * gaps.std() / len(gaps) ** 0.5:.4f}"
            line += f"{cell:>26}"
        lines.append(line)
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(ladder())
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help="of shift, planted, tasks (default all)")
    parser.add_argument("--rungs", nargs="+", choices=names, default=names, metavar="RUNG",
                        help=f"of {', '.join(names)} (default all)")  # fmt: skip
    parser.add_argument("--size", type=positive, default=4, metavar="R", help="that of LoRA of rank R (default 4)")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), metavar="S", help="default 0 to 4")
    parser.add_argument("--tune", action="store_true", help=f"try four learning rates and scales on seed {TUNE_SEED}")
    parser.add_argument("--steps", type=positive, metavar="N", help="a run's (default: by measure)")
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    parser.add_argument("--out", default="runs/ladder", metavar="DIR", help="default runs/ladder")
    args = parser.parse_args(argv)
    args.measures = args.measures or (["shift"] if args.tune else ["shift", "planted", "tasks"])
    unknown = set(args.measures) - {"shift", "planted", "tasks"}
    if unknown:
        parser.error(f"no measure {', '.join(sorted(unknown))}: expected shift, planted or tasks")
    if args.tune and args.measures != ["shift"]:
        parser.error("--tune is for shift alone: the other measures have one learning rate for all rungs")
    path = Path(args.out) / "ladder.csv"
    rungs = ladder(args.size)
    with errors_as_lines(parser, hint=STUDY):
        make_folder(path.parent)
        if not args.report:
            climb(args, [rungs[name] for name in args.rungs], path)
        rows = [row for row in read_table(path) if row["rank"] == str(args.size)]
        print(report(rows, rungs))
        return rows


if __name__ == "__main__":
    main()
