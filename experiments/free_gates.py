"""Do gates close by themselves? The paper's recipe with lambda held at 0 and gates that learn from the task's loss.

    python experiments/free_gates.py --tasks mini-cola mini-mrpc --seeds 0 1 2

The paper's Table 3 has a row without the Lagrangian in which 37 to 43 % of the triplets are left. Here everything is as
published, but lambda never rises: log_theta goes down the gradient of the task's loss alone (R_orth does not see the
gates), and what stays are the gates whose median is positive. One row a task, seed and gate learning rate (0: that of
the recipe) goes to free-gates.csv in --out, with C at T_end; gates start at C = 0.917. Rows that are there are not run
again.
"""

import argparse
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_glue_mini
from budget import RankAllocator
from cli.files import append, has_row, read_table
from glue.mini import TASKS


class FreeGates(RankAllocator):
    """Algorithm 1 whose lambda stays 0."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lagrangian.ascend = lambda: None


def one(task, seed, gate_lr, flags):
    """A row: the main job with the paper's recipe and free gates."""
    flags = ["--recipe", "paper", "--task", task, "--seed", str(seed), *flags]
    flags += ["--gate-lr", str(gate_lr)] if gate_lr else []
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(None):
        with patch.object(train_glue_mini, "RankAllocator", FreeGates):
            summary = train_glue_mini.main([*flags, "--out", f"{folder}/run"])
    row = {"task": task, "seed": seed, "gate_lr": gate_lr, "C": summary["density_expected"]}
    return row | {"kept": summary["density_kept"], "score": summary["score"]}


def table(rows):
    """A line a task and gate learning rate, means over seeds."""
    lines = [f"{'task':<12}{'gate lr':>8}{'seeds':>7}{'C at T_end':>12}{'kept':>8}{'score':>8}"]
    for task, gate_lr in dict.fromkeys((row["task"], row["gate_lr"]) for row in rows):
        some = [row for row in rows if (row["task"], row["gate_lr"]) == (task, gate_lr)]
        C, kept, score = (mean(float(row[key]) for row in some) for key in ("C", "kept", "score"))
        name = f"{float(gate_lr):g}" if float(gate_lr) else "auto"
        lines.append(f"{task:<12}{name:>8}{len(some):>7}{C:>12.3f}{kept:>8.3f}{score:>8.4f}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["mini-cola", "mini-mrpc"], metavar="T",
                        help="default mini-cola mini-mrpc")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="default 0 1 2")
    parser.add_argument("--gate-lr", type=float, nargs="+", default=[0.0, 0.1], metavar="LR",
                        help="of log_theta; 0 is that of the recipe (default 0 0.1)")  # fmt: skip
    parser.add_argument("--out", default="runs/free-gates", metavar="DIR", help="default runs/free-gates")
    args, flags = parser.parse_known_args(argv)  # the rest goes to the main job
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "free-gates.csv"
    for seed in args.seeds:
        for task in args.tasks:
            for gate_lr in args.gate_lr:
                if has_row(path, task=task, seed=seed, gate_lr=gate_lr):
                    continue
                row = one(task, seed, gate_lr, flags)
                append(path, row)
                print(f"{task}, seed {seed}, gate lr {gate_lr:g}: C {row['C']:.3f}", flush=True)
    print(table(read_table(path)))
    return read_table(path)


if __name__ == "__main__":
    main()
