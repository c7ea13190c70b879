"""What does structure buy? Masked-word loss of the tiny masked LM after its language has shifted.

    python experiments/shift.py --tune                                   learning rate and scale, for every tuned arm
    python experiments/shift.py --kinds words reverse --arms lora-8 lora-4 ours-4 lora-1 ours-1 --seeds 0 1
    python experiments/shift.py --report                                 tables and a picture, no training

The tiny encoder has read one language; now it reads another, and only adapters train, on 8,000 new texts, 1,000 steps
of 32. What counts is the loss on 3,000 further texts of the same grammar, of which .4 % are among those trained on.
Unlike the scores of the generated tasks, which saturate, this loss has room to fall for every adapter size here, and
repeats within about 0.01. The kinds of shift:

    words      all 100 content words change places
    reverse    the same, and every sentence runs backwards
    synonyms   a new set of synonyms: the second word of each concept moves to another concept of its class
    chance     negative control: the words to be guessed are drawn at random from all words of the texts. What can be
               learned is how frequent each word is, one constant for all places, and any matrix can say that as well as
               another. All placements of rank should tie; an arm that wins here wins by something other than structure.

An arm is METHOD-R and has the size of LoRA of rank R:

    lora       LoRA                        restart    LoRA whose learning rate restarts half-way, as in ours
    ours       SaLoRA, cut from rank 16    svd        cut from rank 16 by singular values, without gates
    paper      the published recipe        late       the main job's default: cut from rank 8
    wider      SaLoRA, cut from rank 32    narrow     the same with window 0.2-0.5
    adalora    AdaLoRA, cut from rank 8    rm-lora    RM-LoRA: regularized and masked, no rank is cut
    alora      ALoRA, R of 8 ranks open    sora       SoRA from rank R; its size follows from its lambda

and those in experiments/arms.py. Those without triplets are adapter-h-R, adapter-p-R, prefix-R and prompt-R, whose R
counts units or vectors, and, without an R, bitfit, ia3, full (all of the encoder, with its embeddings, which the head
of the masked LM shares) and head (the rest of that head, which no other arm trains and no size counts).

A seed draws the shift, the texts, the start and the order; arms of one seed share all of it, so they are compared in
pairs. Tuning uses seed 100 and the reports others. Rows that are there are not run again: other values of --steps or
--texts, or other tuned values, need another --out. Left out: training the head or the embeddings beside adapters.
"""

import argparse
import random
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.files import append, has_row, make_folder, read_table
from cli.flags import positive
from cli.runs import STUDY, errors_as_lines
from cli.setup import TARGETS
from experiments import plots
from experiments.arms import GRID, INSTALLED, METHODS, TUNE_SEED, TUNED, arm_of, grid_of, trial, tuned
from experiments.intervals import interval, paired, share_closed
from glue import mini
from glue.pretrain import corrupt, mini_encoder
from glue.tokens import MiniTokenizer, collate
from hub.checkpoints import write_atomically
from peers.alora import hold_out
from salora import adapt, salora_layers
from tiny_transformer import MaskedLM, load_pretrained
from train_glue_mini import fine_tune

BATCH, HELD_OUT = 32, 3000
COLUMNS = ["kind", "arm", "size", "seed", "loss"]


# The shifts: functions of (texts, rng) that return the texts in the new language.


def permute_words(texts, rng):
    old = mini.vocabulary()[len(mini.GLUE_WORDS) :]
    new = rng.sample(old, len(old))
    return translate(texts, dict(zip(new, new[1:] + new[:1])))


def reverse(texts, rng):
    return [tuple(s and " ".join(s.split()[::-1]) for s in text) for text in permute_words(texts, rng)]


def new_synonyms(texts, rng):
    words = {}
    for concepts in (mini.NOUNS, mini.VERBS, mini.QUALITIES, mini.PLACES):
        second = [concept.split()[1] for concept in concepts]
        rng.shuffle(second)
        for old, new in zip(second, second[1:] + second[:1]):
            words |= {old: new, old + "s": new + "s", mini.past(old): mini.past(new)}  # with plurals and verb forms
    return translate(texts, words)


