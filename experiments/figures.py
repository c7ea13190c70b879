"""The paper's figures and tables in miniature: python experiments/figures.py ITEM, and ITEM --help for its flags.

    fig1      LoRA in one kind of matrix, in one block, or with one rank in all matrices
    fig3      density of the Hard-Concrete distribution, sampled and in closed form
    fig4      loss against the rank at the start: LoRA, and SaLoRA that keeps half of it
    fig5      loss against the budget b, from r = 8, and LoRA of the same size
    fig7      the rank of every matrix, averaged over seeds
    table3    ablation: without the Lagrangian, and without orthogonality
    gates     not in the paper: an animation of the gates of the main job as they close

All but fig3 and gates train after a shift of the language (experiments/shift.py), with the learning rates and scales
that tuning found there; the measure is the masked-word loss, lower is better. For a first look add `--steps 300 --seeds
0`. The published recipe has its eta_c scaled to the window, or nothing would close in so few steps. For Figure 6
`train_glue_mini.py --recipe paper-scaled --trace` draws C, lambda and orthogonality. Tables 1, 2 and 4 are compare.py,
table2.py and cost.py. Left out: Figure 2, which is a drawing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import json
from dataclasses import replace

import torch

import train_glue_mini
from cli.files import made
from cli.flags import folder
from cli.pictures import draw_gates, split_name
from cli.program import Parser, errors_as_lines
from cli.table import read_table
from experiments import arms, plots, shift
from experiments.study import AGAIN
from hard_concrete import GAMMA, TAU, ZETA, prob_above, prob_one, prob_open, sample_gate
from hub.checkpoints import write_atomically
from salora import salora_layers


class LambdaZero(arms.Arm):
    """Algorithm 1 whose lambda stays 0: log_theta goes down the gradient of the task's loss alone."""

    def allocator(self, *args, **options):
        allocator = super().allocator(*args, **options)
        allocator.lagrangian.ascend = lambda: None
        return allocator


def arm_of(name):
    """An arm of experiments/arms.py, also one such as lora-8-in-up, or of SaLoRA with -lambda-0 or -beta-0 added."""
    whole, _, place = name.partition("-in-")
    plain = whole.removesuffix("-lambda-0").removesuffix("-beta-0")
    arm = arms.arm_of(plain)
    if place not in ["", *PLACES] or (plain != whole and arm.method != "salora"):
        raise argparse.ArgumentTypeError(f"{name!r} is not an arm: only SaLoRA has lambda and beta, and places are "
                                         f"{', '.join(PLACES)}")  # fmt: skip
    if name.endswith("-lambda-0"):
        return LambdaZero(**{**vars(arm), "name": name})
    if name.endswith("-beta-0"):
        arm = replace(arm, recipe=replace(arm.recipe, beta=0.0))
    return replace(arm, name=name)


def default_trial(args, task, arm):
    """The learning rate and scale that the shift study has for an arm; at every rank SaLoRA has those of 8 to 4."""
    if arm.method == "salora":
        return shift.TUNED["salora-8-to-4-paper-scaled" if "paper" in arm.name else "salora-8-to-4"]
    return arms.nearest(arms.arm_of(f"lora-{arm.start}"), shift.TUNED)


def measure(args, task, arm, seed, trial):
    """One run: its loss, its size, C at T_end, and the rank of every matrix."""
    lr, scale = trial
    data, model = shift.data_of(task, seed, args.texts), shift.model_of(arm, scale, seed)
    layers = salora_layers(model)
    _, _, place = arm.name.partition("-in-")
    for name, layer in layers.items():
        block, matrix = split_name(name)
        if place not in ("", matrix, f"block-{block}"):
            layer.keep(torch.arange(0))
    allocator = shift.train(model, data, arm, lr, seed, args.steps)
    found = {"loss": data.loss(model), "size": arms.size_of(model), "C": allocator.C_end}
    ranks = json.dumps({name: layer.r for name, layer in layers.items()})
    return {**{key: round(value, 4) for key, value in found.items()}, "ranks": ranks}


def lora_of_size(name, names):
    return [other for other in names if other == f"lora-{arm_of(name).size:g}" != name]


def published(name, names):
    return [other for other in names if other == "salora-8-to-4-paper-scaled" != name]


def over_starts(rows):
    return plots.curves(rows, lambda row: arm_of(row["arm"]).start, "rank r at the start (SaLoRA keeps half)")


def over_sizes(rows):
    return plots.curves(rows, lambda row: float(row["size"]), "adapter parameters at the end, relative to LoRA r = 8")


