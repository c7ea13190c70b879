"""Damaged and hostile files: a reader may return, or raise ValueError or OSError, and must do nothing else.

    python tools/fuzz.py KIND SECONDS [--seed N] [--inputs N]       KIND: rows, config, weights, index, adapter, peft,
                                                                    tokenizer, checkpoint, settings, or all
Every input is one valid file with a few changes: bytes, or values of the JSON, pickle or tensors inside. Reported are
any other exception, more than 1 s of CPU time or 5 s in all, more than 500 MB of memory, and a model that a reader
changed before it refused the file. Input i depends on the seed and i alone: `--inputs N` repeats the first N.
"""

import argparse
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from changes import FORMATS, changed, load_safetensors, replaced, save_safetensors, save_torch  # noqa: E402
from torch import nn  # noqa: E402

from cli.flags import build_parser  # noqa: E402
from cli.journal import Journal  # noqa: E402
from cli.runs import interrupted, read_run  # noqa: E402
from cli.settings import settle, write_settings  # noqa: E402
from cli.setup import build  # noqa: E402
from glue.tasks import TASKS, read_rows  # noqa: E402
from hub.adapters import load_adapter, load_adapter_state, save_adapter  # noqa: E402
from hub.peft import export_peft, import_peft  # noqa: E402
from hub.roberta import load_pretrained, save_pretrained  # noqa: E402
from hub.tokenizers import load_tokenizer  # noqa: E402
from rank_allocator import RankAllocator  # noqa: E402
from salora import adapt  # noqa: E402
from tiny_transformer import MaskedLM, TinyTransformer, TransformerConfig  # noqa: E402
from train_glue_mini import fine_tune  # noqa: E402

CPU_SECONDS, SECONDS, MEGABYTES = 1, 5, 500
SIZES = dict(vocab_size=130, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
             max_position_embeddings=48, type_vocab_size=2)  # fmt: skip


# Kinds: each makes valid files in a folder, and returns [(files that may change, what reads them)]


class Changed(Exception):
    """A reader refused, and yet its model is not what it was."""


class Hang(BaseException):
    """A reader took too long."""


