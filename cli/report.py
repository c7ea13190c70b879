"""What the main job prints and draws: status lines, tables, training.png and ranks.png."""

import csv
import json
import math
import os
import re
from statistics import mean, stdev

from budget import expected_density, kept_density
from glue.metrics import METRICS

COLUMNS = ["step", "phase", "loss", "C", "kept", "lam", "triplets"]  # of log.csv


def whole(path, write):
    """Call write(path of a temporary file), then put the file in place: readers see all of it or nothing."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def write_run(out, log, summary, rank):
    """log.csv, training.png, ranks.png where there are ranks, and last, as the sign of a finished run, summary.json."""
    run = f"{summary['task']}, {summary['method']}, seed {summary['seed']}"
    title = f"{run}: {summary['metric']} {summary['score']:.3f}"
    whole(out / "log.csv", lambda path: write_log(log, path))
    whole(out / "training.png", lambda path: draw_training(log, path, summary["density_target"], title))
    if summary["ranks"]:
        whole(out / "ranks.png", lambda path: draw_ranks(summary["ranks"], rank, path, title))
    whole(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=1) + "\n"))


def log_row(step, phase, loss, layers, lagrangian):
    """One row of the log, the only place where training waits for the device. Raises where the loss is no number."""
    row = {"step": step, "phase": phase, "loss": loss.item(), "C": None, "kept": None, "lam": None, "triplets": ""}
    if not math.isfinite(row["loss"]):
        raise FloatingPointError(f"the loss is {row['loss']} at step {step}: try a smaller --lr")
    if layers:
        kept = sum(int((layer.gate.settled() > 0).sum()) for layer in layers)
        row.update(C=expected_density(layers).item(), kept=kept_density(layers), lam=lagrangian.lam.sum().item())
        row["triplets"] = f"{kept}/{sum(layer.r0 for layer in layers)}"
    return row


def scores(task, predicted, gold):
    """The task's metrics as text: accuracy 0.8725, f1 0.9091."""
    return ", ".join(f"{name} {METRICS[name](predicted, gold):.4f}" for name in (task.metric, task.also) if name)


def write_predictions(out, task, test, predicted):
    """GLUE's submission file for the rows of a test file: index and label, a line a row. Returns its path."""
    part = {"MNLI": "-mm" if "mismatched" in test else "-m"}.get(task.folder, "")
    labels = [task.labels[p] if task.labels else f"{min(5.0, max(0.0, p)):.3f}" for p in predicted]
    lines = ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(labels))]
    whole(out / f"{task.folder}{part}.tsv", lambda path: path.write_text("\n".join(lines) + "\n"))
    return out / f"{task.folder}{part}.tsv"


def append(path, row):
    """Add a row, {column: value}, to a CSV file, with a header line if the file is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def write_log(log, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(log)


def status_line(row, steps, density, rows_per_second):
    """step 0050/0400 | loss .512 | C .71 -> .50 | lambda .33 | kept 37/96 | 812 rows/s | eta 12 s"""
    parts = [f"step {row['step']:0{len(str(steps))}d}/{steps}", f"loss {row['loss']:.3f}"]
    if row["phase"] == "window":
        parts += [f"C {row['C']:.3f} -> {density}"]
        parts += [f"lambda {row['lam']:.2f}"] if row["lam"] else []
    if row["triplets"]:
        parts += [f"kept {row['triplets']}"]
    return " | ".join(parts + [f"{rows_per_second:.0f} rows/s"])


def split_name(name):
    """A layer's name -> (number of the block, name of the matrix in it): encoder.layers.2.up -> (2, "up")."""
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (0, name)


def rank_grid(ranks):
    """{name: rank} -> (matrix names, block numbers, {(matrix, block): rank})."""
    cells = {split_name(name)[::-1]: rank for name, rank in ranks.items()}
    return list(dict.fromkeys(m for m, _ in cells)), sorted({b for _, b in cells}), cells


