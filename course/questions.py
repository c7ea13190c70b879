"""What the checks ask of a student's functions. Arguments and answers are plain data, and no right answer stands here.

At home, a question runs in the process of its test. While a submission is graded, it runs beside the submission, in a
process that knows nothing but these questions and its own answers (course/answer.py); the tests compare elsewhere.
A layer is described by a dict, the arguments of `layer_of`, so that both sides can build it.
"""

from unittest.mock import Mock, patch

import torch
from torch import nn

import budget as budget_file
import hard_concrete
import salora
from course import bare_loop
from course.checking import numbers, question


def layer_of(d, k, r, alpha=16, seed=0, gates="free", log_theta=None, u=None, pruned=False, training=True, **values):
    """A gated layer with random W, bias, A and B in double precision.

    gates: "free", "held", or the constants (r,) at which they are fixed. u: the noise (r,), 1/2 if None. values: A, B,
    weight or bias in place of random ones.
    """
    layer = salora.SaLoRALinear(nn.Linear(k, d), r, alpha).double()
    parts = {"weight": layer.base.weight, "bias": layer.base.bias, "A": layer.A, "B": layer.B}
    with torch.no_grad():
        for i, (name, p) in enumerate(parts.items()):
            p.copy_(values[name] if name in values else numbers(*p.shape, seed=10 * seed + i))
        layer.gate.release()
        layer.gate.log_theta.copy_(torch.zeros(r) if log_theta is None else torch.as_tensor(log_theta))
        if u is not None:
            layer.gate.u.copy_(torch.as_tensor(u))
        if gates == "held":
            layer.gate.hold_open()
        elif gates != "free":
            layer.gate.fix(torch.as_tensor(gates, dtype=torch.float64))
    if pruned:
        salora.prune(layer)
    return layer.train(training)


def layers_of(descriptions, container="list"):
    layers = [layer_of(**description) for description in descriptions]
    if container == "iterator":
        return iter(layers)
    return {str(i): layer for i, layer in enumerate(layers)} if container == "dict" else layers


