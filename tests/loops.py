"""Training loops that are not the main job's, and stand-ins for what is refused: for tests of allocators."""

import copy

import pytest
import torch
from strategies import assert_close
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_leaves

from budget import kept_density
from rank_allocator import RankAllocator, Recipe
from salora import adapt, merge, salora_layers

STEPS, T_START, T_END = 20, 4, 10
OURS = Recipe.ours(window=(0.2, 0.5))  # long enough, of so few steps, to stop and look inside


def mlp():
    return adapt(nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)), ["0", "2"], r=5), (6,)


def conv_net():
    """Convolutions and BatchNorm train beside the adapters of the linear head."""
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model = adapt(nn.Sequential(body, nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 3)), ["1", "3"], r=5)
    model[0].requires_grad_(True)
    return model, (1, 8, 8)


class Run:
    """A model, an optimizer, an allocator, a scheduler and batches, the same numbers every time."""

    def __init__(self, build=mlp, budget=0.5, make=torch.optim.AdamW, recipe=OURS, **flags):
        torch.manual_seed(0)
        self.model, shape = build()
        self.optimizer = make([p for p in self.model.parameters() if p.requires_grad], lr=0.01, **flags)
        self.allocator = RankAllocator(self.model, self.optimizer, STEPS, budget, recipe)
        self.scheduler = LambdaLR(self.optimizer, self.allocator.lr_factor)
        self.parts = [self.model, self.optimizer, self.allocator, self.scheduler]
        self.layers = list(salora_layers(self.model).values())
        inputs = torch.randn(STEPS, 9, *shape)
        self.batches = [(x, (3 * torch.sigmoid(x.flatten(1)[:, 0])).long()) for x in inputs]

    def loss(self, batch):
        return cross_entropy(self.model(batch[0]), batch[1])

    def closure(self, batch=None):
        """What optimizer.step(closure) calls: a whole backward pass."""
        self.optimizer.zero_grad()
        loss = self.loss(batch or self.batches[0])
        loss.backward()
        self.allocator.after_backward()
        return loss

    def train(self, start=0, stop=STEPS):
        allocator, optimizer = self.allocator, self.optimizer
        for step, batch in enumerate(self.batches[start:stop], start):
            allocator.before_step(step)
            loss = self.loss(batch)  # lives on until the next one, and with it what autograd knows of shapes
            loss.backward()
            allocator.after_backward()
            optimizer.step()
            allocator.after_step()
            optimizer.zero_grad()
            self.scheduler.step()
        return self

    def do(self, hooks):
        """B, A, S: before_step and a gradient, after_backward, after_step. O: optimizer.step. F: finish. D: a state."""
        a = self.allocator
        calls = {"B": lambda: a.before_step(a.step), "A": a.after_backward, "O": self.optimizer.step,
                 "S": a.after_step, "F": a.finish, "D": a.state_dict}  # fmt: skip
        for hook in hooks:
            calls[hook]()
            if hook == "B":
                self.loss(self.batches[0]).backward()

    def snapshot(self):
        """All that a refused call must leave alone: a list of numbers, texts and tensors."""
        a, parameters = self.allocator, list(self.model.parameters())
        state = [a.step, a.C_end, a.noise.get_state(), a.gate_optimizer.state_dict(), a.lagrangian.state_dict()]
        flags = [[p.requires_grad for p in parameters], [layer.allocating for layer in self.layers]]
        tensors = [self.model.state_dict(), self.optimizer.state_dict(), [p.grad for p in parameters]]
        return tree_leaves(copy.deepcopy([state, flags, tensors]))


def parts_of_steps(loop, loss_of):
    """Train loop.model up to loop.steps. Yields the name of each part of a step once it is done."""
    for step in range(loop.allocator.step, loop.steps):
        loop.allocator.before_step(step)
        yield "before_step"
        loss_of(loop.model).backward()
        yield "backward"
        loop.allocator.after_backward()
        yield "after_backward"
        loop.optimizer.step()
        yield "step"
        loop.allocator.after_step()
        yield "after_step"
        loop.optimizer.zero_grad()


def prepared(parameters, lr):
    """AdamW as accelerate hands it back."""
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(parameters, lr=lr))


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_refused(run, call, match, errors=(RuntimeError, ValueError)):
    """A call raises, and nothing has changed before it does."""
    before = run.snapshot()
    with pytest.raises(errors, match=match):
        call()
    assert_same(run.snapshot(), before)


def assert_finished(allocator, model, call, budget):
    """C was b at T_end, what is kept fits b, nothing waits for the allocator, and merging changes no output."""
    assert not any(layer.allocating for layer in allocator.layers.values())
    assert abs(allocator.C_end - budget) <= 1e-5, f"C is {allocator.C_end}, but should be {budget}"
    assert kept_density(allocator.layers) <= budget
    outputs = call(model.eval()).detach()
    assert_close(call(merge(copy.deepcopy(model))).detach(), outputs, 64)


# Stand-ins for what is refused


class Wrapper(nn.Module):
    def __init__(self, model):
        nn.Module.__init__(self)
        self.module = model


class Accelerated:
    """Like accelerate's optimizer in a run with fp16."""

    def __init__(self, optimizer):
        self.optimizer, self.scaler = optimizer, torch.amp.GradScaler("cpu")


def sgd(model, of=lambda p: p.requires_grad, kind=torch.optim.SGD):
    return kind([p for p in model.parameters() if of(p)], lr=0.1)


FSDP = type("FullyShardedDataParallel", (Wrapper,), {})
DeepSpeed = type("DeepSpeedOptimizer", (torch.optim.SGD,), {"__module__": "deepspeed.runtime.zero"})
