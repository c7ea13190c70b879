"""Pictures of several studies. Most take the rows of a table, dicts of texts, and return a matplotlib figure."""

import json
import re
from collections import defaultdict
from statistics import mean

from cli.pictures import heat_map, rank_grid
from experiments.arms import arm_of
from experiments.tables import distinct, interval, paired, values_of

BLACK, GRAY, BLUE, SKY = "#000000", "#999999", "#0072B2", "#56B4E9"  # colors of Okabe and Ito, which the color-blind
GREEN, ORANGE, RED, PINK = "#009E73", "#E69F00", "#D55E00", "#CC79A7"  # can tell apart
FAMILIES = {  # arms whatever their size: label, color, marker, line
    "lora": ("LoRA", BLACK, "s", "-"),
    "lora-restart": ("LoRA, restarted", GRAY, "D", "--"),
    "salora-8": ("SaLoRA from r=8", GREEN, "X", "-"),
    "salora-16": ("SaLoRA from r=16", BLUE, "o", "-"),
    "adalora-8": ("AdaLoRA from r=8", SKY, "P", "-"),
    "svd-16": ("SVD cut, no gates", ORANGE, "^", "--"),
    "salora-8-paper": ("SaLoRA, published", PINK, "<", ":"),
    "salora-8-paper-scaled": ("the same, eta_c scaled", RED, "v", ":"),
}
METHODS = {  # of style_of: arms whatever their ranks: label, color, marker
    "lora": ("LoRA", BLACK, "s"),
    "salora": ("SaLoRA", BLUE, "o"),
    "salora-paper-scaled": ("SaLoRA as published, eta_c scaled", RED, "v"),
}
LOSS = "masked-word loss (nats)"


def method(arm):
    """salora-16-to-4-paper-scaled -> salora-paper-scaled"""
    return re.sub(r"-(to-)?[\d.]+", "", arm)


def style_of(method):
    """(label, color, marker); matplotlib chooses the color of a method that is not in METHODS."""
    return METHODS.get(method, (method, None, "^"))


def panels(rows, columns, width, height):
    """A figure and the flat list of its axes, in letters that can be read on a slide."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 13, "axes.labelpad": 8, "axes.titlesize": 13, "legend.fontsize": 12}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def mean_and_bars(values):
    """(mean, how far the 95 % t interval reaches below it, and above it); one seed has no interval."""
    middle = mean(values)
    low, high = interval(values) if len(values) > 1 else (middle, middle)
    return middle, max(0, middle - low), max(0, high - middle)


def line(axis, points, label, color, marker, style="-"):
    """Means with their intervals, joined. points: [(x, y, bar below it, bar above it)]."""
    x, y, below, above = zip(*sorted(points))
    axis.errorbar(x, y, (below, above), label=label, color=color, marker=marker, ls=style, lw=2, ms=8, capsize=4)
    axis.grid(alpha=0.3)


def on_log_scale(axis, label):
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_xlabel(label)


def places(rows):
    """Figure 1: the loss of LoRA in one kind of matrix, in one block, and with one rank in all matrices."""
    figure, [axis] = panels(1, 1, 14, 4.6)
    for arm in distinct(rows, "arm"):
        middle, below, above = mean_and_bars([float(row["loss"]) for row in rows if row["arm"] == arm])
        name = arm.removeprefix("lora-8-in-")
        axis.errorbar(name, middle, [[below], [above]], fmt="o", ms=9, lw=2, capsize=5, color=BLUE)
    axis.grid(alpha=0.3, axis="y")
    axis.set(ylabel=LOSS, title="LoRA r = 8 in one kind of matrix or in one block, and one rank in all matrices")
    return figure


def curves(rows, x_of, label):
    """Figures 4 and 5: the loss over the mean of x_of(row), a line for every method."""
    figure, [axis] = panels(1, 1, 7.5, 5)
    lines = defaultdict(list)
    for arm in distinct(rows, "arm"):
        some = [row for row in rows if row["arm"] == arm]
        losses = mean_and_bars([float(row["loss"]) for row in some])
        lines[method(arm)].append((mean(map(x_of, some)), *losses))
    for name, points in lines.items():
        line(axis, points, *style_of(name))
    on_log_scale(axis, label)
    axis.set_ylabel(LOSS)
    axis.legend()
    return figure


def ranks(rows):
    """Figure 7: the rank of every matrix, its mean over seeds, a panel for every arm. Names have the means of cells."""
    arms = distinct(rows, "arm")
    figure, axes = panels(1, len(arms), 6 * len(arms), 4.6)
    for axis, arm in zip(axes, arms):
        found = [rank_grid(json.loads(row["ranks"])) for row in rows if row["arm"] == arm]
        matrices, blocks, _ = found[0]
        grid = [[mean(cells[matrix, block] for *_, cells in found) for block in blocks] for matrix in matrices]
        columns = [f"{block}: {mean(some):.1f}" for block, some in zip(blocks, zip(*grid))]
        names = [f"{matrix}: {mean(some):.1f}" for matrix, some in zip(matrices, grid)]
        heat_map(axis, grid, columns, names, 8, "{:.1f}".format)
        axis.set(title=f"mean rank, {style_of(method(arm))[0]}", xlabel="block")
    return figure


def planted(rows, most):
    """Planted and learned ranks side by side, of the first task and seed: a column for every arm."""
    first = [row for row in rows if (row["task"], row["seed"]) == (rows[0]["task"], rows[0]["seed"])]
    columns = {"planted": json.loads(first[0]["planted"])}
    columns |= {row["arm"]: json.loads(row["learned"]) for row in first}
    grid = list(zip(*columns.values(), strict=True))
    figure, [axis] = panels(1, 1, 2 + 1.6 * len(columns), 1.6 + 0.32 * len(grid))
    heat_map(axis, grid, columns, range(len(grid)), 1.5 * most, str)  # light enough for red
    cells = [(i, j) for i in range(len(grid)) for j in range(len(columns))]
    for text, (i, j) in zip(axis.texts, cells):
        if grid[i][j] != grid[i][0]:
            text.set(color="tab:red", weight="bold")
    axis.tick_params("x", rotation=15)
    axis.set(ylabel="matrix", title="ranks, planted and found (wrong ones red)")
    return figure


def loss_by_size(rows):
    """Loss against size, a panel for every task, a line for every family; None without lora-8.

    Bars are intervals of the difference from lora-8 over the same seeds.
    """
    tasks = [task for task in distinct(rows, "task") if "lora-8" in values_of(rows, "loss", task)]
    if not tasks:
        return None
    figure, axes = panels(1, len(tasks), 1 + 4.6 * len(tasks), 4.8)
    for axis, task in zip(axes, tasks):
        losses, sizes = values_of(rows, "loss", task), values_of(rows, "size", task)
        points = defaultdict(list)
        for arm in losses:
            gaps = [a - b for a, b in zip(*paired(losses, arm, "lora-8"))]
            if gaps:
                gap, below, above = mean_and_bars(gaps)
                y = mean(losses["lora-8"].values()) + gap
                points[arm_of(arm).family].append((mean(sizes[arm].values()), y, below, above))
        for family, style in FAMILIES.items():
            if points[family]:
                line(axis, points[family], *style)
        on_log_scale(axis, "adapter parameters, relative to LoRA r = 8")
        axis.set(title=task)
    axes[0].set_ylabel(LOSS)
    axes[0].legend()
    return figure
