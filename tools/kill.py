"""Stop programs at a random moment, let them go on, and compare what comes out with a program left alone.

    python tools/kill.py 50 [--seed 0]        50 stops of eight variants of the main job and of a study; a few minutes

Half of the stops are kills, half are Ctrl-C; a third fall while a file is being written. Ctrl-C must end the program
with exit status 130 and one line. A run with a checkpoint is then resumed; one that died before its first checkpoint,
and a study, goes on with the same command. Equal means: adapter, log and score to the bit, or all rows of the study but
for their seconds. Exit status 1 where something was different.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_glue_mini
from cli.table import read_table
from experiments import planted_ranks
from hub.roberta import save_pretrained
from tiny_transformer import TinyTransformer, TransformerConfig

VARIANTS = ["", "--recipe paper", "--method lora", "--method adalora", "--method full", "--precision bf16",
            "--controller sgd --beta 0.1", "--accumulate 3 --dropout 0.1 --budget 0.2 --rank 4"]  # fmt: skip
STEPS = 120  # 20 epochs, so that there are 20 checkpoints to be stopped in
STUDY = "--steps 5 --tasks maps-1 --seeds 0 1 2"  # of experiments/planted_ranks.py


def start(variant, flags, out):
    """Run a program in a process of its own; what it says goes to out.said. Returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{out}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        main = planted_ranks.main if variant == STUDY else train_glue_mini.main
        main(flags)
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.stderr.flush()
        os._exit(status)


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def stopped(child, out, seconds, while_writing, how):
    """Send a signal after so many seconds, or then at the next moment in which a temporary file is there.

    Returns the exit status, or None where the program was faster.
    """
    ends = time.time() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() >= ends and (not while_writing or any(out.glob("*.part"))):
            os.kill(child, how)
            return status_of(child)
        time.sleep(0.0005)
    return None


def outcome(variant, out):
    if variant == STUDY:
        return [{**row, "seconds": ""} for row in read_table(out / "planted.csv")]
    summary = json.loads((out / "summary.json").read_text())
    return summary["adapter_digest"], summary["score"], summary["ranks"], (out / "log.csv").read_text()


def is_a_line(out, how, status):
    """Whether Ctrl-C ended a program as it should; it may also come when the last file has just been written."""
    said = Path(f"{out}.said").read_text()
    if how == signal.SIGKILL or status == 0:
        return status == 0 or not said
    return status == 130 and said.startswith("\ninterrupted; ") and said.count("\n") == 2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stops", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        save_pretrained(TinyTransformer(TransformerConfig(130, 16, 2, 2, 32, 48, 2)), folder / "weights")
        common = f"--weights {folder}/weights --rows 48 --batch-size 8 --steps {STEPS} --device cpu"
        flags = {variant: [*variant.split(), *common.split(), "--out"] for variant in VARIANTS}
        flags[STUDY] = [*STUDY.split(), "--out"]
        variants = list(flags)[-args.stops :]
        expected, seconds = {}, {}
        for variant in variants:
            begun, whole = time.time(), folder / f"whole{len(expected)}"
            assert status_of(start(variant, [*flags[variant], str(whole)], whole)) == 0, variant
            expected[variant], seconds[variant] = outcome(variant, whole), time.time() - begun
        done = different = 0
        while done < args.stops:
            variant, out = variants[done % len(variants)], folder / f"run{rng.getrandbits(40)}"
            command, how = [*flags[variant], str(out)], rng.choice([signal.SIGKILL, signal.SIGINT])
            child = start(variant, command, out)
            status = stopped(child, out, rng.uniform(0.01, seconds[variant]), rng.random() < 1 / 3, how)
            if status is None:
                continue
            done += 1
            clean, resume = is_a_line(out, how, status), (out / "checkpoint.pt").is_file()
            if resume:
                command = ["--resume", str(out)]
            finished = (out / "summary.json").is_file() or status_of(start(variant, command, out)) == 0
            equal = clean and finished and outcome(variant, out) == expected[variant]
            different += not equal
            words = "equal" if equal else "DIFFERENT", how.name.ljust(7), "resumed" if resume else "anew   ", variant
            print(f"{done:3d} {'  '.join(words)}", flush=True)
            if not equal:
                print(status, Path(f"{out}.said").read_text())
    print(f"{args.stops - different} of {args.stops} equal to the bit")
    return different > 0


if __name__ == "__main__":
    sys.exit(main())
