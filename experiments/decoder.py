"""What does structure buy on a real decoder? Next-word loss of a decoder of the LLaMA family on plain sentences.

    python experiments/decoder.py --model MODEL --data DIR --tune              learning rates of all arms
    python experiments/decoder.py --model MODEL --data DIR --seeds 0 1 2       all arms, each at its best learning rate
    python experiments/decoder.py --report                                     tables and a picture, no training

MODEL is a folder that `transformers` has saved, such as SmolLM2-135M-Instruct, with its tokenizer. DIR holds text
files, one sentence a line; by default those of Yelp's reviews (Li et al. 2018): sentiment.dev.0 and .1 to train on,
1,000 sentences of sentiment.test.0 and .1 to hold out. Adapters go into the seven linear maps of every layer.

Arms are METHOD-R, of the size of LoRA of rank R, as in experiments/shift.py: lora, ours (from rank 16), svd (the same
cut by singular values, without gates), restart, and its others that train triplets, but for alora. A seed draws the
sentences of a batch, their order and the start; the held-out sentences are always the same. So arms are compared in
pairs twice over: by sentence, where one seed is enough, and by seed. Tuning uses seed 100 and 300 sentences that are
neither trained on nor reported. Losses are in nats, computed in fp32. A word is a token, and the end of a sentence
counts as one.

In --out: tune.csv; decoder.csv, a row a run; sentences.csv, the losses of every held-out sentence, a row a run. Runs
that are there are not done again, so changes of steps, precision or data need another --out. An arm that was not tuned
takes the learning rate of its method, or of LoRA, at the nearest rank; where nothing was tuned, all take the same.
Left out: training the embeddings, packing, and tuning the scale (alpha / rank at creation), which is 2.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.files import append, has_row, make_folder, read_table
from cli.flags import Parser, above_zero, device_of, positive
from cli.runs import STUDY, errors_as_lines
from experiments import plots, shift
from experiments.arms import INSTALLED, METHODS, TUNE_SEED, arm_of, ranking, tuned
from experiments.intervals import interval, paired, resamples, share_closed
from hub.checkpoints import write_atomically
from hub.tokenizers import errors_of
from salora import adapt
from train_glue_mini import fine_tune

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ["lora-8", "lora-4", "lora-2", "lora-1", "ours-4", "ours-2", "ours-1", "svd-4", "restart-8"]
GRID = [5e-4, 1e-3, 2e-3, 4e-3]  # learning rates that --tune tries
LR = 2e-3  # of arms without a tuned one
SCALE = 2  # alpha / rank at creation
HELD_OUT, TUNING, LONGEST = 1000, 300, 64  # sentences to report, sentences to tune on, and tokens of a sentence
EVAL_BATCH = 16  # rows: with 190 words each, and 49,152 logits for each of them, 600 MB


# The decoder. A row is (token ids, start): the words from index `start` on count, what comes before is only read.


class NextWord(nn.Module):
    """Token ids and a mask of places, each (batch, seq) -> logits of the word after each place (places, vocab)."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids, places):
        hidden = self.lm.model(ids, use_cache=False).last_hidden_state  # (batch, seq, width)
        return self.lm.lm_head(hidden[places])


def load(folder, device="cpu"):
    """(the decoder of a folder in fp32, its tokenizer). Raises OSError or ValueError for a folder without them."""
    folder = Path(folder)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {name} in {folder}; expected a decoder and its tokenizer as transformers "
                                    "saves them")  # fmt: skip
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    except ImportError:
        raise ValueError("a real decoder needs transformers: pip install -r requirements-dev.txt") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with errors_of(folder, "cannot be loaded"):
        lm, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True,
                                                        output_loading_info=True)  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    missing = sorted(info["missing_keys"])
    if missing:  # they would be random
        raise ValueError(f"{folder} lacks weights of the model in config.json: {missing[0]}")
    names = {name.rpartition(".")[2] for name, _ in lm.named_modules()}
    if not names.issuperset(TARGETS) or not hasattr(lm, "model"):
        raise ValueError(f"{folder} holds a {type(lm).__name__}; expected the LLaMA family, with {', '.join(TARGETS)}")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no eos_token to end a text with")
    return NextWord(lm).to(device).eval(), tokenizer