def translate(texts, words):
    """Every word that has an entry in `words` is replaced by it."""
    return [tuple(s and " ".join(words.get(word, word) for word in s.split()) for s in text) for text in texts]


KINDS = {"words": permute_words, "reverse": reverse, "synonyms": new_synonyms, "chance": lambda texts, rng: texts}


class HiddenWords(MaskedLM):
    """ids, mask, types (batch, seq) and the hidden places, a mask of that shape -> logits (hidden places, vocab)."""

    def forward(self, ids, mask, types, hidden):
        return super().forward(self.encoder(ids, mask, types)[hidden])


class Data:
    """The texts of one kind and seed: encoded rows to train on, and held-out batches with their words hidden."""

    def __init__(self, kind, seed, texts):
        self.kind, self.tokenizer = kind, MiniTokenizer()
        self.generator = torch.Generator().manual_seed(1000 + seed)
        new = KINDS[kind](mini.corpus(texts + HELD_OUT, f"shift {seed}"), random.Random(f"shift {seed}"))
        rows = self.tokenizer.encode([(*text, 0) for text in new])
        self.words = torch.tensor([i for ids, _, _ in rows[:texts] for i in ids if i > self.tokenizer.mask])
        self.train = self.in_batches(rows[:texts], BATCH)
        self.held_out = [self.batch_of([batch]) for batch in self.in_batches(rows[texts:], 250)]

    def in_batches(self, rows, size):
        """Rows of like length meet in a batch, so that little is padded."""
        rows = sorted(rows, key=lambda row: len(row[0]))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def restart(self, seed):
        """From here on, the same words are hidden for every arm."""
        self.generator.manual_seed(seed)

    def batch_of(self, batches, model=None, device="cpu"):
        """[a batch of encoded rows] -> (what HiddenWords eats, the hidden words (hidden places,))."""
        [rows] = batches
        ids, mask, types, _ = collate(rows, self.tokenizer.pad)
        seen, hidden = corrupt(ids, types, self.tokenizer, self.generator)
        labels = ids[hidden]
        if self.kind == "chance":
            labels = self.words[torch.randint(len(self.words), labels.shape, generator=self.generator)]
        return (seen, mask, types, hidden), labels

    @torch.no_grad()
    def loss(self, model):
        """Mean cross-entropy of the hidden words of the held-out texts, in nats."""
        model.eval()
        total = sum(F.cross_entropy(model(*inputs), labels, reduction="sum").item() for inputs, labels in self.held_out)
        return total / sum(len(labels) for _, labels in self.held_out)


@lru_cache(maxsize=2)
def data_of(kind, seed, texts):
    """The Data of a kind and seed, made once for all runs on it that follow each other."""
    return Data(kind, seed, texts)


def new_model(seed):
    """The pre-trained masked LM; what is drawn for it from here on follows from the seed."""
    with redirect_stdout(None):
        model, _ = load_pretrained(mini_encoder(), head=HiddenWords)
    torch.manual_seed(seed)
    return model


def adapted(rank, scale, seed):
    """A new masked LM with adapters of one rank in all matrices; what it was pre-trained to stays frozen."""
    return adapt(new_model(seed), TARGETS, rank, alpha=scale * rank)


def model_of(arm, scale, seed):
    """A new masked LM with what an arm trains."""
    if arm.method not in INSTALLED:
        return adapted(arm.r0, scale, seed)
    model = new_model(seed)
    model.lm_head.requires_grad_(False)
    arm.recipe.install(model, *([arm.r0] if arm.recipe.sized else []))
    return model


