"""Instructions in miniature: a tiny decoder learns to make a sentence more positive or more negative.

    python experiments/instruct.py                                      every arm, seeds 0 to 4
    python experiments/instruct.py --arms lora-8 salora --seeds 0 1     some of them
    python experiments/instruct.py --lr .012 .024 --seeds 100 --out runs/instruct-tune     other learning rates
    python experiments/instruct.py --model MODEL --data ALPACA.json --yelp DIR --classifier-weights ENCODER

The paper tunes LLaMA-7B on instructions and asks it to change the sentiment of reviews and nothing else (its section
4.2). Here a causal tiny transformer reads mini-GLUE's world word by word, and then adapters in all six matrices of a
layer learn from a few hundred examples to follow the instructions of glue/instructions.py. The last command asks the
same of a real decoder, with a classifier, BLEU and perplexity as its judges: see experiments/rewrite.py.

What counts are held-out sentences: the loss of the next word (nats) of the grammar's own answer; and of the sentence
that the model writes, word by word, whether the grammar finds the sentiment asked for in it (accuracy), and whether all
words but opinions and "not" are kept, in order (meaning). No classifier judges: the grammar does.

    untuned      the decoder as it was pre-trained
    lora-8       LoRA; likewise lora-4
    restart-8    LoRA whose learning rate restarts half-way, as in SaLoRA
    salora       SaLoRA, cut from rank 8 to density 1/2: the size of lora-4
    salora-16    SaLoRA, cut from rank 16 to density 1/4: the same size

A seed draws the sentences, the start and the order. Rows that are in DIR/instruct.csv are not run again: other values
of --steps or --rows need another --out. Left out: sampling and beam search, a cache of keys and values, perplexity.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from budget import FixedRanks, RankAllocator, Recipe
from cli.files import append, has_row, make_folder, read_table
from cli.flags import Parser, above_zero, positive
from cli.runs import STUDY, errors_as_lines
from cli.setup import TARGETS
from experiments import rewrite
from experiments.arms import RESTART
from experiments.intervals import interval
from experiments.shift import size_of
from glue.instructions import FAULTS, InstructionTokenizer, answer_to, faults_of, new_sentence, texts_to_read
from glue.pretrain import LR, WARMUP, mini_config, train, trained_once
from salora import adapt
from tiny_transformer import MaskedLM, TinyTransformer, load_pretrained
from train_glue_mini import fine_tune

PAD = InstructionTokenizer().pad
TEXTS, STEPS = 40_000, 6000  # of pre-training
BATCH, HELD_OUT, LONGEST = 32, 500, 30  # LONGEST: of an answer, in words; the grammar's have at most 23
SCALE = 2  # alpha / rank at creation
# Rank at creation, density, recipe (None: LoRA) and learning rate: the best of .012, .024 and .048 on seed 100, where
# .048 diverges for all; restart-8 has that of lora-8.
ARMS = {
    "untuned": None,
    "lora-8": (8, 1.0, None, 0.024),
    "lora-4": (4, 1.0, None, 0.024),
    "restart-8": (8, 1.0, RESTART, 0.024),
    "salora": (8, 0.5, Recipe.ours(), 0.024),
    "salora-16": (16, 0.25, Recipe.ours(), 0.012),
}
COLUMNS = ["arm", "seed", "lr", "size", "loss", "accuracy", "meaning"]


# The decoder.


class NextWord(MaskedLM):
    """Token ids and a mask of places, each (batch, seq) -> logits of the word after each place (places, vocab)."""

    def forward(self, ids, places):
        return super().forward(self.encoder(ids)[places])


def decoder_config():
    return replace(mini_config(), vocab_size=InstructionTokenizer().size, max_position_embeddings=72, type_vocab_size=1,
                   is_decoder=True)  # fmt: skip


def batch_of(rows, model=None, device="cpu"):
    """Rows (token ids, where the answer begins) -> ((ids, places), the next words of these places)."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [PAD] * (longest - len(ids)) for ids, _ in rows], device=device)  # (batch, seq)
    starts = torch.tensor([start for _, start in rows], device=device)
    following = ids.roll(-1, 1)
    places = (torch.arange(longest, device=device) >= starts[:, None] - 1) & (following != PAD)
    places[:, -1] = False
    return (ids, places), following[places]


