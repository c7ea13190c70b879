"""Adapters out to PEFT and back: the same outputs through `PeftModel` as through our own layers."""

import copy
import json
import re
import sys
from collections import OrderedDict
from functools import partial

import pytest
import torch
from strategies import randomize, row, unchanged
from test_adapters import Bomb
from test_tiny_transformer import batch, small_encoder
from torch import nn

from budget import freeze_gates
from hub.peft import export_peft, import_peft
from hub.roberta import hub_name, load_pretrained, save_pretrained
from rank_allocator import RankAllocator
from salora import SaLoRALinear, adapt, prune, salora_layers
from tiny_transformer import SequenceClassifier
from tools import agree


def trained(model, pruned, survivors):
    """Adapt all matrices, give every number a value, and freeze the gates to ranks that differ, one of them 0."""
    randomize(adapt(model, ["query", "key", "value", "out", "up", "down"], r=4, alpha=6), seed=1)
    layers = list(salora_layers(model).values())
    layers[1].gate.log_theta.data -= 9
    freeze_gates(layers, 0.5, survivors=survivors)
    for layer in layers if pruned else []:
        prune(layer)
    assert {int((layer.gate.settled() > 0).sum()) for layer in layers} >= {0, 2, 3}
    return model.eval()


# Through PEFT


@pytest.fixture
def base(tmp_path):
    """A folder of a random classifier."""
    save_pretrained(SequenceClassifier(small_encoder(), 3), tmp_path / "base")
    return tmp_path / "base"


