"""Pictures of several experiments: most take rows of a CSV file, dicts of texts, and a path."""

from math import cos, pi, sin
from statistics import mean

from cli.pictures import rank_grid
from experiments.arms import arm_of
from experiments.tables import interval

STYLES = {  # arms of the shift study, in Okabe and Ito's colors, told apart by the color-blind too
    "lora": ("LoRA", "#000000", "s", "-"),
    "lora-restart": ("LoRA, restarted", "#999999", "D", "--"),
    "salora-16": ("SaLoRA from r=16", "#0072B2", "o", "-"),
    "salora-32": ("SaLoRA from r=32", "#56B4E9", "P", "-"),
    "svd-16": ("SVD cut, no gates", "#E69F00", "^", "--"),
    "salora-8-paper": ("SaLoRA (paper)", "#D55E00", "v", ":"),
    "salora-8": ("SaLoRA from r=8", "#009E73", "X", "-"),
}
OURS = ("SaLoRA (ours)", *STYLES["salora-16"][1:])
RECIPES = {**STYLES, "ours": OURS, "paper": STYLES["salora-8-paper"]}  # arms of figures.py, from any rank
COLORS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#000000"]
LOSS = "masked-word loss (nats)"
SALORA, LORA, RANKS, MODULES, VECTORS = STYLES["salora-16"][1], STYLES["lora"][1], "#E69F00", "#D55E00", "#009E73"
METHODS = {  # of compare.py: label, color, marker; one of each for methods of one kind
    "salora-8-to-4": ("SaLoRA", SALORA, "o"),
    "salora-16-to-4": ("SaLoRA from r=16", SALORA, "o"),
    "lora-8": ("LoRA r=8", LORA, "s"),
    "lora-4": ("LoRA r=4", LORA, "s"),
    "adalora-8-to-4": ("AdaLoRA", RANKS, "^"),
    "sora-8": ("SoRA", RANKS, "^"),
    "alora-8-to-4": ("ALoRA", RANKS, "^"),
    "rm-lora-4": ("RM-LoRA", RANKS, "^"),
    "adapter-h-16": ("adapter (H)", MODULES, "D"),
    "adapter-p-35": ("adapter (P)", MODULES, "D"),
    "prefix-8": ("prefix", MODULES, "D"),
    "prompt-8": ("prompt", MODULES, "D"),
    "bitfit": ("BitFit", VECTORS, "v"),
    "ia3": ("(IA)$^3$", VECTORS, "v"),
    "full": ("all weights", "#999999", "X"),
    "head": ("head only", "#999999", "X"),
}