def pretrain(steps=STEPS):
    """Train a new decoder to tell the next word; prints its progress. Returns it in eval mode."""
    torch.manual_seed(0)
    lm, tokenizer, rng = NextWord(TinyTransformer(decoder_config())), InstructionTokenizer(), random.Random(0)
    rows = [(tokenizer.encode_pair(*text, 70)[0], 1) for text in texts_to_read(TEXTS)]
    rows.sort(key=lambda row: len(row[0]))  # texts of equal length meet in a batch
    batches = [rows[i : i + BATCH] for i in range(0, TEXTS, BATCH)]
    order = []

    def draw_loss():
        if not order:
            order.extend(rng.sample(batches, len(batches)))
        inputs, labels = batch_of(order.pop())
        return F.cross_entropy(lm(*inputs), labels)

    return train(lm, draw_loss, steps, "next-word loss")


def mini_decoder():
    """The folder of the pre-trained decoder, which is trained on first use, in about two minutes on one core."""
    recipe = (NextWord.__name__, decoder_config(), TEXTS, STEPS, WARMUP, LR, BATCH, texts_to_read(200))
    return trained_once("decoder", recipe, pretrain)


@torch.no_grad()
def write(model, prompts, stop, most=LONGEST):
    """Go on from each prompt with the likeliest word, again and again, until `stop`, or `most` words.

    prompts: lists of token ids; they are padded on the left, which moves no position. Returns lists of token ids.
    """
    longest, pad = max(map(len, prompts)), model.encoder.config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])  # (batch, seq)
    for _ in range(most):
        last = torch.zeros_like(ids, dtype=torch.bool)
        last[:, -1] = True
        ids = torch.cat([ids, model(ids, last).argmax(1, keepdim=True)], 1)
        if (ids[:, longest:] == stop).any(1).all():
            break
    written = ids[:, longest:].tolist()
    return [words[: words.index(stop)] if stop in words else words for words in written]


# The runs.


class Data:
    """Sentences of a seed: rows to train on, and sentences to hold out."""

    def __init__(self, seed, rows):
        rng, self.tokenizer = random.Random(f"instruct {seed}"), InstructionTokenizer()
        sentences = {}
        while len(sentences) < HELD_OUT + rows:
            sentences.setdefault(*new_sentence(rng))
        self.asked = [(sentence, not praise) for sentence, praise in sentences.items()]
        encoded = [self.row(*asked) for asked in self.asked]
        self.asked, self.held_out, self.train = self.asked[:HELD_OUT], encoded[:HELD_OUT], encoded[HELD_OUT:]

    def row(self, sentence, praise):
        prompt = self.tokenizer.prompt(sentence, praise)
        return prompt + self.tokenizer.encode_pair(answer_to(sentence), None, 64)[0][1:], len(prompt)

    @torch.no_grad()
    def loss(self, model):
        """Mean cross-entropy of the words of the grammar's answers, in nats."""
        inputs, labels = batch_of(self.held_out)
        return F.cross_entropy(model.eval()(*inputs), labels).item()

    def answers(self, model):
        """[what the model writes] for all held-out sentences."""
        prompts = [self.tokenizer.prompt(*asked) for asked in self.asked]
        written = write(model.eval(), prompts, self.tokenizer.stop)
        return [" ".join(self.tokenizer.words[i] for i in ids) for ids in written]


