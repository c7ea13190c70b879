"""Adapters out to PEFT and back: the same outputs through `PeftModel` as through our own layers."""

import json
import sys
from functools import partial

import pytest
import torch
from strategies import generator
from test_salora import Bomb
from test_tiny_transformer import SMALL, batch
from torch import nn

from budget import freeze_gates
from hub.peft import export_peft, import_peft
from salora import adapt, prune, salora_layers
from tiny_transformer import SequenceClassifier, hub_name, load_pretrained

TARGETS = ["query", "key", "value", "out", "up", "down"]


def trained(model, targets, pruned=True, survivors="one"):
    """Adapt a model, give every number a value, and freeze the gates to ranks that differ; some layer has rank 0."""
    adapt(model, targets, r=4, alpha=6)
    layers = list(salora_layers(model).values())
    g = generator(7)
    for i, layer in enumerate(layers):
        layer.B.data.normal_(generator=g)
        layer.gate.release()
        layer.gate.log_theta.data = torch.randn(4, generator=g) * 3 - (9 if i == 1 else 0)
    freeze_gates(layers, 0.5, survivors=survivors)
    if pruned:
        for layer in layers:
            prune(layer)
    assert len({int((layer.gate.settled() > 0).sum()) for layer in layers}) > 2
    return model.eval()


@pytest.mark.parametrize("pad", [False, True], ids=["patterns", "padded"])
@pytest.mark.parametrize("family", ["Roberta", "Bert"])
@pytest.mark.parametrize("pruned,survivors", [(True, "one"), (False, "median")])
def test_classifiers_give_the_same_through_peft(tmp_path, family, pad, pruned, survivors):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = getattr(transformers, f"{family}Config")(**SMALL, num_labels=3)
    other = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    other.save_pretrained(tmp_path / "base")
    encoder, config = load_pretrained(tmp_path / "base")
    model = trained(SequenceClassifier(encoder, 3), TARGETS, pruned, survivors)
    model.classifier.requires_grad_(True)
    names = partial(hub_name, model_type=config.model_type)
    export_peft(model, tmp_path / "adapter", names, pad=pad)
    ids, mask, types = batch(pad=config.pad_token_id)
    expected = model.double()(ids, mask, types)  # in float64, where only the float32 of the files makes a difference
    inputs = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)

    wrapped = peft.PeftModel.from_pretrained(other, tmp_path / "adapter").eval().double()
    difference = (wrapped(**inputs).logits - expected).abs().max()
    merged = (wrapped.merge_and_unload()(**inputs).logits - expected).abs().max()
    again = SequenceClassifier(load_pretrained(tmp_path / "base")[0], 3).eval()
    import_peft(again, tmp_path / "adapter", names).double()
    back = (again(ids, mask, types) - expected).abs().max()
    twice = (import_peft(again, tmp_path / "adapter", names)(ids, mask, types) - expected).abs().max()
    print(f"{family}, pad={pad}: PeftModel {difference:.1e}, merged {merged:.1e}, back {back:.1e}")
    assert max(difference, merged, back, twice) < 1e-6
    tensors = [n for n, p in again.named_parameters() if p.requires_grad and n.startswith("classifier")]
    assert len(tensors) == 4, "the head comes back trainable"


