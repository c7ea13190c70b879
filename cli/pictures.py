"""The pictures of a run: training.png, ranks.png and, with --trace, trace.png; and an animation of its gates."""

import json
import re

import torch

from hard_concrete import prob_open


def split_name(name):
    """A layer's name -> (number of the block, name of the matrix in it): encoder.layers.2.up -> (2, "up")."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (0, name)


def rank_grid(ranks):
    """{name: rank} -> (matrix names, block numbers, {(matrix, block): rank})."""
    cells = {split_name(name)[::-1]: rank for name, rank in ranks.items()}
    return list(dict.fromkeys(m for m, _ in cells)), sorted({b for _, b in cells}), cells


def draw_training(log, path, budget, title):
    """Loss and learning rate, densities and, where it moves, lambda over steps; the window of the gates is shaded."""
    from matplotlib.figure import Figure

    gated, driven = any(row["phase"] == "window" for row in log), any(row["lam"] for row in log)
    panels = 2 + gated + (gated and driven)
    figure = Figure(figsize=(8, 1 + 1.8 * panels), layout="constrained")
    axes = list(figure.subplots(panels, sharex=True))
    steps = [row["step"] for row in log]
    axes[0].plot(steps, [row["loss"] for row in log], color="tab:blue")
    axes[0].set(ylabel="task loss", title=title)
    axes[-1].plot(steps, [row["lr"] for row in log], color="tab:purple")
    axes[-1].set(ylabel="learning rate", xlabel="optimizer step", ylim=(0, None))
    if gated:
        window = [row["step"] for row in log if row["phase"] == "window"]
        for axis in axes:
            axis.axvspan(window[0], window[-1], color="tab:orange", alpha=0.12, lw=0, label="ranks are decided")
        axes[1].plot(steps, [row["C"] for row in log], color="tab:orange", label="expected density C, Eq. (11)")
        kept = [row["kept"] for row in log]
        axes[1].plot(steps, kept, color="tab:green", ls="--", label="density of settled gates")
        axes[1].axhline(budget, color="gray", lw=1, label=f"budget b = {budget}")
        axes[1].set(ylabel="density", ylim=(0, 1.05))
        axes[1].legend(fontsize=8)
        if driven:
            axes[2].plot(steps, [row["lam"] for row in log], color="tab:red")
            axes[2].set(ylabel="lambda")
    figure.savefig(path, format="png", dpi=110)


def draw_trace(trace, largest, path, title):
    """Heat map of the expected number of open gates of every matrix over steps, and the terms of Eq. (9) below it."""
    from matplotlib.figure import Figure

    names, steps = list(dict.fromkeys(row["layer"] for row in trace)), sorted({row["step"] for row in trace})
    series = {key: {name: [row[key] for row in trace if row["layer"] == name] for name in names}
              for key in ("open", "orth_A", "orth_B")}  # fmt: skip
    figure = Figure(figsize=(9, 5.5 + 0.2 * min(len(names), 40)), layout="constrained")
    axes = figure.subplots(3, sharex=True, height_ratios=[2 + 0.1 * min(len(names), 40), 1, 1])
    image = axes[0].pcolormesh(steps, range(len(names)), list(series["open"].values()), cmap="YlGnBu", vmin=0,
                               vmax=largest)  # fmt: skip
    labels = ["{} {}".format(*split_name(name)) for name in names]
    shown = range(0, len(names), -(-len(names) // 40))
    axes[0].set_yticks(shown, [labels[i] for i in shown])
    axes[0].invert_yaxis()
    axes[0].set(ylabel="block and matrix", title=title)
    figure.colorbar(image, label="expected number of open gates")
    for axis, key, label in zip(axes[1:], ("orth_A", "orth_B"), ("|A A$^T$ - I|$^2$", "|B$^T$ B - I|$^2$")):
        for values in series[key].values():
            axis.plot(steps, values, color="tab:blue", lw=0.8, alpha=0.5)
        axis.set(ylabel=label, yscale="log")
    axes[2].set(xlabel="optimizer step; one line per matrix")
    figure.savefig(path, format="png", dpi=110)


def heat_map(axis, grid, columns, rows, largest, text=str):
    """A heat map with text(value) in every cell that has a value. grid: lists of numbers, NaN for none; largest: the
    darkest number. Returns the image."""
    image = axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=largest, aspect="auto")
    for i, values in enumerate(grid):
        for j, value in enumerate(values):
            if value == value:  # NaN is not
                color = "white" if value > 0.6 * largest else "black"
                axis.text(j, i, text(value), ha="center", va="center", color=color)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    return image


def draw_ranks(ranks, largest, path, title):
    """Heat map of the rank of every matrix: a row per kind of matrix, a column per block (as in the paper's Fig. 7)."""
    from matplotlib.figure import Figure

    matrices, blocks, cells = rank_grid(ranks)
    figure = Figure(figsize=(2.4 + 0.6 * len(blocks), 1.2 + 0.5 * len(matrices)), layout="constrained")
    axis = figure.subplots()
    grid = [[cells.get((m, b), float("nan")) for b in blocks] for m in matrices]
    image = heat_map(axis, grid, blocks, matrices, largest)
    axis.set(xlabel="block", title=title)
    figure.colorbar(image, label="rank")
    figure.savefig(path, format="png", dpi=110)


def open_probabilities(log, trace):
    """[(row of log.csv, {(block, matrix): P(g > 0) of its gates})], in every matrix the gates that close last first."""
    frames = {row["step"]: (row, {}) for row in log}
    r0, order = int(trace[0]["rank"]), {}
    for row in reversed(trace):
        logged, cells = frames[row["step"]]
        where, log_theta = split_name(row["layer"]), torch.tensor(json.loads(row["log_theta"]))
        if logged["phase"] == "window":
            order.setdefault(where, log_theta.argsort(descending=True))
            cells[where] = prob_open(log_theta)[order[where]].tolist()
        else:
            cells[where] = [1.0] * len(log_theta) + [0.0] * (r0 - len(log_theta))
    return [(row, dict(reversed(cells.items()))) for row, cells in frames.values()]


def draw_gates(log, trace, path):
    """An animation of P(g > 0) of all gates, a panel per block and a row per matrix, above C over the steps.

    log, trace: the rows of log.csv and trace.csv, dicts of texts.
    """
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure

    frames = open_probabilities(log, trace)
    blocks, matrices = (list(dict.fromkeys(names)) for names in zip(*frames[0][1]))
    steps, C = [int(row["step"]) for row in log], [float(row["C"]) for row in log]
    window = [int(row["step"]) for row in log if row["phase"] == "window"]
    says = {"before": "all gates are held open", "window": "the gates train", "after": "closed triplets are gone"}
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplot_mosaic([blocks, ["C"] * len(blocks)], height_ratios=[3, 1])
    writer = PillowWriter(fps=5)
    shown = [i for i, row in enumerate(log) if row["phase"] == "window" or i % 25 == 0]
    with writer.saving(figure, path, dpi=100):
        for i in shown + [len(log) - 1] * 10:  # the last one stands for two seconds
            row, cells = frames[i]
            figure.suptitle(f"step {row['step']} of {steps[-1]}: {says[row['phase']]}", fontsize=12)
            for axis in axes.values():
                axis.clear()
            for block in blocks:
                grid = [cells[block, matrix] for matrix in matrices]
                draw_block(axes[block], grid, matrices if block == blocks[0] else [""] * len(grid))
                axes[block].set_title(f"block {block}", fontsize=11)
            axes["C"].axvspan(window[0], window[-1], color="tab:orange", alpha=0.15, lw=0)
            axes["C"].plot(steps[: i + 1], C[: i + 1], color="tab:blue", lw=2)
            axes["C"].set(xlim=(0, steps[-1]), ylim=(0, 1.08), xlabel="optimizer step", ylabel="density C")
            writer.grab_frame()


def draw_block(axis, grid, names):
    """A row of squares for each matrix, a square for each gate, and the expected number of open gates."""
    axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=1.2, aspect="auto")
    axis.vlines([i + 0.5 for i in range(len(grid[0]) - 1)], -0.5, len(grid) - 0.5, color="white", lw=2)
    axis.hlines([i + 0.5 for i in range(len(grid) - 1)], -0.5, len(grid[0]) - 0.5, color="white", lw=6)
    axis.set_xticks([])
    axis.set_yticks(range(len(grid)), names)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for i, row in enumerate(grid):
        axis.text(len(row) - 0.3, i, f"{sum(row):.0f}", va="center", fontsize=11)
