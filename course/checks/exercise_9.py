"""Exercise 9: the four hooks of Algorithm 1, in course/bare_loop.py."""

import torch

from budget import GateSchedule, Lagrangian, expected_density, resample
from course.bare_loop import after_backward, after_step, before_step, finish, planted, train
from course.checking import about, holds, layer_of, numbers, same
from salora import orthogonality

SCHEDULE = GateSchedule(10, 0.2, 0.5)  # T_start 2, T_end 5


def bank(free):
    """Two layers, their gates held open or free."""
    layers = [layer_of(4, 4, 3, log_theta=[0.0, 2.0, -1.0]), layer_of(6, 4, 2, log_theta=[0.5, -3.0], seed=1)]
    for layer in layers if not free else []:
        layer.gate.hold_open()
    return layers


def noise_of(layers):
    return torch.cat([layer.gate.u for layer in layers])


def before(layers, step, seed=3, budget=0.6):
    before_step(layers, SCHEDULE, step, budget, torch.Generator().manual_seed(seed))


@about("before_step", "phases")
def test_before_t_start_gates_stay_open():
    layers = bank(free=False)
    before(layers, 1)
    same(layers[0].gate(), [1.0, 1.0, 1.0], "the gates after before_step at step 1, T_start = 2")
    same(noise_of(layers), [0.5] * 5, "the noise at step 1: none is drawn before the window")


@about("before_step", "phases")
def test_at_t_start_triplets_are_made_independent_and_gates_are_released():
    layers = bank(free=False)
    before(layers, 2)
    released = [layer.gate.state == "free" and layer.gate.log_theta.requires_grad for layer in layers]
    holds(all(released), "the gates after before_step at T_start", "still held open", "released, log_theta training")
    gram = layers[0].B.T @ layers[0].B
    diagonal = torch.diag(gram.diagonal())
    same(gram, diagonal, "B^T B after before_step at T_start: canonicalize makes it diagonal", within=1e-8)


@about("before_step", "noise")
def test_every_step_of_the_window_draws_noise_from_the_generator():
    for step, free in ((2, False), (3, True), (4, True)):
        layers, expected = bank(free), bank(free)
        before(layers, step)
        resample(expected, torch.Generator().manual_seed(3))
        same(noise_of(layers), noise_of(expected), f"the noise at step {step}: one draw of resample(layers, noise)")


@about("before_step", "budget rule")
def test_at_t_end_what_does_not_fit_is_removed():
    layers = bank(free=True)
    before(layers, 5)
    states = [layer.gate.state for layer in layers]
    holds(states == ["fixed", "fixed"], "the states of the gates at T_end", states, "fixed")
    same([layer.r for layer in layers], [2, 1], "the ranks after before_step at T_end, budget 0.6")
    same(noise_of(layers), [0.5] * 3, "the noise at T_end: none is drawn after the window")
    before(layers, 6)
    same([layer.r for layer in layers], [2, 1], "the ranks a step later")


@about("after_backward", "9")
def test_the_gradient_of_the_regularizer_is_added_to_that_of_the_task():
    layers, alone = bank(free=False), bank(free=False)
    task = numbers(3, 4)
    layers[0].A.grad = task.clone()
    after_backward(layers, SCHEDULE, 1, Lagrangian(0.5), 0.1)
    orthogonality(alone).backward()
    expected = task + 0.1 * alone[0].A.grad
    same(layers[0].A.grad, expected, "the gradient of A at step 1, beta = 0.1: task's + beta R_orth's")


