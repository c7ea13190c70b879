"""Exercise 9: the four hooks of Algorithm 1, in course/bare_loop.py."""

import torch

from budget import expected_density, resample
from course.bare_loop import planted
from course.checking import about, holds, numbers, same
from course.questions import after_backward, after_step, before_step, finish, layers_of, trained
from salora import orthogonality

SCHEDULE = (10, 0.2, 0.5)  # 10 steps, T_start 2, T_end 5
SEED, BUDGET = 3, 0.6
KEPT = 26 / 44  # triplets of 8 and of 10 parameters: two and one of them fit


def bank(gates):
    """Two layers, their gates held or free."""
    return [
        dict(d=4, k=4, r=3, log_theta=[0.0, 2.0, -1.0], gates=gates),
        dict(d=6, k=4, r=2, log_theta=[0.5, -3.0], gates=gates, seed=1),
    ]


def states_after(gates, *steps):
    """Of the two layers, after before_step at each of these steps."""
    return before_step(bank(gates), SCHEDULE, list(steps), BUDGET, SEED)["states"]


def every(states, key):
    return torch.cat([layer[key] for layer in states]).double()


def noise_at(step, gates):
    """The noise of all layers after before_step, and what one draw gives."""
    layers = layers_of(bank(gates))
    resample(layers, torch.Generator().manual_seed(SEED))
    return every(states_after(gates, step)[0], "noise"), torch.cat([layer.gate.u for layer in layers])


def ranks(states):
    return [layer["r"] for layer in states]


@about("before_step", "phases")
def test_gates_stay_open_until_t_start_and_are_released_then():
    before, start = states_after("held", 1, 2)
    same(every(before, "values"), [1.0] * 5, "the gates after before_step at step 1, T_start = 2")
    same(every(before, "noise"), [0.5] * 5, "the noise at step 1: none is drawn before the window")
    for layer in start:
        released = layer["gates"] == "free" and layer["trains"]
        holds(released, "the gates after before_step at T_start", layer["gates"], "released, log_theta training")


@about("before_step", "canonical")
def test_at_t_start_triplets_are_made_independent():
    for layer in states_after("held", 2)[0]:
        gram = layer["B"].T @ layer["B"]
        diagonal = torch.diag(gram.diagonal())
        same(gram, diagonal, "B^T B after before_step at T_start: canonicalize makes it diagonal", within=1e-8)


@about("before_step", "noise")
def test_every_step_of_the_window_draws_noise_from_the_generator():
    for step, gates in ((2, "held"), (3, "free"), (4, "free")):
        got, expected = noise_at(step, gates)
        same(got, expected, f"the noise at step {step}: one draw of resample(layers, noise)")


@about("before_step", "noise")
def test_one_draw_serves_all_layers():
    got, expected = noise_at(3, "free")
    same(got, expected, "the noise at step 3")
    draws = before_step(bank("free"), SCHEDULE, [3, 4], BUDGET, SEED)["draws"]
    holds(draws <= 2, "calls of resample in two steps of the window", draws, "2: one call for all layers in each step")


@about("before_step", "alg 1")
def test_inside_the_window_only_noise_changes():
    states, noise = states_after("free", 3)[0], noise_at(3, "free")[1]
    same(every(states, "noise"), noise, "the noise at step 3")
    for name in ("A", "B", "log_theta"):
        for layer, before in zip(states, layers_of(bank("free"))):
            unchanged = before.gate.log_theta if name == "log_theta" else getattr(before, name)
            same(layer[name], unchanged, f"{name} after before_step at step 3: only optimizers move it")


@about("before_step", "budget rule")
def test_at_t_end_what_does_not_fit_is_removed():
    at_end, later = states_after("free", 5, 6)
    states = [layer["gates"] for layer in at_end]
    holds(states == ["fixed", "fixed"], "the states of the gates at T_end", states, "fixed")
    same(ranks(at_end), [2, 1], "the ranks after before_step at T_end, budget 0.6")
    same(every(at_end, "noise"), [0.5] * 3, "the noise at T_end: none is drawn after the window")
    same(ranks(later), [2, 1], "the ranks a step later")


@about("before_step", "phases")
def test_an_empty_window_is_decided_in_the_step_in_which_it_begins():
    [states] = before_step(bank("held"), (10, 0.2, 0.2), [2], BUDGET, SEED)["states"]
    same(ranks(states), [2, 1], "the ranks after before_step at T_start = T_end, budget 0.6")


@about("after_backward", "9")
def test_the_gradient_of_the_regularizer_is_added_to_that_of_the_task():
    task, alone = numbers(3, 4), layers_of(bank("held"))
    found = after_backward(bank("held"), SCHEDULE, 1, 0.0, 0.1, task)["gradients"]
    orthogonality(alone).backward()
    words = "at step 1, beta = 0.1: task's + beta R_orth's"
    same(found[0]["A"], task + 0.1 * alone[0].A.grad, f"the gradient of A {words}")
    same(found[1]["B"], 0.1 * alone[1].B.grad, f"the gradient of B in the second layer {words}, which is 0 here")


