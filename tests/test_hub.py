"""Other people's files: what is hostile or damaged is refused by name, at once, and what is unusual is read right."""

import json
import os
import time

import pytest
import torch
from test_tiny_transformer import batch, edit, small_encoder
from torch import nn

from hub.checkpoints import read_json, read_torch, write_atomically
from hub.tokenizers import copy_tokenizer, errors_of, load_tokenizer
from salora import adapt
from tiny_transformer import MaskedLM, SequenceClassifier, load_pretrained, save_pretrained

NORM = "roberta.embeddings.LayerNorm.weight"


@pytest.fixture
def folder(tmp_path):
    """A valid checkpoint folder of a small encoder."""
    save_pretrained(small_encoder(num_attention_heads=2), tmp_path)
    return tmp_path


# Sizes, before anything is built


@pytest.mark.parametrize(
    "field,message",
    [
        ("vocab_size", r"word_embeddings.weight in .*pytorch_model.bin has shape \(40, 12\), .* \(1000000000, 12\)"),
        ("hidden_size", r"word_embeddings.weight in .* \(40, 1000000000\)"),
        ("num_hidden_layers", "num_hidden_layers 1000000000, but the weights have 2 layers"),
        ("intermediate_size", r"intermediate.dense.weight in .* \(1000000000, 12\)"),
        ("max_position_embeddings", r"position_embeddings.weight in .* \(1000000000, 12\)"),
        ("type_vocab_size", r"token_type_embeddings.weight in .* \(1000000000, 12\)"),
    ],
)
def test_a_config_that_asks_for_a_billion_is_refused_before_it_costs_anything(folder, field, message):
    load_pretrained(folder)
    edit(folder, config={field: 10**9})
    started = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("value", [10**10, float("nan"), float("inf"), True, [1], "9" * 10**5])
@pytest.mark.parametrize("field", ["hidden_size", "layer_norm_eps", "hidden_dropout_prob"])
def test_impossible_numbers_are_refused_in_one_short_line(folder, field, value):
    edit(folder, config={field: value})
    with pytest.raises(ValueError, match=f"config.json has {field} .*, expected (int|float) of at least") as error:
        load_pretrained(folder)
    assert len(str(error.value)) < 300 + len(str(folder))


def test_a_config_with_fewer_layers_than_the_file_is_refused(folder):
    edit(folder, config={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="num_hidden_layers 1, but the weights have 2 layers: take both from one"):
        load_pretrained(folder)


def test_a_rate_above_one_and_cross_attention_are_refused(folder):
    edit(folder, config={"attention_probs_dropout_prob": 1.5})
    with pytest.raises(ValueError, match="attention_probs_dropout_prob 1.5, expected float .* at most 1$"):
        load_pretrained(folder)
    edit(folder, config={"attention_probs_dropout_prob": 0, "add_cross_attention": True})
    with pytest.raises(ValueError, match="has add_cross_attention True, expected one of False"):
        load_pretrained(folder)


def test_heads_that_do_not_fit_are_refused_with_the_file(folder):
    edit(folder, config={"num_attention_heads": 5})
    with pytest.raises(ValueError, match="config.json: hidden_size 12 is not a multiple of 5 heads"):
        load_pretrained(folder)


# Weights

ODD_WEIGHTS = {
    "int8": torch.ones(12, dtype=torch.int8),
    "bool": torch.ones(12, dtype=torch.bool),
    "complex": torch.ones(12, dtype=torch.complex64),
    "sparse": torch.ones(12).to_sparse(),
    "meta": torch.ones(12, device="meta"),
    "list": [1.0] * 12,
    "nan": torch.tensor([float("nan")] * 12),
    "inf": torch.tensor([float("inf")] * 12),
    "too large for float32": torch.full((12,), 1e300, dtype=torch.float64),
    "one number for all": torch.ones(1).expand(12),
}


@pytest.mark.parametrize("kind", ODD_WEIGHTS)
def test_weights_that_are_not_finite_dense_floats_are_refused_by_tensor_and_file(folder, kind):
    edit(folder, tensors={NORM: ODD_WEIGHTS[kind]})
    with pytest.raises(ValueError, match="^embeddings.LayerNorm.weight in .*/pytorch_model.bin (is|has|holds)"):
        load_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # torch's own, about quantized tensors
def test_quantized_weights_are_refused(folder):
    edit(folder, tensors={NORM: torch.quantize_per_tensor(torch.ones(12), 0.1, 0, torch.qint8)})
    with pytest.raises(ValueError, match="LayerNorm.weight in .* is a tensor of another kind .*qint8"):
        load_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_float32(folder, dtype):
    value = torch.linspace(-1, 1, 12, dtype=dtype)
    edit(folder, tensors={NORM: value})
    found = load_pretrained(folder)[0].norm.weight
    assert found.dtype == torch.float32 and torch.equal(found, value.float())


def test_names_must_be_texts(folder):
    edit(folder, tensors={3: torch.zeros(3)})
    with pytest.raises(ValueError, match="pytorch_model.bin have no names: expected a dictionary of tensors by name"):
        load_pretrained(folder)


# Files


@pytest.mark.parametrize("shards", [["x.bin"], {"x": 3}, {"x": ["x.bin"]}, "x.bin", None])
def test_an_index_that_maps_no_names_to_files_is_refused(folder, shards):
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ValueError, match="index.json is damaged: weight_map should give the file of every tensor"):
        load_pretrained(folder)


