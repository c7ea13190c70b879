"""Files of others: how they are read and written safely, and the tokenizers of real checkpoints."""

import json
import os
import re
import sys

import pytest
from strategies import row
from test_tiny_transformer import small_encoder

from hub.checkpoints import read_json, read_torch, write_atomically
from hub.roberta import load_pretrained, save_pretrained
from hub.tokenizers import copy_tokenizer, errors_of, load_tokenizer
from tools import agree

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


def test_a_pointer_of_git_lfs_is_refused_by_its_name(tmp_path):
    (tmp_path / "model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n")
    with pytest.raises(ValueError, match="model.bin only points to a file that Git LFS has: git lfs pull brings it"):
        read_torch(tmp_path / "model.bin")


def test_a_byte_order_mark_before_json_is_no_damage(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "config.json") == {"a": 1}


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


@pytest.fixture(params=["with", "without"])
def route(request, monkeypatch):
    """With transformers, and as if it were not installed."""
    pytest.importorskip("tokenizers")
    if request.param == "with":
        pytest.importorskip("transformers")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    return request.param


def test_random_folders_are_tokenized_as_in_transformers_or_refused():
    """Settings, added tokens, odd characters, truncation: with and without that package."""
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    said = []
    assert agree.tokenizers(900, 0, said.append) == 0, said
    totals = [line for line in said if "wrong" in line]
    assert len(totals) == 6 and all(re.search("with transformers [1-9].* equal", line) for line in totals)
    assert sum(bool(re.search("without transformers [1-9].* equal", line)) for line in totals) == 4, "BERT and RoBERTa"


WORD_PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] hello Hello ümlaut umlaut Ümlaut covid - 19".split()


def bert_folder(folder, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORD_PIECES), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def roberta_folders(folder):
    """One tokenizer as vocab.json and merges.txt, and as the tokenizer.json that `tokenizers` writes."""
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["hello world the end"] * 50, 300, special_tokens=special, show_progress=False)
    for name in ("vocab", "whole"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "roberta"}')
    bpe.save_model(str(folder / "vocab"))
    bpe.save(str(folder / "whole" / "tokenizer.json"))
    return folder / "vocab", folder / "whole"


def words_of(folder, *texts):
    tokenizer = load_tokenizer(folder)
    [(ids, _, _)] = tokenizer.encode([(texts[0], texts[1] if len(texts) > 1 else None, 0)], 20)
    return " ".join(tokenizer.tokenizer.id_to_token(i) for i in ids)