def fit(model, data, lr, seed, steps, allocator_of, journal=None, batches=None):
    """Train the adapters on the shifted language, with the allocator that allocator_of(model, optimizer) makes.

    batches: those to train on, if not all.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    allocator = allocator_of(model, optimizer)
    data.restart(seed)
    with redirect_stdout(None):
        fine_tune(model, batches or data.train, optimizer, allocator, lr=lr, batch_size=1, seed=seed, journal=journal,
                  batch_of=data.batch_of)  # fmt: skip
    return allocator


def parameters_of(model):
    """How many parameters an arm has in the encoder: those of its triplets, or all that train."""
    layers = salora_layers(model).values()
    if layers:
        return sum(layer.r * layer.triplet_size for layer in layers)
    return sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


def size_of(model):
    """These parameters relative to LoRA of rank 8."""
    layers = salora_layers(model).values()
    if layers:
        return parameters_of(model) / sum(8 * layer.triplet_size for layer in layers)
    config = model.encoder.config
    d, m = config.hidden_size, config.intermediate_size
    return parameters_of(model) / (8 * config.num_hidden_layers * (4 * (d + d) + 2 * (d + m)))


def ranks_of(model):
    return [layer.r for layer in salora_layers(model).values()]


def score_on(batches, data, model):
    """ALoRA's S(M): a function that returns the negative loss on these batches. Their words are hidden once."""
    inputs, labels = data.batch_of(batches)

    def score():
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(*inputs), labels).item()
        model.train()
        return -loss

    return score


def train(model, data, arm, lr, seed, steps, journal=None, **options):
    """Train an arm's model in place. ALoRA scores ranks on training texts that it does not train on.

    The last batch, which it holds out, has the longest texts, and so the most hidden words.
    """
    batches = data.train
    if arm.method == "alora":
        batches, held_out = hold_out(data.train, 1)
        data.restart(seed)
        options["score"] = score_on(held_out, data, model)

    def allocator_of(model, optimizer):
        return arm.allocator(model, optimizer, steps, seed, **options)

    return fit(model, data, lr, seed, steps, allocator_of, journal, batches)


def measure(data, arm, lr, scale, seed, steps):
    """One run: its size, loss and ranks, and C at T_end. A run whose loss is not finite has an infinite loss."""
    model = model_of(arm, scale, seed)
    try:
        allocator = train(model, data, arm, lr, seed, steps)
    except FloatingPointError:
        size = size_of(model) if arm.method in INSTALLED else arm.rank / 8
        return {"size": size, "loss": float("inf"), "ranks": [], "C": None}
    return {"size": size_of(model), "loss": data.loss(model), "ranks": ranks_of(model), "C": allocator.C_end}


def tune(args, out):
    """Every arm on the whole grid, with the seed that no report uses."""
    path = out / "tune.csv"
    for kind in args.kinds:
        for arm, (lr, scale) in [(arm, point) for arm in args.arms for point in args.grid or grid_of(arm, GRID)]:
            key = {"kind": kind, "arm": arm.name, "lr": lr, "scale": f"{scale:g}", "seed": TUNE_SEED}
            if has_row(path, **key):
                continue
            started = time.time()
            found = measure(data_of(kind, TUNE_SEED, args.texts), arm, lr, scale, TUNE_SEED, args.steps)
            append(path, {**key, **{name: round(found[name], 4) for name in ("size", "loss")}})
            seconds = time.time() - started
            print(f"{kind}, {arm.name}, lr {lr:g}, scale {scale}: {found['loss']:.3f}, {seconds:.0f} s", flush=True)


def best_of(rows):
    """A line a kind and arm: its losses on the grid, best first; and their means over all kinds."""
    lines, trials = [], defaultdict(dict)  # {arm: {(lr, scale): {kind: loss}}}
    for row in rows:
        trials[row["arm"]].setdefault((float(row["lr"]), float(row["scale"])), {})[row["kind"]] = float(row["loss"])
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for arm, tried in trials.items():
        for kind in kinds:
            some = {trial: losses[kind] for trial, losses in tried.items() if kind in losses}
            lines.append(f"{arm:<11}{kind:<9}{ranking(some)}")
        some = {trial: mean(losses.values()) for trial, losses in tried.items() if len(losses) == len(kinds)}
        lines.append(f"{arm:<11}{'mean':<9}{ranking(some)}")
    return "loss (learning rate, scale), best first\n" + "\n".join(lines)


