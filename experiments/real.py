"""Real data, few rows to train on and thousands to score: is SaLoRA better than LoRA, worse, or the same?

    python experiments/real.py --data GLUE --weights MINILM --tune      learning rates of all arms, on seeds 100 to 102
    python experiments/real.py --data GLUE --weights MINILM             every arm, seeds 0 to 4

Official dev sets have 400 to 1,000 rows, which alone gives a standard error of .01 to .03: more than ranks can be
worth. So the official *training* rows are split once and for all into rows to train on, to tune on, and to score. A
seed draws --rows of the first, the start and the order of batches of 32. Dev rows are not used. All arms have scale 2
(alpha / rank at creation) and their own learning rate on each task; lora-4-found and lora-4-shuffled have lora-4's.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import random
from contextlib import nullcontext, redirect_stdout
from functools import lru_cache

import torch

import peers
from cli.afterwards import predict
from cli.flags import positive
from experiments import arms
from experiments.study import Study, by_length, fit
from glue.metrics import METRICS
from glue.tasks import load_task, task_of
from glue.tokens import batch_of, tokenizer_for
from hub.roberta import load_pretrained, read_config
from tiny_transformer import SequenceClassifier

SPLIT = {"sst2": (2000, 10_000), "cola": (1000, 3000), "mrpc": (500, 1000)}  # rows to tune on, rows to score
ARMS = ["lora-8", "lora-4", "lora-4-restart", "salora-8-to-4", "salora-16-to-4", "svd-16-to-4", "lora-4-found",
        "lora-4-shuffled"]  # fmt: skip
TUNE_SEEDS = (100, 101, 102)  # on one seed, rates are chosen by chance: they differ by less than seeds do
BATCH, SCALE, LONGEST = 32, 2, 128
POOL = 8 * BATCH  # rows of similar length within a pool share a batch, which halves the padding


@lru_cache(maxsize=2)
def data_of(task, folder, weights, seed, n):
    """(n rows to train on, rows to score), encoded; with a seed for tuning the latter are those to tune on."""
    everything, _ = load_task(task, folder)
    everything = random.Random(f"split {task}").sample(everything, len(everything))
    n_tune, n_score = SPLIT[task]
    tune, score, rest = everything[:n_tune], everything[n_tune : n_tune + n_score], everything[n_tune + n_score :]
    train = random.Random(f"rows {task} {seed}").sample(rest, min(n, len(rest)))
    tokenizer = tokenizer_for(weights, read_config(Path(weights)), mini=False)
    return tokenizer.encode(train, LONGEST), tokenizer.encode(tune if seed in TUNE_SEEDS else score, LONGEST)


def batches_of(rows, epochs, seed):
    """All batches of all epochs: each epoch is shuffled and cut into pools, a pool into batches of similar length."""
    rng, batches = random.Random(f"batches {seed}"), []
    for _ in range(epochs):
        shuffled = rng.sample(rows, len(rows))
        for i in range(0, len(rows), POOL):
            batches += by_length(shuffled[i : i + POOL], BATCH)
    return batches


def measure(args, task, arm, seed, trial):
    """One run: its score, its size relative to LoRA r = 8, and its ranks."""
    rows, test = data_of(task, args.data, args.weights, seed, args.rows)
    with redirect_stdout(None):
        encoder, _ = load_pretrained(args.weights)
    torch.manual_seed(seed)
    model = SequenceClassifier(encoder, task_of(task).num_labels)
    peers.install(model, "lora", arm.start, SCALE * arm.start)
    if arm.placement:
        arms.place_ranks(args, task, arm, seed, model)
        trial = STUDY.trial_for(args, task, arms.arm_of("lora-4"))
    batches = batches_of(rows, args.epochs, seed)
    autocast = torch.autocast("cpu", torch.bfloat16) if args.precision == "bf16" else nullcontext()
    fit(model, batches, arm, lr=trial[0], seed=seed, steps=len(batches), autocast=autocast,
        batch_of=lambda batches, model, device: batch_of(batches[0], model, device))  # fmt: skip
    with autocast:
        score = METRICS[task_of(task).metric](predict(model, test, "cpu"), [row[2] for row in test])
    return {"score": round(score, 5), "size": round(arms.size_of(model), 4), "ranks": arms.ranks_of(model)}


def rivals(name, names):
    """LoRA, and the arms that show what gates and ranks are worth."""
    found = ["lora-8", "lora-4", "lora-4-restart", "lora-4-shuffled", "svd-16-to-4"]
    return [other for other in found if other in names and other != name]


def add_flags(parser):
    parser.add_argument("--data", metavar="DIR", help="folder with GLUE's official files")
    parser.add_argument("--weights", metavar="DIR", help="checkpoint folder of the encoder")
    parser.add_argument("--rows", type=positive, default=2000, metavar="N", help="to train on (default 2000)")
    parser.add_argument("--epochs", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="default fp32")


STUDY = Study(
    doc=__doc__,
    name="real",
    measure=measure,
    columns=["score", "size", "ranks"],
    more=["size"],
    tasks=list(SPLIT),
    arms=ARMS,
    lowest=False,
    trials=lambda args, task, arm: [] if arm.placement else [(5e-4,), (1e-3,), (2e-3,), (4e-3,)],
    tune_seeds=TUNE_SEEDS,
    by_task=True,
    rivals=rivals,
    equal=0.005,
    add_flags=add_flags,
    needs=("data", "weights"),
    same=("rows", "epochs", "precision"),
)
main = STUDY.main

if __name__ == "__main__":
    main()