def rank_table(ranks):
    """The rank of every matrix as text: a line a block, a column a matrix."""
    matrices, blocks, cells = rank_grid(ranks)
    lines = ["rank     " + " ".join(f"{m:>6}" for m in matrices)]
    lines += [f"block {b:<3}" + " ".join(f"{cells.get((m, b), '-'):>6}" for m in matrices) for b in blocks]
    return "\n".join(lines)


def score_table(summaries):
    """One line a task: metric, score as mean +- deviation over seeds, kept density, seconds; then the average."""
    tasks = list(dict.fromkeys(s["task"] for s in summaries))
    lines, means = [f"{'task':<12}{'metric':<10}{'score':>8}{'+-':>8}{'kept':>8}{'seconds':>9}"], []
    for task in tasks:
        runs = [s for s in summaries if s["task"] == task]
        scores = [s["score"] for s in runs]
        kept = f"{max(s['density_kept'] for s in runs):.4f}" if runs[0]["ranks"] else "-"
        spread = f"{stdev(scores):.4f}" if len(scores) > 1 else "-"
        seconds = mean(s["seconds"] for s in runs)
        means.append(mean(scores))
        lines.append(f"{task:<12}{runs[0]['metric']:<10}{means[-1]:>8.4f}{spread:>8}{kept:>8}{seconds:>9.1f}")
    return "\n".join([*lines, f"{'average':<22}{mean(means):>8.4f}"])


def draw_training(log, path, density, title):
    """Loss, densities and, where it moves, lambda over steps; the gates' window is shaded."""
    from matplotlib.figure import Figure

    gated, driven = any(row["phase"] == "window" for row in log), any(row["lam"] for row in log)
    panels = 1 + gated + (gated and driven)
    figure = Figure(figsize=(8, 1 + 2 * panels), layout="constrained")
    axes = figure.subplots(panels, sharex=True, squeeze=False)[:, 0]
    steps, window = [row["step"] for row in log], [row["step"] for row in log if row["phase"] == "window"]
    axes[0].plot(steps, [row["loss"] for row in log], color="tab:blue")
    axes[0].set(ylabel="task loss", title=title)
    if gated:
        axes[1].plot(steps, [row["C"] for row in log], color="tab:orange", label="expected density C, Eq. (11)")
        kept = [row["kept"] for row in log]
        axes[1].plot(steps, kept, color="tab:green", ls="--", label="density of settled gates")
        axes[1].axhline(density, color="gray", lw=1, label=f"target b = {density}")
        axes[1].set(ylabel="density", ylim=(0, 1.05))
        axes[1].legend(fontsize=8)
        if driven:
            axes[2].plot(steps, [row["lam"] for row in log], color="tab:red")
            axes[2].set(ylabel="lambda")
        for axis in axes:
            axis.axvspan(window[0], window[-1], color="tab:orange", alpha=0.12, lw=0)
    axes[-1].set(xlabel="optimiser step")
    figure.savefig(path, format="png", dpi=110)


def draw_ranks(ranks, largest, path, title):
    """Heat map of the rank of every matrix: a row a kind of matrix, a column a block (as in the paper's Fig. 7)."""
    from matplotlib.figure import Figure

    matrices, blocks, cells = rank_grid(ranks)
    figure = Figure(figsize=(2.4 + 0.6 * len(blocks), 1.2 + 0.5 * len(matrices)), layout="constrained")
    axis = figure.subplots()
    grid = [[cells.get((m, b), float("nan")) for b in blocks] for m in matrices]
    image = axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=largest, aspect="auto")
    for (m, b), rank in cells.items():
        color = "white" if rank > 0.6 * largest else "black"
        axis.text(blocks.index(b), matrices.index(m), rank, ha="center", va="center", color=color)
    axis.set_xticks(range(len(blocks)), blocks)
    axis.set_yticks(range(len(matrices)), matrices)
    axis.set(xlabel="block", title=title)
    figure.colorbar(image, label="rank")
    figure.savefig(path, format="png", dpi=110)