def gradients(value, inputs):
    """The gradient of the sum of a value for each input; None for all if the value has none."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return None
    return torch.autograd.grad(value.sum(), inputs, materialize_grads=True)


# Exercises 1 to 3: the gate


@question
def prob_open(*args):
    return hard_concrete.prob_open(*args)


@question
def sample_gate(*args):
    return hard_concrete.sample_gate(*args)


@question
def median_gate(*args):
    return hard_concrete.median_gate(*args)


@question
def mean_gate(*args):
    return hard_concrete.mean_gate(*args)


@question
def derivative(function, log_theta, *rest):
    """Of one of the four functions above, by log_theta; None if it has none."""
    log_theta = log_theta.clone().requires_grad_()
    found = gradients(getattr(hard_concrete, function)(log_theta, *rest), [log_theta])
    return None if found is None else found[0]


# Exercise 4: the layer


@question
def forward(layer, x):
    return layer_of(**layer)(x)


@question
def forward_gradients(layer, x):
    """Of the sum of all squared outputs, by A, B and log_theta."""
    layer = layer_of(**layer)
    y = layer(x)
    return gradients(y * y, [layer.A, layer.B, layer.gate.log_theta])


@question
def delta(layer):
    return layer_of(**layer).delta()


# Exercise 5: independent triplets


@question
def orthogonality(layers, container="list"):
    return salora.orthogonality(layers_of(layers, container))


@question
def orthogonality_gradients(layers):
    """By B and A of the first layer."""
    layers = layers_of(layers)
    return gradients(salora.orthogonality(layers), [layers[0].B, layers[0].A])


@question
def canonicalized(layer):
    """B and A after canonicalize, and once more after an optimizer that was made before has halved every entry."""
    layer = layer_of(**layer)
    optimizer = torch.optim.SGD([layer.B, layer.A], lr=0.5)
    salora.canonicalize(layer)
    B, A = layer.B.detach().clone(), layer.A.detach().clone()
    ((layer.B * layer.B).sum() / 2 + (layer.A * layer.A).sum() / 2).backward()
    optimizer.step()
    return {"B": B, "A": A, "B halved": layer.B, "A halved": layer.A}


# Exercises 6 and 7: the budget


@question
def total_parameters(layers, container="list"):
    return budget_file.total_parameters(layers_of(layers, container))


@question
def total_of_shapes(shapes, r):
    """total_parameters of layers (d, k) without numbers."""
    with torch.device("meta"):
        layers = [salora.SaLoRALinear(nn.Linear(k, d), r, 16) for d, k in shapes]
    return budget_file.total_parameters(layers)


@question
def expected_density(layers, container="list"):
    return budget_file.expected_density(layers_of(layers, container))


@question
def expected_density_gradients(layers):
    """By the log_theta of every layer."""
    layers = layers_of(layers)
    return gradients(budget_file.expected_density(layers), [layer.gate.log_theta for layer in layers])


@question
def kept_density(layers, container="list"):
    return budget_file.kept_density(layers_of(layers, container))


@question
def best_within_budget(layers, budget):
    return budget_file.best_within_budget(layers_of(layers), budget)


# Exercise 8: two ways to the target


def lagrangian_of(target, lam, **how):
    lagrangian = budget_file.Lagrangian(target, **how)
    lagrangian.lam.data.fill_(lam)
    return lagrangian


@question
def penalty(lam, C, target, new_target=None):
    """Of a Lagrangian whose target may have been set anew."""
    lagrangian = lagrangian_of(target, lam)
    lagrangian.target = target if new_target is None else new_target
    return lagrangian(torch.tensor(C))


@question
def penalty_gradients(lam, C, target):
    """By C and by lambda."""
    lagrangian, C = lagrangian_of(target, lam), torch.tensor(C, requires_grad=True)
    return gradients(lagrangian(C), [C, lagrangian.lam])


@question
def ascended(lam, slopes, lr):
    """Plain gradient ascent: lambda after a step for each of the slopes, and the gradient that is left."""
    lagrangian = lagrangian_of(0.5, lam, lr=lr, Optimizer=torch.optim.SGD)
    steps = []
    for slope in slopes:
        if lagrangian.lam.grad is None:
            lagrangian.lam.grad = torch.zeros(1)
        lagrangian.lam.grad += slope  # backward adds to what is left
        lagrangian.ascend()
        steps.append(lagrangian.lam.detach().clone())
    return {"steps": steps, "left": 0.0 if lagrangian.lam.grad is None else lagrangian.lam.grad.sum()}


@question
def projected(layers, density, container="list"):
    """The log_theta of every layer after project, read from the Parameters that were there before."""
    layers = layers_of(layers)
    held = [layer.gate.log_theta for layer in layers]
    named = {str(i): layer for i, layer in enumerate(layers)}
    budget_file.project(named if container == "dict" else layers, density)
    return {"log_theta": held, "trains": [p.requires_grad for p in held]}


# Exercise 9: Algorithm 1


def states_of(layers):
    """What a layer is now: rank, state of its gates, whether log_theta trains, and copies of all numbers."""
    states = []
    for layer in layers:
        gate = layer.gate
        state = {"r": layer.r, "gates": gate.state, "trains": gate.log_theta.requires_grad}
        values = {"values": gate(), "log_theta": gate.log_theta, "noise": gate.u, "A": layer.A, "B": layer.B}
        states.append(state | {name: value.detach().clone() for name, value in values.items()})
    return states


@question
def before_step(layers, schedule, steps, budget, seed):
    """States after each of these steps, and how often noise was drawn. schedule: arguments of GateSchedule."""
    layers, noise, schedule = layers_of(layers), torch.Generator().manual_seed(seed), bare_loop.GateSchedule(*schedule)
    counted, states = Mock(side_effect=budget_file.resample), []
    with patch.dict(bare_loop.before_step.__globals__, resample=counted):
        for step in steps:
            bare_loop.before_step(layers, schedule, step, budget, noise)
            states.append(states_of(layers))
    return {"states": states, "draws": counted.call_count}


@question
def after_backward(layers, schedule, step, lam, beta, task):
    """The gradients of every layer and of lambda. task: the gradient (r, k) that A of the first layer has by then."""
    layers, lagrangian = layers_of(layers), lagrangian_of(0.5, lam)
    layers[0].A.grad = task.clone()
    bare_loop.after_backward(layers, bare_loop.GateSchedule(*schedule), step, lagrangian, beta)
    found = [{"A": layer.A.grad, "B": layer.B.grad, "log_theta": layer.gate.log_theta.grad} for layer in layers]
    return {"gradients": found, "lambda": lagrangian.lam.grad, "states": states_of(layers)}


@question
def after_step(layers, schedule, steps, slope, lr, lam, lam_slope, lam_lr):
    """log_theta of the first layer and lambda after each of these steps, and the gradients that are left.

    Both move by plain gradient steps; every gradient is the same number before each of them.
    """
    layers, lagrangian = layers_of(layers), lagrangian_of(0.5, lam, lr=lam_lr, Optimizer=torch.optim.SGD)
    thetas = [layer.gate.log_theta for layer in layers]
    optimizer = torch.optim.SGD(thetas, lr=lr)
    found = []
    for step in steps:
        for p in thetas:
            p.grad = torch.full_like(p, slope)
        lagrangian.lam.grad = torch.full((1,), lam_slope)
        bare_loop.after_step(bare_loop.GateSchedule(*schedule), step, optimizer, lagrangian)
        left = [float(p.grad.abs().sum()) for p in (*thetas, lagrangian.lam) if p.grad is not None]
        found.append([thetas[0].detach().clone(), lagrangian.lam.detach().clone(), sum(left)])
    return found


@question
def finish(layers, schedule, budget, decided_before=None):
    """What finish returns, and the states then. decided_before: the budget of a decision at T_end, by before_step."""
    layers, total_steps, schedule = layers_of(layers), schedule[0], bare_loop.GateSchedule(*schedule)
    if decided_before is not None:
        budget_file.freeze_gates(layers, decided_before)
        for layer in layers:
            salora.prune(layer)
    kept = bare_loop.finish(layers, schedule, total_steps, budget)
    return {"kept": kept, "states": states_of(layers)}


@question
def trained(steps, budget):
    """What `train` makes of the planted updates: A and B of every layer, without those whose gates are closed."""
    model, batches, loss_of = bare_loop.planted(steps=steps)
    kept = bare_loop.train(model, batches, loss_of, budget=budget)
    return {"kept": kept, "layers": [[layer.A, layer.B, layer.gate.settled()] for layer in model]}
