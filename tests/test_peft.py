"""Adapters out to PEFT and back: the same outputs through `PeftModel` as through our own layers."""

import copy
import json
import re
import sys
from functools import partial

import pytest
import torch
from strategies import generator
from test_salora import Bomb
from test_tiny_transformer import SMALL, batch
from torch import nn

from budget import RankAllocator, freeze_gates
from hub.peft import export_peft, import_peft
from salora import SaLoRALinear, adapt, prune, salora_layers
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
        self.block.up, self.block.down, self.norm = nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * self.norm(self.block.down(torch.tanh(self.block.up(torch.tanh(self.up(x))))))


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


def test_an_unfinished_allocator_is_not_exported(tmp_path):
    model = adapt(Twins(), ["down"], r=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = RankAllocator(model, optimizer, total_steps=1)
    with pytest.raises(ValueError, match="finish the RankAllocator first: the ranks of block.down are not decided yet"):
        export_peft(model, tmp_path)
    assert not list(tmp_path.iterdir())
    allocator.before_step(0)
    model(torch.randn(2, 6)).sum().backward()
    allocator.after_backward()
    optimizer.step()
    allocator.after_step()
    allocator.finish()
    export_peft(model, tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()


def test_what_peft_has_no_words_for_is_not_exported(tmp_path):
    def refused(model, message, rename=str):
        with pytest.raises(ValueError, match=message):
            export_peft(model, tmp_path / "new", rename)

    model = adapt(Twins(), ["block.up", "down"], r=2)
    refused(model, "rename gives two layers one name: x, x", rename=lambda name: "x")
    model.gain.requires_grad_(True)
    refused(model, "gain trains, but PEFT saves modules and it has none: freeze it")
    model = adapt(Twins(), ["block.up"], r=2)
    model.block.up.base.bias.requires_grad_(True)
    refused(model, "block.up.bias trains beside an adapter, which plain LoRA has no place for: freeze it")
    model.block.up.base.bias.requires_grad_(False)
    model.up.requires_grad_(True)
    refused(model, "up trains, and PEFT would take block.up for a part of it: freeze up")
    refused(SaLoRALinear(nn.Linear(3, 3), r=2, alpha=2), "the model is itself an adapted layer")
    assert not (tmp_path / "new").exists()


def test_a_module_with_a_trained_parameter_is_saved_whole(tmp_path):
    peft = pytest.importorskip("peft")
    plain = Twins().eval()
    model = adapt(copy.deepcopy(plain), ["block.up"], r=2, alpha=2).eval()
    model.norm.bias.requires_grad_(True).data.normal_()
    export_peft(model, tmp_path)
    x = torch.randn(3, 6)
    assert torch.allclose(peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)(x), model(x), atol=1e-6)
    assert torch.allclose(import_peft(plain, tmp_path)(x), model(x), atol=1e-6)


def test_a_failed_export_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    model = adapt(Twins(), ["block.up"], r=2, alpha=4)
    export_peft(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.block.up.alpha = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_peft(model, tmp_path)
    model.block.up.alpha = 8
    with monkeypatch.context() as full:
        full.setattr("os.replace", lambda source, target: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            export_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_auto_classes_of_peft_open_an_export(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    config = transformers.RobertaConfig(**SMALL, num_labels=3)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    encoder, _ = load_pretrained(tmp_path / "base")
    model = trained(SequenceClassifier(encoder, 3), TARGETS)
    model.classifier.requires_grad_(True)
    export_peft(model, tmp_path / "adapter", hub_name, base_model=tmp_path / "base", task_type="SEQ_CLS")
    other = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    ids, mask, types = batch()
    found = other(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    assert (found - model(ids, mask, types)).abs().max() < 1e-5


# What a folder may say


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter for block.up (rank 2) and block.down (rank 2), and the weights of a head."""
    model = adapt(Twins(), ["block.up", "down"], r=2, alpha=4)
    model.norm.requires_grad_(True)
    export_peft(model, tmp_path)
    return tmp_path


def change(folder, tensors=None, **config):
    """Change an adapter folder: entries of its config, and tensors by the end of their name (None drops one)."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors:
        path = folder / "adapter_model.bin"
        whole = folder / "adapter_model.safetensors"
        if whole.exists():
            torch.save(pytest.importorskip("safetensors.torch").load_file(whole), path)
            whole.unlink()
        state = torch.load(path, weights_only=True)
        for end, value in tensors.items():
            [name] = [name for name in state if name.endswith(end)]
            state[name] = value
        torch.save({name: value for name, value in state.items() if value is not None}, path)


def refused(folder, message):
    """The import ends in one line, and the model is what it was."""
    model = Twins()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message) as error:
        import_peft(model, folder)
    assert "\n" not in str(error.value) and not salora_layers(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1], name


def test_whatever_peft_writes_for_plain_lora_is_understood(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    other = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, num_labels=2)).eval()
    other.save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(other, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert len(config) > 30, "it writes every field, most of them null"
    model = SequenceClassifier(load_pretrained(tmp_path / "base")[0], 2).eval()
    import_peft(model, tmp_path / "adapter", hub_name)
    assert len(salora_layers(model)) == 4 and model.classifier["dense"].weight.requires_grad
    ids, mask, types = batch()
    expected = wrapped(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
    assert (model(ids, mask, types) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "key,value",
    [
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["weight"]),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "mica"),
        ("something_new", 1),
        ("something_new", float("nan")),
        ("use_dora", 1),
        ("bias", ["none"]),
    ],
)
def test_what_is_set_and_not_understood_is_refused_by_name(adapter, key, value):
    change(adapter, **{key: value})
    refused(adapter, f"holds no plain LoRA adapter: {key} is ")


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_what_is_unset_passes(adapter, value):
    change(adapter, something_new=value, use_dora=value, bias=value, init_lora_weights=value)
    assert len(salora_layers(import_peft(Twins(), adapter))) == 2


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 0, -1, "16", True, [16], 10**400])
def test_alpha_must_be_a_number_above_zero(adapter, value):
    change(adapter, lora_alpha=value, alpha_pattern={})
    refused(adapter, "adapter_config.json has lora_alpha .*, expected a number above 0")
    change(adapter, lora_alpha=4, alpha_pattern={"up": value})
    refused(adapter, "adapter_config.json has in alpha_pattern for 'up' .*, expected a number above 0")


@pytest.mark.parametrize("value", [float("nan"), 0.5, "2", True, 0])
def test_a_rank_must_be_a_whole_number_above_zero(adapter, value):
    change(adapter, r=value)
    refused(adapter, "adapter_config.json has r .*, expected a whole number above 0") if value else None
    change(adapter, r=2, rank_pattern={"up": value})
    refused(adapter, "adapter_config.json has in rank_pattern for 'up' .*, expected a whole number above 0")


@pytest.mark.parametrize(
    "key,alphas",
    [
        ("up", [9, 4]),  # the end of a name
        ("block.up", [9, 4]),
        ("^block.up", [9, 4]),
        (r"^block\.up", [9, 4]),
        ("^up", [4, 4]),  # a whole name, of another layer
        ("p", [4, 4]),  # the end of a word only
        ("blockxup", [4, 4]),
    ],
)
def test_patterns_are_compared_as_names_like_peft_matches_them(adapter, key, alphas):
    change(adapter, alpha_pattern={key: 9})
    assert [layer.alpha for layer in salora_layers(import_peft(Twins(), adapter)).values()] == alphas
    for module, alpha in zip(("block.up", "block.down"), alphas):
        assert bool(re.match(rf"(.*\.)?({key})$", module)) == (alpha == 9), "PEFT's rule"


@pytest.mark.parametrize("key", ["(a+)+$", ".*up", "up|down", "up$", r"block\.\w+", "block.[u]p", "", "^", "("])
@pytest.mark.parametrize("table", ["rank_pattern", "alpha_pattern"])
def test_regular_expressions_of_a_file_are_refused_and_never_run(adapter, table, key):
    change(adapter, **{table: {key: 2}})
    refused(adapter, f"{table} of .*adapter_config.json has the regular expression .*; only names of modules")


def test_patterns_must_be_tables(adapter):
    change(adapter, rank_pattern=[2])
    refused(adapter, r"has rank_pattern \[2\], expected a number for every name")


def test_ranks_of_the_config_must_be_those_of_the_tensors(adapter):
    change(adapter, rank_pattern={"up": 3, "down": 2})
    refused(adapter, "block.up in .* has rank 2, but adapter_config.json says 3")
    change(adapter, rank_pattern={}, r=5)
    refused(adapter, "block.up in .* has rank 2, but adapter_config.json says 5")


@pytest.mark.parametrize(
    "tensors,message",
    [
        ({"block.up.lora_B.weight": None}, "block.up in .*adapter_model.bin has only one of lora_A and lora_B"),
        ({"block.up.lora_A.weight": torch.zeros(2, 6)}, r"block.up .* has lora_A \(2, 6\) and lora_B \(4, 2\)"),
        ({"block.up.lora_A.weight": torch.zeros(3, 5)}, r"expected \(r, 5\) and \(4, r\)"),
        ({"block.up.lora_A.weight": torch.zeros(())}, r"has lora_A \(\) and"),
        ({"block.up.lora_B.weight": torch.full((4, 2), float("nan"))}, "lora_B of block.up .* not finite"),
        ({"block.up.lora_B.weight": torch.zeros(4, 2, dtype=torch.int8)}, "lora_B of block.up .* of another kind"),
        ({"block.up.lora_B.weight": [[0.0] * 2] * 4}, "lora_B of block.up .* is a list, expected a tensor"),
        ({"norm.weight": torch.zeros(2, 2)}, r"norm.weight in .* has shape \(2, 2\), but the model's is \(3,\)"),
        ({"norm.bias": torch.full((3,), float("inf"))}, "norm.bias in .* not finite"),
        ({end: None for end in ("up.lora_A.weight", "up.lora_B.weight", "down.lora_A.weight", "down.lora_B.weight")},
         "holds no lora_A and lora_B of this model's linear layers"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(adapter, tensors, message):
    change(adapter, tensors)
    refused(adapter, message)


def test_a_folder_without_its_files_is_refused_by_name(adapter):
    for path in adapter.glob("adapter_model.*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no file .*adapter_model.bin"):
        import_peft(Twins(), adapter)
    (adapter / "adapter_config.json").write_text("[" * 100_000)
    refused(adapter, "adapter_config.json is damaged: it holds no JSON object")
