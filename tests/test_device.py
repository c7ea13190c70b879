"""Device discipline without a device: training steps under fake tensors on the meta device, where a tensor made on the
wrong device, or a value read back in the middle of a step, is an error. With CUDA: the same numbers as on the CPU."""

import pytest
import torch
from strategies import generator, make_layer
from torch._subclasses.fake_tensor import FakeTensorMode

import train_glue_mini
from budget import CONTROLLERS, Lagrangian, RankAllocator, Recipe, expected_density, resample, total_parameters
from cli.journal import Journal
from cli.setup import TARGETS
from glue.mini import examples
from glue.tokens import MiniTokenizer
from salora import adapt, canonicalize, merge, orthogonality, prune, salora_layers
from tiny_transformer import SequenceClassifier, TinyTransformer, TransformerConfig
from train_glue_mini import fine_tune

SMALL = dict(vocab_size=130, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


class Done(Exception):
    pass


def stop_at(monkeypatch, phases, last):
    """Reports note the phase instead of reading values back, and end the run at the phase `last`."""

    def add(self, step, loss, optimizer, allocator, batch_size):
        phases.append(allocator.schedule.phase(step))
        if phases[-1] == last and len(phases) > 2:
            raise Done

    monkeypatch.setattr(Journal, "add", add)


def fake_run(model, steps, recipe, rows, batch_size):
    layers = salora_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    allocator = RankAllocator(model, optimizer, steps, recipe=recipe)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Done):
        fine_tune(model, rows, optimizer, allocator, lr=1e-3, batch_size=batch_size)
    return layers


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("window", [(0, 1), (1, 1)], ids=["window", "open"])
def test_steps_stay_on_their_device_and_read_nothing_back(monkeypatch, window, controller):
    """`fine_tune` itself runs three steps on fake tensors."""
    rows = MiniTokenizer().encode(examples("mini-mnli", 40))
    model = SequenceClassifier(TinyTransformer(TransformerConfig(**SMALL, type_vocab_size=2)), 3)
    adapt(model, TARGETS).classifier.requires_grad_(True)
    phases = []
    stop_at(monkeypatch, phases, "window" if window == (0, 1) else "open")
    fake_run(model.to("meta"), 600, Recipe(window, controller, beta=0.1, canonical=False), rows, 4)
    assert len(phases) == 3


@pytest.mark.slow
def test_a_step_of_roberta_large_stays_on_its_device(monkeypatch):
    """The largest published shape, steps with open and with free gates: 3.54 M budgeted parameters."""
    sizes = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    rows = MiniTokenizer().encode(examples("mini-mnli", 40))
    phases = []
    stop_at(monkeypatch, phases, "window")
    with torch.device("meta"):
        model = SequenceClassifier(TinyTransformer(TransformerConfig(**sizes)), 3)
        adapt(model, TARGETS).classifier.requires_grad_(True)
    assert total_parameters(salora_layers(model)) == 3_538_944
    fake_run(model, 3, Recipe((0.3, 1), canonical=False, spread=0, beta=1), rows, 2)
    assert phases == ["open", "window", "window"]


def test_the_fake_device_notices_a_tensor_on_the_wrong_device():
    """The test above can fail: a layer whose gate forgot to move is caught, and so is reading a value back."""
    layer = make_layer(4, 3, 2, seed=0).to("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer.gate.u = torch.rand(2)
        with pytest.raises(Exception, match="device"):
            layer(torch.ones(1, 3, device="meta", dtype=torch.float64))
        layer.gate.u = torch.rand(2, device="meta")
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(layer(torch.ones(1, 3, device="meta", dtype=torch.float64)).sum().detach())


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_cuda_gives_the_cpus_numbers_in_float64():
    torch.backends.cuda.matmul.allow_tf32 = False
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


@needs_cuda
def test_main_job_on_cuda_keeps_the_same_triplets_shape_and_merges(tiny_weights, tmp_path):
    flags = ["--weights", str(tiny_weights), "--rows", "48", "--batch-size", "8", "--steps", "20", "--device", "cuda"]
    summary = train_glue_mini.main([*flags, "--out", str(tmp_path / "run")])
    assert summary["device"] == "cuda" and 0.4 < summary["density_kept"] <= 0.5
    model = adapt(SequenceClassifier(TinyTransformer(TransformerConfig(**SMALL)), 2), TARGETS).cuda().eval()
    ids = torch.randint(5, 100, (2, 6), device="cuda")
    before = model(ids)
    assert torch.allclose(merge(model)(ids), before, atol=1e-5) and not salora_layers(model)
