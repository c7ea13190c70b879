"""Recorded steps give the numbers of eager ones, to the bit.

Where there is no GPU, a trace stands in for a CUDA graph: torch's own operations, on the memory that they had when they
were recorded. No Python of the model runs when it is replayed, so a recording that is out of date gives wrong numbers.
"""

import gc
import weakref
from functools import partial

import pytest
import torch
from main_job import adapter_of
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import train_glue_mini
from glue.tokens import collate
from hub.recorded import Recorded, cuda_graph, forward_backward
from peers import METHODS
from rank_allocator import RankAllocator, Recipe
from salora import adapt, salora_layers
from train_glue_mini import fine_tune


def traced(work, pool=None):
    """Record work() as a CUDA graph does: nothing of it is done, and no random number is drawn."""
    state = torch.get_rng_state()
    graph = make_fx(work)()
    torch.set_rng_state(state)
    for name, value in list(vars(graph).items()) + list(graph.named_parameters(recurse=False)):
        if isinstance(value, torch.Tensor):
            delattr(graph, name)
            setattr(graph, name, value.detach())  # its memory of today, wherever a Parameter's may be tomorrow
    return graph


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare, self.head = nn.Linear(6, 5), nn.Linear(2, 2), nn.Linear(5, 3)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return self.head(self.dropout(torch.tanh(self.body(x))))


def loss_by(net):
    return lambda share, x, y: share * nn.functional.cross_entropy(net(x), y)


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randint(3, (rows,), generator=generator)


