"""SaLoRA in one short file: two linear maps train, and Algorithm 1 finds out which ranks their updates need.

    python course/bare_loop.py

The maps must learn updates of ranks 1 and 3. Each starts with 8 triplets (a triplet is a column of B, a gate and
a row of A), and a quarter of these parameters may stay.

    before T_start   every gate is held at 1: plain LoRA
    in the window    gates are random, and lambda pushes the expected density C toward the budget b
    after T_end      the triplets of largest log_theta that fit the budget have stayed: plain LoRA again

`train` is the loop; it calls the four hooks above it. Not the paper's are: triplets that are made independent at
T_start (`canonicalize`), the budget that decides which of them stay, and their gates of 1 (`freeze_gates`); Adam for
log_theta and lambda, and SGD for A and B; gate_lr and beta, which suit so short a run. rank_allocator.py has the same
hooks for any model. Left out: its checks, resuming, and Adam for A and B, whose moments would be cut with them.
"""

import sys
from pathlib import Path

import torch
from torch import nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from budget import GateSchedule, Lagrangian, expected_density, freeze_gates, kept_density, resample
from salora import adapt, canonicalize, orthogonality, prune, salora_layers


def before_step(layers, schedule, step, budget, noise):
    """Before the loss. T_start: canonicalize layers, release gates. Window: draw noise. T_end: decide and prune."""
    if step == schedule.T_start:
        for layer in layers:
            canonicalize(layer)
            layer.gate.release()
    if step == schedule.T_end:
        freeze_gates(layers, budget)
        for layer in layers:
            prune(layer)
    if schedule.phase(step) == "window":
        resample(layers, noise)


def after_backward(layers, schedule, step, lagrangian, beta):
    """After the loss's backward pass: add the gradient of beta R_orth and, in the window, of lambda (C - b)^2."""
    penalty = beta * orthogonality(layers)  # Eq. (9)
    if schedule.phase(step) == "window":
        penalty = penalty + lagrangian(expected_density(layers))  # Eq. (12)
    penalty.backward()


def after_step(schedule, step, gate_optimizer, lagrangian):
    """After A and B have moved, in the window: log_theta goes down its gradient, which is cleared; lambda goes up."""
    if schedule.phase(step) == "window":
        gate_optimizer.step()
        gate_optimizer.zero_grad()
        lagrangian.ascend()


def finish(layers, schedule, total_steps, budget):
    """After the last step: decide now if the window lasted until here. Returns the density that was kept."""
    if schedule.T_end == total_steps:
        freeze_gates(layers, budget)
        for layer in layers:
            prune(layer)
    return kept_density(layers)


def train(model, batches, loss_of, budget, lr=0.05, gate_lr=0.2, beta=0.01, window=(0.2, 0.5), seed=0):
    """Train a model's adapters, one step per batch. loss_of(model, batch) is a scalar. Returns the density kept."""
    layers = list(salora_layers(model).values())
    schedule = GateSchedule(len(batches), *window)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    gate_optimizer = torch.optim.Adam([layer.gate.log_theta for layer in layers], lr=gate_lr)
    lagrangian = Lagrangian(budget, lr=gate_lr)
    noise = torch.Generator().manual_seed(seed)
    model.train()
    for step, batch in enumerate(batches):
        before_step(layers, schedule, step, budget, noise)
        loss = loss_of(model, batch)
        loss.backward()
        after_backward(layers, schedule, step, lagrangian, beta)
        optimizer.step()
        after_step(schedule, step, gate_optimizer, lagrangian)
        optimizer.zero_grad()
        if step % 100 == 0:
            C, ranks = expected_density(layers).item(), [layer.r for layer in layers]
            print(f"step {step:3d} | {schedule.phase(step):6} | loss {loss.item():.4f} | C {C:.2f} | ranks {ranks}")
    return finish(layers, schedule, len(batches), budget)


def planted(ranks=(1, 3), size=16, rows=64, steps=800, seed=0):
    """(model, batches, loss_of): linear maps (size, size) that must become themselves plus updates of these ranks."""
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in ranks)
    updates = [torch.randn(size, rank) @ torch.randn(rank, size) / size for rank in ranks]
    targets = [linear.weight.detach() + update for linear, update in zip(model, updates)]
    adapt(model, ["0", "1"], r=8, alpha=16)

    def loss_of(model, x):
        return sum((layer(x) - x @ target.T).square().sum(1).mean() for layer, target in zip(model, targets))

    return model, [torch.randn(rows, size) for _ in range(steps)], loss_of


def main():
    model, batches, loss_of = planted()
    kept = train(model, batches, loss_of, budget=0.25)
    print(f"kept {kept:.2f} of the parameters | planted ranks [1, 3], learned {[layer.r for layer in model]}")


if __name__ == "__main__":
    from course.ending import ending_in_a_line

    with ending_in_a_line("bare_loop.py"):
        main()