@about("after_backward", "12")
def test_in_the_window_the_multiplier_and_every_log_theta_get_a_gradient():
    layers, alone, lagrangian = bank(free=True), bank(free=True), Lagrangian(0.5)
    lagrangian.lam.data.fill_(2.0)
    after_backward(layers, SCHEDULE, 3, lagrangian, 0.1)
    C = expected_density(alone)
    (2.0 * (C - 0.5) ** 2).backward()
    holds(lagrangian.lam.grad is not None, "the gradient of lambda in the window", "none", "(C - b)^2")
    same(lagrangian.lam.grad, [(C.item() - 0.5) ** 2], "the gradient of lambda in the window: (C - b)^2")
    same(layers[0].gate.log_theta.grad, alone[0].gate.log_theta.grad, "the gradient of log_theta: 2 lambda (C - b) dC")


@about("after_backward", "phases")
def test_outside_of_the_window_the_multiplier_gets_no_gradient():
    for step in (1, 6):
        layers, lagrangian = bank(free=False), Lagrangian(0.5)
        after_backward(layers, SCHEDULE, step, lagrangian, 0.1)
        holds(lagrangian.lam.grad is None, f"the gradient of lambda at step {step}", lagrangian.lam.grad, "none")


@about("after_step", "12")
def test_in_the_window_log_theta_goes_down_and_lambda_up():
    layers, lagrangian = bank(free=True), Lagrangian(0.5, 0.1, torch.optim.SGD)
    thetas = [layer.gate.log_theta for layer in layers]
    for p in thetas:
        p.grad = torch.ones_like(p)
    lagrangian.lam.grad = torch.tensor([0.2])
    after_step(SCHEDULE, 3, torch.optim.SGD(thetas, lr=0.5), lagrangian)
    same(thetas[0], [-0.5, 1.5, -1.5], "log_theta after a step of gradient 1 and lr 0.5, from [0, 2, -1]")
    same(lagrangian.lam, [0.02], "lambda after a step of gradient 0.2 and lr 0.1, from 0")
    left = [p.grad is not None and bool(p.grad.any()) for p in (*thetas, lagrangian.lam)]
    holds(not any(left), "the gradients of log_theta and lambda once after_step is done", "not cleared", "none or 0")


@about("after_step", "phases")
def test_outside_of_the_window_nothing_moves():
    layers, lagrangian = bank(free=True), Lagrangian(0.5, 0.1, torch.optim.SGD)
    thetas = [layer.gate.log_theta for layer in layers]
    for step in (1, 5):
        for p in (*thetas, lagrangian.lam):
            p.grad = torch.ones_like(p)
        after_step(SCHEDULE, step, torch.optim.SGD(thetas, lr=0.5), lagrangian)
        same(thetas[0], [0.0, 2.0, -1.0], f"log_theta after step {step}, outside of the window")
        same(lagrangian.lam, [0.0], f"lambda after step {step}, outside of the window")


@about("finish", "budget rule")
def test_a_window_that_lasts_to_the_end_is_decided_at_the_end():
    layers = bank(free=True)
    kept = finish(layers, GateSchedule(10, 0.2, 1.0), 10, 0.6)
    same([layer.r for layer in layers], [2, 1], "the ranks after finish, window 0.2 to 1, budget 0.6")
    same(kept, 26 / 44, "what finish returns: the kept density")


@about("finish", "alg 1")
def test_otherwise_finish_only_returns_what_was_kept():
    layers = bank(free=True)
    before(layers, 5)
    ranks = [layer.r for layer in layers]
    same(finish(layers, SCHEDULE, 10, 0.2), 26 / 44, "what finish returns after a decision at T_end")
    same([layer.r for layer in layers], ranks, "the ranks after finish: decided at T_end already")


@about("before_step", "alg 1")
def test_a_small_net_learns_within_its_budget():
    model, batches, loss_of = planted(steps=150)
    start = loss_of(model, batches[0]).item()
    kept = train(model, batches, loss_of, budget=0.25)
    end = loss_of(model, batches[0]).item()
    holds(0 < kept <= 0.25, "the kept density of train(..., budget=0.25)", kept, "at most 0.25, and not 0")
    holds(end < start / 2, "the loss after 150 steps", f"{end:.3f}", f"less than half of the first, {start:.3f}")
