"""Adapter files: what is saved comes back exactly, and what is damaged or does not fit is refused as a whole."""

from functools import partial

import pytest
import torch
from strategies import Net, assert_close, make_layer, randomize, row, unchanged
from torch import nn

from budget import freeze_gates
from hub.adapters import adapter_state, load_adapter, load_adapter_state, save_adapter
from salora import adapt, merge, prune, salora_layers

pytestmark = pytest.mark.equation("adapter file")
TARGETS = ["shared", r"body\.\d"]


def trained(model):
    """Names of what requires a gradient, without log_theta, which waits for its release in a loaded model."""
    return {n for n, p in model.named_parameters() if p.requires_grad and not n.endswith("log_theta")}


def net_at(stage):
    """A small net with a trained head, its adapters at a stage of training."""
    net = randomize(adapt(Net(seed=1), TARGETS, r=3))
    net.head.requires_grad_(True)
    net.head.weight.data.add_(1)
    layers = salora_layers(net).values()
    if stage in ("fixed", "pruned", "closed"):
        freeze_gates(layers, 0.4 if stage != "closed" else 1e-9, survivors="median" if stage == "fixed" else "one")
    for layer in layers:
        if stage == "held":
            layer.gate.hold_open()
        if stage in ("pruned", "closed"):
            prune(layer)
    return net


@pytest.mark.parametrize("stage", ["held", "free", "fixed", "pruned", "closed"])
def test_saved_adapters_come_back_exactly(tmp_path, stage):
    net, x = net_at(stage), torch.randn(5, 6)
    save_adapter(net, tmp_path / "adapter.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter.pt"], "no temporary file stays behind"
    for target in (Net(seed=1), net_at("free"), adapt(Net(seed=1), [".*"], r=2)):  # what was there before goes
        loaded = load_adapter(target, tmp_path / "adapter.pt")
        assert trained(loaded) == trained(net)
        for one, other in zip(salora_layers(loaded).items(), salora_layers(net).items(), strict=True):
            assert one[0] == other[0] and one[1].gate.state == other[1].gate.state and one[1].r0 == other[1].r0
        for training in (True, False):
            assert torch.equal(loaded.train(training)(x), net.train(training)(x))


@pytest.mark.parametrize("dtype,coarser", [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)])
def test_an_adapter_takes_the_dtype_of_the_model_that_it_is_loaded_into(dtype, coarser):
    net, x = net_at("free").eval(), torch.randn(2, 6)
    y = load_adapter_state(Net(seed=1).to(dtype).eval(), adapter_state(net))(x.to(dtype)).detach()
    assert y.dtype == dtype
    assert_close(y.to(coarser), net(x).to(coarser).detach(), inner=32)


def test_a_bias_that_trains_inside_an_adapted_layer_and_running_statistics_are_saved():
    def new():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))

    net, x = adapt(new(), ["0"]), torch.randn(9, 6)
    net[0].base.bias.requires_grad_(True).data.add_(1)
    net.train()(3 * x + 1)
    other = load_adapter_state(new(), adapter_state(net))
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert other[0].base.bias.requires_grad and not other[0].base.weight.requires_grad


def plain(value):
    """A state with lists in the place of its tensors, so that == compares all of it."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("stage", ["held", "free", "fixed"])
def test_a_snapshot_shares_no_memory_with_the_model_nor_two_models_with_each_other(stage):
    net = net_at(stage)
    state = adapter_state(net)
    whole = plain(state)
    twins = [load_adapter_state(Net(seed=1), state) for _ in range(2)]
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers(), *twins[0].parameters(), *twins[0].buffers()):
            tensor.add_(1)
    assert plain(state) == whole and plain(adapter_state(twins[1])) == whole


@pytest.mark.parametrize("training", [True, False])
def test_loaded_layers_are_in_the_mode_of_the_model(training):
    loaded = load_adapter_state(Net(seed=1).train(training), adapter_state(net_at("free")))
    assert {module.training for module in loaded.modules()} == {training}


def in_parts(net):
    """Compile two layers, one of which has an adapter or is to get one."""
    net.body[0], net.head = torch.compile(net.body[0], backend="eager"), torch.compile(net.head, backend="eager")
    return net


def in_ddp(net):
    """As DistributedDataParallel wraps it, which needs other processes."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = net
    return wrapped


