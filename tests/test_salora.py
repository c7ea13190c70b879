"""The gated linear layer and what is done to it, against naive loops in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_close, layers, make_layer, naive_forward, normal, seeds, sizes
from torch import nn
from torch.nn.utils.prune import random_unstructured

import salora
from budget import freeze_gates
from hard_concrete import sample_gate
from salora import SaLoRALinear, adapt, canonicalize, merge, orthogonality, prune, salora_layers


class Net(nn.Module):
    """A model that is not ours: one linear layer used under two names, one inside a list, and others."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6, bias=False)])
        self.shared = nn.Linear(6, 6)
        self.alias = nn.Sequential(self.shared, nn.Tanh())
        self.conv = nn.Conv1d(1, 1, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.body[1](torch.tanh(self.body[0](x)))
        return self.head(self.alias(self.shared(x)))


def opened(layer, value):
    layer.gate.fix(torch.full((layer.r,), value, dtype=layer.A.dtype))
    return layer


def randomize(model, seed=0):
    """Give every adapter of a model a B and gates at random: nothing keeps its initial value."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in salora_layers(model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=g))
            layer.gate.release()
            layer.gate.log_theta.copy_(2 * torch.randn(layer.r, generator=g))
    return model


# Exact identities


@pytest.mark.equation("5")
@given(layers())
def test_closed_gates_leave_exactly_the_frozen_layer(layer):
    x = normal(3, layer.A.shape[1], seed=1)
    assert torch.equal(opened(layer, 0.0)(x), layer.base(x)), "g = 0: h = W x"


@pytest.mark.equation("3", "5")
@given(layers())
def test_open_gates_are_plain_lora(layer):
    x = normal(3, layer.A.shape[1], seed=1)
    scale = layer.alpha / layer.r0
    lora = layer.base(x) + scale * (x @ layer.A.T) @ layer.B.T
    assert_close(opened(layer, 1.0)(x), lora, layer.A.shape[1] + layer.r)  # g = 1: h = W x + alpha / r B A x


@pytest.mark.equation("3")
def test_a_fresh_layer_changes_nothing_and_a_is_drawn_so_that_aat_is_the_identity_on_average():
    base = nn.Linear(4096, 16)
    layer = SaLoRALinear(base, 8, 16)
    x = torch.randn(2, 4096)
    assert torch.equal(layer(x), base(x)), "B = 0 at the start"
    assert (layer.A @ layer.A.T - torch.eye(8)).abs().max() < 0.1, "A ~ N(0, 1/k)"
    assert abs(float(layer.A.detach().std()) * 64 - 1) < 0.02


# The layer itself


@pytest.mark.equation("5")
@given(layers(), seeds)
def test_forward_is_eq_5_by_naive_loops(layer, seed):
    x = normal(2, layer.A.shape[1], seed=seed)
    gates = sample_gate(layer.gate.log_theta, layer.gate.u).tolist()
    assert_close(layer(x), naive_forward(layer, x, gates), layer.A.shape[1] + layer.r)


@pytest.mark.equation("5", "median")
@given(layers(), seeds)
def test_eval_mode_uses_median_gates_and_ignores_the_noise(layer, seed):
    x = normal(2, layer.A.shape[1], seed=seed)
    layer.eval()
    expected = naive_forward(layer, x, sample_gate(layer.gate.log_theta, torch.full_like(layer.gate.u, 0.5)).tolist())
    assert_close(layer(x), expected, layer.A.shape[1] + layer.r)
    before = layer(x)
    layer.gate.u.fill_(0.123)
    assert torch.equal(layer(x), before)


@pytest.mark.equation("5")
@given(layers(), st.integers(1, 3), st.integers(1, 3))
def test_leading_axes_are_free(layer, n, m):
    x = normal(n, m, layer.A.shape[1], seed=3)
    flat = layer(x.reshape(n * m, -1))
    assert_close(layer(x), flat.reshape(n, m, -1), layer.A.shape[1])


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


@pytest.mark.equation("3")
def test_only_triplets_and_gates_have_gradients_and_the_frozen_weight_stays_bitwise():
    layer = make_layer(5, 4, 3, seed=1)
    layer.gate.u.fill_(0.5)
    layer.gate.log_theta.data.zero_()
    before = copy.deepcopy(layer.base.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(normal(2, 4, seed=2)).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in layer.base.parameters())
    assert all(p.grad is not None and p.grad.any() for p in (layer.A, layer.B, layer.gate.log_theta))
    assert all(torch.equal(before[name], value) for name, value in layer.base.state_dict().items())


# Eq. (9)


@pytest.mark.equation("9")
@given(st.lists(layers(), min_size=1, max_size=3))
def test_orthogonality_is_eq_9_by_naive_loops(bank):
    total = 0.0
    for layer in bank:
        A, B = layer.A.tolist(), layer.B.T.tolist()
        for rows in (A, B):  # rows of A, columns of B: their Gram matrices against the identity
            for i, p in enumerate(rows):
                for j, q in enumerate(rows):
                    total += (sum(a * b for a, b in zip(p, q)) - (i == j)) ** 2
    assert_close(orthogonality(iter(bank)), torch.tensor(total, dtype=torch.float64), 200)


@pytest.mark.equation("9")
def test_orthogonality_is_zero_for_orthonormal_factors_and_its_gradient_is_zero_at_b_0():
    layer = make_layer(6, 5, 3, seed=0)
    layer.B.data, layer.A.data = torch.eye(6, dtype=torch.float64)[:, :3], torch.eye(5, dtype=torch.float64)[2:]
    assert float(orthogonality([layer]).detach()) == pytest.approx(0)
    layer.B.data.zero_()
    orthogonality([layer]).backward()
    assert not layer.B.grad.any() and float(orthogonality([layer]).detach()) == pytest.approx(3), "||0 - I||^2 = r"


# Canonical triplets


@pytest.mark.equation("canonical")
@given(sizes, sizes, st.integers(1, 8), seeds)
def test_canonical_triplets_keep_the_product_and_are_a_singular_basis(d, k, r, seed):
    layer = make_layer(d, k, r, seed)
    product = layer.B @ layer.A
    canonicalize(layer)
    assert_close(layer.B @ layer.A, product, 64)
    singular = torch.linalg.svdvals(product)
    expected = torch.zeros(r, dtype=torch.float64)
    n = min(r, d, k)
    expected[:n] = singular[:n]
    for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T):
        assert_close(gram, torch.diag(expected), 256)  # orthogonal, sorted, and S shared evenly between A and B


@pytest.mark.equation("canonical")
def test_canonical_triplets_in_half_precision():
    layer = make_layer(6, 5, 3, seed=2, dtype=torch.bfloat16)
    product = layer.B.float() @ layer.A.float()
    canonicalize(layer)
    assert layer.A.dtype == layer.B.dtype == torch.bfloat16
    assert_close((layer.B @ layer.A).detach(), product.bfloat16().detach(), inner=3)


@pytest.mark.equation("canonical")
def test_canonical_triplets_of_an_untrained_layer_are_left_alone():
    layer = SaLoRALinear(nn.Linear(5, 4), 3, 16)
    before = layer.A.clone()
    canonicalize(layer)
    assert torch.equal(layer.A, before) and not layer.B.any(), "A must not be lost while B = 0"


# Pruning and merging


@pytest.mark.equation("prune")
@given(layers(), seeds)
def test_pruned_layer_equals_the_masked_one(layer, seed):
    x = normal(2, layer.A.shape[1], seed=seed)
    layer.eval()
    masked, settled = layer(x), layer.gate.settled()
    scale, kept = layer.scale, prune(layer)
    assert torch.equal(kept, settled.nonzero().flatten()) and layer.r == len(kept)
    assert layer.scale == scale, "survivors keep alpha / r0"
    assert_close(layer(x), masked, layer.A.shape[1] + 8)
    assert len(prune(layer)) == layer.r == len(kept), "pruning twice is pruning once"


@pytest.mark.equation("prune", "merge")
@given(layers(), st.floats(0.05, 1), st.sampled_from(["budget", "median"]), st.sampled_from(["one", "median"]))
def test_freeze_prune_merge_all_give_the_frozen_models_outputs(layer, density, rule, survivors):
    x = normal(2, layer.A.shape[1], seed=4)
    freeze_gates([layer], density, rule, survivors)
    expected = layer(x)
    prune(layer)
    assert_close(layer(x), expected, layer.A.shape[1] + 8)
    merged = merge(layer)
    assert type(merged) is nn.Linear
    assert_close(merged(x), expected, layer.A.shape[1] + 8)


@pytest.mark.equation("prune")
def test_triplets_can_be_removed_in_any_order():
    x = normal(3, 4, seed=9)
    once, bit_by_bit = make_layer(5, 4, 6, seed=3), make_layer(5, 4, 6, seed=3)
    mask = torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=torch.float64)
    once.gate.fix(mask)
    prune(once)
    for closed in (4, 1, 1):  # positions in the layer as it then is: triplets 4, 1, 2
        bit_by_bit.gate.fix(torch.ones(bit_by_bit.r, dtype=torch.float64))
        bit_by_bit.gate.fixed[closed] = 0
        prune(bit_by_bit)
    assert torch.equal(once(x), bit_by_bit(x)) and once.r == bit_by_bit.r == 3


@pytest.mark.equation("prune")
def test_a_layer_with_every_triplet_closed_is_the_frozen_layer():
    layer = opened(make_layer(5, 4, 3, seed=2), 0.0)
    prune(layer)
    x = normal(2, 4, seed=1)
    assert layer.r == 0 and torch.equal(layer(x), layer.base(x)) and not layer.delta().any()
    assert float(orthogonality([layer]).detach()) == 0


@pytest.mark.equation("merge")
def test_merged_model_equals_the_adapted_one_and_merging_twice_changes_nothing():
    net = randomize(adapt(Net().double(), [r"body\.\d", "shared"], r=2).double()).eval()
    x = normal(4, 6, seed=1)
    expected = net(x)
    merged = merge(net)
    assert merged is net and not salora_layers(merged)
    assert all(type(m) is not SaLoRALinear for m in merged.modules())
    assert_close(merged(x), expected, 64)
    again = merged(x)
    assert torch.equal(merge(merged)(x), again)


@pytest.mark.equation("merge")
def test_merging_leaves_what_shares_a_weight_as_it_was():
    net = nn.ModuleDict({"words": nn.Embedding(7, 4), "scores": nn.Linear(4, 7, bias=False)})
    net["scores"].weight = net["words"].weight  # tied, as in language models
    randomize(adapt(net, ["scores"], r=2)).eval()
    x, words = torch.randn(3, 4), net["words"].weight.clone()
    expected = net["scores"](x)
    assert_close(merge(net)["scores"](x), expected, inner=4)
    assert torch.equal(net["words"].weight, words)


@pytest.mark.equation("merge")
def test_nothing_merges_when_the_mode_changes():
    layer = make_layer(4, 4, 2, seed=1)
    before = layer.base.weight.clone()
    layer.eval(), layer.train(), layer.eval()
    assert torch.equal(layer.base.weight, before)


# Adapting models


@pytest.mark.equation("3")
def test_adapt_replaces_by_suffix_and_by_pattern_and_freezes_the_rest():
    net = adapt(Net(), ["shared", r"body\.1"], r=2, alpha=4)
    assert list(salora_layers(net)) == ["body.1", "shared"]
    assert net.alias[0] is net.shared, "a module with two parents stays one module"
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {f"{m}.{p}" for m in ("body.1", "shared") for p in ("A", "B")}, "log_theta waits for release()"
    assert net.shared.r == 2 and net.shared.scale == 2
    assert "r=2, r0=2, alpha=4" in str(net.shared), "a printed model shows its ranks"


@pytest.mark.equation("3")
def test_adapt_takes_rank_8_and_alpha_16_unless_told():
    net = adapt(Net(), "shared")
    assert (net.shared.r, net.shared.scale) == (8, 2)


@pytest.mark.equation("3")
def test_a_target_is_a_whole_name_or_a_suffix_after_a_dot():
    net = adapt(Net(), "body.0")
    assert list(salora_layers(net)) == ["body.0"]
    with pytest.raises(ValueError, match="'hared' matches no module"):
        adapt(Net(), ["hared"])


@pytest.mark.equation("3")
def test_adapt_refuses_targets_without_a_linear_layer_and_lists_candidates():
    with pytest.raises(ValueError, match="'quary' matches no module; nn.Linear layers here: 0, 1, head, shared$"):
        adapt(Net(), ["quary"])
    with pytest.raises(ValueError, match="'conv' matches only Conv1d"):
        adapt(Net(), ["conv"])
    net = Net()
    with pytest.raises(ValueError, match="matches no module"):
        adapt(net, ["shared", "nothing"])
    assert not salora_layers(net) and all(p.requires_grad for p in net.parameters()), "nothing is left half done"


@pytest.mark.equation("3")
def test_adapt_refuses_linear_layers_whose_parent_bypasses_them():
    attention = nn.MultiheadAttention(8, 2)  # it reads out_proj.weight itself and would ignore an adapter
    with pytest.raises(ValueError, match="only nn.Linear can be adapted"):
        adapt(attention, ["out_proj"])


@pytest.mark.equation("3")
def test_adapting_twice_is_refused_rather_than_nested():
    net = adapt(Net(), ["shared"])
    with pytest.raises(ValueError, match="'shared' matches only SaLoRALinear"):
        adapt(net, ["shared"])
    assert list(salora_layers(adapt(net, [".*"]))) == ["body.0", "body.1", "shared", "head"]


@pytest.mark.equation("3")
@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be a whole number above 0, got {rank}"):
        adapt(Net(), ["shared"], r=rank)


@pytest.mark.equation("3")
def test_equal_seeds_give_equal_starts():
    first, second = (adapt(_seeded_net(), ["shared"]) for _ in range(2))
    assert torch.equal(first.shared.A, second.shared.A)


def _seeded_net():
    torch.manual_seed(1)
    return Net()


# Adapter files


def trained(model):
    """Names of what requires a gradient, without log_theta, which waits for its release in a loaded model."""
    return {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("log_theta")}


@pytest.mark.equation("adapter file")
@pytest.mark.parametrize("stage", ["fresh", "window", "frozen", "pruned", "closed"])
@pytest.mark.parametrize("training", [True, False])
def test_saved_adapters_come_back_exactly(tmp_path, stage, training):
    net = randomize(adapt(_seeded_net(), ["shared", r"body\.\d"], r=3))
    net.head.requires_grad_(True)
    net.head.weight.data.add_(1)
    bank = list(salora_layers(net).values())
    if stage in ("frozen", "pruned", "closed"):
        freeze_gates(bank, 0.4 if stage != "closed" else 1e-9, survivors="median" if stage == "frozen" else "one")
    if stage in ("pruned", "closed"):
        for layer in bank:
            prune(layer)
    net.train(training)
    salora.save_adapter(net, tmp_path / "adapter.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pt"], "no temporary file stays behind"

    x = torch.randn(5, 6)
    for target in (_seeded_net(), adapt(_seeded_net(), ["shared", r"body\.\d"], r=3)):
        loaded = salora.load_adapter(target.train(training), tmp_path / "adapter.pt")
        assert torch.equal(loaded(x), net(x))
        assert trained(loaded) == trained(net)


@pytest.mark.equation("adapter file")
def test_an_adapter_whose_ranks_are_not_decided_is_not_saved_as_finished(tmp_path):
    net = adapt(Net(), ["shared"])
    net.shared.allocating = True
    with pytest.raises(ValueError, match="the ranks of shared are not decided yet: call the allocator's finish"):
        salora.save_adapter(net, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == [] and "shared" in salora.adapter_state(net)["layers"], "a snapshot is allowed"


@pytest.mark.equation("adapter file")
def test_loading_an_adapter_removes_the_one_that_was_there(tmp_path):
    net = randomize(adapt(_seeded_net(), ["shared"], r=2)).eval()
    salora.save_adapter(net, tmp_path / "a.pt")
    other = salora.load_adapter(randomize(adapt(_seeded_net(), [".*"], r=3), seed=5).eval(), tmp_path / "a.pt")
    x = torch.randn(2, 6)
    assert list(salora_layers(other)) == ["shared"] and torch.equal(other(x), net(x))


@pytest.mark.equation("adapter file")
@pytest.mark.parametrize("dtype,coarser", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)])
def test_an_adapter_takes_the_dtype_of_the_model_that_it_is_loaded_into(tmp_path, dtype, coarser):
    net = randomize(adapt(_seeded_net(), ["shared"], r=2)).eval()
    salora.save_adapter(net, tmp_path / "a.pt")
    other = salora.load_adapter(_seeded_net().to(dtype).eval(), tmp_path / "a.pt")
    x = torch.randn(2, 6)
    y = other(x.to(dtype)).detach()
    assert y.dtype == dtype
    assert_close(y.to(coarser), net(x).to(coarser).detach(), inner=16)


class Bomb:
    def __reduce__(self):
        return (eval, ("1 / 0",))


@pytest.mark.equation("adapter file")
def test_an_adapter_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"format": "salora-1", "layers": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is damaged or not an adapter"):
        salora.load_adapter(Net(), tmp_path / "a.pt")


@pytest.mark.equation("adapter file")
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_leaves_the_model_alone(tmp_path):
    net = adapt(_seeded_net(), ["shared"])
    salora.save_adapter(net, tmp_path / "a.pt")
    for k, d in ((6, 7), (6, 5), (7, 6), (5, 6)):
        other = Net()
        other.shared = nn.Linear(k, d)
        with pytest.raises(ValueError, match="shared of shape"):
            salora.load_adapter(other, tmp_path / "a.pt")
        assert type(other.shared) is nn.Linear and other.shared.weight.requires_grad
    net.head.requires_grad_(True)
    salora.save_adapter(net, tmp_path / "b.pt")
    for d in (1, 3):
        other = Net()
        other.head = nn.Linear(6, d)
        with pytest.raises(ValueError, match="head.weight of shape"):
            salora.load_adapter(other, tmp_path / "b.pt")
        assert type(other.shared) is nn.Linear
    torch.save({"some": "thing"}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a SaLoRA adapter"):
        salora.load_adapter(Net(), tmp_path / "c.pt")


NOT_FINITE, WHOLE = torch.full((4, 6), torch.nan), torch.ones(4, 6)


@pytest.mark.equation("adapter file")
@pytest.mark.parametrize("part, value", [
    ("A", None), ("A", [1.0]), ("A", NOT_FINITE), ("A", WHOLE.int()), ("A", WHOLE.to_sparse()), ("A", WHOLE.to("meta")),
    ("A", WHOLE[0]), ("A", torch.zeros(1).expand(10**6, 10**6)), ("B", WHOLE),
    ("log_theta", WHOLE[0]), ("fixed", WHOLE), ("r0", 10.0), ("r0", 0), ("r0", True),
    ("alpha", "16"), ("alpha", torch.nan), ("alpha", None),
])  # fmt: skip
def test_an_adapter_of_damaged_content_is_refused_and_leaves_the_model_alone(part, value):
    net = adapt(_seeded_net(), ["shared"], r=4)
    before = {name: (p.clone(), p.requires_grad) for name, p in net.named_parameters()}
    state = salora.adapter_state(net)
    state["layers"]["shared"][part] = value
    with pytest.raises(ValueError, match="layer shared of the adapter is damaged"):
        salora.load_adapter_state(net, state)
    after = {name: (p, p.requires_grad) for name, p in net.named_parameters()}
    assert list(before) == list(after)
    assert all(torch.equal(p, after[name][0]) and trains == after[name][1] for name, (p, trains) in before.items())


@pytest.mark.equation("adapter file")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # which later releases of torch may lack
@pytest.mark.skipif(not hasattr(torch, "quantize_per_tensor"), reason="this torch has no quantized tensors")
def test_an_adapter_of_quantized_numbers_is_refused():
    test_an_adapter_of_damaged_content_is_refused_and_leaves_the_model_alone(
        "A", torch.quantize_per_tensor(WHOLE, 0.1, 0, torch.qint8)
    )


@pytest.mark.equation("adapter file")
@pytest.mark.parametrize("state", [None, [], {"format": "salora-1"}, {"format": "salora-1", "layers": {}, "others": 3},
                                   {"format": "salora-1", "layers": {"shared": 3}, "others": {}},
                                   {"format": "salora-1", "layers": {}, "others": {"head.bias": "x"}}])  # fmt: skip
def test_what_is_not_an_adapter_is_refused(state):
    with pytest.raises(ValueError, match="adapter"):
        salora.load_adapter_state(Net(), state)


@pytest.mark.equation("adapter file")
def test_a_file_of_damaged_bytes_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match="a.pt is damaged"):
        salora.load_adapter(Net(), tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        salora.load_adapter(Net(), tmp_path / "b.pt")


@pytest.mark.equation("adapter file")
def test_a_bias_that_trains_inside_an_adapted_layer_is_saved_and_comes_back_trainable():
    net = adapt(_seeded_net(), ["shared"])
    net.shared.base.bias.requires_grad_(True).data.add_(1)
    other = salora.load_adapter_state(_seeded_net(), salora.adapter_state(net))
    assert torch.equal(other.shared.base.bias, net.shared.base.bias) and other.shared.base.bias.requires_grad
    assert not other.shared.base.weight.requires_grad


@pytest.mark.equation("adapter file")
def test_running_statistics_that_move_in_a_frozen_model_are_saved():
    def new():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))

    net, x = adapt(new(), ["0"]), torch.randn(9, 6)
    net.train()(3 * x + 1)
    other = salora.load_adapter_state(new(), salora.adapter_state(net))
    assert torch.equal(other.eval()(x), net.eval()(x))


@pytest.mark.equation("adapter file")
def test_a_snapshot_shares_no_memory_with_the_model_nor_two_models_with_each_other():
    net = adapt(_seeded_net(), ["shared"])
    net.head.requires_grad_(True)
    state = salora.adapter_state(net)
    twins = [salora.load_adapter_state(_seeded_net(), state) for _ in range(2)]
    kept = state["layers"]["shared"]["A"].clone(), state["others"]["head.weight"].clone()
    with torch.no_grad():
        for p in (*net.parameters(), *twins[0].parameters()):
            p.add_(1)
    for A, weight in ((state["layers"]["shared"]["A"], state["others"]["head.weight"]),
                      (twins[1].shared.A, twins[1].head.weight)):  # fmt: skip
        assert torch.equal(A, kept[0]) and torch.equal(weight, kept[1])


@pytest.mark.equation("adapter file")
def test_a_state_dict_of_the_frozen_model_leaves_the_triplets_alone():
    net = adapt(_seeded_net(), ["shared"])
    A = net.shared.A.detach().clone()
    frozen = {name: value for name, value in net.state_dict().items() if ".base." in name}
    net.load_state_dict(frozen, strict=False)
    assert torch.equal(net.shared.A, A)


@pytest.mark.equation("adapter file")
@pytest.mark.parametrize("fixed", [False, True])
def test_a_state_dict_of_pruned_and_fixed_layers_loads_into_fresh_ones(fixed):
    net = adapt(_seeded_net(), ["shared"], r=4)
    layer, x = net.shared, torch.randn(3, net.shared.A.shape[1])
    nn.init.normal_(layer.B)
    layer.gate.fix(torch.tensor([1.0, 0.0, 0.3, 1.0])) if fixed else layer.gate.release()
    prune(layer)
    fresh = adapt(_seeded_net(), ["shared"], r=4)
    fresh.load_state_dict(net.state_dict())
    assert fresh.shared.r == layer.r == (3 if fixed else 4)
    assert torch.equal(fresh.eval().shared(x), net.eval().shared(x))


@pytest.mark.equation("3")
def test_layers_whose_weight_is_computed_by_hooks_are_refused():
    net = Net()
    random_unstructured(net.shared, "weight", amount=0.5)
    with pytest.raises(ValueError, match="computed by hooks"):
        adapt(net, ["shared"])


@pytest.mark.equation("3")
@pytest.mark.parametrize("rank", [2.5, True, "8"])
def test_a_rank_that_is_not_a_whole_number_is_refused(rank):
    with pytest.raises(ValueError, match="rank must be a whole number above 0"):
        adapt(Net(), ["shared"], r=rank)


@pytest.mark.equation("3")
def test_torchs_fast_path_around_an_adapter_is_refused_and_without_it_the_adapter_acts_in_eval_mode():
    def new():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()

    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        adapt(new(), ["linear1"])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        net, frozen, x = adapt(new(), ["linear1"]), new(), torch.randn(2, 3, 8)
        assert torch.allclose(net(x), frozen(x), atol=1e-6)
        for layer in salora_layers(net).values():
            nn.init.normal_(layer.B)
        assert (net(x) - frozen(x)).abs().max() > 0.01
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.equation("3")
def test_adapt_takes_no_name_of_a_container_as_a_pattern_for_what_it_holds():
    with pytest.raises(ValueError, match="'body' matches only ModuleList"):
        adapt(Net(), ["body"])


@pytest.mark.equation("3")
def test_a_layer_with_two_names_is_adapted_under_both():
    net = Net()
    net.second = net.shared  # twice in one parent
    adapt(net, ["alias.0"])
    assert net.second is net.shared is net.alias[0] and list(salora_layers(net)) == ["shared"]
    merged = net.shared.base
    assert merge(net).second is net.shared is net.alias[0] is merged


@pytest.mark.equation("prune")
def test_triplets_that_stay_keep_their_gates_in_train_mode():
    layer = make_layer(5, 4, 6, seed=3)
    layer.gate.log_theta.data = torch.tensor([-9.0, 0.1, 0.2, -9, 0.3, -9], dtype=torch.float64)
    before = layer.gate().detach()
    kept = prune(layer)
    assert kept.tolist() == [1, 2, 4] and torch.equal(layer.gate(), before[kept])
