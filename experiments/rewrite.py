"""Instructions for a real decoder: the half of experiments/instruct.py that --model asks for.

A decoder of the LLaMA family learns from instructions in Stanford Alpaca's format, with the loss on the words of the
answers alone. Then it is asked to rewrite Yelp's sentences (Li et al. 2018) in the words of the paper's Table A3:
negative ones to be more positive, and positive ones more negative. As in its Table 2, what is written is measured by

    accuracy      how often a classifier finds the sentiment asked for: the main job's, fine-tuned on sentiment.dev.*
    BLEU          against the human rewriting of the same sentence (sacrebleu, without case)
    perplexity    of the written words under the same decoder before any tuning; the paper has an n-gram model

and the loss is that of the next word of held-out answers. Two rows are yardsticks: `copy` leaves the sentence as it is,
`human` is the reference. A seed draws the batches and the start; all seeds hold out the same answers. Adapters and
training are those of experiments/decoder.py. Left out: sampling, beam search, and a learning rate for each arm: --lr
gives those that all arms try.
"""

import json
import math
import random
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch

import train_glue_mini
from budget import FixedRanks, RankAllocator, Recipe
from cli.afterwards import predict, reopen
from cli.files import append, has_row, make_folder, read_table
from cli.flags import device_of, positive
from cli.runs import read_settings
from experiments.decoder import (
    add_decoder_flags,
    check_rows,
    encode,
    first_token,
    fit,
    in_batches,
    lines_of,
    load,
    losses_of,
)
from experiments.shift import size_of
from hub.checkpoints import read_json, write_atomically

PROMPT = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
REQUEST = "Please change the sentiment of the following sentence to be more {}."
ASKED = {"positive": 0, "negative": 1}  # the sentiment asked for, and the label of the sentences that it is asked of
DEFAULTS = {"arms": ["untuned", "lora-8", "lora-4", "salora", "salora-16"], "seeds": [0], "steps": 60, "rows": 900,
            "out": "runs/rewrite"}  # fmt: skip
LR = 1e-3
WRITE_BATCH = 16
SETTINGS = ("precision", "batch_size", "length", "sentences", "words")
FLAGS = ("data", "yelp", "classifier_weights", "device", *SETTINGS)  # for a real decoder alone
SAME = ("steps", "rows", *SETTINGS)  # in all rows of a table
CLASSIFIER_DEV = 200  # sentences of each sentiment that the classifier does not train on


def add_flags(parser):
    g = parser.add_argument_group("a real decoder instead of the miniature")
    add_decoder_flags(g)
    g.add_argument("--data", metavar="FILE", help="instructions in Stanford Alpaca's format, a JSON file")
    g.add_argument("--yelp", metavar="DIR", help="folder with sentiment.dev.0, .1 and reference.0, .1")
    g.add_argument("--classifier-weights", metavar="DIR", help="folder of a RoBERTa- or BERT-family encoder, which the "
                   "main job turns into the classifier of sentiment")  # fmt: skip
    g.add_argument("--batch-size", type=positive, default=8, metavar="N", help="instructions a step (default 8)")
    g.add_argument("--length", type=positive, default=192, metavar="N", help="tokens of an instruction and its answer; "
                   "the rest is cut (default 192)")  # fmt: skip
    g.add_argument("--sentences", type=positive, default=50, metavar="N", help="to rewrite a direction (default 50)")
    g.add_argument("--words", type=positive, default=30, metavar="N", help="to write at most, in tokens (default 30)")


def prompt(instruction, text=""):
    """An instruction in Alpaca's format, up to where the response begins."""
    parts = [PROMPT, f"### Instruction:\n{instruction}", *([f"### Input:\n{text}"] if text else []), "### Response:\n"]
    return "\n\n".join(parts)


class Data:
    """Rows of instructions to train on and to hold out, and the sentences to rewrite: {asked: [(sentence, human)]}."""

    def __init__(self, args, tokenizer):
        self.tokenizer = tokenizer
        found = read_instructions(args.data)
        found = [row for row in (self.row(*each, args.length) for each in found) if row]
        random.Random("instructions").shuffle(found)  # the same for all seeds: what is held out is the same
        if len(found) <= args.rows:
            raise ValueError(f"{args.data} has {len(found)} instructions that fit --length {args.length}: take fewer "
                             f"than --rows {args.rows} to train on, so that some are held out")  # fmt: skip
        self.train, self.held_out = found[: args.rows], found[args.rows :]
        self.asked = {asked: self.pairs(args, label) for asked, label in ASKED.items()}

    def row(self, instruction, text, answer, length):
        """(token ids of the prompt and the answer, where the answer begins), or None without room for an answer."""
        ids = self.prompt(instruction, text)
        whole = [*ids, *encode(answer, self.tokenizer), self.tokenizer.eos_token_id]
        return (whole[:length], len(ids)) if len(ids) < length else None

    def prompt(self, instruction, text):
        return [first_token(self.tokenizer), *encode(prompt(instruction, text), self.tokenizer)]

    def pairs(self, args, label):
        """The first sentences of a label with their human rewriting."""
        path = Path(args.yelp) / f"reference.{label}"
        lines = [line.split("\t") for line in lines_of(path)[: args.sentences]]
        if any(len(line) != 2 for line in lines):
            raise ValueError(f"{path} needs two columns, a sentence and its rewriting, separated by a tab")
        return [(sentence.strip(), human.strip()) for sentence, human in lines]