def item(name, arm_names, draw, **more):
    options = {"doc": ABOUT[name], "name": name, "arms": arm_names, "draw": draw, "default_tasks": ["words"], **more}
    return replace(shift.STUDY, measure=measure, columns=["loss", "size", "C", "ranks"], more=["size", "C"],
                   arm_of=arm_of, default=default_trial, **options)  # fmt: skip


LORAS = ["lora-1", "lora-2", "lora-4", "lora-8"]
PLACES = ["query", "key", "value", "out", "up", "down", "block-0", "block-1", "block-2"]
STARTS = [f"salora-{r}-to-{r // 2}{recipe}" for recipe in ("", "-paper-scaled") for r in (2, 4, 8, 16)]
SIZES = [f"salora-8-to-{size}{recipe}" for recipe in ("", "-paper-scaled") for size in (1, 2, 4, 6)]
ABLATION = [f"salora-8-to-4-paper-scaled{change}" for change in ("", "-lambda-0", "-beta-0")]
ABOUT = {line.split()[0]: line.strip() for line in __doc__.splitlines() if line.startswith("    ")}
ITEMS = {
    "fig1": item("fig1", [f"lora-8-in-{place}" for place in PLACES] + LORAS, plots.places),
    "fig4": item("fig4", [*LORAS[1:], "lora-16", *STARTS], over_starts, rivals=lora_of_size),
    "fig5": item("fig5", [*LORAS, "lora-6", *SIZES], over_sizes, rivals=lora_of_size),
    "fig7": item("fig7", ["salora-8-to-4", "salora-8-to-4-paper-scaled"], plots.ranks),
    "table3": item("table3", ABLATION, None, default_tasks=["words", "reverse"], rivals=published),
}


def density_of(log_theta, t):
    """The density of a gate at t in (0, 1): minus the derivative of prob_above in t."""
    p = prob_above(log_theta, t)
    return p * (1 - p) * TAU * (1 / (t - GAMMA) + 1 / (ZETA - t))


def fig3(args):
    """Lines and bars are closed forms, points are 200,000 samples in 20 bins."""
    figure, axes = plots.panels(1, 3, 14, 4.6)
    generator = torch.Generator().manual_seed(0)
    bins = (torch.arange(20, dtype=torch.float64) + 0.5) / 20  # their middles
    for axis, log_theta in zip(axes, torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)):
        g = sample_gate(log_theta, torch.rand(200_000, generator=generator, dtype=torch.float64))
        masses = torch.stack([1 - prob_open(log_theta), prob_one(log_theta)])
        sampled = [(g == 0).double().mean(), (g == 1).double().mean()]
        axis.plot(bins, [density_of(log_theta, t) for t in bins.tolist()], color=plots.BLUE, lw=2, label="density")
        found = torch.histc(g[(g > 0) & (g < 1)], 20, 0, 1) * 20 / len(g)
        axis.plot(bins, found, "o", color=plots.RED, label="sampled")
        axis.bar([0, 1], masses.tolist(), 0.05, color=plots.SKY, label="mass at 0 and at 1")
        axis.plot([0, 1], sampled, "o", color=plots.RED)
        axis.set(title=f"log theta = {log_theta:g}", xlabel="gate g", ylim=(0, None))
        print(f"log theta {log_theta:>2g}: P(g = 0) = {masses[0]:.5f}, sampled {sampled[0]:.5f}")
    axes[0].set_ylabel("density, or mass")
    axes[1].legend()
    write_atomically(args.out / "fig3.png", lambda part: figure.savefig(part, format="png", dpi=110))


def gates(args):
    """Run the main job, or the rest of it, unless its run is there, and draw its gates."""
    run = args.out / "run"
    if (run / "checkpoint.pt").is_file():
        train_glue_mini.main(["--resume", str(run)])
    if not (run / "summary.json").is_file():
        train_glue_mini.main(["--trace", "--out", str(run)])
    draw_gates(read_table(run / "log.csv"), read_table(run / "trace.csv"), args.out / "gates.gif")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", choices=[*ABOUT], metavar="ITEM", help=", ".join(ABOUT))
    with errors_as_lines(parser, hint=AGAIN):
        name = parser.parse_args(argv[:1]).item
        if name in ITEMS:
            return ITEMS[name].main(argv[1:])
        parser = Parser(description=ABOUT[name])
        parser.add_argument("--out", type=folder, default=Path("runs") / name, metavar="DIR",
                            help=f"default runs/{name}")  # fmt: skip
        args = parser.parse_args(argv[1:])
        with made(args.out):
            {"fig3": fig3, "gates": gates}[name](args)
        print(f"see {args.out}")


if __name__ == "__main__":
    main()