def encode(text, tokenizer):
    """The token ids of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False).input_ids


def first_token(tokenizer):
    """The token id that begins a text."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def in_batches(rows, size, seed):
    """Rows of like length meet in a batch, so that little is padded; the seed decides which of them do."""
    rows = random.Random(f"batches {seed}").sample(rows, len(rows))
    rows.sort(key=lambda row: len(row[0]))
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def batch_of(batches, model=None, device="cpu"):
    """[a batch of rows] -> ((ids, places), the next words of these places). Padding is read by no place before it."""
    [rows] = batches
    longest = max(len(words) for words, _ in rows)
    ids = torch.tensor([words + [0] * (longest - len(words)) for words, _ in rows])  # (batch, seq)
    places = torch.zeros_like(ids, dtype=torch.bool)
    for i, (words, start) in enumerate(rows):
        places[i, start - 1 : len(words) - 1] = True
    labels = ids.roll(-1, 1)[places]
    return (ids.to(device), places.to(device)), labels.to(device)


def fit(model, batches, rank, allocator_of, lr, seed, precision="fp32"):
    """Adapt the decoder, in place, to batches of rows; the allocator is what allocator_of(model, optimizer) makes."""
    torch.manual_seed(seed)
    adapt(model, TARGETS, rank, alpha=SCALE * rank)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    allocator = allocator_of(model, optimizer)
    device = next(model.parameters()).device.type
    autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()
    with redirect_stdout(None):
        fine_tune(model, batches, optimizer, allocator, lr=lr, batch_size=1, seed=seed, batch_of=batch_of,
                  autocast=autocast)  # fmt: skip
    return model