def test_both_spellings_of_a_robertas_tokenizer_put_its_tokens_around_a_row_and_know_them_inside(tmp_path, route):
    for folder in roberta_folders(tmp_path):
        assert words_of(folder, "hello world") == "<s> hello Ġworld </s>"
        assert words_of(folder, "hello world", "the") == "<s> hello Ġworld </s> </s> the </s>"
        assert words_of(folder, "hello <mask>") == "<s> hello Ġ <mask> </s>"
        (folder / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
        assert words_of(folder, "world") == "<s> Ġworld </s>"
    folder = tmp_path / "vocab"
    wide = {"mask_token": {"content": "<mask>", "lstrip": True}}
    (folder / "special_tokens_map.json").write_text(json.dumps(wide))
    assert words_of(folder, "world <mask>") == "<s> Ġworld <mask> </s>", "it takes the blank before it along"
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    assert words_of(folder, "hello <mask>") == "<s> hello Ġ <mask> </s>", "beside this the other file does not count"


def test_settings_and_added_tokens_of_a_bert_decide_its_words(tmp_path, route):
    for settings, expected in (
        ({}, "hello umlaut covid - 19"),
        ({"strip_accents": False}, "hello ümlaut covid - 19"),
        ({"do_lower_case": False}, "Hello Ümlaut covid - 19"),
    ):
        folder = bert_folder(tmp_path, **settings)
        assert words_of(folder, "Hello Ümlaut covid-19") == f"[CLS] {expected} [SEP]"
    (folder / "added_tokens.json").write_text(json.dumps({"covid-19": len(WORD_PIECES)}))
    assert words_of(folder, "covid-19 [MASK]") == "[CLS] covid-19 [MASK] [SEP]"
    assert load_tokenizer(folder).size == len(WORD_PIECES) + 1
    (folder / "added_tokens.json").write_text(json.dumps({"[MASK]": 4}))
    for settings, expected in (({"mask_token": "[MASK]"}, [2, 1, 1, 1, 3]), ({}, [2, 4, 3])):
        [(ids, _, _)] = load_tokenizer(bert_folder(tmp_path, **settings)).encode([("[mask]", None, 0)], 9)
        assert ids == expected, "known in lower case, unless the settings name it as special"


def token(content, **more):
    return {"content": content, **more}


BERT, ROBERTA = {"model_type": "bert"}, {"model_type": "roberta"}
VOCAB = "\n".join(WORD_PIECES)
FOLDERS = [  # ({file: content}, error)
    ({"config.json": ROBERTA, "vocab.txt": "x"}, "has vocab.txt, but no vocab.json, merges.txt, which its RobertaTok"),
    ({"config.json": {**ROBERTA, "tokenizer_class": "PhobertTokenizer"}, "vocab.txt": "x"},
     "has vocab.txt, but no tokenizer.json, which its PhobertTokenizer needs"),
    ({"config.json": ROBERTA, "vocab.json": {"<s>": 0}}, "vocab.json, but no merges.txt, which its RobertaTokenizer"),
    ({"config.json": BERT, "vocab.txt": "[UNK]\n[SEP]"}, r"has no \[CLS\], which its BertTokenizer puts around a row"),
    ({"vocab.txt": VOCAB, "added_tokens.json": {"new": 20}}, "gives 'new' the id 20, but its BertTokenizer gives it"),
    ({"vocab.txt": VOCAB, "tokenizer_config.json": {"added_tokens_decoder": {"20": token("new")}}}, "'new' the id 20"),
    ({"vocab.txt": VOCAB, "tokenizer_config.json": {"added_tokens_decoder": {"20": "new"}}}, "vocab.txt cannot be"),
    ({"vocab.txt": VOCAB, "added_tokens.json": {"new": "20"}}, "vocab.txt cannot be read|gives 'new' the id 20"),
    ({"vocab.txt": VOCAB, "tokenizer_config.json": {"do_lower_case": "yes"}}, "vocab.txt cannot be read"),
    ({"vocab.txt": VOCAB, "special_tokens_map.json": {"cls_token": 3}}, "vocab.txt cannot be read"),
]  # fmt: skip


def write_folder(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_files_that_contradict_each_other_or_are_not_understood_are_refused_by_name(tmp_path, route):
    for i, (files, match) in enumerate(FOLDERS):
        folder = write_folder(tmp_path / str(i), files)
        with row(files), pytest.raises(ValueError, match=match) as error:
            load_tokenizer(folder)
        assert "\n" not in str(error.value)


def test_code_that_a_folder_brings_along_is_not_run(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    ran, classes = tmp_path / "ran", {"AutoTokenizer": ["theirs.Tokenizer", None]}
    folder = bert_folder(tmp_path / "folder", auto_map=classes)
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tokenizer: pass\n")
    assert words_of(folder, "hello") == "[CLS] hello [SEP]" and not ran.exists()


def test_without_transformers_settings_that_are_not_understood_are_refused_by_key_and_value(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for settings in (
        {"never_split": ["hello"]}, {"do_basic_tokenize": False}, {"split_special_tokens": True}, {"new_key": 3},
        {"additional_special_tokens": ["<x>"]}, {"cls_token": "<s>"}, {"mask_token": {"content": "<m>"}},
        {"do_lower_case": "yes"}, {"strip_accents": 1}, {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
    ):  # fmt: skip
        [(key, value)] = settings.items()
        said = re.escape(f"tokenizer_config.json has {key} {value!r}, which is only read by a package: pip install tr")
        with row(settings), pytest.raises(ValueError, match=said):
            load_tokenizer(bert_folder(tmp_path, **settings))
    with pytest.raises(ValueError, match="its class AlbertTokenizer is only read by a package: pip install transform"):
        load_tokenizer(write_folder(tmp_path / "a", {
            "tokenizer_config.json": {"tokenizer_class": "AlbertTokenizer"},
            "tokenizer.json": word_level({"[UNK]": 0}),
        }))  # fmt: skip
    bert_folder(tmp_path, never_split=None, new_key=0, additional_special_tokens=[], model_max_length=512)
    assert words_of(tmp_path, "hello") == "[CLS] hello [SEP]", "what is unset or without effect passes"


def word_level(vocab, **changes):
    """The text of a tokenizer.json with these words and ids, split at blanks; changes: of its top-level entries."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return json.dumps({**json.loads(tokenizer.to_str()), **changes})


def test_a_tokenizer_json_needs_a_known_token_in_front_the_model_of_its_class_and_words_for_every_row(tmp_path):
    pytest.importorskip("transformers")
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces}
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [7], "tokens": ["<s>"]}}
    plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, settings, whole, match in (
        ("none", plain, word_level({"[UNK]": 0, "fine": 1}), "puts no token in front of a row"),
        ("unknown", plain, word_level({"[UNK]": 0, "fine": 1}, post_processor=template), "has no <s>, which its"),
        ("another", {}, word_level({"[UNK]": 0}), "holds a WordLevel model, but BertTokenizer is made of WordPiece"),
    ):
        folder = write_folder(tmp_path / name, {"tokenizer_config.json": settings, "tokenizer.json": whole})
        with row(name), pytest.raises(ValueError, match=match):
            load_tokenizer(folder)
    whole = word_level({"[UNK]": 0, "<s>": 7, "fine": 3}, post_processor=template)
    folder = write_folder(tmp_path / "good", {"tokenizer_config.json": plain, "tokenizer.json": whole})
    assert words_of(folder, "fine") == "<s> fine" and load_tokenizer(folder).size == 8, "the largest id plus one"
    whole = word_level({"<s>": 7, "fine": 3}, post_processor=template)
    tokenizer = load_tokenizer(write_folder(tmp_path / "x", {"tokenizer_config.json": plain, "tokenizer.json": whole}))
    with pytest.raises(ValueError, match="x fails to encode: .*UNK"):
        tokenizer.encode([("unheard", None, 0)], 8)


class PanicException(BaseException):
    """What the packages written in Rust raise when they panic."""


def test_panics_become_errors_and_interruptions_pass():
    for error, expected in ((PanicException("out of\n  bounds"), ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(expected, match="^file cannot be read: out of bounds$" if expected is ValueError else None):
            with errors_of("file", "cannot be read"):
                raise error


@pytest.mark.parametrize("config,settings", [
    (BERT, {"do_lower_case": False}),
    ({**ROBERTA, "tokenizer_class": "BertTokenizerFast"}, {"do_lower_case": False}),
    (BERT, None),
    ({"model_type": "xlm-roberta", "tokenizer_class": "BertTokenizer"}, None),
])  # fmt: skip
def test_a_copied_tokenizer_reads_the_same_beside_a_config_that_says_less(tmp_path, route, config, settings):
    files = {"vocab.txt": VOCAB, "added_tokens.json": {"covid-19": len(WORD_PIECES)}}
    if settings is not None:
        files["tokenizer_config.json"] = settings
    source = write_folder(tmp_path / "source", {**files, "config.json": config, "weights.bin": "not a tokenizer's"})
    target = write_folder(tmp_path / "target", {"config.json": {"model_type": config["model_type"].split("-")[-1]}})
    assert set(copy_tokenizer(source, target)) == set(files) and not (target / "weights.bin").exists()
    text = "Hello Ümlaut covid-19"
    assert words_of(target, text) == words_of(source, text) and "covid-19" in words_of(target, text)


def test_the_class_that_follows_from_a_foreign_model_type_is_copied_along(tmp_path):
    """Weights of XLM-RoBERTa and CamemBERT are saved again as RoBERTa's, which has another tokenizer."""
    for model_type, kind in (("xlm-roberta", "XLMRobertaTokenizer"), ("camembert", "CamembertTokenizer")):
        source = write_folder(tmp_path / f"from {model_type}", {"config.json": {"model_type": model_type},
                                                               "tokenizer.json": "{}"})  # fmt: skip
        target = write_folder(tmp_path / model_type, {"config.json": ROBERTA})
        copy_tokenizer(source, target)
        assert read_json(target / "tokenizer_config.json") == {"tokenizer_class": kind}
