"""Table 2 in miniature: a tiny decoder learns to make a sentence more positive or more negative, and changes no more.

    python experiments/table2.py                                      every arm, seeds 0 to 4
    python experiments/table2.py --tune                               learning rates, on seed 100

The paper tunes LLaMA-7B on instructions and asks it to change the sentiment of reviews (Section 4.2). Here a causal
tiny transformer reads mini-GLUE's world word by word; then adapters in all six matrices of a layer learn from a few
hundred examples to follow the instructions of glue/instructions.py. What counts are held-out sentences:

    loss        of the next word (nats), over the grammar's own answers
    accuracy    how often what the model writes has the sentiment that was asked for
    meaning     how often all words but opinions and "not" are kept, in order

`untuned` is the decoder as pre-trained. A seed draws sentences, start and order. Left out: perplexity.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import random
from contextlib import redirect_stdout
from functools import lru_cache
from statistics import mean

import torch
import torch.nn.functional as F

import peers
from cli.flags import positive
from experiments import arms, study
from glue.decoder import NextWord, batch_of, mini_decoder, write
from glue.instructions import FAULTS, InstructionTokenizer, answer_to, faults_of, new_sentence
from hub.roberta import load_pretrained

BATCH, HELD_OUT, LONGEST = 32, 500, 30  # LONGEST: of an answer, in words; the grammar's have at most 23
SCALE = 2  # alpha / rank at creation
LORAS = ["lora-8", "lora-4", "lora-8-restart"]
TUNED = dict.fromkeys([*LORAS, "salora-8-to-4"], (0.024,)) | {"salora-16-to-4": (0.012,)}  # the best on seed 100


@lru_cache(maxsize=1)
def data_of(seed, n):
    """([(sentence, whether praise is asked for)] to hold out, rows of them, n rows to train on), all different.

    A row is (token ids of the instruction and of the grammar's answer, where the answer begins).
    """
    rng, tokenizer, sentences = random.Random(f"instruct {seed}"), InstructionTokenizer(), {}
    while len(sentences) < HELD_OUT + n:
        sentences.setdefault(*new_sentence(rng))
    asked = [(sentence, not praise) for sentence, praise in sentences.items()]
    rows = []
    for sentence, praise in asked:
        prompt = tokenizer.prompt(sentence, praise)
        rows.append((prompt + tokenizer.encode_pair(answer_to(sentence), None, 64)[0][1:], len(prompt)))
    return asked[:HELD_OUT], rows[:HELD_OUT], rows[HELD_OUT:]


def measure(args, task, arm, seed, trial):
    """One run: loss, accuracy, meaning and size."""
    asked, held_out, rows = data_of(seed, args.rows)
    folder = mini_decoder()  # which says what it does
    with redirect_stdout(None):
        model, _ = load_pretrained(folder, NextWord)
    torch.manual_seed(seed)
    if arm.start:
        model.lm_head.requires_grad_(False)
        peers.install(model, "lora", arm.start, SCALE * arm.start)
        [lr] = trial
        study.fit(model, rows, arm, lr=lr, seed=seed, steps=args.steps, batch_size=BATCH, batch_of=batch_of)
    tokenizer = InstructionTokenizer()
    prompts = [tokenizer.prompt(*each) for each in asked]
    texts = [" ".join(tokenizer.words[i] for i in ids) for ids in write(model.eval(), prompts, tokenizer.stop, LONGEST)]
    faults = [faults_of(*each, text) for each, text in zip(asked, texts, strict=True)]
    inputs, labels = batch_of(held_out)
    with torch.no_grad():
        found = {"loss": F.cross_entropy(model(*inputs), labels).item()}
    for name, fault in zip(("accuracy", "meaning"), FAULTS):
        found[name] = mean(fault not in some for some in faults)
    found["size"] = arms.size_of(model) if arm.start else 0.0
    return {name: round(value, 4) for name, value in found.items()}


def arm_of(name):
    return arms.Arm(name, name, "head") if name == "untuned" else arms.arm_of(name)


def add_flags(parser):
    parser.add_argument("--rows", type=positive, default=400, metavar="N", help="to train on (default 400)")


STUDY = study.Study(
    doc=__doc__,
    name="table2",
    measure=measure,
    columns=["loss", "accuracy", "meaning", "size"],
    more=["accuracy", "meaning", "size"],
    tasks=["sentiment"],
    arms=["untuned", *TUNED],
    steps=300,
    trials=lambda args, task, arm: [(0.012,), (0.024,), (0.048,)] if arm.start else [],
    default=lambda args, task, arm: arms.nearest(arm, TUNED),
    arm_of=arm_of,
    add_flags=add_flags,
    same=("steps", "rows"),
)
main = STUDY.main

if __name__ == "__main__":
    main()
