"""What does structure buy on a real decoder? Next-word loss of a decoder of the LLaMA family on plain sentences.

    python experiments/decoder.py --model MODEL --data DIR --tune              learning rates of all arms
    python experiments/decoder.py --model MODEL --data DIR --seeds 0 1 2       all arms, each at its best learning rate

MODEL is a folder that `transformers` has saved, such as SmolLM2-135M-Instruct, with its tokenizer. DIR holds Yelp's
reviews (Li et al. 2018), one sentence per line: sentiment.dev.0 and .1 to train on, 1,000 sentences of sentiment.test.0
and .1 to hold out. Adapters go into the seven linear maps of every layer. A seed draws the batches, their order and the
start. Tuning uses 300 further sentences; an arm that was not tuned takes the learning rate of its family, or of LoRA,
at the nearest size. Losses are in nats per token, in fp32. Left out: packing, other scales.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import argparse
import random
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F

from cli.flags import device_of, positive
from cli.table import read_table
from experiments import arms, shift, study, tables
from glue.decoder import batch_of
from hub.decoder import TARGETS, load_decoder
from salora import adapt

SCALE = 2  # alpha / rank at creation
HELD_OUT, TUNING, LONGEST = 1000, 300, 64  # sentences to report, sentences to tune on, and tokens of a sentence
EVAL_BATCH = 16  # rows: with 63 words each, and 49,152 logits for each of them, 200 MB


@lru_cache(maxsize=1)
def data_of(model, folder):
    """(rows to train on, to tune on, and to hold out); no row is in two of them."""
    _, tokenizer = load_decoder(model)
    held_out = rows_of(folder, "test", tokenizer)[:HELD_OUT]
    rows = [row for row in rows_of(folder, "dev", tokenizer) if row not in held_out]
    rows = random.Random("to tune on").sample(rows, len(rows))
    tuning = rows[: min(TUNING, len(rows) // 4)]
    return [row for row in rows if row not in tuning], tuning, held_out


def rows_of(folder, part, tokenizer):
    """A row for every sentence: a start token, which is only read, its words, and a stop token."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    rows = []
    for path in (Path(folder) / f"sentiment.{part}.{label}" for label in (0, 1)):
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; expected text with one sentence per line")
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                ids = tokenizer(line.strip(), add_special_tokens=False).input_ids[: LONGEST - 2]
                rows.append(([start, *ids, tokenizer.eos_token_id], 1))
    if not rows:
        raise ValueError(f"{path} and its like are empty; expected text with one sentence per line")
    return rows


@torch.no_grad()
def loss_of(model, rows):
    """Mean cross-entropy of all words that count, in nats."""
    model.eval()
    nats, device = 0.0, next(model.parameters()).device
    for batch in study.by_length(rows, EVAL_BATCH):
        inputs, labels = batch_of(batch, model, device)
        nats += F.cross_entropy(model(*inputs), labels, reduction="sum").item()
    return nats / sum(len(ids) - start for ids, start in rows)


def measure(args, task, arm, seed, trial):
    """One run: its loss, its size relative to LoRA r = 8, and its ranks."""
    device = device_of(args.device)
    train, tuning, held_out = data_of(args.model, args.data)
    model, _ = load_decoder(args.model, device)
    torch.manual_seed(seed)
    adapt(model, TARGETS, arm.start, alpha=SCALE * arm.start)
    bf16 = torch.autocast(torch.device(device).type, torch.bfloat16)
    [lr] = trial
    train = random.Random(f"batches {seed}").sample(train, len(train))  # the seed decides which rows share a batch
    study.fit(model, study.by_length(train, args.batch_size), arm, lr=lr, seed=seed, steps=args.steps,
              batch_of=lambda batches, *rest: batch_of(batches[0], *rest),
              autocast=bf16 if args.precision == "bf16" else nullcontext())  # fmt: skip
    loss = loss_of(model, tuning if seed == study.TUNE_SEED else held_out)
    return {"loss": round(loss, 4), "size": round(arms.size_of(model), 4), "ranks": arms.ranks_of(model)}


def arm_of(name):
    """An arm of experiments/arms.py that trains triplets, and does not need held-out rows for it."""
    arm = arms.arm_of(name)
    if not arm.has_triplets or arm.method == "alora":
        raise argparse.ArgumentTypeError(f"{name}: this study trains triplets alone, and holds out no rows for ALoRA")
    return arm


def default(args, task, arm):
    """The learning rate of an arm that was not tuned."""
    tuned = read_table(args.out / "tune.csv")
    best = {name: STUDY.ranking(tuned, name, [task])[0][1] for name in tables.distinct(tuned, "arm")}
    return arms.nearest(arm, best) or (2e-3,)


def add_flags(parser):
    parser.add_argument("--model", metavar="MODEL", help="folder of a decoder and its tokenizer")
    parser.add_argument("--data", metavar="DIR", help="folder of the text files")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="sentences per step (default 16)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of training (default fp32)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")


STUDY = study.Study(
    doc=__doc__,
    name="decoder",
    measure=measure,
    columns=["loss", "size", "ranks"],
    more=["size"],
    tasks=["sentences"],
    arms=["lora-8", "lora-4", "lora-2", "lora-1", "lora-4-restart", "salora-8-to-4", "salora-16-to-4"],
    seeds=range(3),
    steps=150,
    trials=lambda args, task, arm: [(5e-4,), (1e-3,), (2e-3,), (4e-3,)],
    default=default,
    arm_of=arm_of,
    rivals=shift.rivals,
    add_flags=add_flags,
    needs=("model", "data"),
    same=("steps", "precision", "batch_size"),
)
main = STUDY.main

if __name__ == "__main__":
    main()
