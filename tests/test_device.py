"""Device discipline without a device: training steps under fake tensors on the meta device, where a tensor made on the
wrong device, or a value read back in the middle of a step, is an error. With CUDA: the same numbers as on the CPU."""

from contextlib import nullcontext

import pytest
import torch
from strategies import generator, make_layer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_glue_mini
from budget import Lagrangian, expected_density, resample
from cli.journal import Journal
from glue.mini import examples
from glue.tokens import MiniTokenizer
from hub.recorded import forward_backward
from peers import METHODS, allocator_for, install
from rank_allocator import Recipe
from salora import canonicalize, orthogonality, prune
from tiny_transformer import SequenceClassifier, TinyTransformer, TransformerConfig
from train_glue_mini import fine_tune

SMALL = dict(vocab_size=130, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


class Done(Exception):
    pass


class OnTheCPU(TorchDispatchMode):
    """Notes the operations with a tensor on the CPU: in a CUDA graph it would be read once, when that is recorded."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.found += [operation for x in tensors if x.device.type == "cpu"]
        return result


def three_steps(monkeypatch, method, total_steps, **options):
    """`fine_tune` itself on fake tensors. Returns the allocator, and what the second and the third step did on the CPU
    in the part that CUDA graphs record; the first may fill caches."""
    steps, on_the_cpu = [], OnTheCPU()

    def add(self, step, loss, optimizer, allocator, batch_size):
        """Read nothing back, and end the run."""
        steps.append(step)
        if len(steps) == 3:
            raise Done

    def watched(loss_of, *inputs):
        with on_the_cpu if steps else nullcontext():
            return forward_backward(loss_of, *inputs)

    monkeypatch.setattr(Journal, "add", add)
    monkeypatch.setattr(train_glue_mini, "forward_backward", watched)
    rows = MiniTokenizer().encode(examples("mini-mnli", 40))
    model = SequenceClassifier(TinyTransformer(TransformerConfig(**SMALL, type_vocab_size=2)), 3)
    install(model, method, 4)
    model.classifier.requires_grad_(True)
    model.to("meta")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = allocator_for(method, model, optimizer, total_steps, **options)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Done):
        fine_tune(model, rows, optimizer, allocator, lr=1e-3, batch_size=4)
    return allocator, on_the_cpu.found


@pytest.mark.parametrize("controller", ["projection", "quadratic"])
def test_steps_stay_on_their_device_and_read_nothing_back(monkeypatch, controller):
    """One step before the window, two in it."""
    recipe = Recipe((0.3, 1), controller, beta=0.1, canonical=False)
    allocator, on_the_cpu = three_steps(monkeypatch, "salora", 3, recipe=recipe)
    assert [allocator.schedule.phase(step) for step in range(3)] == ["before", "window", "window"]
    assert on_the_cpu == []


@pytest.mark.parametrize("method", [name for name in METHODS if name != "salora"])
def test_what_is_recorded_of_a_competing_method_stays_on_its_device(monkeypatch, method):
    options = {"child-tuning": {"losses": lambda: []}, "alora": {"score": lambda: 0.0}}
    assert three_steps(monkeypatch, method, 100, **options.get(method, {}))[1] == []


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_cuda_gives_the_cpus_numbers_in_float64():
    values = []
    for device in ("cpu", "cuda"):
        layer = make_layer(24, 16, 8, seed=3).to(device)
        resample([layer], generator(1))
        x = torch.linspace(-1, 1, 32, dtype=torch.float64, device=device).view(2, 16)
        lagrangian = Lagrangian(0.5, device=device)
        loss = layer(x).square().sum() + orthogonality([layer]) + lagrangian(expected_density([layer]))
        loss.backward()
        values.append([loss.detach().cpu(), layer.A.grad.cpu(), layer.gate.log_theta.grad.cpu()])
        product = layer.B @ layer.A
        canonicalize(layer)
        assert torch.allclose(layer.B @ layer.A, product, atol=1e-10)
        prune(layer)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*values, strict=True))
