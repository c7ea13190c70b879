"""What a run prints and writes: status lines, tables, its files."""

import csv
import json
import platform
from statistics import mean, stdev

import numpy as np
import torch

from budget import kept_density, total_parameters
from cli.files import digest_of
from cli.pictures import draw_ranks, draw_trace, draw_training, rank_grid
from cli.settings import write_settings
from cli.workers import worker, workers
from glue.metrics import METRICS
from glue.tasks import task_of
from guard import FEW_STEPS
from hub.adapters import adapter_state, save_adapter
from hub.checkpoints import write_atomically
from peers import METHODS
from salora import salora_layers

COLUMNS = ["step", "phase", "loss", "lr", "C", "kept", "lam", "triplets"]  # of log.csv
TRACE = ["step", "layer", "rank", "open", "log_theta", "orth_A", "orth_B"]  # of trace.csv


def announce(settings, folder, model, train, dev, allocator):
    """Print what the run is about to do, and write settings.json."""
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    budgeted = total_parameters(salora_layers(model))
    device = settings.device + (f" and {workers() - 1} more" if workers() > 1 else "")
    print(f"{settings.task}, {settings.method}, seed {settings.seed} on {device}: "
          f"{len(train)} training rows, {len(dev)} dev rows")  # fmt: skip
    packed = " (two in 4 bits count as one)" if settings.quantize else ""
    print(f"{everything:,} parameters{packed}, {trained:,} trained, {budgeted:,} in adapters; run folder {folder}")
    if METHODS[settings.method].adds_modules:
        print(f"{settings.method} adds modules to the encoder: the run can be evaluated, but not merged or exported")
    if settings.method == "salora":
        schedule = allocator.schedule
        gates = f"gates train from step {schedule.T_start} to {schedule.T_end}"
        if schedule.window_steps == 0:
            gates = f"no gates train; triplets are cut at step {schedule.T_end}"
        print(f"{gates} of {allocator.total_steps}, gate lr {allocator.gate_lr:.3g}")
        for warning in allocator.guard.warnings():
            print(f"warning: {warning}")
    if worker() == 0:
        write_settings(settings, folder, getattr(allocator, "gate_lr", None))


def finish_run(settings, folder, model, allocator, journal, predicted, dev):
    """Score, write the files of the run, print how it went. Returns the summary."""
    task, layers = task_of(settings.task), salora_layers(model)
    gold = [row[2] for row in dev]
    summary = {
        "task": settings.task,
        "method": settings.method,
        "metric": task.metric,
        "score": METRICS[task.metric](predicted, gold),
        "budget": getattr(allocator, "budget", 1.0) if layers else None,
        "density_expected": allocator.C_end,
        "density_kept": kept_density(layers) if layers else None,
        "adapter_params_total": total_parameters(layers),
        "adapter_params_kept": sum(layer.r * layer.triplet_size for layer in layers.values()),
        "ranks": {name: layer.r for name, layer in layers.items()},
        "steps": journal.rows[-1]["step"],
        "seconds": round(journal.seconds, 2),
        "seed": settings.seed,
        "device": settings.device,
        "command": settings.command,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "adapter_digest": digest_of(adapter_state(model)),
        "frozen_digest": journal.fingerprint()["frozen weights"],
    }
    if settings.method == "salora":
        summary["recipe"] = settings.recipe
    save_adapter(model, folder / "adapter.pt")
    short = settings.method == "salora" and 0 < allocator.schedule.window_steps < FEW_STEPS
    write_run(folder, journal, summary, settings.rank, short)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    if layers:
        print(rank_table(summary["ranks"]))
        kept, density, budget = summary["adapter_params_kept"], summary["density_kept"], summary["budget"]
        above = f", above the budget of {budget}" if density > budget else ""
        print(f"kept {kept:,} of {summary['adapter_params_total']:,} adapter parameters: {density:.4f}{above}")
    seconds = summary["seconds"]
    print(f"{settings.task}: {scores(task, predicted, gold)} in {seconds:.1f} s; see {folder}", flush=True)
    return summary


def write_run(folder, journal, summary, rank, short=False):
    """log.csv, training.png, trace.csv and trace.png if the run was traced, ranks.png where there are ranks, and last,
    as the sign of a finished run, summary.json."""
    recipe = f" ({summary['recipe']})" if summary.get("recipe", "ours") != "ours" else ""
    run = f"{summary['task']}, {summary['method']}{recipe}, seed {summary['seed']}"
    title = f"{run}: {summary['metric']} {summary['score']:.3f}"
    log, trace = journal.rows, journal.trace
    write_atomically(folder / "log.csv", lambda path: write_rows(log, COLUMNS, path))
    budget = summary["budget"]
    picture(folder / "training.png", lambda path: draw_training(log, path, budget, title))
    if trace:
        write_atomically(folder / "trace.csv", lambda path: write_rows(trace, TRACE, path))
        picture(folder / "trace.png", lambda path: draw_trace(trace, rank, path, title))
    if summary["ranks"]:
        title += "\nwindow too short for ranks to mean anything" if short else ""
        picture(folder / "ranks.png", lambda path: draw_ranks(summary["ranks"], rank, path, title))
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))


def picture(path, draw):
    """Draw a picture into a file. One that cannot be drawn, say for want of LaTeX, costs a line and not the run."""
    try:
        write_atomically(path, draw)
    except Exception as error:
        print(f"warning: there is no {path}: {error}")


def scores(task, predicted, gold):
    """The task's metrics as text: accuracy 0.8725, f1 0.9091."""
    return ", ".join(f"{name} {METRICS[name](predicted, gold):.4f}" for name in (task.metric, task.also) if name)


def write_predictions(out, task, file, predicted):
    """GLUE's submission for the rows of an official file: index and label, one line per row. Returns its path."""
    labels = [task.labels[p] if task.labels else f"{min(5.0, max(0.0, p)):.3f}" for p in predicted]
    lines = ["index\tprediction", *(f"{i}\t{label}" for i, label in enumerate(labels))]
    path = out / task.predictions_of(file)
    write_atomically(path, lambda part: part.write_text("\n".join(lines) + "\n"))
    return path


def write_rows(rows, columns, path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def status_line(row, total_steps, allocator, rows_per_second):
    """step 0050/0400 | loss .512 | C .71 -> .50 | lambda .33 | kept 37/96 | 812 rows/s"""
    parts = [f"step {row['step']:0{len(str(total_steps))}d}/{total_steps}", f"loss {row['loss']:.3f}"]
    if row["phase"] == "window":
        parts += [f"C {row['C']:.3f} -> {allocator.budget}"]
        parts += [f"lambda {row['lam']:.2f}"] if row["lam"] else []
    if row["triplets"]:
        parts += [f"kept {row['triplets']}"]
    return " | ".join(parts + [f"{rows_per_second:.0f} rows/s"])


def rank_table(ranks):
    """The rank of every matrix as text: a line per block, a column per matrix."""
    matrices, blocks, cells = rank_grid(ranks)
    lines = ["rank     " + " ".join(f"{m:>6}" for m in matrices)]
    lines += [f"block {b:<3}" + " ".join(f"{cells.get((m, b), '-'):>6}" for m in matrices) for b in blocks]
    return "\n".join(lines)


def score_table(summaries):
    """One line per task: metric, score as mean +- deviation over seeds, kept density, seconds; then the average."""
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