@pytest.mark.parametrize("shard", ["/etc/passwd", "../pytorch_model.bin", "a/../../b.bin"])
def test_an_index_that_leaves_its_folder_is_refused(folder, shard):
    (folder / "pytorch_model.bin").rename(folder.parent / "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ValueError, match="shards must lie in the folder of their index"):
        load_pretrained(folder)


def test_a_shard_that_is_absent_or_a_list_is_refused_by_name(folder):
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "part-1.bin"}}')
    with pytest.raises(FileNotFoundError, match="no file .*part-1.bin"):
        load_pretrained(folder)
    torch.save([torch.zeros(3)], folder / "part-1.bin")
    with pytest.raises(ValueError, match="part-1.bin have no names"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "name,read",
    [
        ("config.json", load_pretrained),
        ("pytorch_model.bin", load_pretrained),
        ("tokenizer.json", load_tokenizer),
        ("merges.txt", load_tokenizer),
    ],
)
def test_pipes_are_refused_rather_than_waited_for(folder, name, read):
    pytest.importorskip("tokenizers")
    if name == "merges.txt":
        (folder / "vocab.json").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        read(folder)


def test_devices_and_folders_are_not_files(tmp_path):
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for read, path in ((read_torch, tmp_path), (read_json, tmp_path / "zero.json")):
        with pytest.raises(ValueError, match="is not a regular file"):
            read(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_json_nested_without_end_is_damaged(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is damaged: it holds no JSON object"):
        read_json(tmp_path / "config.json")


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


# The masked-LM head


def random_lm(**changes):
    lm = MaskedLM(small_encoder(**changes)).eval()
    lm.encoder.position.weight.data[:2] = 0  # the rows of padding, which files of BERT do not have
    for p in lm.lm_head.parameters():
        p.data.normal_()
    return lm


@pytest.mark.parametrize("model_type", ["roberta", "bert"])
def test_a_saved_masked_lm_opens_in_transformers_and_comes_back(tmp_path, model_type, capsys):
    lm = random_lm(model_type=model_type)
    save_pretrained(lm, tmp_path)
    again, _ = load_pretrained(tmp_path, MaskedLM)
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters(), strict=True))
    encoder, _ = load_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(lm.encoder.parameters(), encoder.parameters(), strict=True))
    assert capsys.readouterr().out == "", "the head is left behind without a word"

    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    name = {"roberta": "RobertaForMaskedLM", "bert": "BertForMaskedLM"}[model_type]
    assert type(other).__name__ == name and read_json(tmp_path / "config.json")["architectures"] == [name]
    ids, mask, types = batch()
    expected = other(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    assert ((lm(lm.encoder(ids, mask, types)) - expected).abs() * mask[..., None]).max() < 1e-5


@pytest.mark.parametrize("model_type,decoder", [("roberta", "lm_head.decoder"), ("bert", "cls.predictions.decoder")])
def test_word_scores_may_be_stored_under_a_second_name_but_must_be_the_same(tmp_path, model_type, decoder):
    lm = random_lm(model_type=model_type)
    save_pretrained(lm, tmp_path)
    words, bias = lm.encoder.word.weight.detach(), lm.lm_head.bias.detach()
    first = decoder.removesuffix(".decoder") + ".bias"
    edit(tmp_path, tensors={f"{decoder}.weight": words, f"{decoder}.bias": bias, first: None})
    again, _ = load_pretrained(tmp_path, MaskedLM)
    assert torch.equal(again.lm_head.bias, bias)
    edit(tmp_path, tensors={f"{decoder}.weight": words + 1})
    with pytest.raises(ValueError, match=f"{decoder}.weight in .* differs from embeddings.word_embeddings.weight"):
        load_pretrained(tmp_path, MaskedLM)
    load_pretrained(tmp_path)  # an encoder has no use for it


def test_only_whole_models_of_ours_are_saved(tmp_path):
    with pytest.raises(ValueError, match="expected an encoder, a SequenceClassifier or a MaskedLM, got Linear"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "new")
    adapted = adapt(SequenceClassifier(small_encoder(), 2), ["query"])
    with pytest.raises(ValueError, match="module encoder.layers.0.query.* has no published name; .* merge it first"):
        save_pretrained(adapted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Tokenizers


def word_level(folder, vocab, **changes):
    """A tokenizer.json with these words and ids, split at blanks; changes: of its top-level entries."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **changes}))
    return load_tokenizer(folder)


def test_the_size_of_a_tokenizer_is_its_largest_id_plus_one(tmp_path):
    assert word_level(tmp_path, {"[UNK]": 0, "fine": 7}).size == 8


def test_what_fails_only_in_encode_is_a_value_error_with_the_file(tmp_path):
    tokenizer = word_level(tmp_path, {"fine": 0})
    with pytest.raises(ValueError, match="tokenizer.json fails to encode: .*UNK"):
        tokenizer.encode([("unheard", None, 0)], 8)


def test_a_row_without_any_token_is_refused(tmp_path):
    tokenizer = word_level(tmp_path, {"[UNK]": 0, "fine": 1})
    with pytest.raises(ValueError, match="tokenizer.json turns ' ' into no token at all"):
        tokenizer.encode([("fine", None, 0), (" ", None, 0)], 8)


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    start = {"id": "<s>", "ids": [99], "tokens": ["<s>"]}
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": {"<s>": start}}
    tokenizer = word_level(tmp_path, {"[UNK]": 0, "fine": 1}, post_processor=template)
    with pytest.raises(ValueError, match="tokenizer.json gives the token id 99, but its vocabulary has 2"):
        tokenizer.encode([("fine", None, 0)], 8)


class PanicException(BaseException):
    """What the packages written in Rust raise when they panic."""


def test_panics_become_errors_and_interruptions_pass():
    with pytest.raises(ValueError, match="^file cannot be read: index out of bounds$"):
        with errors_of("file", "cannot be read"):
            raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt):
        with errors_of("file", "cannot be read"):
            raise KeyboardInterrupt


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