def adapted(name, data, lr, seed, steps):
    """The decoder, fine-tuned as the arm `name` says."""
    with redirect_stdout(None):
        model, _ = load_pretrained(mini_decoder(), NextWord)
    if name == "untuned":
        return model
    rank, density, recipe, _ = ARMS[name]
    torch.manual_seed(seed)
    adapt(model, TARGETS, rank, alpha=SCALE * rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    if recipe is None:
        allocator = FixedRanks(model, steps, Recipe.ours().warmup)
    else:
        allocator = RankAllocator(model, optimizer, steps, density, recipe, seed)
    with redirect_stdout(None):
        fine_tune(model, data.train, optimizer, allocator, lr=lr, batch_size=BATCH, seed=seed, batch_of=batch_of)
    return model.eval()


def measure(data, name, lr, seed, steps):
    """(the row of one run, what its model writes). One that diverges has an infinite loss, and writes nothing."""
    try:
        model = adapted(name, data, lr, seed, steps)
    except FloatingPointError:
        return dict(zip(COLUMNS, [name, seed, lr, nan, inf, 0.0, 0.0], strict=True)), []
    written = data.answers(model)
    faults = [faults_of(*asked, text) for asked, text in zip(data.asked, written, strict=True)]
    accuracy, meaning = (mean(fault not in some for some in faults) for fault in FAULTS)
    size = 0.0 if name == "untuned" else size_of(model)
    values = [round(value, 4) for value in (size, data.loss(model), accuracy, meaning)]
    return dict(zip(COLUMNS, [name, seed, lr, *values], strict=True)), written


def rates_of(name, asked):
    """The learning rates to run an arm with: those that are asked for, or the tuned one; untuned has none."""
    return [0.0] if name == "untuned" else asked or [ARMS[name][-1]]


def compare(args, out):
    """Run every arm on every seed. What is in out/instruct.csv is not run again; out/written.csv has the first texts
    that each model writes."""
    path = out / "instruct.csv"
    runs = [(name, lr) for name in args.arms for lr in rates_of(name, args.lr)]
    for seed in args.seeds:
        data = None
        for name, lr in runs:
            if has_row(path, arm=name, seed=seed, lr=lr):
                continue
            started = time.time()
            data = data or Data(seed, args.rows)
            row, written = measure(data, name, lr, seed, args.steps)
            for (sentence, praise), text in list(zip(data.asked, written))[:20]:
                texts = {"praise": praise, "sentence": sentence, "written": text}
                append(out / "written.csv", {"arm": name, "seed": seed, "lr": lr, **texts})
            append(path, row)
            said = ", ".join(f"{key} {value}" for key, value in row.items())
            print(f"{said}, {time.time() - started:.0f} s", flush=True)


def table(rows):
    """A line an arm and learning rate: means over seeds, and their 95 % bootstrap intervals."""
    lines = [f"{'arm':<11}{'lr':>8}{'size':>7}{'seeds':>7}" + "".join(f"{key:>26}" for key in COLUMNS[4:])]
    groups = defaultdict(list)
    for row in rows:
        groups[row["arm"], row["lr"]].append(row)
    for (name, lr), some in groups.items():
        line = f"{name:<11}{lr:>8}{mean(float(row['size']) for row in some):>7.3f}{len(some):>7}"
        for key in COLUMNS[4:]:
            values = [float(row[key]) for row in some]
            low, high = interval(values)
            line += f"{f'{mean(values):.3f} [{low:.3f}, {high:.3f}]':>26}"
        lines.append(line)
    return "\n".join(lines)


def examples(rows):
    """One sentence as it came for every arm and every verdict on it."""
    found = {}
    for row in rows:
        sentence, praise, text = row["sentence"], row["praise"] == "True", row["written"]
        faults = " and ".join(faults_of(sentence, praise, text)) or "good"
        asked = f"more {'positive' if praise else 'negative'} : {sentence}"
        found.setdefault((row["arm"], faults), f"{row['arm']}, {faults}\n  {asked}\n  {text}")
    return "\n".join(found[key] for key in sorted(found))


DEFAULTS = {"arms": list(ARMS), "seeds": range(5), "steps": 300, "rows": 400, "out": "runs/instruct"}


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)} (default all; "
                        f"with --model {' '.join(rewrite.DEFAULTS['arms'])})")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", metavar="S", help="default 0 to 4; with --model 0")
    parser.add_argument("--lr", type=above_zero, nargs="+", metavar="LR", help="default: what is tuned for each arm; "
                        f"with --model {rewrite.LR:g}")  # fmt: skip
    parser.add_argument("--steps", type=positive, metavar="N", help="default 300; with --model "
                        f"{rewrite.DEFAULTS['steps']}")  # fmt: skip
    parser.add_argument("--rows", type=positive, metavar="N", help="to train on (default 400; with --model "
                        f"{rewrite.DEFAULTS['rows']})")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="default runs/instruct; with --model runs/rewrite")
    rewrite.add_flags(parser)
    args = parser.parse_args(argv)
    for name, value in (rewrite.DEFAULTS if args.model else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in rewrite.FLAGS:
        if not args.model and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for a real decoder: it needs --model")
    with errors_as_lines(parser, hint=STUDY):
        if args.model:
            return rewrite.run(args, ARMS)
        out = Path(args.out)
        make_folder(out)
        mini_decoder()
        compare(args, out)
        rows = read_table(out / "instruct.csv")
        print(table(rows))
        print(examples(read_table(out / "written.csv")))
        return rows


if __name__ == "__main__":
    main()
