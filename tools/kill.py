"""Kill runs of the main job at a random moment, resume them, and compare what comes out with a run left alone.

    python tools/kill.py 50 [--seed 0]        50 kills over eight variants of the main job; a few minutes

A third of the kills fall while a file is being written. A run that dies before its first checkpoint is started anew
with the same command. Equal means: adapter, log and score to the bit. Exit status 1 where they are not.
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
from hub.roberta import save_pretrained
from tiny_transformer import TinyTransformer, TransformerConfig

VARIANTS = ["", "--recipe paper", "--method lora", "--method adalora", "--method full", "--precision bf16",
            "--controller sgd --beta 0.1", "--accumulate 3 --dropout 0.1 --budget 0.2 --rank 4"]  # fmt: skip
STEPS = 120  # 20 epochs, so that there are 20 checkpoints to be killed in


def start(flags):
    """Run the main job in a process of its own, without output. Returns its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = 1
    try:
        train_glue_mini.main(flags)
        status = 0
    finally:
        os._exit(status)


def succeeds(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def killed(child, folder, seconds, while_writing):
    """Kill the process after so many seconds, or then at the next moment in which a temporary file is there. Returns
    whether it was still running."""
    ends = time.time() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.time() >= ends and (not while_writing or any(folder.glob("*.part"))):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0005)
    return False


def outcome(folder):
    summary = json.loads((folder / "summary.json").read_text())
    return summary["adapter_digest"], summary["score"], summary["ranks"], (folder / "log.csv").read_text()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        torch.manual_seed(0)
        save_pretrained(TinyTransformer(TransformerConfig(130, 16, 2, 2, 32, 48, 2)), folder / "weights")
        common = f"--weights {folder}/weights --rows 48 --batch-size 8 --steps {STEPS} --device cpu --out"
        expected, seconds = {}, {}
        for variant in VARIANTS[: args.kills]:
            begun, whole = time.time(), folder / f"whole{len(expected)}"
            assert succeeds(start([*variant.split(), *common.split(), str(whole)])), variant
            expected[variant], seconds[variant] = outcome(whole), time.time() - begun
        done = different = 0
        while done < args.kills:
            variant, run = VARIANTS[done % len(VARIANTS)], folder / f"run{rng.getrandbits(40)}"
            flags = [*variant.split(), *common.split(), str(run)]
            if not killed(start(flags), run, rng.uniform(0, seconds[variant]), rng.random() < 1 / 3):
                continue
            done += 1
            resume = (run / "checkpoint.pt").is_file()
            finished = succeeds(start(["--resume", str(run)] if resume else flags))
            equal = finished and outcome(run) == expected[variant]
            different += not equal
            words = "equal" if equal else "DIFFERENT", "resumed" if resume else "anew   ", variant
            print(f"{done:3d} {'  '.join(words)}", flush=True)
    print(f"{args.kills - different} of {args.kills} equal to the bit")
    return different > 0


if __name__ == "__main__":
    sys.exit(main())