WRAPPED = {
    "compiled": partial(torch.compile, backend="eager"),
    "parts compiled": in_parts,
    "several processes": in_ddp,
    "both": lambda net: torch.compile(in_ddp(net), backend="eager"),
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_names_are_those_of_the_model_before_it_was_compiled_or_distributed(tmp_path, wrap):
    net, x = net_at("fixed").eval(), torch.randn(3, 6)
    expected = plain(adapter_state(net))
    save_adapter(wrap(net), tmp_path / "adapter.pt")
    assert plain(adapter_state(load_adapter(Net(seed=1), tmp_path / "adapter.pt"))) == expected
    target = Net(seed=1).eval()
    wrapped = wrap(target)
    loaded = load_adapter(wrapped, tmp_path / "adapter.pt")
    assert loaded is wrapped and plain(adapter_state(loaded)) == expected
    assert torch.equal(target(x), net(x)), "what was compiled before is not called any more"


@pytest.mark.parametrize("wrap", [nn.Identity(), WRAPPED["compiled"], WRAPPED["both"]])
def test_a_model_that_is_one_layer_is_replaced(wrap):
    layer, x = make_layer(4, 3, 2, seed=0, dtype=torch.float32).eval(), torch.randn(2, 3)
    linear = nn.Linear(3, 4).eval()
    linear.load_state_dict(layer.base.state_dict())
    loaded = load_adapter_state(wrap(linear), adapter_state(layer))
    assert torch.equal(loaded(x), layer(x)) and plain(adapter_state(loaded)) == plain(adapter_state(layer))


# What is refused


class Bomb:
    """A pickle that runs code where it is loaded."""

    def __reduce__(self):
        return (eval, ("1 / 0",))


def test_a_file_that_is_absent_damaged_or_would_run_code_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_adapter(Net(), tmp_path / "b.pt")
    for write in (
        lambda path: torch.save({"format": "salora-1", "layers": Bomb()}, path),
        lambda path: path.write_bytes(b"PK\x03\x04 and then nothing"),
    ):
        write(tmp_path / "a.pt")
        with pytest.raises(ValueError, match="a.pt is damaged or not an adapter"):
            load_adapter(Net(), tmp_path / "a.pt")


def odd_tensors():
    """Tensors that look like a whole (4, 6) of floats, and are none."""
    whole = torch.ones(4, 6)
    yield from (torch.full((4, 6), torch.nan), whole.int(), whole.to_sparse(), whole.to("meta"), whole[0], whole[:, :5])
    yield torch.zeros(1).expand(10**6, 10**6)
    if hasattr(torch, "quantize_per_tensor"):  # which later releases of torch may lack
        yield torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_state_that_is_damaged_is_refused_and_leaves_the_model_alone():
    net = adapt(Net(), ["shared"], r=4)
    whole, parts = adapter_state(net), [("A", value) for value in (None, [1.0], *odd_tensors())]
    parts += [("B", torch.ones(4, 6)), ("log_theta", torch.ones(6)), ("fixed", torch.ones(4, 6))]
    parts += [("held", torch.ones(3)), ("r0", 10.0), ("r0", 0), ("r0", True)]
    parts += [("alpha", "16"), ("alpha", torch.nan), ("alpha", None)]
    states = [whole | {"layers": {"shared": whole["layers"]["shared"] | {part: value}}} for part, value in parts]
    states += [None, [], {"some": "thing"}, {"format": "salora-1"}, whole | {"others": 3}]
    states += [whole | {"layers": {"shared": 3}}, whole | {"others": {"head.bias": "x"}}]
    for state in states:
        with row(state), unchanged(net), pytest.raises(ValueError, match="adapter.*(damaged|: no 'format')"):
            load_adapter_state(net, state)


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    """As after merge. A head that trains alone is worth a file."""
    net = adapt(Net(), ["shared"])
    merge(net)
    with pytest.raises(ValueError, match="has no adapter, and nothing in it trains: save before merge"):
        save_adapter(net, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    net.head.requires_grad_(True)
    save_adapter(net, tmp_path / "a.pt")


def test_an_adapter_that_does_not_fit_is_refused_by_name():
    net = adapt(Net(), ["shared"])
    net.head.requires_grad_(True)
    for name, linears, match in (
        ("shared", [(6, 7), (6, 5), (7, 6), (5, 6)], "layer shared of the adapter .* not made for a matrix of shape"),
        ("shared", [None], "has a layer shared, but the model has no"),
        ("head", [(6, 1), (6, 3)], "head.weight of shape"),
    ):
        for shape in linears:
            other = Net()
            setattr(other, name, nn.Linear(*shape) if shape else nn.Tanh())
            with row(name, shape), unchanged(other), pytest.raises(ValueError, match=match):
                load_adapter_state(other, adapter_state(net))