def panels(rows, columns, width, height):
    """A figure and its axes, a flat list, in letters that can be read on a slide."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 13, "axes.labelpad": 8}):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save(figure, path):
    figure.savefig(path, format="png", dpi=110)


def mean_and_bars(values):
    """(mean, how far the 95 % bootstrap interval reaches below it, and above it); one seed has no interval."""
    middle = mean(values)
    low, high = interval(values) if len(values) > 1 else (middle, middle)
    return middle, max(0, middle - low), max(0, high - middle)


def places(rows, matrices, blocks, path):
    """Figure 1: the loss by kind of matrix, by block, and by rank."""
    figure, axes = panels(1, 3, 14, 4.6)
    ranks = [(str(r), "all", str(r)) for r in (1, 2, 4, 8)]
    groups = [[(m, m, "8") for m in matrices], [(b[6:], b, "8") for b in blocks], ranks]
    titles = ["one kind of matrix (r = 8)", "one block (r = 8)", "one rank, all matrices"]
    for axis, group, title in zip(axes, groups, titles):
        for label, where, r in group:
            losses = [float(row["loss"]) for row in rows if (row["where"], row["r"]) == (where, r)]
            if losses:
                middle, below, above = mean_and_bars(losses)
                bars = [[below], [above]] if len(losses) > 1 else None
                axis.bar(label, middle, yerr=bars, capsize=4, color="#0072B2")
        axis.set_title(title, fontsize=13)
    losses = [float(row["loss"]) for row in rows]
    for axis, label in zip(axes, ("matrix", "block", "rank r")):
        axis.set(xlabel=label, ylim=(0.9 * min(losses), 1.03 * max(losses)))  # bars from 0 would hide the differences
    axes[0].set_ylabel(f"{LOSS}; axis cut")
    save(figure, path)


def hard_concrete(rows, path):
    """Figure 3: lines are the closed form, points are samples; the masses at 0 and at 1 are bars."""
    figure, axes = panels(1, 3, 14, 4.6)
    for axis, log_theta in zip(axes, dict.fromkeys(row["log_theta"] for row in rows)):
        some = [row for row in rows if row["log_theta"] == log_theta]
        inside = [row for row in some if row["part"] == "density"]
        edges = [row for row in some if row["part"] != "density"]
        g = [float(row["g"]) for row in inside]
        axis.plot(g, [float(row["exact"]) for row in inside], color="#0072B2", lw=2, label="density")
        axis.plot(g, [float(row["sampled"]) for row in inside], "o", color="#D55E00", ms=5, label="sampled")
        x = [float(row["g"]) for row in edges]
        axis.bar(x, [float(row["exact"]) for row in edges], 0.05, color="#56B4E9", label="mass at 0 and at 1")
        axis.plot(x, [float(row["sampled"]) for row in edges], "o", color="#D55E00", ms=5)
        axis.set_title(f"log theta = {float(log_theta):g}", fontsize=13)
        axis.set(xlabel="gate g", ylim=(0, None))
    axes[0].set_ylabel("density, or mass")
    axes[1].legend(fontsize=12)
    save(figure, path)


def curves(rows, column, label, path):
    """Figures 4 and 5: the loss over a column, a line for every arm."""
    figure, [axis] = panels(1, 1, 7.5, 5)
    for arm in dict.fromkeys(row["arm"] for row in rows):
        name, color, marker, _ = RECIPES[arm]
        points = []
        mine = [row for row in rows if row["arm"] == arm]
        for key in dict.fromkeys((row["r"], row["density"]) for row in mine):
            some = [row for row in mine if (row["r"], row["density"]) == key]
            x = mean(float(row[column]) for row in some)
            points.append((x, *mean_and_bars([float(row["loss"]) for row in some])))
        x, y, below, above = zip(*sorted(points))
        axis.errorbar(x, y, (below, above), label=name, color=color, marker=marker, lw=2, ms=8, capsize=4)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set(xlabel=label, ylabel=LOSS)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=12)
    save(figure, path)


def traces(rows, path):
    """Figure 6: four panels over steps; one line a seed."""
    figure, axes = panels(2, 2, 12, 8)
    columns = {"C": "expected density C", "lam": "lambda"}
    columns |= {"orth_A": "||A A^T - I||^2, W^O, block 0", "orth_B": "||B^T B - I||^2, W^O, block 0"}
    for axis, (column, label) in zip(axes, columns.items()):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            name, color, _, _ = RECIPES[arm]
            for i, seed in enumerate(dict.fromkeys(row["seed"] for row in rows)):
                some = [row for row in rows if (row["arm"], row["seed"]) == (arm, seed)]
                axis.plot([int(row["step"]) for row in some], [float(row[column]) for row in some], lw=2,
                          color=color, label=name if i == 0 else None)  # fmt: skip
        axis.set(xlabel="optimizer step", ylabel=label)
        if column.startswith("orth"):
            axis.set_yscale("log")
    axes[0].axhline(0.5, color="gray", lw=1)
    axes[0].legend(fontsize=12)
    save(figure, path)


def ranks(means, path):
    """Figure 7: the mean rank of every matrix, a panel for every recipe."""
    figure, axes = panels(1, len(means), 5.5 * len(means), 4.6)
    for axis, (arm, found) in zip(axes, means.items()):
        matrices, blocks, cells = rank_grid(found)
        grid = [[cells.get((m, b), float("nan")) for b in blocks] for m in matrices]
        axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=8, aspect="auto")
        for (m, b), rank in cells.items():
            color = "white" if rank > 4.8 else "black"
            axis.text(blocks.index(b), matrices.index(m), f"{rank:.1f}", ha="center", va="center", color=color,
                      fontsize=13)  # fmt: skip
        axis.set_xticks(range(len(blocks)), blocks)
        axis.set_yticks(range(len(matrices)), matrices)
        axis.set_xlabel("block")
        axis.set_title(f"mean rank, {RECIPES[arm][0]}", fontsize=13)
    save(figure, path)


def ablation(rows, path):
    """Table 3: loss and expected density of every arm and, in gray, of its seeds; a column for every kind of shift."""
    kinds, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("kind", "arm"))
    figure, axes = panels(2, len(kinds), 6.5 * len(kinds), 7)
    for i, kind in enumerate(kinds):
        for row_of_panels, (key, label) in enumerate((("loss", LOSS), ("C", "expected density C at T_end"))):
            axis = axes[row_of_panels * len(kinds) + i]
            for x, arm in enumerate(arms):
                values = [float(row[key]) for row in rows if (row["kind"], row["arm"]) == (kind, arm)]
                middle, below, above = mean_and_bars(values)
                axis.errorbar(x, middle, [[below], [above]], fmt="o", ms=9, lw=2, capsize=5, color=RANKS)
                axis.plot([x + 0.15] * len(values), values, "o", ms=4, color="gray")
            axis.set_xticks(range(len(arms)), [f"{arm}'s recipe" if arm == "paper" else arm for arm in arms])
            axis.set(ylabel=label, xlim=(-0.5, len(arms) - 0.5), title=kind if key == "loss" else None)
            axis.grid(alpha=0.3, axis="y")
            if key == "C":
                axis.set_ylim(0, 1)
                axis.axhline(0.5, color="gray", lw=1, label="budget b = 0.5")
                axis.legend(fontsize=12)
    save(figure, path)


def costs(rows, path):
    """Table 4: time and memory of every arm relative to LoRA's, a color and marker for every shape and batch size."""
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != "lora"))
    groups = list(dict.fromkeys((row["shape"], row["batch_size"], row["device"]) for row in rows))
    figure, axes = panels(1, 2, 13, 2 + 0.45 * len(arms))
    for axis, key, label in zip(axes, ("time_ratio", "memory_ratio"), ("time of a step", "peak memory")):
        for i, group in enumerate(groups):
            some = {row["arm"]: float(row[key]) for row in rows
                    if (row["shape"], row["batch_size"], row["device"]) == group}  # fmt: skip
            shift = 0.5 * (i + 0.5) / len(groups) - 0.25  # so that equal values do not cover each other
            color, marker = COLORS[i % len(COLORS)], "osD^vP"[i % 6]
            places = [y + shift for y, arm in enumerate(arms) if arm in some]
            axis.plot([some[arm] for arm in arms if arm in some], places, marker, color=color, ms=8,
                      label="{}, batch {}, {}".format(*group))  # fmt: skip
        axis.axvline(1, color="gray", lw=1)
        axis.set(xlabel=f"{label}, relative to LoRA r = 8", ylim=(len(arms) - 0.5, -0.5))
        axis.set_yticks(range(len(arms)), arms)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=11)
    save(figure, path)


