"""Move the four numbers of a gate, and see what becomes of it: exercises 1 to 3 in one picture.

    python course/explore_gate.py                      a window with sliders
    python course/explore_gate.py --save gate.png      a picture of one gate, for slides
    python course/explore_gate.py --save gate.png --log-theta -2.4 --tau 0.5

The curve is the density of the stretched sample s, before it is clamped. What lies outside of [0, 1] becomes a gate of
exactly 0 or exactly 1: the two bars. In a handout, the functions are yours as far as they are written (course/run.py).
"""

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.ending import Parser, ending_in_a_line

SLIDERS = {  # name: (lowest, highest, at the start)
    "log_theta": (-6.0, 6.0, 0.0),
    "tau": (0.1, 2.0, 1.0),
    "gamma": (-0.6, -0.02, -0.1),
    "zeta": (1.02, 1.6, 1.1),
}
POINTS = 600


def facts_of(log_theta, tau, gamma, zeta):
    """Everything in the picture: lists "s" and "density", numbers "closed", "open", "one", "median" and "mean"."""
    from hard_concrete import mean_gate, median_gate, prob_above, prob_one, prob_open

    theta, rest = torch.tensor(log_theta, dtype=torch.float64), (tau, gamma, zeta)
    step = (zeta - gamma) / POINTS
    s = [gamma + (i + 0.5) * step for i in range(POINTS)]
    density = []
    for t in s:
        p = float(prob_above(theta, t, *rest))
        density.append(p * (1 - p) * tau * (1 / (t - gamma) + 1 / (zeta - t)))  # minus the derivative of P(s > t)
    found = {"open": prob_open, "one": prob_one, "median": median_gate, "mean": mean_gate}
    numbers = {name: float(function(theta, *rest)) for name, function in found.items()}
    return {"s": s, "density": density, "closed": 1 - numbers["open"], **numbers}


def draw(axes, facts):
    """The curve, what is clamped in another color, the two bars, and the numbers in the title."""
    axes.clear()
    s, density = facts["s"], facts["density"]
    inside = [0 <= value <= 1 for value in s]
    axes.fill_between(s, density, where=inside, color="tab:blue", alpha=0.3, label="density of s")
    axes.fill_between(s, density, where=[not value for value in inside], color="tab:red", alpha=0.3, label="clamped")
    axes.plot(s, density, color="tab:blue", linewidth=1)
    masses = [facts["closed"], facts["one"]]
    axes.bar([0, 1], masses, width=0.02, color="tab:red", label="probability of exactly 0 and of exactly 1")
    axes.axvline(facts["mean"], color="black", linestyle=":", label="mean")
    axes.axvline(facts["median"], color="black", linestyle="--", label="median")
    axes.set_ylim(0, min(5, 1.5 * max(density + masses)))
    axes.set_xlabel("s before, g after the clamp")
    axes.set_title("P(g = 0) {closed:.3f}   P(g > 0) {open:.3f}   P(g = 1) {one:.3f}   median {median:.3f}   "
                   "E[g] {mean:.3f}".format(**facts), fontsize=10)  # fmt: skip
    axes.legend(loc="upper center", fontsize=8)


def window(values):
    """Opens it, and returns when it is closed. Raises ValueError where there is no screen."""
    import matplotlib.pyplot as plt
    from matplotlib.widgets import Slider

    if plt.get_backend().lower() == "agg":
        raise ValueError("no window can be opened here: write a picture with --save FILE")
    figure, axes = plt.subplots(figsize=(8, 6))
    figure.subplots_adjust(bottom=0.32)
    sliders = {}
    for i, (name, (low, high, _)) in enumerate(SLIDERS.items()):
        place = figure.add_axes((0.15, 0.18 - 0.045 * i, 0.7, 0.03))
        sliders[name] = Slider(place, name, low, high, valinit=values[name])

    def redraw(_=None):
        draw(axes, facts_of(**{name: slider.val for name, slider in sliders.items()}))
        figure.canvas.draw_idle()

    for slider in sliders.values():
        slider.on_changed(redraw)
    redraw()
    plt.show()


def save(path, values):
    """Writes the picture, without sliders, but with their values in its label. Raises ValueError for a kind of file
    that matplotlib does not know."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, facts_of(**values))
    axes.set_xlabel("   ".join(f"{name} {value:g}" for name, value in values.items()))
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write a picture (.png, .pdf, .svg) and open no window"
    )
    for name, (low, high, value) in SLIDERS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=value, metavar="X", help=f"from {low} to {high}, default {value}")
    args = parser.parse_args(argv)
    values = {name: getattr(args, name) for name in SLIDERS}
    for name, (low, high, _) in SLIDERS.items():
        if not low <= values[name] <= high:
            parser.error(f"{name} must be from {low} to {high}, got {values[name]}")
    with ending_in_a_line("explore_gate.py"):
        from course.run import mine

        print(mine())
        if args.save:
            save(args.save, values)
        else:
            window(values)


if __name__ == "__main__":
    main()
