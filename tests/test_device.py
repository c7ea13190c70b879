"""Device discipline without a device: training steps under fake tensors on the meta device, where a tensor made on the
wrong device, or a value read back in the middle of a step, is an error. With CUDA: the same numbers as on the CPU."""

import pytest
import torch
from strategies import generator, make_layer
from torch._subclasses.fake_tensor import FakeTensorMode

from budget import Lagrangian, expected_density, resample
from cli.journal import Journal
from glue.mini import examples
from glue.tokens import MiniTokenizer
from peers import TARGETS
from rank_allocator import RankAllocator, Recipe
from salora import adapt, canonicalize, orthogonality, prune
from tiny_transformer import SequenceClassifier, TinyTransformer, TransformerConfig
from train_glue_mini import fine_tune

SMALL = dict(vocab_size=130, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)


class Done(Exception):
    pass


@pytest.mark.parametrize("controller", ["projection", "quadratic"])
def test_steps_stay_on_their_device_and_read_nothing_back(monkeypatch, controller):
    """`fine_tune` itself runs three steps on fake tensors: one before the window, two in it."""
    phases = []

    def add(self, step, loss, optimizer, allocator, batch_size):
        """Note the phase instead of reading values back, and end the run before gates are decided."""
        phases.append(allocator.schedule.phase(step))
        if len(phases) == 3:
            raise Done

    monkeypatch.setattr(Journal, "add", add)
    rows = MiniTokenizer().encode(examples("mini-mnli", 40))
    model = SequenceClassifier(TinyTransformer(TransformerConfig(**SMALL, type_vocab_size=2)), 3)
    adapt(model, TARGETS).classifier.requires_grad_(True)
    model.to("meta")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    recipe = Recipe((0.3, 1), controller, beta=0.1, canonical=False)
    allocator = RankAllocator(model, optimizer, 3, recipe=recipe)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Done):
        fine_tune(model, rows, optimizer, allocator, lr=1e-3, batch_size=4)
    assert phases == ["before", "window", "window"]


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