def train(net, add_gradients, steps=8):
    """Batches in two parts, of two shapes in turn. Returns losses, gradients and weights of all steps."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    found = []
    torch.manual_seed(1)
    for step in range(steps):
        for part in range(2):
            found.append(add_gradients(0.5, *batch(4 + step % 2, 2 * step + part)))
        found += [p.grad if p.grad is None else p.grad.clone() for p in net.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return found + [p.detach() for p in net.parameters()]


def same(a, b):
    return all(x is y is None or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def noting(recordings):
    """`traced`, which adds to a list what it is to record."""

    def record(work, pool):
        recordings.append(work)
        return traced(work)

    return record


def recorded(net, record=traced):
    return Recorded(net, loss_by(net), record)


def test_replays_equal_eager_steps_to_the_bit_and_inputs_of_a_shape_are_recorded_once():
    """With dropout, with parameters that no gradient reaches, and with gradients that add up over two parts."""
    plain, net, calls = Net(), Net(), []
    expected = train(plain, partial(forward_backward, loss_by(plain)))
    assert same(train(net, recorded(net, noting(calls))), expected)
    assert len(calls) == 2, "two shapes"
    assert net.spare.weight.grad is None


def test_two_models_and_two_constants_have_recordings_of_their_own():
    nets = Net(), Net()
    nets[1].head.weight.data *= 2
    steps = [recorded(net) for net in nets]
    for share in (0.5, 0.5, 0.5, 0.25, 0.25, 0.25):
        for net, step in zip(nets, steps):
            torch.manual_seed(2)
            loss = step(share, *batch(4, 0))
            torch.manual_seed(2)
            assert torch.equal(loss, loss_by(net)(share, *batch(4, 0)))


def test_what_moves_is_recorded_again():
    net, calls = Net(), []
    step = recorded(net, noting(calls))
    for change, recordings in ((lambda _: None, 1), (change_in_place, 1), (move, 2), (move, 3)):
        change(net.head.weight)
        for _ in range(3):
            net.zero_grad()
            torch.manual_seed(3)
            loss = step(1, *batch(4, 0))
            torch.manual_seed(3)
            assert torch.equal(loss, loss_by(net)(1, *batch(4, 0)))
        assert len(calls) == recordings


def change_in_place(p):
    p.data *= 2


def move(p):
    p.data = 2 * p.data


def test_the_loss_that_is_returned_is_nobodys_memory():
    net = Net()
    step = recorded(net)
    losses = [step(1, *batch(4, seed)) for seed in range(5)]
    assert len({loss.item() for loss in losses}) == 5


def test_recordings_are_gone_with_what_made_them_without_a_garbage_collection():
    """A CUDA graph that is destroyed while another is recorded would break that."""
    step = recorded(Net())
    for _ in range(3):
        step(1, *batch(4, 0))
    [replay] = step.replays.values()
    gone = weakref.ref(replay)
    gc.disable()
    try:
        del step, replay
        assert gone() is None
    finally:
        gc.enable()


def test_hooks_of_parameters_see_their_gradients():
    net, seen = Net(), []
    net.head.bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step = recorded(net)
    for _ in range(3):
        net.zero_grad()
        step(1, *batch(4, 0))
    assert len(seen) == 3


def test_after_an_error_the_next_call_begins_anew():
    net = Net()
    step = recorded(net)
    step(1, *batch(4, 0))
    loss_of, step.loss_of = step.loss_of, lambda *inputs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        step(1, *batch(4, 0))
    step.loss_of = loss_of
    net.zero_grad()
    torch.manual_seed(4)
    loss = step(1, *batch(4, 0))
    torch.manual_seed(4)
    assert torch.equal(loss, loss_of(1, *batch(4, 0)))


# The main job


def accumulator(p):
    """The node of autograd that adds to p.grad. It lives as long as a graph that leads to it."""
    return p.view_as(p).grad_fn.next_functions[0][0]


class Watched(Recorded):
    """A Recorded that refuses to record while a graph of an earlier step lives. Autograd would take a gradient to the
    stream of that step, which a CUDA graph cannot record."""

    recordings = 0

    def __init__(self, model, loss_of):
        def trained():
            return [p for p in model.parameters() if p.requires_grad]

        def marking(*inputs):
            loss = loss_of(*inputs)
            for p in trained():
                accumulator(p).metadata["is old"] = True
            return loss

        def record(work, pool):
            assert not any(accumulator(p).metadata for p in trained())
            Watched.recordings += 1
            return traced(work)

        super().__init__(model, marking, record)


def of_one_length(rows, model, device):
    ids, mask, types, labels = collate(rows, model.encoder.config.pad_token_id, 24)
    return (ids, mask, types if model.encoder.config.type_vocab_size > 1 else None), labels


@pytest.mark.parametrize("flags", [
    "--recipe ours --accumulate 2 --dropout 0.1", "--recipe paper --precision bf16", "--quantize nf4",
    *(f"--method {name}" for name in METHODS if name != "salora"),
])  # fmt: skip
def test_every_method_of_the_main_job_learns_the_same_from_replayed_steps(go, tmp_path, monkeypatch, flags):
    folders = []
    monkeypatch.setattr(train_glue_mini, "Recorded", Watched)
    monkeypatch.setattr(Watched, "recordings", 0)
    for replays in (False, True):
        here = {"recorded": replays, "batch_of": of_one_length}
        monkeypatch.setattr(train_glue_mini, "fine_tune", lambda *args, **rest: fine_tune(*args, **{**rest, **here}))
        folders.append(tmp_path / str(replays))
        window = ["--window", 0.3, 0.6] if "--method" not in flags else []
        go(*flags.split(), *window, "--rows", 40, "--batch-size", 8, "--steps", 14, "--out", folders[-1])
    assert Watched.recordings > 0 and adapter_of(folders[0]) == adapter_of(folders[1])


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
def test_a_cuda_graph_gives_the_numbers_of_eager_steps_to_the_bit():
    nets = Net().cuda(), Net().cuda()
    steps = partial(forward_backward, loss_by(nets[0])), Recorded(nets[1], loss_by(nets[1]))
    on_device = [lambda share, x, y, step=step: step(share, x.cuda(), y.cuda()) for step in steps]
    assert same(*(train(net, step) for net, step in zip(nets, on_device)))


@needs_cuda
@pytest.mark.parametrize("recipe", [Recipe.ours(window=(0.3, 0.6)), Recipe.paper(window=(0.3, 0.6))])
def test_a_whole_run_on_cuda_gives_the_numbers_of_an_eager_one(recipe):
    weights = []
    for record in (None, cuda_graph):
        net = adapt(Net(), ["body", "head"], r=4).cuda()
        step = partial(forward_backward, loss_by(net)) if record is None else Recorded(net, loss_by(net))
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01, fused=True)
        allocator = RankAllocator(net, optimizer, 40, recipe=recipe)
        for i in range(40):
            allocator.before_step(i)
            x, y = batch(8, i)
            step(1, x.cuda(), y.cuda())
            allocator.after_backward()
            optimizer.step()
            allocator.after_step()
            optimizer.zero_grad()
        allocator.finish()
        weights.append([p.detach() for layer in salora_layers(net).values() for p in (layer.A, layer.B)])
    assert same(*weights)