def methods(points, label, lower, path):
    """Scores of methods against their size; beside it, those of the size of LoRA r = 4, which lie too close together.

    points: (method, parameters, score, bar below it, bar above it). lower: whether lower is better.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    same = [size for method, size, *_ in points if method == "lora-4"]
    alike = [point for point in points if same and abs(point[1] - same[0]) < same[0] / 5]
    alike = alike if len(alike) > 1 else []
    figure, axes = panels(1, 2 if alike else 1, 14 if alike else 9, 5.6)
    figure.set_dpi(110)
    axis, marks = axes[0], []
    for method, size, score, below, above in points:
        name, color, marker = METHODS[method]
        if size:
            axis.errorbar(size, score, [[below], [above]], color=color, marker=marker, ms=10, lw=2, capsize=4)
        else:
            axis.axhline(score, color=color, ls="--", lw=2, label=name)
            axis.legend(fontsize=12)
        if size and (method, size, score, below, above) not in alike:
            marks.append((name, size, score - below, score, score + above))
    if alike:
        ends = [score - below for *_, score, below, _ in alike] + [score + above for *_, score, _, above in alike]
        marks.append((f"{len(alike)} methods\n(right)", same[0], min(ends), mean(ends), max(ends)))
        ranked(axes[1], sorted(alike, key=lambda point: point[2], reverse=lower), label)
    axis.set_xscale("log")
    axis.margins(0.12, 0.15)  # room for the names
    axis.grid(alpha=0.3)
    axis.set(xlabel="parameters in the end, without the head", ylabel=label)
    FigureCanvasAgg(figure).draw()  # only now it is known where everything lies
    figure.set_layout_engine("none")
    place_names(axis, marks)
    save(figure, path)


def ranked(axis, points, label):
    """Scores of methods, one above the other: the last on top."""
    for height, (method, _, score, below, above) in enumerate(points):
        _, color, marker = METHODS[method]
        axis.errorbar(score, height, xerr=[[below], [above]], color=color, marker=marker, ms=10, lw=2, capsize=4)
    axis.set_yticks(range(len(points)), [METHODS[method][0] for method, *_ in points])
    axis.grid(alpha=0.3)
    axis.set_xlabel(label)
    axis.set_title("about as large as LoRA r=4", fontsize=13)


def place_names(axis, marks):
    """Write every name as near to its mark as it covers no mark, interval or other name. Returns the boxes in pixels.

    marks: (name, x, low end of the bar, y, high end).
    """
    from matplotlib.transforms import Bbox

    taken, boxes = [], []
    for _, x, low, y, high in marks:
        ends = axis.transData.transform([(x, low), (x, y), (x, high)])
        taken.append(Bbox.null())
        taken[-1].update_from_data_xy([*(ends - 10), *(ends + 10)])
    for name, x, _, y, _ in marks:
        text = axis.text(x, y, name, fontsize=13, ha="center", va="center")
        width, height = text.get_window_extent().size
        px, py = axis.transData.transform((x, y))
        spots = [(d, pi * i / 8) for d in range(12, 400, 6) for i in range(16)]  # around the mark, ever farther away
        for distance, angle in spots:
            cx, cy = px + cos(angle) * (distance + width / 2), py + sin(angle) * (distance + height / 2)
            box = Bbox.from_bounds(cx - width / 2, cy - height / 2, width, height)
            inside = axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) and axis.bbox.containsy(box.y1)
            if inside and axis.bbox.containsy(box.y0) and not any(box.overlaps(other) for other in taken):
                break
        text.set_position(axis.transData.inverted().transform((cx, cy)))
        if distance > 24:  # a line leads to the mark
            edge = min(max(px, box.x0), box.x1), min(max(py, box.y0), box.y1)
            end = axis.transData.inverted().transform(edge)
            axis.plot([x, end[0]], [y, end[1]], color="gray", lw=0.8)
        taken.append(box)
        boxes.append(box)
    return boxes


def scores(table, tasks, lower, path):
    """Table 1: {method: its scores, None where it has none}. The shades of a column go from its worst to its best."""
    figure, [axis] = panels(1, 1, 2.5 + 1.1 * len(tasks), 1.2 + 0.42 * len(table))
    grid = [[float("nan")] * len(tasks) for _ in table]
    for column in range(len(tasks)):
        known = [values[column] for values in table.values() if values[column] is not None]
        worst, best = (max(known), min(known)) if lower else (min(known), max(known))
        for row, values in enumerate(table.values()):
            if values[column] is None:
                continue
            shade = (values[column] - worst) / (best - worst) if best != worst else 1.0
            grid[row][column] = shade
            weight, color = "bold" if shade == 1 else "normal", "white" if shade > 0.8 else "black"
            axis.text(column, row, f"{values[column]:.3f}", ha="center", va="center", color=color, fontweight=weight,
                      fontsize=13)  # fmt: skip
    axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=1.3, aspect="auto")
    axis.set_xticks(range(len(tasks)), [task.removeprefix("mini-") for task in tasks])
    axis.set_yticks(range(len(table)), [METHODS[method][0] for method in table])
    axis.tick_params(length=0)
    axis.xaxis.tick_top()
    save(figure, path)


def draw_panel(axis, points, title):
    """Loss against size, a line a method. points: {arm: (size, loss of LoRA r=8, difference from it, its interval)}."""
    from matplotlib.ticker import NullLocator

    for method, (label, color, marker, line) in STYLES.items():
        some = [points[arm] for arm in points if arm_of(arm).family == method]
        if some:
            x = [size for size, *_ in some]
            y = [base + gap for _, base, gap, *_ in some]
            bars = [gap - low for *_, gap, low, _ in some], [high - gap for *_, gap, _, high in some]
            axis.errorbar(x, y, bars, label=label, color=color, marker=marker, linestyle=line, linewidth=2,
                          markersize=8, capsize=4)  # fmt: skip
    sizes = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    sizes = [size for size in sizes if any(point[0] < 1.4 * size for point in points.values())]
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"1/{1 / size:.0f}" if size < 1 else "1" for size in sizes], fontsize=13)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params("y", labelsize=13)
    axis.set_title(title, fontsize=15)
    axis.set_xlabel("adapter parameters, of LoRA r=8's", fontsize=13)
    axis.grid(alpha=0.3)