def read_instructions(path):
    """[(instruction, input, output)] of a file in Alpaca's format. Raises OSError or ValueError for other files."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected instructions in Alpaca's format, a JSON file")
    keys = ("instruction", "input", "output")
    try:
        return [tuple(row[key].strip() for key in keys) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} is not in Alpaca's format: a JSON list of {', '.join(keys)}") from None


def write(model, tokenizer, prompts, most):
    """The first line of the likeliest continuation of each prompt (token ids), of at most `most` tokens: texts."""
    stop, device = tokenizer.eos_token_id, next(model.parameters()).device
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in (order[i : i + WRITE_BATCH] for i in range(0, len(order), WRITE_BATCH)):
        longest = len(prompts[batch[-1]])
        blank = [longest - len(prompts[i]) for i in batch]  # on the left, so that all go on at the right
        ids = torch.tensor([[stop] * n + prompts[i] for n, i in zip(blank, batch)], device=device)  # (batch, seq)
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in blank], device=device)
        written = model.lm.generate(ids, attention_mask=mask, max_new_tokens=most, do_sample=False, pad_token_id=stop,
                                    eos_token_id=stop)  # fmt: skip
        for i, text in zip(batch, tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)):
            texts[i] = text.strip().partition("\n")[0].strip()
    return texts


# The measures.


def names_of(asked):
    """The columns of one direction."""
    return [f"{measure} to {asked}" for measure in ("accuracy", "bleu", "perplexity")]


class Judge:
    """Classifier, BLEU and perplexity."""

    def __init__(self, args, out):
        self.decoder, self.tokenizer = load(args.model, args.device)  # which nothing tunes
        self.settings, self.classifier, self.encode = classifier(args, out)

    def scores(self, asked, texts, humans):
        """{measure: value} of what was written for one direction."""
        rows = self.encode([(text or ".", None, 0) for text in texts])  # no row may be empty
        labels = predict(self.classifier, rows, self.settings.device)
        values = [mean(label != ASKED[asked] for label in labels), bleu(texts, humans), self.perplexity(texts)]
        return {name: round(value, 4) for name, value in zip(names_of(asked), values, strict=True)}

    def perplexity(self, texts):
        """exp(nats a word) of texts without their end; nan where nothing was written."""
        rows = [([first_token(self.tokenizer), *encode(text, self.tokenizer)], 1) for text in texts if text]
        nats, words = losses_of(self.decoder, rows)
        return math.exp(sum(nats) / sum(words)) if rows else math.nan


def bleu(texts, humans):
    """0 to 100, of all texts together."""
    try:
        import sacrebleu
    except ImportError:
        raise ValueError("BLEU needs sacrebleu: pip install -r requirements-dev.txt") from None
    return sacrebleu.corpus_bleu(texts, [humans], lowercase=True).score


def classifier(args, out):
    """(settings, model, encode) of the main job's run in out/classifier, which is trained on first use."""
    folder = out / "classifier"
    if (folder / "checkpoint.pt").is_file() and not (folder / "summary.json").is_file():
        train_glue_mini.main(["--resume", str(folder)])
    elif not (folder / "summary.json").is_file():
        write_sst2(Path(args.yelp), out / "SST-2")
        train_glue_mini.main(["--task", "sst2", "--data", str(out), "--weights", args.classifier_weights,
                              "--device", args.device, "--out", str(folder)])  # fmt: skip
    settings, summary = read_settings(folder, args.device), read_json(folder / "summary.json")
    model, encode = reopen(settings, folder, summary)
    print(f"classifier: {summary['metric']} {summary['score']:.4f} on {2 * CLASSIFIER_DEV} sentences", flush=True)
    return settings, model, encode


def write_sst2(yelp, folder):
    """Yelp's dev sentences as GLUE's SST-2: the last ones of each sentiment to score with, the others to train on."""
    folder.mkdir(exist_ok=True)
    texts = {label: lines_of(yelp / f"sentiment.dev.{label}") for label in ASKED.values()}
    for name, part in (("train", slice(None, -CLASSIFIER_DEV)), ("dev", slice(-CLASSIFIER_DEV, None))):
        lines = [f"{text}\t{label}" for label, some in texts.items() for text in some[part]]
        text = "\n".join(["sentence\tlabel", *lines]) + "\n"
        write_atomically(folder / f"{name}.tsv", lambda path: path.write_text(text, encoding="utf-8"))


# The runs.