@about("after_backward", "12")
def test_in_the_window_the_multiplier_and_every_log_theta_get_a_gradient():
    alone = layers_of(bank("free"))
    found = after_backward(bank("free"), SCHEDULE, 3, 2.0, 0.1, numbers(3, 4))
    C = expected_density(alone)
    (2.0 * (C - 0.5) ** 2).backward()
    holds(found["lambda"] is not None, "the gradient of lambda in the window", "none", "(C - b)^2")
    same(found["lambda"], [(C.item() - 0.5) ** 2], "the gradient of lambda in the window: (C - b)^2")
    for got, layer in zip(found["gradients"], alone):
        same(got["log_theta"], layer.gate.log_theta.grad, "the gradient of log_theta: 2 lambda (C - b) dC")


@about("after_backward", "alg 1")
def test_after_backward_moves_nothing():
    found = after_backward(bank("free"), SCHEDULE, 3, 2.0, 0.1, numbers(3, 4))
    holds(found["lambda"] is not None, "the gradient of lambda in the window", "none", "(C - b)^2")
    before = [0.0, 2.0, -1.0, 0.5, -3.0]
    same(every(found["states"], "log_theta"), before, "log_theta after after_backward: it moves in after_step alone")


@about("after_backward", "phases")
def test_outside_of_the_window_the_multiplier_gets_no_gradient():
    for step in (1, 6):
        found = after_backward(bank("held"), SCHEDULE, step, 2.0, 0.1, numbers(3, 4) * 0)
        added = found["gradients"][1]["B"] is not None
        holds(added, f"the gradient of B at step {step}", "none", "that of beta R_orth")
        holds(found["lambda"] is None, f"the gradient of lambda at step {step}", found["lambda"], "none")


@about("after_step", "12")
def test_in_the_window_log_theta_goes_down_and_lambda_up():
    [[log_theta, lam, left]] = after_step(bank("free"), SCHEDULE, [3], 1.0, 0.5, 0.0, 0.2, 0.1)
    same(log_theta, [-0.5, 1.5, -1.5], "log_theta after a step of gradient 1 and lr 0.5, from [0, 2, -1]")
    same(lam, [0.02], "lambda after a step of gradient 0.2 and lr 0.1, from 0")
    same(left, 0.0, "the gradients of log_theta and lambda once after_step is done, summed")


@about("after_step", "phases")
def test_outside_of_the_window_nothing_moves():
    found = after_step(bank("free"), SCHEDULE, [1, 2, 4, 5], 1.0, 0.5, 0.0, 0.2, 0.1)
    moved = [[0.0, 2.0, -1.0], [-0.5, 1.5, -1.5], [-1.0, 1.0, -2.0], [-1.0, 1.0, -2.0]]
    for i, step in enumerate((1, 2, 4, 5)):
        log_theta, lam, _ = found[i]
        same(log_theta, moved[i], f"log_theta after step {step}, with the window from 2 to 4")
        same(lam, [(0.0, 0.02, 0.04, 0.04)[i]], f"lambda after step {step}, with the window from 2 to 4")


@about("finish", "budget rule")
def test_a_window_that_lasts_to_the_end_is_decided_at_the_end():
    end = finish(bank("free"), (10, 0.2, 1.0), BUDGET)
    same(ranks(end["states"]), [2, 1], "the ranks after finish, window 0.2 to 1, budget 0.6")
    same(end["kept"], KEPT, "what finish returns: the kept density")


@about("finish", "alg 1")
def test_otherwise_finish_only_returns_what_was_kept():
    end = finish(bank("free"), SCHEDULE, 0.2, decided_before=BUDGET)
    same(end["kept"], KEPT, "what finish returns after a decision at T_end")
    same(ranks(end["states"]), [2, 1], "the ranks after finish: decided at T_end already")


@about("before_step", "alg 1")
def test_a_small_net_learns_within_its_budget():
    model, batches, loss_of = planted(steps=150)
    start, cost = loss_of(model, batches[0]).item(), 0
    layers = trained(150, 0.25)["layers"]
    with torch.no_grad():
        for layer, (A, B, gates) in zip(model, layers):
            layer.base.weight += layer.scale * (B * gates) @ A
            cost += sum(A[0].numel() + B[:, 0].numel() for gate in gates if gate > 0)
    density, end = cost / (2 * 8 * 32), loss_of(model, batches[0]).item()
    holds(0 < density <= 0.25, "the kept density of train(..., budget=0.25)", density, "at most 0.25, and not 0")
    holds(end < start / 2, "the loss after 150 steps", f"{end:.3f}", f"less than half of the first, {start:.3f}")
