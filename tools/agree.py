"""Do we and the packages that others use read the same out of the same files? Random ones say.

    python tools/agree.py tokenizers [--inputs 10000] [--seed N]   rows, over six kinds of checkpoint folder, through
                                                                   load_tokenizer with and without transformers
    python tools/agree.py exports [--inputs 200] [--seed N]        models with random names of modules, through
                                                                   export_peft, PEFT and import_peft
Rows have the ids and types that AutoTokenizer gives them; without transformers a folder may be refused by the setting
that is not understood. An export opens in PEFT with the
model's outputs, or is refused before anything is written. Exit status 1 where something else happens.
"""

import argparse
import copy
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from hub.peft import export_peft, import_peft  # noqa: E402
from hub.tokenizers import load_tokenizer  # noqa: E402
from salora import adapt, salora_layers  # noqa: E402

# Tokenizers

PIECES = """hello Hello world the The end is umlaut ümlaut Ümlaut uber über Über cafe café naïve 中 文 中文 ##文 covid
19 - . , ! ? ##s ##ing ##lo hel wor ##ld a b c d e ##a ##b ##c ##d ##e i can not ' t 3""".split()
WORDS = [*PIECES, "covid-19", "COVID-19", "newWord", "new word", "ﬁne", "Straße", "İstanbul", "e\u0301", "\u200b", "\t",
         "\u00a0", "\x00", "😀", "한국", "##", "hello,world", "it's", "[mask]", "#1", "\u2028", "x" * 120]  # fmt: skip
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROWS = 25  # from every folder


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def bert_folder(folder, rng, whole):
    """vocab.txt, or a tokenizer.json that says something about each setting itself. Returns settings to choose from."""
    import tokenizers

    write(folder / "vocab.txt", "\n".join(BERT + PIECES))
    if whole:
        flags = dict(lowercase=rng.random() < 0.5, handle_chinese_chars=rng.random() < 0.5)
        tokenizer = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), **flags)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
    return {"do_lower_case": [True, False], "strip_accents": [None, True, False],
            "tokenize_chinese_chars": [True, False], "do_basic_tokenize": [True]}  # fmt: skip


def roberta_folder(folder, rng, whole):
    import tokenizers

    tokenizer = tokenizers.ByteLevelBPETokenizer(add_prefix_space=rng.random() < 0.5)
    tokenizer.train_from_iterator([" ".join(PIECES)] * 5, 330, special_tokens=ROBERTA, show_progress=False)
    tokenizer.save(str(folder / "tokenizer.json")) if whole else tokenizer.save_model(str(folder))
    return {"add_prefix_space": [True, False], "trim_offsets": [True, False]}


