"""Algorithm 1 in a bare loop: what `budget.RankAllocator` does, without its checks, as four plain functions.

    python -m course.bare_loop         a small net learns updates of rank 1 and 3 within a quarter of its parameters

`train` is the loop. At four moments of a step it calls the functions of exercise 9: before the step, after the backward
pass, after the optimizer's step, and once at the end. The recipe is the paper's, with the budget rule for what stays.
Left out: moments of an optimizer, which would have to be cut with A and B (so plain SGD), resume, several processes.
"""

import torch
from torch import nn

from budget import GateSchedule, Lagrangian, expected_density, freeze_gates, kept_density, resample
from salora import adapt, orthogonality, prune, salora_layers


def before_step(layers, schedule, step, density, noise):
    """Algorithm 1 before the task's loss of this step is computed.

    At T_start every gate is released. In the window, new noise is drawn from the generator `noise`. At T_end it is
    decided which triplets fit `density`, and the closed ones are removed for good.
    """
    if step == schedule.T_start:
        for layer in layers:
            layer.gate.release()
    if step == schedule.T_end:
        freeze_gates(layers, density)
        for layer in layers:
            prune(layer)
    if schedule.phase(step) == "window":
        resample(layers, noise)


def after_backward(layers, schedule, step, lagrangian, beta):
    """Add the gradient of beta R_orth, and in the window that of lambda (C - b)^2, to that of the task's loss."""
    penalty = beta * orthogonality(layers)  # Eq. (9)
    if schedule.phase(step) == "window":
        penalty = penalty + lagrangian(expected_density(layers))  # Eq. (12)
    penalty.backward()


def after_step(schedule, step, gate_optimizer, lagrangian):
    """In the window: log_theta goes down its gradient, which is then cleared, and lambda goes up."""
    if schedule.phase(step) == "window":
        gate_optimizer.step()
        gate_optimizer.zero_grad()
        lagrangian.ascend()


def finish(layers, schedule, total_steps, density):
    """Decide now if the window lasted to the last step. Returns the density that was kept."""
    if schedule.T_end == total_steps:
        freeze_gates(layers, density)
        for layer in layers:
            prune(layer)
    return kept_density(layers)


def train(model, batches, loss_of, density, lr=0.05, gate_lr=0.2, beta=0.01, window=(0.2, 0.5), seed=0):
    """Train the adapters of a model on a list of batches, a step each. Returns the density that was kept.

    loss_of(model, batch): a scalar with gradient.
    """
    layers = list(salora_layers(model).values())
    schedule = GateSchedule(len(batches), *window)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    gate_optimizer = torch.optim.Adam([layer.gate.log_theta for layer in layers], lr=gate_lr)
    lagrangian = Lagrangian(density, lr=gate_lr)
    noise = torch.Generator().manual_seed(seed)
    model.train()
    for step, batch in enumerate(batches):
        before_step(layers, schedule, step, density, noise)
        loss_of(model, batch).backward()
        after_backward(layers, schedule, step, lagrangian, beta)
        optimizer.step()
        after_step(schedule, step, gate_optimizer, lagrangian)
        optimizer.zero_grad()
    return finish(layers, schedule, len(batches), density)


def planted(ranks=(1, 3), size=16, rows=64, steps=800, seed=0):
    """(model, batches, loss_of): linear maps that are to become themselves plus updates of these ranks."""
    torch.manual_seed(seed)
    model = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in ranks)
    updates = [torch.randn(size, rank) @ torch.randn(rank, size) / size for rank in ranks]
    targets = [linear.weight.detach() + update for linear, update in zip(model, updates)]
    adapt(model, r"\d", r=8, alpha=16)

    def loss_of(model, x):
        errors = [layer(x) - x @ target.T for layer, target in zip(model, targets)]
        return sum(error.square().sum(1).mean() for error in errors)

    return model, [torch.randn(rows, size) for _ in range(steps)], loss_of


def main():
    model, batches, loss_of = planted()
    before = loss_of(model, batches[0]).item()
    kept = train(model, batches, loss_of, density=0.25)
    after, ranks = loss_of(model, batches[0]).item(), [layer.r for layer in model]
    print(f"loss {before:.3f} -> {after:.3f} | kept {kept:.3f} | planted ranks 1, 3 | learned {ranks[0]}, {ranks[1]}")


if __name__ == "__main__":
    main()