def contents(model):
    """All that a refused file must leave alone, as plain values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [type(m) for m in model.modules()], [(name, p.tolist(), p.requires_grad) for name, p in tensors]


def unchanged_if_refused(make, read, path):
    """Call read(make(), path); where it refuses, the model must be what it was."""
    model = make()
    before = contents(model)
    try:
        read(model, path)
    except (ValueError, OSError):
        if contents(model) != before:
            raise Changed("the model was changed before the file was refused") from None
        raise


def small_encoder():
    return TinyTransformer(TransformerConfig(**SIZES))


def rows(folder):
    texts = {
        "cola": "s\t1\t\tA good film .\ns\t0\t*\tFilm a .\n" * 5,
        "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n" + "1\t1\t2\tOne .\tTwo .\n" * 9,
        "stsb": "index\tsentence1\tsentence2\tscore\n" + "0\tOne .\tTwo .\t3.5\n" * 9,
        "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n" + "0\t1\t2\tWhat ?\tWho ?\t1\n" * 9,
    }
    variants = []
    for name, text in texts.items():
        path = folder / f"{name}.tsv"
        path.write_text(text, encoding="utf-8")
        for labeled in (True, False) if name != "cola" else (True,):
            read = partial(read_rows, path, TASKS[name], labeled)
            variants.append(([path], read))
    return variants


def saved_encoders(folder):
    """The folders of a RoBERTa encoder as .bin and of a BERT MaskedLM as .safetensors, and what reads each."""
    roberta, bert = folder / "roberta", folder / "bert"
    save_pretrained(small_encoder(), roberta)
    config = TransformerConfig(**{**SIZES, "max_position_embeddings": 49, "pad_token_id": 0, "model_type": "bert"})
    save_pretrained(MaskedLM(TinyTransformer(config)), bert)
    weights = bert / "pytorch_model.bin"
    (bert / "model.safetensors").write_bytes(save_safetensors(torch.load(weights, weights_only=True)))
    weights.unlink()
    return [(roberta, lambda: load_pretrained(roberta)), (bert, lambda: load_pretrained(bert, MaskedLM))]


def config(folder):
    return [([where / "config.json"], read) for where, read in saved_encoders(folder)]


def weights(folder):
    names = ("pytorch_model.bin", "model.safetensors")
    return [([where / name], read) for name, (where, read) in zip(names, saved_encoders(folder))]


def index(folder):
    variants = []
    for where, read in saved_encoders(folder):
        [whole] = [path for path in where.iterdir() if path.suffix in (".bin", ".safetensors")]
        parse, dump = FORMATS[whole.suffix]
        tensors, shards = parse(whole.read_bytes()), {}
        whole.unlink()
        for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
            shard = where / f"{whole.stem}-{i}{whole.suffix}"
            shard.write_bytes(dump({name: tensors[name].contiguous() for name in names}))
            shards |= {name: shard.name for name in names}
        path = where / f"{whole.name}.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        variants.append(([path, path, path, where / sorted(shards.values())[0]], read))
    return variants


def small_net():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4), nn.Linear(4, 2))
    return net.eval()


def adapted_net(rank=3):
    net = adapt(small_net(), ["0", "2"], r=rank, alpha=4)
    net[3].requires_grad_(True)
    for layer in (net[0], net[2]):
        layer.B.data.normal_()
    return net


def adapter(folder):
    fixed, free = adapted_net(), adapted_net()
    free[0].gate.release()
    variants = []
    for name, net in (("fixed.pt", fixed), ("free.pt", free)):
        path = folder / name
        save_adapter(net, path)
        for make in (small_net, adapted_net):
            variants.append(([path], partial(unchanged_if_refused, make, load_adapter, path)))
    return variants


def peft(folder):
    variants = []
    for name, pad in (("patterns", False), ("padded", True)):
        where = folder / name
        export_peft(adapted_net(), where, pad=pad)
        path = where / "adapter_model.safetensors"
        if pad:
            (where / "adapter_model.bin").write_bytes(save_torch(load_safetensors(path.read_bytes())))
            path.unlink()
            path = where / "adapter_model.bin"
        read = partial(unchanged_if_refused, small_net, import_peft, where)
        variants.append(([where / "adapter_config.json", path], read))
    return variants


def tokenizer(folder):
    import tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "fine", ".", "a"]
    for name in ("pieces", "whole", "bpe"):
        (folder / name).mkdir()
    (folder / "pieces" / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "pieces" / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 512}')
    (folder / "pieces" / "added_tokens.json").write_text(json.dumps({"covid-19": len(words)}))
    (folder / "pieces" / "special_tokens_map.json").write_text('{"mask_token": {"content": "[MASK]", "lstrip": true}}')
    pieces = tokenizers.BertWordPieceTokenizer(str(folder / "pieces" / "vocab.txt"))
    pieces.save(str(folder / "whole" / "tokenizer.json"))
    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator(["a fine play", "playing fine ."] * 9, 300, special_tokens=special)
    bpe.save_model(str(folder / "bpe"))
    size, token = bpe.get_vocab_size(), {"content": "new", "lstrip": True, "normalized": False, "special": False}
    (folder / "bpe" / "config.json").write_text('{"model_type": "roberta", "tokenizer_class": "RobertaTokenizerFast"}')
    (folder / "bpe" / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {size: token}}))
    folders = [folder / name for name in ("pieces", "whole", "bpe")]
    return [(sorted(where.iterdir()), partial(read, where))
            for where in folders for read in (read_tokenizer, read_without_transformers)]  # fmt: skip


def read_without_transformers(where):
    with patch.dict(sys.modules, {"transformers": None}):
        read_tokenizer(where)


def read_tokenizer(where):
    tokenizer = load_tokenizer(where)
    if tokenizer is None:
        raise FileNotFoundError(where)  # none of its files is left
    tokenizer.encode([("Playing a fine", None, 0), ("a", "Fine . playing <s> \u00e9", 1)], 8)


def saved_run(folder):
    """(settings.json, checkpoint.pt, parser, arguments) of a run that was interrupted after its fourth epoch."""
    save_pretrained(small_encoder(), folder / "weights")
    parser, run = build_parser(), folder / "run"
    flags = ["--weights", str(folder / "weights"), "--device", "cpu", "--steps", "10", "--rank", "3"]
    settings = settle(parser.parse_args(flags))
    settings.seed = 0
    run.mkdir()
    model, encode = build(settings)
    optimizer, allocator = trainers(model, settings)
    data = encode([("the dog sees a cat .", None, i % 2) for i in range(8)])
    fine_tune(model, data, optimizer, allocator, lr=1e-3, batch_size=4, journal=Journal(10, run))
    write_settings(settings, run)
    return run / "settings.json", run / "checkpoint.pt", parser, parser.parse_args(["--resume", str(run)])


def trainers(model, settings):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return optimizer, RankAllocator(model, optimizer, settings.steps, settings.budget, settings.decisions)


def checkpoint(folder):
    _, path, parser, args = saved_run(folder)

    def read():
        settings, where, saved = interrupted(args, parser)
        model, _ = build(settings)
        load_adapter_state(model, saved["adapter"])
        optimizer, allocator = trainers(model, settings)
        Journal(settings.steps, where).restore(saved, optimizer, allocator)

    return [([path], read)]


def settings(folder):
    path, _, parser, args = saved_run(folder)

    return [([path], lambda: build(read_run(args, parser, "resume", "device")[0]))]


# Running


def clear(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def where_it_fell(error):
    """Kind of error and the last line of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and not f.filename.endswith("fuzz.py")]
    place = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "outside"
    return f"{type(error).__name__} at {place}"


