"""What does structure buy? Masked-word loss of the tiny masked LM after its language has shifted.

    python experiments/shift.py --tune                    learning rate and scale of every arm
    python experiments/shift.py --tasks words --arms lora-8 lora-4 salora-16-to-4 --seeds 0 1
    python experiments/shift.py --report                  tables and a picture, no training
    python experiments/shift.py --arms salora-16-to-4 lora-4-found lora-4-shuffled lora-4-uniform       is it the ranks?

The tiny encoder has read one language; now it reads another, and only adapters train, on 8,000 new texts, for 1,000
steps of 32. What counts is the loss on 3,000 held-out texts, which unlike scores of the generated tasks does not
saturate. The tasks:

    words      all 100 content words are permuted
    reverse    the same, and every sentence runs backwards
    chance     negative control: the words to be guessed are drawn at random from all words of the texts, so no
               placement of ranks can help: an arm that wins here wins by something other than structure

`full` trains all of the encoder, with its embeddings, which the head of the masked LM shares; `head` trains the rest of
that head, which is frozen in all other arms and which no size counts. A seed draws the shift, the texts, the start and
the order. An arm that has not been tuned in --out takes the learning rate and scale of TUNED.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.interrupts import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

import random
from functools import lru_cache

import torch
import torch.nn.functional as F

from cli.flags import positive
from experiments import plots
from experiments.arms import arm_of, nearest, place_ranks, ranks_of
from experiments.study import Study, by_length, fit
from glue import mini
from glue.pretrain import corrupt, mini_encoder
from glue.tokens import MiniTokenizer, collate
from hub.roberta import load_pretrained
from peers import METHODS, install
from peers.alora import hold_out
from salora import salora_layers
from tiny_transformer import MaskedLM

BATCH, HELD_OUT = 32, 3000
GRID = [(6e-3, 1), (6e-3, 2), (6e-3, 4), (1.2e-2, 1), (1.2e-2, 2), (2.4e-2, 1)]  # learning rate, alpha / rank
BEST = {  # of GRID on seed 100, by the mean over words and reverse: the best on words is often too high on reverse
    (6e-3, 2): "salora-8-to-4 salora-16-to-4 salora-16-to-2 salora-16-to-1 salora-16-to-.5 svd-16-to-4 svd-16-to-2 "
    "svd-16-to-1 svd-16-to-.5 lora-8-restart",
    (6e-3, 4): "lora-8",
    (1.2e-2, 1): "lora-4-restart",
    (1.2e-2, 2): "lora-4 lora-2 lora-2-restart lora-1-restart salora-8-to-4-paper salora-8-to-4-paper-scaled",
    (1.2e-2, 8): "adalora-8-to-4",  # beyond the grid, where other arms diverge
    (2.4e-2, 1): "lora-1",
}
TUNED = {name: trial for trial, names in BEST.items() for name in names.split()}


# The shifts: functions of (texts, rng) that return the texts in the new language.


def permute_words(texts, rng):
    content = mini.VOCABULARY[len(mini.GLUE_WORDS) :]
    cycle = rng.sample(content, len(content))
    words = dict(zip(cycle, cycle[1:] + cycle[:1]))  # one cycle: no word keeps its meaning
    return [tuple(s and " ".join(words.get(word, word) for word in s.split()) for s in text) for text in texts]


def reverse(texts, rng):
    return [tuple(s and " ".join(s.split()[::-1]) for s in text) for text in permute_words(texts, rng)]


SHIFTS = {"words": permute_words, "reverse": reverse, "chance": lambda texts, rng: texts}


class HiddenWords(MaskedLM):
    """ids, mask, types (batch, seq) and the hidden positions, a mask of that shape -> logits (positions, vocab)."""

    def forward(self, ids, mask, types, hidden):
        return super().forward(self.encoder(ids, mask, types)[hidden])


class Data:
    """The texts of one task and seed: batches to train on, and held-out batches with their words hidden."""

    def __init__(self, task, seed, texts):
        self.task, self.tokenizer = task, MiniTokenizer()
        self.generator = torch.Generator().manual_seed(1000 + seed)
        new = SHIFTS[task](mini.corpus(texts + HELD_OUT, f"shift {seed}"), random.Random(f"shift {seed}"))
        rows = self.tokenizer.encode([(*text, 0) for text in new])
        self.words = torch.tensor([i for ids, _, _ in rows[:texts] for i in ids if i > self.tokenizer.mask])
        self.train = by_length(rows[:texts], BATCH)
        self.held_out = [self.batch_of([batch]) for batch in by_length(rows[texts:], 250)]

    def batch_of(self, batches, model=None, device="cpu"):
        """[a batch of encoded rows] -> (the inputs of HiddenWords, the hidden words (positions,))."""
        [rows] = batches
        ids, mask, types, _ = collate(rows, self.tokenizer.pad)
        seen, hidden = corrupt(ids, types, self.tokenizer, self.generator)
        labels = ids[hidden]
        if self.task == "chance":
            labels = self.words[torch.randint(len(self.words), labels.shape, generator=self.generator)]
        return (seen, mask, types, hidden), labels

    @torch.no_grad()
    def loss(self, model):
        """Mean cross-entropy of the hidden words of the held-out texts, in nats."""
        model.eval()
        total = sum(F.cross_entropy(model(*inputs), labels, reduction="sum").item() for inputs, labels in self.held_out)
        return total / sum(len(labels) for _, labels in self.held_out)


data_of = lru_cache(maxsize=2)(Data)  # made once for all runs of a task and seed that follow each other


def model_of(arm, scale, seed):
    """The pre-trained masked LM with what an arm trains; its own weights stay frozen."""
    model, _ = load_pretrained(mini_encoder(), head=HiddenWords)
    torch.manual_seed(seed)
    model.lm_head.requires_grad_(arm.method == "head")
    install(model, arm.method, arm.start, scale * (arm.start or 0))
    return model


def train(model, data, arm, lr, seed, steps, **options):
    """Train an arm's model in place. Returns its allocator.

    ALoRA scores ranks on the last batch, on which it does not train: it has the longest texts, so most hidden words.
    """
    batches = data.train
    if arm.method == "alora":
        batches, held_out = hold_out(data.train, 1)
        data.generator.manual_seed(seed)
        options["score"] = score_on(held_out, data, model)
    if arm.method == "child-tuning":
        options["losses"] = lambda: losses_on(batches, data, model, seed)
    data.generator.manual_seed(seed)  # the same words are hidden for every arm
    return fit(model, batches, arm, lr=lr, seed=seed, steps=steps, batch_of=data.batch_of, **options)


def score_on(batches, data, model):
    """ALoRA's S(M): a function that returns the negative loss on these batches. Their words are hidden once."""
    inputs, labels = data.batch_of(batches)

    @torch.no_grad()
    def score():
        loss = F.cross_entropy(model.eval()(*inputs), labels).item()
        model.train()
        return -loss

    return score


