"""The gated linear layer and what is done to it, against naive loops in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import Net, assert_close, layers, make_layer, naive_forward, normal, randomize, row, seeds, sizes
from torch import nn
from torch.nn.utils.prune import random_unstructured

from budget import freeze_gates
from hard_concrete import sample_gate
from salora import SaLoRALinear, adapt, canonicalize, merge, orthogonality, prune, salora_layers

pytestmark = pytest.mark.equation("3")


def opened(layer, value):
    layer.gate.fix(torch.full((layer.r,), value, dtype=layer.A.dtype))
    return layer


# Exact identities


@pytest.mark.equation("3", "5")
@given(layers())
def test_closed_gates_leave_exactly_the_frozen_layer_and_open_ones_are_plain_lora(layer):
    x = normal(3, layer.A.shape[1], seed=1)
    assert torch.equal(opened(layer, 0.0)(x), layer.base(x)), "g = 0: h = W x"
    lora = layer.base(x) + layer.alpha / layer.r0 * (x @ layer.A.T) @ layer.B.T
    assert_close(opened(layer, 1.0)(x), lora, layer.A.shape[1] + layer.r)  # g = 1: h = W x + alpha / r B A x


def test_a_fresh_layer_changes_nothing_and_a_is_drawn_so_that_aat_is_the_identity_on_average():
    layer, x = SaLoRALinear(nn.Linear(4096, 16), 8, 16), torch.randn(2, 4096)
    assert torch.equal(layer(x), layer.base(x)), "B = 0 at the start"
    assert (layer.A @ layer.A.T - torch.eye(8)).abs().max() < 0.1, "A ~ N(0, 1/k)"


# The layer itself


@pytest.mark.equation("5", "median")
@given(layers(), seeds)
def test_forward_is_eq_5_by_naive_loops_with_sampled_gates_in_train_and_median_gates_in_eval_mode(layer, seed):
    x = normal(2, layer.A.shape[1], seed=seed)
    middle = torch.full_like(layer.gate.u, 0.5)
    for u in (layer.gate.u.clone(), middle):
        gates = sample_gate(layer.gate.log_theta, u).tolist()
        assert_close(layer(x), naive_forward(layer, x, gates), layer.A.shape[1] + layer.r)
        layer.eval()
        layer.gate.u.fill_(0.123)  # noise that eval mode must not see


@pytest.mark.equation("5")
def test_gradients_agree_with_finite_differences():
    layer = make_layer(4, 3, 2, seed=5)
    layer.gate.log_theta.data = torch.tensor([0.3, -0.4], dtype=torch.float64)
    layer.gate.u.copy_(torch.tensor([0.45, 0.55]))
    x = normal(2, 3, seed=6).requires_grad_()

    def f(x, A, B, log_theta):
        names = {"A": A, "B": B, "gate.log_theta": log_theta}
        return torch.func.functional_call(layer, names, (x,))

    inputs = [p.detach().clone().requires_grad_() for p in (layer.A, layer.B, layer.gate.log_theta)]
    assert torch.autograd.gradcheck(f, (x, *inputs))


def test_only_triplets_and_gates_have_gradients_and_nothing_merges_when_the_mode_changes():
    layer = make_layer(5, 4, 3, seed=1)
    layer.gate.u.fill_(0.5)
    layer.gate.log_theta.data.zero_()
    before = layer.base.weight.clone()
    layer(normal(2, 4, seed=2)).square().sum().backward()
    assert all(p.grad is None for p in layer.base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in (layer.A, layer.B, layer.gate.log_theta))
    layer.eval(), layer.train(), layer.eval()
    assert torch.equal(layer.base.weight, before)


# Eq. (9)


@pytest.mark.equation("9")
@given(st.lists(layers(), min_size=1, max_size=3))
def test_orthogonality_is_eq_9_by_naive_loops(bank):
    total = 0.0
    for layer in bank:
        for rows in (layer.A.tolist(), layer.B.T.tolist()):  # rows of A, columns of B: their Gram matrices against I
            for i, p in enumerate(rows):
                for j, q in enumerate(rows):
                    total += (sum(a * b for a, b in zip(p, q)) - (i == j)) ** 2
    assert_close(orthogonality(iter(bank)), torch.tensor(total, dtype=torch.float64), 200)


# Canonical triplets


@pytest.mark.equation("canonical")
@given(sizes, sizes, st.integers(1, 8), seeds)
def test_canonical_triplets_keep_the_product_and_are_a_singular_basis(d, k, r, seed):
    layer = make_layer(d, k, r, seed)
    product = layer.B @ layer.A
    canonicalize(layer)
    assert_close(layer.B @ layer.A, product, 64)
    expected, n = torch.zeros(r, dtype=torch.float64), min(r, d, k)
    expected[:n] = torch.linalg.svdvals(product)[:n]
    for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T):
        assert_close(gram, torch.diag(expected), 256)  # orthogonal, sorted, and S shared evenly between A and B


@pytest.mark.equation("canonical")
def test_canonical_triplets_in_half_precision_and_of_an_untrained_layer():
    layer = make_layer(6, 5, 3, seed=2, dtype=torch.bfloat16)
    product = layer.B.float() @ layer.A.float()
    canonicalize(layer)
    assert layer.A.dtype == layer.B.dtype == torch.bfloat16
    assert_close((layer.B @ layer.A).detach(), product.bfloat16().detach(), inner=3)
    fresh = SaLoRALinear(nn.Linear(5, 4), 3, 16)
    before = fresh.A.clone()
    canonicalize(fresh)
    assert torch.equal(fresh.A, before) and not fresh.B.any(), "A must not be lost while B = 0"


# Pruning and merging


@pytest.mark.equation("prune", "merge")
@given(layers(), st.sampled_from([None, "budget", "median"]), st.sampled_from(["one", "median"]))
def test_pruned_and_merged_layers_equal_the_masked_one_whatever_the_noise(layer, rule, survivors):
    """In train mode, too: what stays depends on the median gates, or on those that are fixed."""
    x, scale = normal(2, layer.A.shape[1], seed=4), layer.scale
    if rule:
        freeze_gates([layer], 0.5, rule, survivors)
    sampled, settled = layer.gate(), layer.gate.settled()
    masked, twin = layer.eval()(x), copy.deepcopy(layer).train()
    assert_close(merge(twin)(x), masked, layer.A.shape[1] + 8)
    kept = prune(layer.train())
    assert torch.equal(kept, settled.nonzero().flatten()) and layer.r == len(kept)
    assert torch.equal(layer.gate(), sampled[kept]), "triplets that stay keep their noise"
    assert layer.scale == scale, "survivors keep alpha / r0"
    assert_close(layer.eval()(x), masked, layer.A.shape[1] + 8)
    assert len(prune(layer)) == layer.r == len(kept), "pruning twice is pruning once"
    merged = merge(layer)
    assert type(merged) is nn.Linear and not any(p.requires_grad for p in merged.parameters()), "it stays frozen"


@pytest.mark.equation("merge")
def test_merging_leaves_what_shares_a_weight_as_it_was():
    net = nn.ModuleDict({"words": nn.Embedding(7, 4), "scores": nn.Linear(4, 7, bias=False)})
    net["scores"].weight = net["words"].weight  # tied, as in language models
    randomize(adapt(net, ["scores"], r=2)).eval()
    x, words = torch.randn(3, 4), net["words"].weight.clone()
    expected = net["scores"](x)
    assert_close(merge(net)["scores"](x), expected, inner=4)
    assert torch.equal(net["words"].weight, words)


# Adapting models


def test_adapt_replaces_by_suffix_and_by_pattern_and_freezes_the_rest():
    net = adapt(Net(), ["shared", r"body\.1"], r=2, alpha=4)
    assert list(salora_layers(net)) == ["body.1", "shared"]
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.{p}" for m in ("body.1", "shared") for p in ("A", "B")}, "log_theta waits for release()"
    assert net.shared.r == 2 and net.shared.scale == 2
    assert "r=2, r0=2, alpha=4" in str(net.shared), "a printed model shows its ranks"
    assert (adapt(Net(), "shared").shared.r, adapt(Net(), "shared").shared.scale) == (8, 2), "unless told"


def test_a_layer_with_two_names_is_adapted_under_both():
    net = Net()
    net.second = net.shared  # twice in one parent
    adapt(net, ["alias.0"])
    assert net.second is net.shared is net.alias[0] and list(salora_layers(net)) == ["shared"]
    assert list(salora_layers(adapt(net, [".*"]))) == ["body.0", "body.1", "shared", "head"], "nothing is nested"
    merged = net.shared.base
    assert merge(net).second is net.shared is net.alias[0] is merged


def test_a_later_adapt_leaves_earlier_adapters_trainable_and_ranks_may_differ_by_target():
    twice = adapt(adapt(Net(), ["shared"], r=4), ["head"], r=2)
    once = adapt(Net(), {"shared": 4, "head": 2})
    for net in (twice, once):
        assert {name: layer.r for name, layer in salora_layers(net).items()} == {"shared": 4, "head": 2}
        trained = {name for name, p in net.named_parameters() if p.requires_grad}
        assert trained == {f"{layer}.{side}" for layer in ("shared", "head") for side in "AB"}


def test_all_linear_leaves_out_heads_and_the_output_embedding():
    net = Net()
    assert list(salora_layers(adapt(net, "all-linear"))) == ["body.0", "body.1", "shared"]
    net.scores = nn.Linear(6, 3)
    net.get_output_embeddings = lambda: net.scores
    assert list(salora_layers(adapt(Net(), "all-linear"))) == ["body.0", "body.1", "shared"]
    with pytest.raises(ValueError, match="'all-linear' matches no module"):
        adapt(nn.Sequential(nn.Conv1d(3, 3, 1)), "all-linear")
    attention = nn.MultiheadAttention(8, 2)
    net.heads = nn.ModuleDict({"qa_outputs": nn.Linear(3, 3), "other": attention})
    net.more = nn.Linear(3, 3)
    assert list(salora_layers(adapt(net, "all-linear"))) == ["body.0", "body.1", "shared", "more"]


def test_dropout_is_on_the_adapters_input_alone_and_in_train_mode_only():
    layer = SaLoRALinear(nn.Linear(6, 4), 3, 16, dropout=0.5)
    nn.init.normal_(layer.B)
    x = torch.randn(5, 6)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    assert_close(y, layer.base(x) + nn.functional.dropout(x, 0.5) @ layer.delta().T, inner=8)
    assert_close(layer.eval()(x), layer.base(x) + x @ layer.delta().T, inner=8)


def hooked():
    net = Net()
    random_unstructured(net.shared, "weight", amount=0.5)
    return net


REFUSED = [  # (model, targets, rank, error)
    (Net, ["quary"], 8, "'quary' matches no module; linear layers here: 0, 1, head, shared$"),
    (Net, ["hared"], 8, "'hared' matches no module"),  # a target is a whole name or a suffix after a dot
    (Net, ["shared", "nothing"], 8, "'nothing' matches no module"),
    (Net, ["conv"], 8, "'conv' matches only Conv1d"),
    (Net, ["body"], 8, "'body' matches only ModuleList"),
    (lambda: adapt(Net(), ["shared"]), ["shared"], 8, "'shared' matches only SaLoRALinear"),
    (lambda: nn.MultiheadAttention(8, 2), ["out_proj"], 8, "MultiheadAttention bypasses the forward of its"),
    (hooked, ["shared"], 8, "computed before every forward"),
    (Net, ["*.shared"], 8, "neither a name nor a regular expression"),
    (Net, [], 8, r"targets must name at least one linear layer, got \[\]"),
    (Net, {"head": 4, "shared": 0}, 8, "rank must be a whole number above 0, got 0"),
    *[(Net, ["shared"], r, f"rank must be a whole number above 0, got {r!r}") for r in (0, -1, 2.5, True, "8")],
]


def test_a_scale_or_a_dropout_that_makes_no_sense_is_refused():
    for name, values in (("alpha", (float("nan"), float("inf"), "16", None)), ("dropout", (-0.1, 1, "0.1", True))):
        for value in values:
            net = Net()
            with row(name, value), pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
                adapt(net, ["shared"], **{name: value})
            assert all(p.requires_grad for p in net.parameters()), "and nothing is frozen"


def test_what_cannot_be_adapted_is_refused_and_nothing_is_left_half_done():
    for build, targets, rank, match in REFUSED:
        net = build()
        layers, trained = salora_layers(net), [p.requires_grad for p in net.parameters()]
        with row(match):
            with pytest.raises(ValueError, match=match):
                adapt(net, targets, r=rank)
            assert salora_layers(net) == layers and [p.requires_grad for p in net.parameters()] == trained


def test_torchs_fast_path_around_an_adapter_is_refused_and_without_it_the_adapter_acts_in_eval_mode():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 8)
    frozen = net(x)
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        adapt(net, ["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert torch.allclose(adapt(net, ["linear1"])(x), frozen, atol=1e-6)
        assert (randomize(net)(x) - frozen).abs().max() > 0.01
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# State dicts


@pytest.mark.equation("prune", "gate")
@pytest.mark.parametrize("state", ["held", "free", "fixed"])
def test_a_state_dict_in_any_state_loads_into_a_fresh_model(state):
    net, x = adapt(Net(seed=1), ["shared"], r=4), torch.randn(3, 6)
    layer = net.shared
    nn.init.normal_(layer.B)
    if state != "held":
        layer.gate.release()
    if state == "fixed":
        layer.gate.fix(torch.tensor([1.0, 0.0, 0.3, 1.0]))
    prune(layer)
    fresh = adapt(Net(seed=1), ["shared"], r=4)
    fresh.load_state_dict(net.state_dict())
    assert fresh.shared.gate.state == state and fresh.shared.r == layer.r == (3 if state == "fixed" else 4)
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if ".base." in k}, strict=False)  # no triplets
    assert torch.equal(fresh.eval()(x), net.eval()(x))