def stop(*_):
    raise Hang(f"no answer after {SECONDS} s")


def fuzz(kind, seconds, seed=0, inputs=10**9, say=print):
    """Read changed files of one kind for so many seconds. Returns {what fell: how often}."""
    fell, counts = Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{kind}-") as folder, redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        variants = KINDS[kind](Path(folder))
        good = {path: path.read_bytes() for paths, _ in variants for path in paths}
        for _, read in variants:
            read()  # the files are valid, and what is imported late is there before anything is measured
        started, i = time.time(), 0
        while i < inputs and time.time() - started < seconds:
            rng = random.Random(f"{seed}-{i}")
            paths, read = rng.choice(variants)
            path = rng.choice(paths)
            data = changed(good[path], path.suffix, rng) if rng.random() > 0.01 else None
            clear(path)
            path.write_bytes(data) if data is not None else replaced(path, rng)

            memory, cpu, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time(), time.time()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            faulthandler.dump_traceback_later(60, exit=True, file=sys.stderr)  # what no signal can stop
            what = None
            try:
                read()
                counts["read"] += 1
            except (ValueError, OSError):
                counts["refused"] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                what, message = where_it_fell(error), " ".join(str(error).split())[:160]
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            cpu, wall = time.process_time() - cpu, time.time() - begun
            memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
            if what is None and (cpu > CPU_SECONDS or wall > SECONDS):
                what, message = "slow", f"{cpu:.1f} s of CPU time, {wall:.1f} s"
            if what is None and memory > MEGABYTES:
                what, message = "large", f"{memory:.0f} MB"
            if what:
                fell[what] += 1
                if fell[what] == 1:
                    say(f"{kind}, input {i}, {path.relative_to(folder)}: {what}: {message}")
            i += 1
            clear(path)
            path.write_bytes(good[path])
    pace = i / (time.time() - started)
    say(f"{kind}, seed {seed}: {i} inputs, {pace:.0f}/s: {counts['read']} read, {counts['refused']} refused, "
        f"{sum(fell.values())} fell in {len(fell)} ways {dict(fell) or ''}")  # fmt: skip
    return fell


KINDS = {f.__name__: f for f in (rows, config, weights, index, adapter, peft, tokenizer, checkpoint, settings)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("seconds", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=10**9)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, stop)
    warnings.simplefilter("ignore")
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics in Rust write there, whoever catches them
    say = partial(print, file=sys.stdout, flush=True)
    kinds = KINDS if args.kind == "all" else [args.kind]
    fell = [fuzz(kind, args.seconds, args.seed, args.inputs, say) for kind in kinds]
    sys.exit(any(fell))


if __name__ == "__main__":
    main()
