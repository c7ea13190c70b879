"""Checkpoint folders: the same outputs in `transformers` as here, and whatever is wrong with one is refused by name."""

import json
import re
import sys
import time
from functools import partial

import pytest
import torch
from strategies import randomize, row
from test_tiny_transformer import batch, small_encoder
from torch import nn

from glue.tasks import load_task
from glue.tokens import collate
from hub.roberta import load_pretrained, save_pretrained
from hub.tokenizers import load_tokenizer
from salora import adapt, merge
from tiny_transformer import MaskedLM, SequenceClassifier, TinyTransformer

Classifier = partial(SequenceClassifier, num_labels=3)
KINDS = {  # (head, is_decoder, transformers' class for each family)
    "encoder": (None, False, "{}Model"),
    "classifier": (Classifier, False, "{}ForSequenceClassification"),
    "masked LM": (MaskedLM, False, "{}ForMaskedLM"),
    "decoder": (MaskedLM, True, {"Roberta": "RobertaForCausalLM", "Bert": "BertLMHeadModel"}),
}


def outputs_of(model, ids, mask, types):
    """Hidden states, word scores or logits of a model, ours or theirs."""
    if isinstance(model, MaskedLM):
        return model(model.encoder(ids, mask, types))
    if isinstance(model, TinyTransformer | SequenceClassifier):
        return model(ids, mask, types)
    return model(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]


def assert_alike(one, other, inputs):
    """Two models give the same on all real tokens."""
    a, b = outputs_of(one, *inputs), outputs_of(other, *inputs)
    real = inputs[1].bool() if a.dim() == 3 else slice(None)
    difference = (a[real] - b[real]).abs().max()
    assert difference < 1e-5, f"differs by {difference:.2e}, but should by at most 1e-5"


