"""The encoder: against a naive one in plain loops, and against `transformers` where that package is installed."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from glue.tasks import load_task
from glue.tokens import collate
from hub.tokenizers import load_tokenizer
from salora import adapt, merge, salora_layers
from tiny_transformer import (
    MaskedLM,
    SequenceClassifier,
    TinyTransformer,
    TransformerConfig,
    hub_name,
    hub_parameters,
    load_pretrained,
    save_pretrained,
)

SMALL = dict(
    vocab_size=40,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=20,
    type_vocab_size=2,
    pad_token_id=1,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)


def small_encoder(**changes):
    torch.manual_seed(0)
    encoder = TinyTransformer(TransformerConfig(**{**SMALL, **changes}))
    for p in encoder.parameters():  # no LayerNorm and no bias at its neutral start
        p.data.add_(0.1 * torch.randn_like(p))
    return encoder.eval()


def batch(pad=1, vocab=40):
    """Two rows, the second padded, with types: (ids, mask, types)."""
    ids = torch.randint(5, vocab, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 0]])
    return ids.masked_fill(mask == 0, pad), mask, types


def naive_encoder(encoder, ids, types):
    """One unpadded row (seq,) through the encoder, written out without a library attention or norm."""
    c, p = encoder.config, dict(encoder.named_parameters())

    def norm(x, name):
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
        return (x - mean) / (var + c.layer_norm_eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    positions = [c.pad_token_id + 1 + i for i in range(len(ids))]
    x = norm(p["word.weight"][ids] + p["position.weight"][positions] + p["token_type.weight"][types], "norm")
    size = c.hidden_size // c.num_attention_heads
    for i in range(c.num_hidden_layers):
        q, k, v = (linear(x, f"layers.{i}.{name}") for name in ("query", "key", "value"))
        heads = []
        for h in range(c.num_attention_heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            heads.append(weights @ v[:, part])
        x = norm(x + linear(torch.cat(heads, -1), f"layers.{i}.out"), f"layers.{i}.norm1")
        u = linear(x, f"layers.{i}.up")
        gelu = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))  # the exact one
        x = norm(x + linear(gelu, f"layers.{i}.down"), f"layers.{i}.norm2")
    return x


@pytest.mark.equation("encoder")
def test_encoder_equals_the_naive_one_and_padding_changes_nothing():
    encoder = small_encoder().double()
    ids, mask, types = batch()
    hidden = encoder(ids, mask, types)
    assert torch.allclose(hidden[0], naive_encoder(encoder, ids[0], types[0]), atol=1e-12)
    assert torch.allclose(hidden[1, :4], naive_encoder(encoder, ids[1, :4], types[1, :4]), atol=1e-12)
    assert torch.equal(hidden, encoder(ids, None, types)), "without a mask, padding is not looked at"


@pytest.mark.equation("encoder")
def test_masked_tokens_are_not_looked_at():
    encoder = small_encoder()
    ids, mask, types = batch()
    other = ids.clone()
    other[1, 5] = 17  # behind the mask, but not padding
    changed = encoder(other, mask, types)[1, :4]
    assert torch.allclose(changed, encoder(ids, mask, types)[1, :4], atol=1e-6)
    assert not torch.allclose(encoder(other, None, types)[1, :4], changed, atol=1e-3)


@pytest.mark.equation("encoder")
def test_what_follows_changes_nothing_in_a_decoder_and_something_in_an_encoder():
    ids, mask, types = batch()
    for place in range(1, 7):
        other = ids.clone()
        other[:, place:] = torch.randint(5, 40, other[:, place:].shape)
        for is_decoder in (True, False):
            encoder = small_encoder(is_decoder=is_decoder).double()
            before, after = (encoder(x, None, types)[:, :place] for x in (ids, other))
            assert torch.allclose(before, after, rtol=0, atol=1e-12) == is_decoder, place


@pytest.mark.equation("encoder")
def test_the_first_token_of_a_decoder_sees_itself_and_the_last_one_all():
    encoder = small_encoder(is_decoder=True).double()
    ids, mask, types = batch()
    hidden = encoder(ids, mask, types)
    assert torch.allclose(hidden[0, :1], naive_encoder(encoder, ids[0, :1], types[0, :1]), atol=1e-12)
    for place in range(6):
        other = ids.clone()
        other[0, place] = 4  # the batch has no 4
        assert not torch.allclose(encoder(other, mask, types)[0, 6], hidden[0, 6], atol=1e-6), place


def test_padding_on_the_left_of_a_decoder_changes_nothing():
    encoder = small_encoder(is_decoder=True).double()
    ids, mask, types = batch()
    padded = torch.cat([torch.full((2, 3), 1), ids], 1)
    shifted = encoder(padded)[:, 3:]
    assert torch.allclose(shifted[mask == 1], encoder(ids)[mask == 1], atol=1e-12)


def test_a_decoder_is_saved_and_loaded_as_one_and_makes_no_classifier(tmp_path):
    encoder = small_encoder(is_decoder=True)
    save_pretrained(encoder, tmp_path)
    loaded, config = load_pretrained(tmp_path)
    ids, mask, types = batch()
    assert config == encoder.config and config.is_decoder
    assert torch.equal(loaded(ids, mask, types), encoder(ids, mask, types))
    with pytest.raises(ValueError, match="reads the first token, which sees no other in a decoder"):
        SequenceClassifier(loaded, 2)


@pytest.mark.equation("encoder")
def test_positions_start_at_pad_plus_one_and_padding_keeps_the_padding_position():
    encoder = small_encoder(pad_token_id=3, vocab_size=40)
    seen = []
    encoder.position.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder(torch.tensor([[7, 8, 9, 3, 3]]))
    assert seen[0].tolist() == [[4, 5, 6, 3, 3]]
    assert encoder.config.max_length == 20 - 3 - 1


def test_masked_lm_head_is_dense_gelu_norm_and_the_tied_embedding():
    lm = MaskedLM(small_encoder())
    x = torch.randn(4, 12)
    h = nn.functional.layer_norm(nn.functional.gelu(lm.lm_head.dense(x)), (12,), eps=1e-5)
    lm.lm_head.bias.data.normal_()
    assert torch.allclose(lm(x), h @ lm.encoder.word.weight.T + lm.lm_head.bias, atol=1e-5)


def test_classifier_reads_the_first_token_through_dense_tanh_out_proj():
    model = SequenceClassifier(small_encoder(), 3).eval()
    ids, mask, types = batch()
    head = model.classifier
    expected = head["out_proj"](torch.tanh(head["dense"](model.encoder(ids, mask, types)[:, 0])))
    assert torch.equal(model(ids, mask, types), expected) and expected.shape == (2, 3)


def test_roberta_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        encoder = TinyTransformer(TransformerConfig())
        total = sum(p.numel() for p in encoder.parameters())
        assert total == 124_055_040, "RoBERTa-base without its pooler"
        adapt(encoder, ["query", "key", "value", "out", "up", "down"], 8, 16)
    layers = salora_layers(encoder).values()
    assert len(layers) == 72 and sum(layer.r * layer.triplet_size for layer in layers) == 1_327_104


def test_heads_must_divide_the_hidden_size():
    with pytest.raises(ValueError, match="hidden_size 12 is not a multiple of 5 heads"):
        TransformerConfig(hidden_size=12, num_attention_heads=5)


# Checkpoint folders


def test_saved_encoder_loads_exactly(tmp_path, capsys):
    encoder = small_encoder()
    save_pretrained(encoder, tmp_path)
    loaded, config = load_pretrained(tmp_path)
    assert config == encoder.config and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), loaded.parameters(), strict=True))
    assert capsys.readouterr().out == "", "nothing was left unused, so nothing is said"
    calm, config = load_pretrained(tmp_path, hidden_dropout_prob=0.25)
    assert config == calm.config == replace(encoder.config, hidden_dropout_prob=0.25)


def edit(folder, config=None, tensors=None):
    """Change a saved checkpoint: update its config, replace or drop (None) tensors."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    state.update(tensors or {})
    torch.save({k: v for k, v in state.items() if v is not None}, folder / "pytorch_model.bin")