def test_an_adapter_made_by_peft_comes_in(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    other = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, num_labels=2)).eval()
    other.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["query", "intermediate.dense"], modules_to_save=["classifier"],
        rank_pattern={"layer.0.attention.self.query": 2}, alpha_pattern={"layer.1.attention.self.query": 9},
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = peft.get_peft_model(other, config).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    model = SequenceClassifier(load_pretrained(tmp_path / "base")[0], 2).eval()
    import_peft(model, tmp_path / "adapter", hub_name)
    ids, mask, types = batch()
    expected = wrapped(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    assert (model(ids, mask, types) - expected).abs().max() < 1e-5
    assert [layer.r for layer in salora_layers(model).values()] == [2, 3, 3, 3]


class Twins(nn.Module):
    """Two linears of which one's name is the end of the other's, and a parameter outside of all modules."""

    def __init__(self):
        super().__init__()
        self.up, self.block = nn.Linear(6, 5), nn.Module()
        self.block.up, self.block.down = nn.Linear(5, 4), nn.Linear(4, 3)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * self.block.down(torch.tanh(self.block.up(torch.tanh(self.up(x)))))


@pytest.mark.parametrize("pad", [False, True], ids=["patterns", "padded"])
def test_names_that_end_alike_are_told_apart(tmp_path, pad):
    peft = pytest.importorskip("peft")
    plain, model = Twins().eval(), Twins().eval()
    model.load_state_dict(plain.state_dict())
    adapt(model, ["up", "block.up"], r=4, alpha=6)
    for layer, keep in zip(salora_layers(model).values(), (3, 1), strict=True):
        layer.B.data.normal_()
        layer.gate.release()
        layer.gate.log_theta.data = torch.tensor([9.0] * keep + [-9.0] * (4 - keep))
    export_peft(model, tmp_path, pad=pad)
    x = torch.randn(3, 6)
    back = import_peft(Twins().eval(), tmp_path)
    assert [layer.r for layer in salora_layers(back).values()] == ([4, 4] if pad else [3, 1])
    assert torch.allclose(peft.PeftModel.from_pretrained(plain, tmp_path)(x), model(x), atol=1e-6)


def test_padded_form_has_one_rank_and_no_patterns(tmp_path):
    model = trained(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 7), nn.Linear(7, 6)), [r"\d"])
    export_peft(model, tmp_path, pad=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 6, {}, {})
    assert (config["peft_type"], config["lora_dropout"], config["bias"]) == ("LORA", 0, "none")
    assert config["inference_mode"] is True and config["modules_to_save"] is None
    x = torch.randn(2, 6)
    again = nn.Sequential(*(getattr(m, "base", m) for m in model)).eval()
    assert torch.allclose(import_peft(again, tmp_path)(x), model(x), atol=1e-5)


@pytest.mark.parametrize("package", ["with", "without"])
def test_heads_go_along_with_and_without_safetensors(tmp_path, monkeypatch, package):
    if package == "without":
        for name in ("safetensors", "safetensors.torch"):
            monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    else:
        pytest.importorskip("safetensors")
    model = adapt(Twins().eval(), ["block.up"], r=2, alpha=2)
    model.block.up.B.data.normal_()
    model.block.down.requires_grad_(True).weight.data.normal_()
    export_peft(model, tmp_path)
    assert (tmp_path / "adapter_model.bin").exists() == (package == "without")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["block.down"]
    back = Twins().eval()
    back.up.load_state_dict(model.up.state_dict())
    back.block.up.load_state_dict(model.block.up.base.state_dict())
    x = torch.randn(3, 6)
    assert torch.allclose(import_peft(back, tmp_path)(x), model(x), atol=1e-6)
    assert back.block.down.weight.requires_grad and not back.up.weight.requires_grad


def test_export_refuses_an_empty_adapter_and_import_what_it_cannot_represent(tmp_path):
    model = adapt(nn.Sequential(nn.Linear(4, 3)), ["0"], r=2, alpha=2)
    layer = model[0]
    layer.gate.fix(torch.zeros(2))
    with pytest.raises(ValueError, match="no triplet is open"):
        export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())
    layer.gate.fix(torch.ones(2))
    export_peft(model, tmp_path)
    with pytest.raises(ValueError, match="no place for 0.lora_A.weight, 0.lora_B.weight"):
        import_peft(nn.ModuleDict({"other": nn.Linear(4, 3)}), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    odd = [("peft_type", "ADALORA"), ("peft_type", "VERA"), ("peft_type", None), ("bias", "all"), ("bias", "lora_only")]
    odd += [(key, True) for key in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias")]
    odd += [("init_lora_weights", name) for name in ("pissa_niter_4", "olora", "loftq", "corda")]
    torch.save({"0.lora_A.weight": Bomb()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="adapter_model.bin is damaged or not a PyTorch file of plain tensors"):
        import_peft(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    for key, value in odd:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"no plain LoRA adapter: {key} is {value!r}$"):
            import_peft(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_a_layer_under_two_names_is_not_exported(tmp_path):
    layer = nn.Linear(4, 4)
    model = trained(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), [r"\d"], False)
    model.append(model[0])
    with pytest.raises(ValueError, match="two of these are one layer: 0, 2, 3, 4, 5$"):
        export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())