def ranking(losses):
    """{(lr, scale): loss} -> text, best first."""
    best = sorted(losses, key=losses.get)
    return ", ".join(f"{losses[lr, scale]:.3f} ({lr:g}, {scale:g})" for lr, scale in best)


def compare(args, out):
    """Every arm with its tuned learning rate and scale, on every kind and seed."""
    path = out / "shift.csv"
    for seed in args.seeds:
        for kind in args.kinds:
            for arm in args.arms:
                if has_row(path, kind=kind, arm=arm.name, seed=seed):
                    continue
                started = time.time()
                lr, scale = tuned(arm)
                found = measure(data_of(kind, seed, args.texts), arm, lr, scale, seed, args.steps)
                size, loss = round(found["size"], 4), round(found["loss"], 4)
                row = dict(zip(COLUMNS, [kind, arm.name, size, seed, loss], strict=True))
                seconds = round(time.time() - started, 1)
                more = {"lr": lr, "scale": scale, "ranks": found["ranks"], "seconds": seconds}
                append(out / "ranks.csv", {"kind": kind, "arm": arm.name, "seed": seed, **more})
                append(path, row)
                print(f"{kind}, {arm.name}, seed {seed}: {loss:.4f}, size {size:.4f}, {seconds:.0f} s", flush=True)


# Reports: means, and differences between arms of one seed with intervals over seeds.


def rank_of(name):
    """The R in an arm's name, a text. Arms without triplets stand beside LoRA of rank 4: most are as large."""
    return "4" if arm_of(name).method in INSTALLED else name.rpartition("-")[2]


def losses_of(rows, kind):
    """{arm: {seed: loss}}, largest size first."""
    rows = sorted((row for row in rows if row["kind"] == kind), key=lambda row: -float(rank_of(row["arm"])))
    losses = defaultdict(dict)
    for row in rows:
        losses[row["arm"]][int(row["seed"])] = float(row["loss"])
    return losses


def rivals(arm, losses):
    """The arms to compare it with: LoRA of its size and of twice its size (r=1 at least), and a cut without gates."""
    rank = rank_of(arm)
    same, double = (f"{max(1, factor * float(rank)):g}" for factor in (1, 2))
    names = [f"lora-{same}", f"restart-{same}", f"lora-{double}", f"restart-{double}", f"svd-{rank}"]
    return [name for name in dict.fromkeys(names) if name in losses and name != arm]