def test_loading_says_what_it_did_not_use(tmp_path, capsys):
    save_pretrained(small_encoder(), tmp_path)
    edit(tmp_path, tensors={"classifier.dense.bias": torch.zeros(3), "roberta.adapter.weight": torch.zeros(3, 3)})
    load_pretrained(tmp_path)
    assert "2 tensors not used: adapter.weight, classifier.dense.bias" in capsys.readouterr().out


def test_heads_of_pretraining_are_left_behind_without_a_word(tmp_path, capsys):
    pooler, order = torch.zeros(3, 3), torch.arange(20)
    for model_type in ("roberta", "bert"):
        save_pretrained(MaskedLM(small_encoder(model_type=model_type)), tmp_path)
        edit(tmp_path, tensors={"bert.pooler.dense.weight": pooler, "bert.embeddings.position_ids": order})
        load_pretrained(tmp_path)
        assert capsys.readouterr().out == ""


def test_loading_refuses_missing_and_misshapen_tensors_by_name(tmp_path):
    save_pretrained(small_encoder(), tmp_path)
    edit(tmp_path, tensors={"roberta.encoder.layer.1.output.dense.bias": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"encoder.layer.1.output.dense.bias .*has shape \(5,\).*asks for \(12,\)"):
        load_pretrained(tmp_path)
    edit(tmp_path, tensors={"roberta.encoder.layer.1.output.dense.bias": None})
    with pytest.raises(ValueError, match="lacks 1 tensors: encoder.layer.1.output.dense.bias"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change", [{"hidden_act": "gelu_new"}, {"position_embedding_type": "relative_key"}, {"model_type": "gpt2"}]
)
def test_loading_refuses_foreign_architectures(tmp_path, change):
    save_pretrained(small_encoder(), tmp_path)
    edit(tmp_path, config=change)
    key, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{key} '{value}', expected one of"):
        load_pretrained(tmp_path)


def test_loading_refuses_missing_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        load_pretrained(tmp_path)
    save_pretrained(small_encoder(), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="pytorch_model.bin is damaged"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors or pytorch_model.bin"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "key,value,expected",
    [
        ("hidden_size", "12", "int of at least 1"),
        ("num_attention_heads", 0, "int of at least 1"),
        ("num_hidden_layers", 2.0, "int of at least 1"),
        ("pad_token_id", -1, "int of at least 0"),
        ("layer_norm_eps", "small", "float of at least 0"),
    ],
)
def test_loading_refuses_numbers_that_are_none(tmp_path, key, value, expected):
    save_pretrained(small_encoder(), tmp_path)
    edit(tmp_path, config={key: value})
    with pytest.raises(ValueError, match=f"config.json has {key} {value!r}, expected {expected}"):
        load_pretrained(tmp_path)


def test_what_a_config_leaves_out_is_what_published_models_mean_by_it(tmp_path):
    save_pretrained(small_encoder(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    less = {key: value for key, value in raw.items() if key not in ("layer_norm_eps", "type_vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps(less))
    config = load_pretrained(tmp_path)[1]
    assert (config.layer_norm_eps, config.type_vocab_size) == (1e-12, 2)


def test_loading_asks_for_every_size_and_for_room_beside_padding(tmp_path):
    save_pretrained(small_encoder(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("vocab_size", "num_attention_heads", "max_position_embeddings"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != key}))
        with pytest.raises(ValueError, match=f"config.json has {key} None, expected int of at least 1"):
            load_pretrained(tmp_path)
    words, pad = raw["vocab_size"], raw["pad_token_id"]
    no_word = {"pad_token_id": words, "max_position_embeddings": words + 9}
    for change in (no_word, {"max_position_embeddings": pad + 1}):
        (tmp_path / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(ValueError, match="leaves no word or no position for a token"):
            load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
def test_loading_refuses_damaged_json_by_file(tmp_path, name, text):
    save_pretrained(small_encoder(), tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name} is damaged: it holds no JSON object"):
        load_pretrained(tmp_path)


def test_loading_refuses_weights_without_names(tmp_path):
    save_pretrained(small_encoder(), tmp_path)
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="have no names: expected a dictionary of tensors"):
        load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(ValueError, match="num_hidden_layers 2, but the weights have 0 layers"):
        load_pretrained(tmp_path)


def test_safetensors_files_need_their_package_and_must_be_whole(tmp_path, monkeypatch):
    save_pretrained(small_encoder(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with monkeypatch.context() as without:
        for name in ("safetensors", "safetensors.torch"):
            without.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(FileNotFoundError, match="needs a package: pip install safetensors"):
            load_pretrained(tmp_path)
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        load_pretrained(tmp_path)


def test_every_parameter_has_its_own_published_name():
    for model in (SequenceClassifier(small_encoder(), 2), MaskedLM(small_encoder())):
        for model_type in ("roberta", "bert"):
            names = hub_parameters(model, replace(model.encoder.config, model_type=model_type))
            assert len(names) == len(list(model.parameters()))
    assert hub_name("layers.3.up") == hub_name("encoder.layers.3.up") == "roberta.encoder.layer.3.intermediate.dense"
    assert hub_name("classifier.dense", "bert") == "bert.pooler.dense"


def test_recomputing_activations_changes_no_gradient():
    """With dropout: what is computed again must draw the same."""
    ids, mask, types = batch()
    grads = []
    for again in (False, True):
        encoder = small_encoder(hidden_dropout_prob=0.5).train()
        encoder.recompute = again
        torch.manual_seed(5)
        encoder(ids, mask, types).square().sum().backward()
        grads.append([p.grad for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_shards_and_half_precision_load_like_one_file_of_floats(tmp_path, form):
    encoder = small_encoder()
    save_pretrained(encoder, tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    (tmp_path / "pytorch_model.bin").unlink()
    names, shards = sorted(state), {}
    for i, part in enumerate((names[::2], names[1::2])):
        tensors = {name: state[name].to(torch.bfloat16).contiguous() for name in part}
        if form == "bin":
            file, save = f"pytorch_model-{i}.bin", torch.save
        else:
            safetensors = pytest.importorskip("safetensors.torch")
            file, save = f"model-{i}.safetensors", safetensors.save_file
        save(tensors, tmp_path / file)
        shards |= {name: file for name in part}
    index = "pytorch_model.bin" if form == "bin" else "model.safetensors"
    (tmp_path / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    loaded, _ = load_pretrained(tmp_path)
    for a, b in zip(encoder.parameters(), loaded.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.to(torch.bfloat16).float(), b)


# Against the reference implementation


def reference(family, folder, **changes):
    """A random model of `transformers`, saved in the usual layout; returns it."""
    transformers = pytest.importorskip("transformers")
    changes = {k: v for k, v in {**SMALL, **changes}.items()}
    torch.manual_seed(1)
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**{**changes, "pad_token_id": 0}))
    else:
        model = transformers.RobertaModel(transformers.RobertaConfig(**changes))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.equation("encoder")
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_encoder_equals_transformers_on_a_random_checkpoint(family, tmp_path):
    pytest.importorskip("safetensors")
    model = reference(family, tmp_path)
    encoder, config = load_pretrained(tmp_path)
    ids, mask, types = batch(pad=config.pad_token_id)
    expected = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    difference = ((encoder(ids, mask, types) - expected).abs() * mask[..., None]).max()
    assert difference < 1e-5, f"differs by {difference:.2e}, but should by at most 1e-5"


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
def test_decoder_and_its_lm_head_equal_transformers_in_both_directions(tmp_path, family):
    """Theirs opens here, ours opens there, with padding on the right and on the left."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    Theirs = {"Roberta": transformers.RobertaForCausalLM, "Bert": transformers.BertLMHeadModel}[family]
    torch.manual_seed(2)
    other = Theirs(getattr(transformers, f"{family}Config")(**SMALL, is_decoder=True)).eval()
    for p in other.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    other.save_pretrained(tmp_path)
    lm, config = load_pretrained(tmp_path, MaskedLM)
    assert config.is_decoder and config.model_type == family.lower()
    save_pretrained(lm, tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is Theirs and again.config.architectures == [Theirs.__name__] and again.config.is_decoder
    ids, mask, types = batch(pad=config.pad_token_id)
    if family == "Roberta":  # BERT there counts positions from the left, padding included
        ids, mask = torch.cat([ids, ids.flip(1)]), torch.cat([mask, mask.flip(1)])
        types = torch.cat([types, types])
    for model in (other, again):
        expected = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
        difference = ((lm(lm.encoder(ids, mask, types)) - expected).abs() * mask[..., None]).max()
        assert difference < 1e-5, f"differs by {difference:.2e}, but should by at most 1e-5"


@pytest.mark.equation("encoder")
def test_encoder_equals_transformers_at_the_longest_input(tmp_path):
    pytest.importorskip("safetensors")
    model = reference("roberta", tmp_path)
    encoder, config = load_pretrained(tmp_path)
    ids = torch.randint(5, 40, (1, config.max_length))
    assert (encoder(ids) - model(input_ids=ids).last_hidden_state).abs().max() < 1e-5


def test_classifier_equals_transformers_with_the_same_head(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    config = transformers.RobertaConfig(**SMALL, num_labels=3)
    other = transformers.RobertaForSequenceClassification(config).eval()
    other.save_pretrained(tmp_path)
    model = SequenceClassifier(load_pretrained(tmp_path)[0], 3).eval()
    for name in ("dense", "out_proj"):
        model.classifier[name].load_state_dict(getattr(other.classifier, name).state_dict())
    ids, mask, types = batch()
    expected = other(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    assert (model(ids, mask, types) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
def test_lm_head_equals_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SMALL)
    torch.manual_seed(2)
    other = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    for p in other.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    other.save_pretrained(tmp_path)
    lm, config = load_pretrained(tmp_path, MaskedLM)
    ids, mask, types = batch(pad=config.pad_token_id)
    expected = other(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    difference = ((lm(lm.encoder(ids, mask, types)) - expected).abs() * mask[..., None]).max()
    print(f"{family} LM head: largest difference {difference:.2e}")
    assert difference < 1e-5


@pytest.mark.parametrize("family", ["Roberta", "Bert"])
def test_merged_classifier_opens_in_transformers(tmp_path, family):
    """From a checkpoint through training's parts to a folder that AutoModelForSequenceClassification opens."""
    transformers = pytest.importorskip("transformers")
    getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**SMALL)).save_pretrained(tmp_path)
    encoder, config = load_pretrained(tmp_path)
    model = adapt(SequenceClassifier(encoder, 3), ["query", "down"], r=4).eval()
    for layer in salora_layers(model).values():
        layer.B.data.normal_()
    merge(model)
    save_pretrained(model, tmp_path / "merged")
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert type(other).__name__ == f"{family}ForSequenceClassification"
    ids, mask, types = batch(pad=config.pad_token_id)
    expected = other(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    difference = (model(ids, mask, types) - expected).abs().max()
    print(f"{family} merged classifier: largest difference {difference:.2e}")
    assert difference < 1e-5
    again, _ = load_pretrained(tmp_path / "merged", lambda encoder: SequenceClassifier(encoder, 3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.equation("encoder")
def test_real_encoder_equals_transformers(encoder_dir):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(encoder_dir).eval()
    encoder, config = load_pretrained(encoder_dir)
    ids, mask, types = batch(pad=config.pad_token_id, vocab=config.vocab_size)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
        difference = ((encoder(ids, mask, types) - expected).abs() * mask[..., None]).max()
    print(f"largest difference to transformers on real weights: {difference:.2e}")
    assert difference < 1e-5


@pytest.mark.parametrize("eps", [1e-12, 0.1])
def test_encoder_uses_the_layer_norm_eps_of_its_config_and_no_dropout_in_eval_mode(eps):
    drop = dict(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    encoder = small_encoder(layer_norm_eps=eps, **drop).double()
    ids, mask, types = batch()
    expected = naive_encoder(encoder, ids[0], types[0])
    assert torch.allclose(encoder(ids, mask, types)[0], expected, atol=1e-9)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_encoder_drops_out_in_train_mode(rate):
    ids, mask, types = batch()
    encoder = small_encoder(**{rate: 0.5}).train()
    assert not torch.allclose(encoder(ids, mask, types), encoder.eval()(ids, mask, types), atol=1e-3)


def test_encoder_starts_with_the_deviation_of_its_config_zero_biases_and_zero_padding_rows():
    encoder = TinyTransformer(TransformerConfig(hidden_size=60, num_attention_heads=2, num_hidden_layers=1))
    for name, p in encoder.named_parameters():
        if p.dim() == 2:
            pad = encoder.config.pad_token_id
            if name in ("word.weight", "position.weight"):
                assert not p[pad].any() and p[pad - 1].any(), name
            assert abs(float(p.detach().std()) / 0.02 - 1) < 0.2, name
        else:
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name


def test_bert_positions_lose_their_unused_rows_in_a_file_and_get_them_back(tmp_path):
    encoder = small_encoder(model_type="bert", pad_token_id=2)
    save_pretrained(encoder, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["max_position_embeddings"] == 20 - 3, "published tables count from 0"
    loaded, config = load_pretrained(tmp_path)
    ids, mask, types = batch(pad=2)
    real = mask.bool()
    assert torch.equal(loaded(ids, mask, types)[real], encoder(ids, mask, types)[real]) and config.max_length == 17


def test_masked_words_of_real_text_are_predicted_as_by_transformers(encoder_dir, glue_dir, tmp_path):
    """The checkpoint has no LM head, so both get the same random one; encoder, words and text are real."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    other = transformers.AutoModelForMaskedLM.from_pretrained(encoder_dir).eval()
    other.save_pretrained(tmp_path)
    lm, config = load_pretrained(tmp_path, MaskedLM)
    rows = load_tokenizer(encoder_dir).encode(load_task("cola", glue_dir)[1][:64], 64)
    ids, mask, types, _ = collate(rows, config.pad_token_id)
    hidden = (torch.arange(ids.shape[1]) % 4 == 2) & (mask == 1)
    ids = ids.masked_fill(hidden, 103)  # [MASK]
    with torch.no_grad():
        expected = other(input_ids=ids, attention_mask=mask, token_type_ids=types).logits[hidden]
        found = lm(lm.encoder(ids, mask, types)[hidden])
    print(f"{len(found)} masked words: largest difference {(found - expected).abs().max():.2e}")
    assert torch.equal(found.argmax(1), expected.argmax(1)) and (found - expected).abs().max() < 1e-5