def theirs(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def ours(folder):
    return load_pretrained(folder, partial(SequenceClassifier, num_labels=3))[0]


def logits_of(model):
    """In float64, where only the float32 of the files makes a difference."""
    ids, mask, types = batch()
    outputs = model.double()(input_ids=ids, attention_mask=mask, token_type_ids=types)
    return getattr(outputs, "logits", outputs)


@pytest.mark.parametrize("pad", [False, True], ids=["patterns", "padded"])
@pytest.mark.parametrize("pruned,survivors", [(True, "one"), (False, "median")])
def test_classifiers_give_the_same_through_peft(tmp_path, base, pad, pruned, survivors):
    peft = pytest.importorskip("peft")
    model = trained(ours(base), pruned, survivors)
    model.classifier.requires_grad_(True)
    export_peft(model, tmp_path / "adapter", hub_name, pad, base_model=base, task_type="SEQ_CLS")
    wrapped = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    opened = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    again = import_peft(ours(base), tmp_path / "adapter", hub_name)
    assert sum(p.requires_grad for p in again.classifier.parameters()) == 4, "the head comes back trainable"
    twice = import_peft(copy.deepcopy(again), tmp_path / "adapter", hub_name)
    for other in (again, twice, opened, wrapped, wrapped.merge_and_unload()):
        assert (logits_of(other) - logits_of(model)).abs().max() < 1e-6


def test_an_adapter_made_by_peft_comes_in(tmp_path, base):
    peft = pytest.importorskip("peft")
    plain = dict(task_type="SEQ_CLS", target_modules=["query", "value"])
    patterns = dict(
        r=3, lora_alpha=5, target_modules=["query", "intermediate.dense"], modules_to_save=["classifier"],
        rank_pattern={"layer.0.attention.self.query": 2}, alpha_pattern={"layer.1.attention.self.query": 9},
    )  # fmt: skip
    for options, ranks in ((plain, [8, 8, 8, 8]), (patterns, [2, 3, 3, 3])):
        wrapped = peft.get_peft_model(theirs(base), peft.LoraConfig(**options, init_lora_weights=False)).eval()
        wrapped.save_pretrained(tmp_path / str(ranks))
        model = import_peft(ours(base), tmp_path / str(ranks), hub_name)
        assert (logits_of(wrapped) - logits_of(model)).abs().max() < 1e-6
        assert [layer.r for layer in salora_layers(model).values()] == ranks
        assert model.classifier["dense"].weight.requires_grad


class Twins(nn.Module):
    """Two linears of which one's name is the end of the other's, and a parameter outside of all modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.block = nn.Linear(6, 5), nn.Module()
        self.block.up, self.block.down, self.norm = nn.Linear(5, 4), nn.Linear(4, 3), nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * self.norm(self.block.down(torch.tanh(self.block.up(torch.tanh(self.up(x))))))


X = torch.linspace(-1, 1, 18).view(3, 6)


@pytest.mark.parametrize("package", ["with", "without"])
@pytest.mark.parametrize("pad", [False, True], ids=["patterns", "padded"])
def test_names_that_end_alike_are_told_apart_and_heads_go_along_with_and_without_safetensors(
    tmp_path, monkeypatch, pad, package
):
    """A module of which one parameter trains is saved whole."""
    peft = pytest.importorskip("peft")
    model = adapt(Twins().eval(), ["up", "block.up"], r=4, alpha=6)
    for p in (model.norm.bias, *model.block.down.parameters()):
        p.requires_grad_(True).data.normal_()
    for layer, keep in zip(salora_layers(model).values(), (3, 1), strict=True):
        layer.B.data.normal_()
        layer.gate.release()
        layer.gate.log_theta.data = torch.tensor([9.0] * keep + [-9.0] * (4 - keep))
    with monkeypatch.context() as context:
        if package == "without":
            context.setitem(sys.modules, "safetensors.torch", None)  # as if it were not installed
        export_peft(model, tmp_path, pad=pad)
    assert (tmp_path / "adapter_model.bin").exists() == (package == "without")
    back = import_peft(Twins().eval(), tmp_path)
    assert [layer.r for layer in salora_layers(back).values()] == ([4, 4] if pad else [3, 1])
    assert back.block.down.weight.requires_grad and not back.block.up.base.weight.requires_grad
    for other in (back, peft.PeftModel.from_pretrained(Twins().eval(), tmp_path)):
        assert torch.allclose(other(X), model(X), atol=1e-6)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["modules_to_save"] == ["block.down", "norm"]
    if pad:
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (4, 6, {}, {})


# What is not exported


def test_what_peft_has_no_words_for_is_not_exported_and_nothing_is_written(tmp_path):
    def refused(model, message, rename=str):
        with row(message), pytest.raises(ValueError, match=message):
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
    refused(model, "up trains, and PEFT would take block.up for it or for a part of it, by its name: freeze up")
    refused(SaLoRALinear(nn.Linear(3, 3), r=2, alpha=2), "the model is itself an adapted layer")
    model = adapt(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), ["0"], r=2)
    model.append(model[0])
    refused(model, "two of these are one layer: 0, 2$")
    model[0].gate.fix(torch.zeros(2))
    refused(model[:1], "no triplet is open")
    model = adapt(Twins(), ["down"], r=2)
    RankAllocator(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), total_steps=1)
    refused(model, "still at work on block.down: call its finish")
    parts = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(2, 2)}), "a_b": nn.Linear(2, 2)})
    model = adapt(parts, ["a_b"], r=2)
    model["a"].requires_grad_(True)
    refused(model, "a.b trains, and PEFT would take a_b for it")
    head = nn.Sequential(OrderedDict(original_module=nn.Linear(4, 2), act=nn.Tanh()))
    model = adapt(nn.ModuleDict({"layer": nn.Linear(4, 4), "head": head}), ["layer"], r=2)
    head.requires_grad_(True)
    refused(model, "head trains, and PEFT would take head.original_module for it or for a part of it")
    words, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = words.weight
    model = adapt(nn.ModuleDict({"words": words, "body": nn.Linear(4, 4), "head": head}), ["body"], r=2)
    head.requires_grad_(True)
    refused(model, "words.weight and head.weight are one weight, which trains, and PEFT would make two of it")
    model = adapt(Twins(), ["down"], r=2)
    model.block.up = torch.compile(model.block.up)
    refused(model, "a part of the model is compiled, which changes names")
    assert not (tmp_path / "new").exists()


class Named(nn.Module):
    """A layer under one name in a block, and a head under another."""

    def __init__(self, layer, head):
        super().__init__()
        self.block, self.names = nn.Module(), (layer, head)
        self.block.add_module(layer, nn.Linear(6, 6))
        self.add_module(head, nn.Linear(6, 2))

    def forward(self, x):
        layer, head = self.names
        return self.get_submodule(head)(torch.tanh(self.block.get_submodule(layer)(x)))


HEADS = [  # (the name of a layer, of a head, what PEFT would take for the head, or None)
    ("c_fc", "fc", "block.c_fc"),
    ("q_proj", "proj", "block.q_proj"),
    ("12", "2", "block.12"),
    ("query", "out", "block.query.lora_dropout"),
    ("query", "A", "block.query.lora_A"),
    ("query", "layer", "block.query.base_layer"),
    ("query", "default", "block.query.lora_A.default"),
    ("query", "module", "module.original_module"),
    ("query", "head", None),
    ("classifier_x", "classifier", None),
]


def test_a_head_opens_in_peft_or_is_refused_where_its_name_is_the_end_of_others(tmp_path):
    peft = pytest.importorskip("peft")
    for layer, head, other in HEADS:
        base = Named(layer, head).eval()
        model = randomize(adapt(copy.deepcopy(base), [layer], r=2)).eval()
        model.get_submodule(head).requires_grad_(True).bias.data.normal_()
        with row(layer, head):
            if other is not None:
                with pytest.raises(ValueError, match=f"^{head} trains, and PEFT would take {other} for it"):
                    export_peft(model, tmp_path / "refused")
                assert not (tmp_path / "refused").exists()
                continue
            export_peft(model, tmp_path / head)
            opened = peft.PeftModel.from_pretrained(base, tmp_path / head)
            assert torch.allclose(opened(X), model(X), atol=1e-6)


def test_random_names_open_in_peft_with_the_same_outputs_or_are_refused():
    pytest.importorskip("peft")
    said = []
    assert agree.exports(80, 0, said.append) == 0, said
    assert re.search("exports, seed 0: [1-9].* open with the same outputs, [1-9].* refused, 0 wrong", said[0])


def test_a_compiled_model_is_exported_and_imported_like_the_one_inside(tmp_path):
    model = randomize(adapt(Twins().eval(), ["up", "block.up"], r=2)).eval()
    export_peft(torch.compile(model, backend="eager"), tmp_path)
    compiled = torch.compile(Twins().eval(), backend="eager")
    assert import_peft(compiled, tmp_path) is compiled
    assert torch.allclose(compiled(X), model(X), atol=1e-6)


def test_an_export_leaves_no_weights_of_an_earlier_one_beside_its_own(tmp_path, monkeypatch):
    """Which readers might prefer."""
    pytest.importorskip("safetensors")
    for without in (True, False, True):
        model = randomize(adapt(Twins(), ["block.up"], r=2))
        with monkeypatch.context() as context:
            if without:
                context.setitem(sys.modules, "safetensors.torch", None)
            export_peft(model, tmp_path)
        weights = {"adapter_model.bin"} if without else {"adapter_model.safetensors"}
        assert {path.name for path in tmp_path.iterdir()} == weights | {"adapter_config.json"}


def test_a_failed_export_leaves_the_files_as_they_were(tmp_path):
    model = adapt(Twins(), ["block.up"], r=2, alpha=4)
    export_peft(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model.block.up.alpha = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_peft(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# What a folder may say


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A folder with an adapter for block.up and block.down, both of rank 2, and the weights of a head, as a .bin."""
    model = adapt(Twins(), ["block.up", "down"], r=2, alpha=4)
    model.norm.requires_grad_(True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        export_peft(model, tmp_path)
    return tmp_path


def alphas_of(folder):
    """lora_alpha of block.up and of block.down."""
    return [layer.alpha for layer in salora_layers(import_peft(Twins(), folder)).values()]


def change(folder, **config):
    """Change entries of an adapter's config. Returns what undoes it."""
    path = folder / "adapter_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **config}))
    return lambda: path.write_text(before)


def refused(folder, message):
    """The import ends in one line, and the model is what it was."""
    model = Twins()
    with row(message), unchanged(model):
        with pytest.raises(ValueError, match=message) as error:
            import_peft(model, folder)
        assert "\n" not in str(error.value)


NAN = float("nan")
NOT_PLAIN = {
    "peft_type": ["ADALORA", "VERA", None], "bias": ["all", "lora_only", ["none"]], "use_dora": [True, 1],
    "init_lora_weights": ["pissa_niter_4", "olora", "loftq", "corda", "eva", "pissa", "mica"],
    "alora_invocation_tokens": [[1, 2]], "layer_replication": [[[0, 2]]], "trainable_token_indices": [[3]],
    "target_parameters": [["weight"]], "something_new": [1, NAN],
    **{key: [True] for key in ("use_rslora", "fan_in_fan_out", "lora_bias", "use_qalora")},
}  # fmt: skip
REGULAR_EXPRESSIONS = ["(a+)+$", ".*up", "up|down", "up$", r"block\.\w+", "block.[u]p", "", "^", "("]
SETTINGS = [  # (settings, error)
    *[({key: value}, f"no plain LoRA adapter: {key} is ") for key, values in NOT_PLAIN.items() for value in values],
    *[(settings, f"adapter_config.json has {what} .*, expected a number above 0")
      for value in (None, NAN, float("inf"), 0, -1, "16", True, [16], 10**400)
      for settings, what in (({"lora_alpha": value, "alpha_pattern": {}}, "lora_alpha"),
                             ({"alpha_pattern": {"up": value}}, "in alpha_pattern for 'up'"))],
    *[({"r": value}, "config.json has r .*, expected a whole number above 0") for value in (NAN, 0.5, "2", True)],
    *[({"rank_pattern": {"up": value}}, "has in rank_pattern for 'up' .*, expected a whole number above 0")
      for value in (NAN, 0.5, "2", True, 0)],
    *[({table: {key: 2}}, f"{table} of .* has the regular expression .*; only names of modules")
      for table in ("rank_pattern", "alpha_pattern") for key in REGULAR_EXPRESSIONS],
    ({"rank_pattern": [2]}, r"has rank_pattern \[2\], expected a number for every name"),
    ({"rank_pattern": {"up": 3, "down": 2}}, "block.up in .* has rank 2, but adapter_config.json says 3"),
    ({"rank_pattern": {}, "r": 5}, "block.up in .* has rank 2, but adapter_config.json says 5"),
]  # fmt: skip


def test_settings_that_are_impossible_or_not_understood_are_refused_by_name(adapter):
    for settings, message in SETTINGS:
        undo = change(adapter, **settings)
        with row(settings):
            refused(adapter, message)
        undo()
    for value in (None, False, 0, "", [], {}):
        change(adapter, something_new=value, use_dora=value, bias=value, init_lora_weights=value)
        assert len(salora_layers(import_peft(Twins(), adapter))) == 2, "what is unset passes"


PATTERNS = {"up": [9, 4], "block.up": [9, 4], "^block.up": [9, 4], r"^block\.up": [9, 4],
            "^up": [4, 4], "p": [4, 4], "blockxup": [4, 4]}  # fmt: skip


def test_patterns_are_compared_as_names_like_peft_matches_them(adapter):
    """The end of a name, but not of a word; with ^ a whole name."""
    for key, alphas in PATTERNS.items():
        change(adapter, alpha_pattern={key: 9})
        assert alphas_of(adapter) == alphas, key
        for module, alpha in zip(("block.up", "block.down"), alphas):
            assert bool(re.match(rf"(.*\.)?({key})$", module)) == (alpha == 9), "PEFT's rule"


def test_of_several_patterns_the_first_that_fits_counts(adapter):
    """As in PEFT, where the order of the file decides, not the length of the names."""
    for first, second, alphas in (("up", "block.up", [9, 4]), ("block.up", "up", [9, 4]), ("down", "up", [7, 9])):
        change(adapter, alpha_pattern={first: 9, second: 7})
        assert alphas_of(adapter) == alphas


UP, DOWN = "block.up.lora_{}.weight", "block.down.lora_{}.weight"
TENSORS = [  # (tensors, error); None drops one
    *[({UP.format(side): None}, "block.up in .*adapter_model.bin has only one of lora_A and lora_B")
      for side in "AB"],
    ({UP.format("A"): torch.zeros(2, 6)}, r"block.up .* has lora_A \(2, 6\) and lora_B \(4, 2\)"),
    ({UP.format("A"): torch.zeros(3, 5)}, r"expected \(r, 5\) and \(4, r\)"),
    ({UP.format("A"): torch.zeros(())}, r"has lora_A \(\) and"),
    ({UP.format("B"): torch.full((4, 2), NAN)}, "lora_B of block.up .* not finite"),
    ({UP.format("B"): torch.zeros(4, 2, dtype=torch.int8)}, "lora_B of block.up .* of another kind"),
    ({UP.format("B"): [[0.0] * 2] * 4}, "lora_B of block.up .* is a list, expected a tensor"),
    ({"norm.weight": torch.zeros(2, 2)}, r"norm.weight in .* has shape \(2, 2\), but the model's is \(3,\)"),
    ({"norm.bias": torch.full((3,), float("inf"))}, "norm.bias in .* not finite"),
    ({name.format(side): None for name in (UP, DOWN) for side in "AB"}, "holds no lora_A and lora_B of this model's"),
    ({"other.lora_A.weight": torch.zeros(2, 5)}, "the model has no place for other.lora_A.weight"),
    ({"norm.bias": Bomb()}, "adapter_model.bin is damaged or not a PyTorch file of plain tensors"),
]  # fmt: skip


def test_tensors_that_do_not_fit_are_refused_by_name(adapter):
    path = adapter / "adapter_model.bin"
    whole = torch.load(path, weights_only=True)
    for changes, message in TENSORS:
        state = whole | {f"base_model.model.{name}": value for name, value in changes.items()}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
        refused(adapter, message)