def losses_on(batches, data, model, seed):
    """Child-Tuning's losses: yields that of every batch, with gradient. Afterwards training hides the same words as for
    every arm."""
    for batch in batches:
        inputs, labels = data.batch_of([batch])
        yield F.cross_entropy(model(*inputs), labels)
    data.generator.manual_seed(seed)


def parameters_of(model):
    """How many parameters an arm has in the encoder: those of its triplets, or all that train."""
    layers = salora_layers(model).values()
    if layers:
        return sum(layer.r * layer.triplet_size for layer in layers)
    return sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


def measure(args, task, arm, seed, trial):
    """One run: its loss, its size relative to LoRA r = 8, and its ranks."""
    lr, scale = trial
    data, model = data_of(task, seed, args.texts), model_of(arm, scale, seed)
    if arm.placement:
        place_ranks(args, task, arm, seed, model)
    train(model, data, arm, lr, seed, args.steps)
    config = model.encoder.config
    d, m = config.hidden_size, config.intermediate_size
    lora_8 = 8 * config.num_hidden_layers * (4 * (d + d) + 2 * (d + m))
    size = parameters_of(model) / lora_8
    return {"loss": round(data.loss(model), 4), "size": round(size, 4), "ranks": ranks_of(model)}


def trials(args, task, arm, grid=GRID):
    """A grid, and for an arm without triplets as many learning rates, from half of the main job's default upwards."""
    if arm.has_triplets:
        return grid
    middle, _ = METHODS[arm.method].lr
    return [(middle * 2 ** (i - 1), 1) for i in range(len(grid))]


def rivals(name, names):
    """LoRA of an arm's size and of twice its size (r = 1 at least), both restarted too, and a cut without gates."""
    if name.startswith("lora"):
        return [other for other in names if name.endswith("-found") and other.endswith(("-shuffled", "-uniform"))]
    arm = arm_of(name)
    rank = arm.size if arm.has_triplets else 4  # most arms without triplets are about as large as LoRA r = 4
    same, double = max(1, rank), max(1, 2 * rank)
    wanted = [("lora", same), ("lora-restart", same), ("lora", double), ("lora-restart", double), ("svd-16", rank)]
    arms = {(other.family, other.size): other.name for other in map(arm_of, names)}
    return [arms[key] for key in dict.fromkeys(wanted) if arms.get(key, name) != name]


def add_flags(parser):
    parser.add_argument("--texts", type=positive, default=8000, metavar="N", help="to train on (default 8000)")


STUDY = Study(
    doc=__doc__,
    name="shift",
    measure=measure,
    columns=["loss", "size", "ranks"],
    more=["size"],
    tasks=list(SHIFTS),
    default_tasks=["words", "reverse"],
    arms=list(TUNED),
    steps=1000,
    trials=trials,
    default=lambda args, task, arm: nearest(arm, TUNED) if arm.has_triplets else trials(args, task, arm)[3],
    rivals=rivals,
    draw=plots.loss_by_size,
    add_flags=add_flags,
    same=("steps", "texts"),
)
main = STUDY.main

if __name__ == "__main__":
    main()
