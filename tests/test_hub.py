"""Files of others: how they are read and written safely, and the tokenizers of real checkpoints."""

import json
import os

import pytest
from strategies import row
from test_tiny_transformer import small_encoder

from hub.checkpoints import read_json, read_torch, write_atomically
from hub.roberta import load_pretrained, save_pretrained
from hub.tokenizers import copy_tokenizer, errors_of, load_tokenizer

# Files


def test_pipes_devices_and_folders_are_refused_rather_than_waited_for(tmp_path):
    pytest.importorskip("tokenizers")
    os.mkfifo(tmp_path / "pipe")
    for name, read in (("config.json", load_pretrained), ("pytorch_model.bin", load_pretrained),
                       ("tokenizer.json", load_tokenizer), ("merges.txt", load_tokenizer)):  # fmt: skip
        folder = tmp_path / name.partition(".")[0]
        save_pretrained(small_encoder(), folder)
        if name == "merges.txt":
            (folder / "vocab.json").write_text("{}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "pipe")
        with row(name), pytest.raises(ValueError, match=f"{name} is not a regular file"):
            read(folder)
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for read, path in ((read_torch, tmp_path), (read_json, tmp_path / "zero.json")):
        with row(path), pytest.raises(ValueError, match="is not a regular file"):
            read(path)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("PytorchStreamWriter failed writing file")])
def test_an_atomic_write_that_fails_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("before")

    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(OSError, match=f"file cannot be written: {error}"):
        write_atomically(path, write)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


# Tokenizers


def word_level(folder, vocab, **changes):
    """A tokenizer.json with these words and ids, split at blanks; changes: of its top-level entries."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
    return load_tokenizer(folder)


def test_rows_that_a_tokenizer_cannot_encode_are_refused_with_the_file(tmp_path):
    start = {"id": "<s>", "ids": [99], "tokens": ["<s>"]}
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {"<s>": start}}
    for vocab, changes, text, match in (
        ({"fine": 0}, {}, "unheard", "tokenizer.json fails to encode: .*UNK"),
        ({"[UNK]": 0, "fine": 1}, {}, " ", "tokenizer.json turns ' ' into no token at all"),
        ({"[UNK]": 0, "fine": 1}, {"post_processor": template}, "fine", "the token id 99, but its vocabulary has 2"),
    ):
        tokenizer = word_level(tmp_path, vocab, **changes)
        with row(match), pytest.raises(ValueError, match=match):
            tokenizer.encode([("fine", None, 0), (text, None, 0)], 8)
    assert word_level(tmp_path, {"[UNK]": 0, "fine": 7}).size == 8, "the largest id plus one"


class PanicException(BaseException):
    """What the packages written in Rust raise when they panic."""


def test_panics_become_errors_and_interruptions_pass():
    for error, expected in ((PanicException("out of bounds"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(expected, match="^file cannot be read: out of bounds$" if expected is ValueError else None):
            with errors_of("file", "cannot be read"):
                raise error


def test_a_copied_tokenizer_reads_the_same(tmp_path):
    pytest.importorskip("tokenizers")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfine\nFine\n")
    (source / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (source / "weights.bin").write_text("not a tokenizer's")
    assert copy_tokenizer(source, target) == ["tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in target.iterdir()) == ["tokenizer_config.json", "vocab.txt"]
    assert load_tokenizer(target).encode([("Fine", None, 0)], 8) == [([2, 6, 3], [0, 0, 0], 0)]