@torch.no_grad()
def losses_of(model, rows):
    """(nats, words): for every row the sum of its words' losses, and how many words counted."""
    model.eval()
    device = next(model.parameters()).device
    nats, words = [0.0] * len(rows), [len(ids) - start for ids, start in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for batch in (order[i : i + EVAL_BATCH] for i in range(0, len(rows), EVAL_BATCH)):
        inputs, labels = batch_of([[rows[i] for i in batch]], model, device)
        losses = F.cross_entropy(model(*inputs), labels, reduction="none")  # (places,), row after row
        for i, some in zip(batch, losses.split([words[i] for i in batch])):
            nats[i] = some.sum().item()
    return nats, words


# The study.


def decoder_arm(name):
    """The arm of that name. Raises ArgumentTypeError for what `fit` does not train."""
    arm = arm_of(name)
    if arm.method in INSTALLED:
        raise argparse.ArgumentTypeError(f"{name} trains no triplets, and this study nothing else")
    if arm.method == "alora":
        raise argparse.ArgumentTypeError(f"{name} scores ranks on training rows, which this study does not hold out")
    return arm


class Data:
    """Rows to train on, rows to tune on and rows to hold out, from the text files of a folder; no row is in two."""

    def __init__(self, args):
        _, tokenizer = load(args.model)
        self.held_out = self.read(args.data, args.held_out, tokenizer)[:HELD_OUT]
        known = {tuple(ids) for ids, _ in self.held_out}
        rows = [row for row in self.read(args.data, args.train, tokenizer) if tuple(row[0]) not in known]
        rows = random.Random("to tune on").sample(rows, len(rows))
        self.tuning = rows[: min(TUNING, len(rows) // 4)]
        tuned = {tuple(ids) for ids, _ in self.tuning}
        self.train = [row for row in rows if tuple(row[0]) not in tuned]

    def read(self, folder, names, tokenizer):
        """One row a sentence: a start, which is only read, its words, and a stop."""
        first, rows = first_token(tokenizer), []
        for name in names:
            for text in lines_of(Path(folder) / name):
                ids = encode(text, tokenizer)[: LONGEST - 2]
                rows.append(([first, *ids, tokenizer.eos_token_id], 1))
        return rows


def lines_of(path):
    """The sentences of a text file, one a line. Raises OSError or ValueError for a file that has none."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected text with one sentence a line")
    found = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    found = [line for line in found if line]
    if not found:
        raise ValueError(f"{path} is empty; expected text with one sentence a line")
    return found


def measure(args, data, arm, lr, seed):
    """(row, nats, words) of one run, on the rows to tune on where the seed is that of tuning, else on those held out.
    A run whose loss is not finite has an infinite loss.
    """
    started = time.time()
    model, _ = load(args.model, args.device)
    batches = in_batches(data.train, args.batch_size, seed)
    ranks = []
    try:
        fit(model, batches, arm.r0, lambda *parts: arm.allocator(*parts, args.steps, seed), lr, seed, args.precision)
        nats, words = losses_of(model, data.tuning if seed == TUNE_SEED else data.held_out)
        size, ranks = shift.size_of(model), shift.ranks_of(model)
    except FloatingPointError:
        nats, words, size = [float("inf")], [1], arm.rank / 8
    row = {"arm": arm.name, "size": round(size, 4), "seed": seed, "lr": lr, "steps": args.steps}
    row |= {"precision": args.precision, "batch_size": args.batch_size}
    row |= {"loss": round(sum(nats) / sum(words), 4), "ranks": ranks}
    return {**row, "seconds": round(time.time() - started, 1)}, nats, words


def check_rows(path, args, flags=("steps", "precision", "batch_size")):
    """Raises ValueError for a table of runs with other values of these flags."""
    for row in read_table(path):
        for name in flags:
            if row.get(name) != str(getattr(args, name)):
                raise ValueError(f"{path} holds runs of --{name.replace('_', '-')} {row.get(name)}: give the same, or "
                                 "another --out")  # fmt: skip


def tune(args, out):
    """Every arm at every learning rate of the grid, on the seed that no report uses."""
    path = out / "tune.csv"
    check_rows(path, args)
    data = Data(args)
    for arm in args.arms:
        for lr in args.grid:
            if not has_row(path, arm=arm.name, lr=lr):
                row, _, _ = measure(args, data, arm, lr, TUNE_SEED)
                append(path, row)
                print(f"{arm.name}, lr {lr:g}: {row['loss']:.4f}, {row['seconds']:.0f} s", flush=True)


def trials_of(rows):
    """{arm: {learning rate: loss}}, from the rows of tune.csv."""
    trials = defaultdict(dict)
    for row in rows:
        trials[row["arm"]][float(row["lr"])] = float(row["loss"])
    return trials


def best_of(rows):
    """A line an arm: its losses, best first."""
    lines = ["loss (learning rate), best first"]
    lines += [f"{arm:<11}{ranking(trials)}" for arm, trials in trials_of(rows).items()]
    return "\n".join(lines)


def rate_of(arm, rows):
    """The learning rate of an arm, from the rows of tune.csv."""
    best = {name: min(trials, key=trials.get) for name, trials in trials_of(rows).items()}
    return tuned(arm, best) or LR


def compare(args, out):
    """Every arm at its tuned learning rate, on every seed."""
    path = out / "decoder.csv"
    check_rows(path, args)
    trials = read_table(out / "tune.csv")
    data = Data(args)
    for seed in args.seeds:
        for arm in args.arms:
            if has_row(path, arm=arm.name, seed=seed):
                continue
            row, nats, words = measure(args, data, arm, rate_of(arm, trials), seed)
            each = {"nats": json.dumps([round(x, 4) for x in nats]), "words": json.dumps(words)}
            append(out / "sentences.csv", {"arm": arm.name, "seed": seed, **each})
            append(path, row)
            print(f"{arm.name}, seed {seed}, lr {row['lr']:g}: {row['loss']:.4f}, size {row['size']:.4f}, "
                  f"{row['seconds']:.0f} s", flush=True)  # fmt: skip


# The report: differences between arms, paired by sentence and by seed.


def read_sentences(out):
    """({arm: {seed: nats (sentences,)}}, words (sentences,)). Raises ValueError where runs differ in their words."""
    found, words = defaultdict(dict), None
    for row in read_table(out / "sentences.csv"):
        nats = torch.tensor(json.loads(row["nats"]), dtype=torch.float64)
        if nats.isfinite().all():  # not of a run that diverged
            found[row["arm"]][int(row["seed"])] = nats
            counts = torch.tensor(json.loads(row["words"]), dtype=torch.float64)
            if words is not None and not torch.equal(words, counts):
                raise ValueError(f"{out / 'sentences.csv'} mixes runs that held out other sentences")
            words = counts
    order = sorted(found, key=lambda arm: -arm_of(arm).rank)
    return {arm: found[arm] for arm in order}, words


def gap_by_sentence(nats, words, arm, rival):
    """(difference in nats a word, its 95 % bootstrap interval over sentences), averaged over the seeds of both arms."""
    ours, theirs = (torch.stack(some).mean(0) for some in paired(nats, arm, rival))  # (sentences,) each
    index = resamples(len(words))
    means = (ours - theirs)[index].sum(1) / words[index].sum(1)
    bounds = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ((ours - theirs).sum() / words.sum()).item(), bounds


def gaps_by_seed(nats, words, arm, rival):
    """The difference in nats a word of every seed that both arms have."""
    ours, theirs = paired(nats, arm, rival)
    return [((a - b).sum() / words.sum()).item() for a, b in zip(ours, theirs)]


def between(bounds):
    return f"[{bounds[0]:+.4f}, {bounds[1]:+.4f}]"


def report(rows, nats, words):
    """Means, paired differences, and how much of the gap from r=4 to r=8 is closed at r=4's size."""
    lines = [f"next-word loss of {len(words)} held-out sentences, {int(words.sum())} words; means over seeds"]
    lines.append(f"  {'arm':<14}{'size':>7}{'seeds':>7}{'loss':>9}{'s.d.':>8}")
    for arm, found in nats.items():
        losses = [(some.sum() / words.sum()).item() for some in found.values()]
        size = mean(float(row["size"]) for row in rows if row["arm"] == arm and row["loss"] != "inf")
        deviation = f"{stdev(losses):8.4f}" if len(losses) > 1 else f"{'-':>8}"
        lines.append(f"  {arm:<14}{size:>7.4f}{len(losses):>7}{mean(losses):>9.4f}{deviation}")
    lost = [f"{row['arm']} (seed {row['seed']})" for row in rows if row["loss"] == "inf"]
    lines += [f"diverged, and in no mean: {', '.join(lost)}"] if lost else []
    lines.append("differences in nats a word, shared seeds (below 0: less loss), and 95 % bootstrap intervals")
    lines.append(f"  {'':<24}{'mean':>8}  {'over sentences':<20}  over seeds, three or more")
    for arm in nats:
        for rival in rivals(arm, nats):
            gap, bounds = gap_by_sentence(nats, words, arm, rival)
            gaps = gaps_by_seed(nats, words, arm, rival)
            line = f"  {f'{arm} - {rival}':<24}{gap:>+8.4f}  {between(bounds)}"
            if len(gaps) > 2:
                line += f"  {between(interval(gaps))}  below 0 in {sum(gap < 0 for gap in gaps)} of {len(gaps)}"
            lines.append(line)
    for lora in ("lora", "restart"):
        for arm in nats:
            ends = [f"{lora}-4", f"{lora}-8"]
            is_cut = METHODS[arm_of(arm).method][0] is not None
            if is_cut and arm.endswith("-4") and set(ends) <= set(nats) and shared(nats, *ends, arm):
                lines.append(f"  of the gap from {lora}-4 to {lora}-8, {arm} closes {share(nats, *ends, arm)}")
    return "\n".join(lines)


def shared(nats, *arms):
    """How many seeds all of these arms have."""
    return len(set.intersection(*(set(nats[arm]) for arm in arms)))


def rivals(arm, nats):
    """The arms to compare an arm with that share a seed with it; LoRA is what others are compared with."""
    names = [] if arm.startswith("lora") else shift.rivals(arm, nats)
    return [name for name in names if shared(nats, arm, name)]


def share(nats, *arms):
    """The share of a gap that an arm closes, as text, with intervals; arms: the gap's upper end, its lower, the arm."""
    some = paired(nats, *arms)
    total, (low, high) = share_closed(*(torch.stack(each).mean(0).tolist() for each in some))
    text = f"{total:.2f}, over sentences [{low:.2f}, {high:.2f}]"
    if len(some[0]) > 2:
        _, (low, high) = share_closed(*([nats.sum().item() for nats in each] for each in some))
        text += f", over seeds [{low:.2f}, {high:.2f}]"
    return text


def draw(rows, nats, words, path):
    """Loss against size. Bars are intervals over sentences of the difference from LoRA r=8."""
    from matplotlib.figure import Figure

    base = mean((some.sum() / words.sum()).item() for some in nats["lora-8"].values())
    points = {}
    for arm in (arm for arm in nats if shared(nats, arm, "lora-8")):
        gap, bounds = gap_by_sentence(nats, words, arm, "lora-8")
        size = mean(float(row["size"]) for row in rows if row["arm"] == arm)
        points[arm] = (size, base, gap, *bounds)
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axis = figure.subplots()
    plots.draw_panel(axis, points, "a real decoder")
    axis.set_ylabel("next-word loss (nats)", fontsize=13)
    axis.legend(fontsize=12)
    figure.savefig(path, format="png", dpi=110)


def show(out, picture):
    """Print the report of a folder, and draw it where LoRA r=8 is there to compare with. Returns its rows."""
    rows = read_table(out / "decoder.csv")
    nats, words = read_sentences(out)
    if not nats:
        raise ValueError(f"no runs in {out / 'decoder.csv'}: run without --report first")
    print(report(rows, nats, words))
    if "lora-8" in nats:
        write_atomically(picture, lambda path: draw(rows, nats, words, path))
        print(f"see {picture}")
    return rows


def add_decoder_flags(parser):
    """What every experiment on a real decoder can be told."""
    parser.add_argument("--model", metavar="MODEL", help="folder of a decoder of the LLaMA family and its tokenizer, "
                        "saved by transformers")  # fmt: skip
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="of the matrix products while adapters train (default fp32)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or mps")


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_decoder_flags(parser)
    parser.add_argument("--data", metavar="DIR", help="folder of the text files")
    parser.add_argument("--train", nargs="+", default=["sentiment.dev.0", "sentiment.dev.1"], metavar="FILE",
                        help="in DIR, to train on (default sentiment.dev.0 sentiment.dev.1)")
    parser.add_argument("--held-out", nargs="+", default=["sentiment.test.0", "sentiment.test.1"], metavar="FILE",
                        help=f"in DIR, of which the first {HELD_OUT} sentences are held out (default sentiment.test.0 "
                        "sentiment.test.1)")  # fmt: skip
    parser.add_argument("--arms", nargs="+", type=decoder_arm, default=list(map(arm_of, ARMS)), metavar="METHOD-R",
                        help=f"default {' '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(3), metavar="S", help="default 0 1 2")
    parser.add_argument("--tune", action="store_true", help=f"try the learning rates of --grid, on seed {TUNE_SEED}")
    parser.add_argument("--grid", type=above_zero, nargs="+", default=GRID, metavar="LR",
                        help=f"default {' '.join(f'{lr:g}' for lr in GRID)}")
    parser.add_argument("--report", action="store_true", help="only the tables and the picture of what is there")
    parser.add_argument("--steps", type=positive, default=150, metavar="N", help="default 150")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="sentences a step (default 16)")
    parser.add_argument("--out", default="runs/decoder", metavar="DIR", help="default runs/decoder")
    args = parser.parse_args(argv)
    out = Path(args.out)
    with errors_as_lines(parser, hint=STUDY):
        if args.report:
            return show(out, out / "decoder.png")
        if args.model is None or args.data is None:
            raise ValueError("a run needs --model MODEL and --data DIR")
        args.device = device_of(args.device)
        make_folder(out)
        if args.tune:
            tune(args, out)
            print(best_of(read_table(out / "tune.csv")))
            return read_table(out / "tune.csv")
        compare(args, out)
        return read_table(out / "decoder.csv")


if __name__ == "__main__":
    main()