def runs_of(args):
    """(arm, seed, learning rate) of all runs. What no seed changes is run once."""
    runs = [(name, 0, 0.0) for name in ("copy", "human")]
    runs += [("untuned", 0, 0.0)] if "untuned" in args.arms else []
    tuned = [name for name in args.arms if name != "untuned"]
    return runs + [(name, seed, lr) for seed in args.seeds for name in tuned for lr in args.lr or [LR]]


def tuned_decoder(args, data, arm, lr, seed):
    """The decoder, fine-tuned as an arm says: None, or (rank at creation, density, recipe or None for LoRA, ...)."""
    model, _ = load(args.model, args.device)
    if arm is None:
        return model
    rank, density, recipe, _ = arm

    def allocator_of(model, optimizer):
        if recipe is None:
            return FixedRanks(model, args.steps, Recipe.ours().warmup)
        return RankAllocator(model, optimizer, args.steps, density, recipe, seed)

    batches = in_batches(data.train, args.batch_size, seed)
    return fit(model, batches, rank, allocator_of, lr, seed, args.precision)


def measure(args, data, judge, arms, name, seed, lr):
    """(row, {asked: texts}) of one run. One that diverges has an infinite loss, and writes nothing."""
    row = {"arm": name, "seed": seed, "lr": lr, **{flag: getattr(args, flag) for flag in SAME}}
    if name in ("copy", "human"):
        row |= {"size": 0.0, "loss": ""}
        texts = {asked: [pair[name == "human"] for pair in pairs] for asked, pairs in data.asked.items()}
    else:
        try:
            model = tuned_decoder(args, data, arms[name], lr, seed)
        except FloatingPointError:
            columns = ("size", "loss", *(column for asked in ASKED for column in names_of(asked)))
            return row | dict.fromkeys(columns, math.nan) | {"loss": math.inf}, {}
        nats, words = losses_of(model, data.held_out)
        size = 0.0 if name == "untuned" else round(size_of(model), 4)
        row |= {"size": size, "loss": round(sum(nats) / sum(words), 4)}
        texts = {}
        for asked, pairs in data.asked.items():
            prompts = [data.prompt(REQUEST.format(asked), sentence) for sentence, _ in pairs]
            texts[asked] = write(model, data.tokenizer, prompts, args.words)
    for asked, pairs in data.asked.items():
        row |= judge.scores(asked, texts[asked], [human for _, human in pairs])
    return row, texts


def compare(args, arms, out):
    """All runs that args ask for, of arms {name: what tuned_decoder takes}. Returns the rows of out/instruct.csv.

    What is there is not run again. out/written.csv has what each model writes.
    """
    path = out / "instruct.csv"
    check_rows(path, args, SAME)
    runs = [run for run in runs_of(args) if not has_row(path, **dict(zip(("arm", "seed", "lr"), run)))]
    if not runs:
        return read_table(path)
    judge = Judge(args, out)
    data = Data(args, judge.tokenizer)
    for name, seed, lr in runs:
        started = time.time()
        row, texts = measure(args, data, judge, arms, name, seed, lr)
        for asked, written in texts.items():
            for (sentence, human), text in zip(data.asked[asked], written, strict=True):
                said = {"asked": asked, "sentence": sentence, "human": human, "written": text}
                append(out / "written.csv", {"arm": name, "seed": seed, "lr": lr, **said})
        append(path, row)
        said = ", ".join(f"{key} {value}" for key, value in row.items() if value != "")
        print(f"{said}, {time.time() - started:.0f} s", flush=True)
    return read_table(path)


def table(rows):
    """A line an arm and learning rate, means over seeds."""
    lines = [" " * 43 + "".join(f"{f'more {asked}: ACC    BLEU      PPL':>36}" for asked in ASKED)]
    lines.append(f"{'arm':<11}{'lr':>8}{'size':>8}{'seeds':>7}{'loss':>9}")
    groups = defaultdict(list)
    for row in rows:
        groups[row["arm"], row["lr"]].append(row)
    for (name, lr), some in groups.items():
        loss = f"{mean(float(row['loss']) for row in some):.4f}" if some[0]["loss"] else "-"
        line = f"{name:<11}{lr:>8}{mean(float(row['size']) for row in some):>8.4f}{len(some):>7}{loss:>9}"
        for asked in ASKED:
            accuracy, overlap, perplexity = (mean(float(row[name]) for row in some) for name in names_of(asked))
            line += f"{accuracy:>19.3f}{overlap:>8.2f}{perplexity:>9.1f}"
        lines.append(line)
    return "\n".join(lines)


def run(args, arms):
    """The experiment, from its flags to its table. Returns the rows."""
    for flag in ("data", "yelp", "classifier_weights"):
        if getattr(args, flag) is None:
            raise ValueError(f"--model needs --{flag.replace('_', '-')} too")
    args.device = device_of(args.device)
    out = Path(args.out)
    make_folder(out)
    rows = compare(args, arms, out)
    print(table(rows))
    error = 0.5 / args.sentences**0.5
    print(f"loss: next word of held-out answers. ACC: of {args.sentences} sentences, standard error up to {error:.2f}. "
          f"PPL: under the decoder of {args.model}, not tuned")  # fmt: skip
    return rows