def report(rows):
    """For every kind: means, paired differences, and how much of the gap from r=4 to r=8 is closed at r=4's size."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        losses = losses_of(rows, kind)
        sizes = {arm: mean(float(r["size"]) for r in rows if (r["kind"], r["arm"]) == (kind, arm)) for arm in losses}
        lines.append(f"{kind}: masked-word loss, means over seeds")
        lines.append(f"  {'arm':<14}{'size':>7}{'seeds':>7}{'loss':>9}{'s.d.':>8}")
        for arm, found in losses.items():
            values = list(found.values())
            deviation = f"{stdev(values):8.4f}" if len(values) > 1 else f"{'-':>8}"
            lines.append(f"  {arm:<14}{sizes[arm]:>7.4f}{len(values):>7}{mean(values):>9.4f}{deviation}")
        lines.append(f"{kind}: differences of arms over shared seeds, 95 % bootstrap intervals (below 0: less loss)")
        for arm in losses:
            if arm.startswith(("lora", "restart")):
                continue
            for rival in rivals(arm, losses):
                gaps = [a - b for a, b in zip(*paired(losses, arm, rival))]
                if len(gaps) > 1:
                    low, high = interval(gaps)
                    wins = sum(gap < 0 for gap in gaps)
                    lines.append(f"  {f'{arm} - {rival}':<24}{mean(gaps):>+8.4f}  [{low:+.4f}, {high:+.4f}]"
                                 f"  below 0 in {wins} of {len(gaps)}")  # fmt: skip
        for lora in ("lora", "restart"):
            for arm in losses:
                ends = [f"{lora}-4", f"{lora}-8"]
                if METHODS[arm_of(arm).method][0] and arm.endswith("-4") and all(end in losses for end in ends):
                    low, high, ours = paired(losses, *ends, arm)
                    if len(low) > 1:
                        share, (least, most) = share_closed(low, high, ours)
                        lines.append(f"  of the gap from {lora}-4 to {lora}-8, {arm} closes {share:.2f} "
                                     f"[{least:.2f}, {most:.2f}]")  # fmt: skip
    return "\n".join(lines)


def draw(rows, path):
    """Loss against size, a panel a kind. Bars are intervals of the difference from LoRA r=8 of the same seed."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if "lora-8" in losses_of(rows, kind)]
    figure = Figure(figsize=(1 + 4.6 * len(kinds), 4.8), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds):
        losses = losses_of(rows, kind)
        base = mean(losses["lora-8"].values())
        points = {}
        for arm in losses:
            gaps = [a - b for a, b in zip(*paired(losses, arm, "lora-8"))]
            if not gaps:
                continue  # no seed in common
            size = mean(float(r["size"]) for r in rows if (r["kind"], r["arm"]) == (kind, arm))
            points[arm] = (size, base, mean(gaps), *interval(gaps))
        plots.draw_panel(axis, points, kind)
    figure.axes[0].set_ylabel("masked-word loss (nats)", fontsize=13)
    figure.axes[0].legend(fontsize=12)
    figure.savefig(path, format="png", dpi=110)


def study(args):
    """Tune, compare or report. Returns the rows of the table."""
    out = Path(args.out)
    make_folder(out)
    if args.tune:
        tune(args, out)
        print(best_of(read_table(out / "tune.csv")))
        return read_table(out / "tune.csv")
    if not args.report:
        compare(args, out)
    rows = read_table(out / "shift.csv")
    if args.report:
        rows = [row for row in rows if row["kind"] in args.kinds]
        if not rows:
            raise ValueError(f"no rows of these kinds in {out / 'shift.csv'}: run without --report first")
        print(report(rows))
        if any(row["arm"] == "lora-8" for row in rows):  # with which the picture compares
            write_atomically(out / "shift.png", lambda path: draw(rows, path))
            print(f"see {out / 'shift.png'}")
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["words", "reverse"], metavar="KIND",
                        help=f"of {', '.join(KINDS)} (default words reverse)")
    parser.add_argument("--arms", nargs="+", type=arm_of, metavar="METHOD-R", help=f"methods: {', '.join(METHODS)} "
                        "(default: those that are tuned)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=range(5), metavar="S", help="default 0 to 4")
    parser.add_argument("--tune", action="store_true", help="try the grid of learning rates and scales, on seed "
                        f"{TUNE_SEED}, and print the best")  # fmt: skip
    parser.add_argument("--grid", type=trial, nargs="+", metavar="LR:SCALE", help="what --tune tries "
                        f"(default {' '.join(f'{lr:g}:{scale:g}' for lr, scale in GRID)})")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only the tables and the picture of what is there")
    parser.add_argument("--steps", type=positive, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--texts", type=positive, default=8000, metavar="N", help="to train on (default 8000)")
    parser.add_argument("--out", default="runs/shift", metavar="DIR", help="default runs/shift")
    args = parser.parse_args(argv)
    args.arms = args.arms or [arm_of(name) for name in TUNED]
    with errors_as_lines(parser, hint=STUDY):
        return study(args)


if __name__ == "__main__":
    main()