@pytest.mark.equation("encoder")
@pytest.mark.parametrize("family", ["Roberta", "Bert"])
@pytest.mark.parametrize("kind", KINDS)
def test_models_equal_transformers_in_both_directions(tmp_path, capsys, family, kind):
    """Ours is saved, opens there and comes back to the bit; theirs opens here."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    head, is_decoder, name = KINDS[kind]
    name = name[family] if isinstance(name, dict) else name.format(family)
    encoder = small_encoder(is_decoder=is_decoder, model_type=family.lower())
    encoder.position.weight.data[:2] = 0  # the rows of padding, which files of BERT do not have
    model = (head(encoder) if head else encoder).eval()
    if kind == "classifier":
        merge(randomize(adapt(model, ["query", "down"], r=4)))
    save_pretrained(model, tmp_path / "ours")
    again, config = load_pretrained(tmp_path / "ours", head)
    assert capsys.readouterr().out == "" and config == encoder.config and not again.training
    ids, mask, types = batch(pad=config.pad_token_id)
    ids, mask, types = torch.cat([ids, ids.flip(1)]), torch.cat([mask, mask.flip(1)]), torch.cat([types, types])
    ids[0, 2] = config.pad_token_id  # as a word of the text, and with padding on either side
    assert torch.equal(outputs_of(again, ids, mask, types), outputs_of(model, ids, mask, types))

    Theirs = getattr(transformers, name)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [name]
    theirs = Theirs.from_pretrained(tmp_path / "ours").eval()
    assert_alike(theirs, model, (ids, mask, types))
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_alike(theirs, load_pretrained(tmp_path / "theirs", head)[0], (ids, mask, types))
    if kind == "encoder":
        longest = torch.randint(5, 40, (1, config.max_length))
        assert_alike(theirs, load_pretrained(tmp_path / "theirs")[0], (longest, longest > 0, 0 * longest))


def test_real_text_gives_the_same_hidden_states_as_in_transformers(encoder_dir, glue_dir):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(encoder_dir).eval()
    encoder, config = load_pretrained(encoder_dir)
    rows = load_tokenizer(encoder_dir).encode(load_task("cola", glue_dir)[1][:64], 64)
    with torch.no_grad():
        assert_alike(theirs, encoder, collate(rows, config.pad_token_id)[:3])


def test_only_whole_models_of_ours_are_saved(tmp_path):
    for model, match in (
        (nn.Linear(2, 2), "expected an encoder, a SequenceClassifier or a MaskedLM, got Linear"),
        (adapt(Classifier(small_encoder()), ["query"]), "0.query.* has no published name; .* merge it first"),
    ):
        with row(match), pytest.raises(ValueError, match=match):
            save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# What is unusual in a folder, and read right


@pytest.fixture
def folder(tmp_path):
    """A valid checkpoint folder of a small encoder."""
    save_pretrained(small_encoder(num_attention_heads=2), tmp_path)
    return tmp_path


def edit(folder, config=None, tensors=None):
    """Change a saved checkpoint: update its config or tensors, or drop (None) entries of them."""
    raw = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    if tensors:
        state = torch.load(folder / "pytorch_model.bin", weights_only=True) | tensors
        torch.save({k: v for k, v in state.items() if v is not None}, folder / "pytorch_model.bin")


def test_loading_says_what_it_did_not_use_but_for_the_heads_of_pretraining(tmp_path, capsys):
    more = {"bert.pooler.dense.weight": torch.zeros(3, 3), "bert.embeddings.position_ids": torch.arange(20)}
    for model_type in ("roberta", "bert"):
        save_pretrained(MaskedLM(small_encoder(model_type=model_type)), tmp_path)
        edit(tmp_path, tensors=more)
        load_pretrained(tmp_path)
        assert capsys.readouterr().out == ""
    edit(tmp_path, tensors={"classifier.dense.bias": torch.zeros(3), "bert.adapter.weight": torch.zeros(3, 3)})
    load_pretrained(tmp_path)
    assert "2 tensors not used: adapter.weight, classifier.dense.bias" in capsys.readouterr().out


def test_what_a_config_leaves_out_is_what_published_models_mean_by_it(folder):
    edit(folder, config={"layer_norm_eps": None, "type_vocab_size": None})
    config = load_pretrained(folder)[1]
    assert (config.layer_norm_eps, config.type_vocab_size) == (1e-12, 2)


WRAPPERS = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("front", WRAPPERS)
def test_names_from_compiled_and_distributed_models_are_read(folder, front):
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in state:
        edit(folder, tensors={name: None, front + name.replace("layer.1.", "layer.1._orig_mod."): state[name]})
    for a, b in zip(small_encoder().parameters(), load_pretrained(folder)[0].parameters(), strict=True):
        assert torch.equal(a, b)
    edit(folder, tensors={"embeddings.LayerNorm.bias": torch.zeros(12)})
    with pytest.raises(ValueError, match="embeddings.LayerNorm.bias in .*pytorch_model.bin is there a second time"):
        load_pretrained(folder)


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
def test_dropout_of_the_head_is_the_configs_unless_another_rate_is_asked_for(tmp_path, family):
    save_pretrained(Classifier(small_encoder(model_type=family.lower())), tmp_path)
    for config, changes, rate in (
        ({"hidden_dropout_prob": 0.1}, {}, 0.1),
        ({"classifier_dropout": 0.3}, {}, 0.3),
        ({"classifier_dropout": 0}, {"hidden_dropout_prob": 0.1}, 0),  # 0.1 is the file's
        ({"classifier_dropout": 0.3}, {"hidden_dropout_prob": 0.2}, 0.2),
    ):
        edit(tmp_path, config=config)
        model = load_pretrained(tmp_path, Classifier, **changes)[0]
        assert model.dropout.p == rate
    transformers = pytest.importorskip("transformers")
    save_pretrained(load_pretrained(tmp_path, Classifier)[0], tmp_path / "again")
    theirs = getattr(transformers, f"{family}ForSequenceClassification").from_pretrained(tmp_path / "again")
    assert getattr(theirs, "dropout", getattr(theirs.classifier, "dropout", None)).p == 0.3


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_folder_holds_the_weights_once_and_names_its_classes(tmp_path, safetensors):
    package = pytest.importorskip("safetensors")
    for other in (not safetensors, safetensors):  # the second takes the place of the first
        model = Classifier(small_encoder())
        model.classifier["dense"].weight.data.normal_()
        compiled = torch.compile(model, backend="eager")
        save_pretrained(compiled, tmp_path, ["yes", "no", "perhaps"], safetensors=other)
    weights = "model.safetensors" if safetensors else "pytorch_model.bin"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", weights}
    if safetensors:
        with package.safe_open(tmp_path / weights, "pt") as file:
            assert file.metadata() == {"format": "pt"}, "which some readers ask for"
    again = load_pretrained(tmp_path, Classifier)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    config = pytest.importorskip("transformers").AutoConfig.from_pretrained(tmp_path)
    assert config.id2label == {0: "yes", 1: "no", 2: "perhaps"} and config.label2id["perhaps"] == 2


@pytest.mark.parametrize("model_type,decoder", [("roberta", "lm_head.decoder"), ("bert", "cls.predictions.decoder")])
def test_word_scores_may_be_stored_under_a_second_name_but_must_be_the_same(tmp_path, model_type, decoder):
    lm = MaskedLM(small_encoder(model_type=model_type))
    lm.lm_head.bias.data.normal_()
    save_pretrained(lm, tmp_path)
    words, bias = lm.encoder.word.weight.detach(), lm.lm_head.bias.detach()
    first = decoder.removesuffix(".decoder") + ".bias"
    edit(tmp_path, tensors={f"{decoder}.weight": words, f"{decoder}.bias": bias, first: None})
    assert torch.equal(load_pretrained(tmp_path, MaskedLM)[0].lm_head.bias, bias)
    edit(tmp_path, tensors={f"{decoder}.weight": words + 1})
    with pytest.raises(ValueError, match=f"{decoder}.weight in .* differs from embeddings.word_embeddings.weight"):
        load_pretrained(tmp_path, MaskedLM)
    load_pretrained(tmp_path)  # an encoder has no use for it


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shards_and_half_precision_load_like_one_file_of_floats(folder, form):
    stem = {"bin": "pytorch_model", "safetensors": "model"}[form]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    save = torch.save if form == "bin" else pytest.importorskip("safetensors.torch").save_file
    (folder / "pytorch_model.bin").unlink()
    shards = {name: f"{stem}-{i % 2}.{form}" for i, name in enumerate(sorted(state))}
    for file in set(shards.values()):
        save({name: state[name].bfloat16().contiguous() for name in state if shards[name] == file}, folder / file)
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    for a, b in zip(small_encoder().parameters(), load_pretrained(folder)[0].parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)


# What is refused, by file and field or tensor, in one line

NAN, SIZE = float("nan"), 10**9
CONFIGS = [  # (changes of config.json, error)
    ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', expected one of"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key', expected one of"),
    ({"model_type": "gpt2"}, "model_type 'gpt2', expected one of"),
    ({"add_cross_attention": True}, "add_cross_attention True, expected one of False"),
    ({"hidden_size": "12"}, "has hidden_size '12', expected int of at least 1"),
    ({"num_attention_heads": 0}, "has num_attention_heads 0, expected int of at least 1"),
    ({"num_hidden_layers": 2.0}, "has num_hidden_layers 2.0, expected int of at least 1"),
    ({"pad_token_id": -1}, "has pad_token_id -1, expected int of at least 0"),
    ({"layer_norm_eps": "small"}, "has layer_norm_eps 'small', expected float of at least 0"),
    ({"classifier_dropout": "0.1"}, "has classifier_dropout '0.1', expected float of at least 0 and at most 1"),
    ({"attention_probs_dropout_prob": 1.5}, "attention_probs_dropout_prob 1.5, expected float .* at most 1$"),
    ({"num_attention_heads": 5}, "config.json: hidden_size 12 is not a multiple of 5 heads"),
    ({"max_position_embeddings": 2}, "leaves no id or no position for a token"),
    ({"pad_token_id": 40, "max_position_embeddings": 60}, "leaves no id or no position for a token"),
    ({"num_hidden_layers": 1}, "num_hidden_layers 1, but the weights have 2 layers: take both from one"),
    *[({key: None}, f"has {key} None, expected int of at least 1") for key in ("vocab_size", "num_attention_heads")],
    *[({key: value}, f"config.json has {key} .*, expected (int|float) of at least")
      for key in ("hidden_size", "layer_norm_eps") for value in (10**10, NAN, float("inf"), True, [1], "9" * 10**5)],
    # a billion costs nothing
    ({"vocab_size": SIZE}, r"word_embeddings.weight in .*_model.bin has shape \(40, 12\), .* \(1000000000, 12\)"),
    ({"num_hidden_layers": SIZE}, "num_hidden_layers 1000000000, but the weights have 2 layers"),
]  # fmt: skip

BIAS, NORM = "encoder.layer.1.output.dense.bias", "embeddings.LayerNorm.weight"
TENSORS = [  # (tensor, what it becomes, error)
    (BIAS, torch.zeros(5), rf"{BIAS} .*has shape \(5,\).*asks for \(12,\)"),
    (BIAS, None, f"lacks 1 tensors: {BIAS}"),
    *[(NORM, value, f"^{NORM} in .*/pytorch_model.bin (is|has|holds)") for value in (
        torch.ones(12, dtype=torch.int8),
        torch.ones(12, dtype=torch.complex64),
        torch.ones(12).to_sparse(),
        torch.ones(12, device="meta"),
        [1.0] * 12,
        torch.full((12,), NAN),
        torch.full((12,), 1e300, dtype=torch.float64),  # too large for float32
        torch.ones(1).expand(12),  # one number for all
    )],
]  # fmt: skip


def refused(folder, match, error=ValueError):
    """Loading ends in one short line, at once."""
    started = time.process_time()
    with pytest.raises(error, match=match) as found:
        load_pretrained(folder)
    message = str(found.value)
    assert "\n" not in message and len(message.replace(str(folder), "")) < 300
    assert time.process_time() - started < 1


def test_impossible_configs_are_refused_by_field_before_they_cost_anything(folder):
    whole = (folder / "config.json").read_text()
    for change, match in CONFIGS:
        edit(folder, config=change)
        with row(change):
            refused(folder, match)
        (folder / "config.json").write_text(whole)
    load_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # torch's own, about quantized tensors
def test_tensors_that_are_missing_misshapen_or_no_finite_dense_floats_are_refused_by_name(folder):
    whole = (folder / "pytorch_model.bin").read_bytes()
    quantized = torch.quantize_per_tensor(torch.ones(12), 0.1, 0, torch.qint8)
    for name, value, match in (*TENSORS, (NORM, quantized, f"{NORM} in .* is a tensor of another kind .*qint8")):
        edit(folder, tensors={f"roberta.{name}": value})
        with row(name, value):
            refused(folder, match)
        (folder / "pytorch_model.bin").write_bytes(whole)
    for dtype in (torch.float16, torch.float64):
        value = torch.linspace(-1, 1, 12, dtype=dtype)
        edit(folder, tensors={f"roberta.{NORM}": value})
        assert torch.equal(load_pretrained(folder)[0].norm.weight, value.float()), "other floats are read as float32"


INDEX = "pytorch_model.bin.index.json"
FILES = [  # (file, its content or None to remove it, error)
    ("config.json", None, "no config.json in"),
    ("pytorch_model.bin", None, "no model.safetensors or pytorch_model.bin"),
    ("pytorch_model.bin", b"not a checkpoint", "pytorch_model.bin is damaged"),
    ("pytorch_model.bin", [torch.zeros(3)], "pytorch_model.bin have no names: expected a dictionary of tensors"),
    ("pytorch_model.bin", {3: torch.zeros(3)}, "pytorch_model.bin have no names: expected a dictionary of tensors"),
    *[(name, text, f"{name} is damaged: it holds no JSON object")
      for name in ("config.json", INDEX) for text in (b"{", b"[]", b"\xff", b"[" * 100_000, b'{"a":' * 100_000)],
    *[(INDEX, json.dumps({"weight_map": shards}).encode(), "index.json is damaged: weight_map should give the file of")
      for shards in (["x.bin"], {"x": 3}, {"x": ["x.bin"]}, "x.bin", None)],
    *[(INDEX, json.dumps({"weight_map": {"x": shard}}).encode(), "shards must lie in the folder of their index")
      for shard in ("/etc/passwd", "../pytorch_model.bin", "a/../../b.bin")],
    (INDEX, b'{"weight_map": {}}', "num_hidden_layers 2, but the weights have 0 layers"),
    (INDEX, b'{"weight_map": {"x": "part-1.bin"}}', "no file .*part-1.bin"),
]  # fmt: skip


def test_files_that_are_missing_or_damaged_are_refused_by_name(folder):
    for file, content, match in FILES:
        save_pretrained(small_encoder(), folder)
        (folder / INDEX).unlink(missing_ok=True)
        if file == INDEX or content is None:
            (folder / "pytorch_model.bin" if file == INDEX else folder / file).unlink()
        if isinstance(content, bytes):
            (folder / file).write_bytes(content)
        elif content is not None:
            torch.save(content, folder / file)
        with row(file, content):
            refused(folder, match, FileNotFoundError if re.match("no ", match) else ValueError)


def test_safetensors_files_need_their_package_and_must_be_whole(folder, monkeypatch):
    (folder / "model.safetensors").write_bytes(b"not a checkpoint")
    with monkeypatch.context() as without:
        for name in ("safetensors", "safetensors.torch"):
            without.setitem(sys.modules, name, None)  # as if it were not installed
        refused(folder, "needs a package: pip install safetensors", FileNotFoundError)
    pytest.importorskip("safetensors")
    refused(folder, "model.safetensors cannot be read")