def other_folder(folder, rng, unigram):
    """A tokenizer.json of XLM-RoBERTa's class, or of none that has defaults of its own."""
    import tokenizers

    if unigram:
        vocab = [(word, -float(i)) for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "▁"])]
        vocab += [(f"▁{word}", -5.0 - i) for i, word in enumerate(PIECES)] + [(c, -99.0) for c in "abcdehlortw"]
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram([*vocab, ("<mask>", 0.0)], unk_id=3))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    else:
        vocab = {word: i for i, word in enumerate(ROBERTA + PIECES)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        pieces = dict(single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1")
        special = [("<s>", vocab["<s>"]), ("</s>", vocab["</s>"])]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**pieces, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"tokenizer_class": ["XLMRobertaTokenizer" if unigram else "PreTrainedTokenizerFast"]}


FOLDERS = {  # (what writes it, its model_type, its special tokens)
    "BERT, vocab.txt": (lambda folder, rng: bert_folder(folder, rng, False), "bert", BERT),
    "BERT, tokenizer.json": (lambda folder, rng: bert_folder(folder, rng, True), "bert", BERT),
    "RoBERTa, vocab.json": (lambda folder, rng: roberta_folder(folder, rng, False), "roberta", ROBERTA),
    "RoBERTa, tokenizer.json": (lambda folder, rng: roberta_folder(folder, rng, True), "roberta", ROBERTA),
    "XLM-RoBERTa, tokenizer.json": (lambda folder, rng: other_folder(folder, rng, True), "xlm-roberta", ROBERTA),
    "another tokenizer.json": (lambda folder, rng: other_folder(folder, rng, False), "roberta", ROBERTA),
}


def vocabulary(folder):
    """{word: id} of a folder, without the files that add to it."""
    import tokenizers

    if (folder / "tokenizer.json").exists():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    if (folder / "vocab.json").exists():
        return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    return {word: i for i, word in enumerate(words)}


def random_folder(folder, kind, rng):
    """Write a folder of a kind, settings and added tokens in random places. Returns its added and special tokens."""
    make, model_type, special = FOLDERS[kind]
    often = {**make(folder, rng), "mask_token": special[-1:]}
    seldom = {"truncation_side": ["left", "right"], "model_max_length": [512], "split_special_tokens": [True],
              "never_split": [None, ["hello"]], "additional_special_tokens": [[], ["<new>"]]}  # fmt: skip
    settings = {key: rng.choice(values) for key, values in often.items() if rng.random() < 0.6 or "class" in key}
    settings |= {key: rng.choice(values) for key, values in seldom.items() if rng.random() < 0.05}

    vocab = vocabulary(folder)
    added = sorted(rng.sample(["covid-19", "newWord", "new word", "<e1>", special[-1]], rng.randint(0, 3)))
    new = [word for word in added if word not in vocab]
    ids = vocab | {word: len(vocab) + i for i, word in enumerate(new)}
    flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized")}
    place = rng.choice(["added_tokens.json", "added_tokens_decoder", "special_tokens_map.json", "nowhere"])
    if place == "added_tokens.json":
        write(folder / place, {word: ids[word] for word in added})
    elif place == "added_tokens_decoder":
        settings[place] = {ids[word]: {"content": word, **flags, "special": word in special} for word in added}
    elif place == "special_tokens_map.json":
        write(folder / place, {"mask_token": {"content": special[-1], **flags}})
    write(folder / "config.json", {"model_type": model_type})
    if settings:
        write(folder / "tokenizer_config.json", settings)
    return added + special


def random_text(special, rng):
    parts = []
    for _ in range(rng.randint(0, 12)):
        parts += [rng.choice(special if rng.random() < 0.25 else WORDS), rng.choice(["", " ", " ", " ", "  "])]
    return "".join(parts)


def tokenizers_differ(kind, inputs, rng, counts, say):
    """Compare so many rows with AutoTokenizer in one folder of a kind, and count them by what happens."""
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        special = random_folder(folder, kind, rng)
        pairs = [(random_text(special, rng), rng.choice([None, random_text(special, rng)])) for _ in range(inputs)]
        longest = rng.choice([6, 9, 15, 400])
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for route in ("with", "without"):
            with patch.dict(sys.modules, {"transformers": None} if route == "without" else {}):
                try:
                    found = load_tokenizer(folder).encode([(*pair, 0) for pair in pairs], longest)
                except ValueError as error:
                    known = route == "without" and "only read by a package: pip install transformers" in str(error)
                    counts[route, "refused" if known else "wrong"] += inputs
                    if not known:
                        say(f"{kind}, {route} transformers: {error}")
                    continue
            for pair, (ids, types, _) in zip(pairs, found):
                columns = [[text] for text in pair if text is not None]
                row = theirs(*columns, truncation="longest_first", max_length=longest, return_token_type_ids=True)
                right = (row["input_ids"][0], row["token_type_ids"][0])
                counts[route, "equal" if (ids, types) == right else "wrong"] += 1
                if (ids, types) != right:
                    settings = [path.read_text() for path in sorted(folder.glob("*_*.json"))]
                    where = f"{kind}, {route} transformers, {' '.join(settings)}"
                    say(f"{where}: {pair} in at most {longest} tokens: {ids, types}, right: {right}")


def tokenizers(inputs, seed, say):
    """How many of so many rows have other tokens than in AutoTokenizer."""
    wrong = 0
    for kind in FOLDERS:
        counts, rng = Counter(), random.Random(f"{seed}-{kind}")
        for _ in range(-(-inputs // (len(FOLDERS) * ROWS))):
            tokenizers_differ(kind, ROWS, rng, counts, say)
        parts = [f"{route} transformers {counts[route, 'equal']} equal, {counts[route, 'refused']} refused, "
                 f"{counts[route, 'wrong']} wrong" for route in ("with", "without")]  # fmt: skip
        say(f"{kind}, seed {seed}: {'; '.join(parts)}")
        wrong += counts["with", "wrong"] + counts["without", "wrong"]
    return wrong


# Exports

NAMES = """fc c_fc proj q_proj out query head heads 2 12 0 A B layer layers default lora lora_A lora_B base_layer
dropout model module block classifier score original_module save modules_to_save norm bias x""".split()
CONTAINERS = [nn.Module, nn.Module, nn.ModuleDict]


class Chain(nn.Module):
    """Linear layers under random names, called one after the other."""

    def __init__(self, rng):
        super().__init__()
        self.paths = []
        for _ in range(rng.randint(2, 6)):
            path = ".".join(rng.choices(NAMES, k=rng.choice([1, 1, 2, 3])))
            inside = [other for other in self.paths if f"{path}.".startswith(f"{other}.")]
            around = [other for other in self.paths if f"{other}.".startswith(f"{path}.")]
            if not inside and not around:
                self.paths.append(path)
                self.add(path.split("."), rng)

    def add(self, path, rng):
        module = self
        for name in path[:-1]:
            if name not in module._modules:
                module.add_module(name, rng.choice(CONTAINERS)())
            module = module._modules[name]
        module.add_module(path[-1], nn.Linear(4, 4))

    def forward(self, x):
        for path in self.paths:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


def random_adapter(rng):
    """(a model, the same with random adapters and heads that train), or None where the names leave no two layers."""
    torch.manual_seed(rng.getrandbits(32))
    base = Chain(rng).eval()
    if len(base.paths) < 2:
        return None
    paths = rng.sample(base.paths, len(base.paths))
    targets = paths[: rng.randint(1, len(paths) - 1)]
    model = adapt(copy.deepcopy(base), targets, r=3, alpha=5)
    adapted = salora_layers(model)
    for layer in adapted.values():
        layer.B.data.normal_()
        layer.gate.fix((torch.rand(3) < 0.7).float())
    for path in set(paths) - set(adapted):
        if rng.random() < 0.5:
            head = model.get_submodule(path).requires_grad_(True)
            head.weight.data.normal_()
    return base, model.eval()


def export_differs(rng):
    """None where an export opens in PEFT and here with the model's outputs, "refused", or what went wrong."""
    import peft

    made = random_adapter(rng)
    if made is None:
        return "skipped"
    base, model = made
    x = torch.randn(5, 4)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        try:
            export_peft(model, out, pad=rng.random() < 0.3)
        except ValueError as error:
            return f"half a folder: {error}" if out.exists() else "refused"
        names = f"adapters {list(salora_layers(model))}, of {base.paths}"
        try:
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)(x)
        except Exception as error:  # whatever it is, it is what the user would meet
            return f"PEFT: {type(error).__name__}: {' '.join(str(error).split())[:200]}; {names}"
        for other in (theirs, import_peft(copy.deepcopy(base), out)(x)):
            if not torch.allclose(other, model(x), atol=1e-5):
                return f"outputs differ by {(other - model(x)).abs().max():.1e}; {names}"
    return None


# Running


def exports(inputs, seed, say):
    """How many of so many exports PEFT reads otherwise than they were meant."""
    counts, wrong, i = Counter(), 0, 0
    while counts["equal"] + counts["refused"] + wrong < inputs:
        found = export_differs(random.Random(f"{seed}-{i}"))
        if found in (None, "refused", "skipped"):
            counts[found or "equal"] += 1
        else:
            wrong += 1
            say(f"exports, input {i}: {found}")
        i += 1
    equal, refused = counts["equal"], counts["refused"]
    say(f"exports, seed {seed}: {equal} open with the same outputs, {refused} refused, {wrong} wrong")
    return wrong


KINDS = {"tokenizers": (tokenizers, 10_000), "exports": (exports, 200)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    compare, inputs = KINDS[args.kind]
    sys.exit(bool(compare(args.inputs or inputs, args.seed, print)))


if __name__ == "__main__":
    main()
