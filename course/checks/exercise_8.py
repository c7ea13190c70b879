"""Exercise 8: Lagrangian.forward and .ascend, Eq. (12), and project."""

import torch

from course.checking import about, f64, holds, learned, same
from course.questions import ascended, penalty, penalty_gradients, projected
from hard_concrete import prob_open

FORWARD, ASCEND = "Lagrangian.forward", "Lagrangian.ascend"

BANK = [  # triplets of 8, 20 and 20 parameters
    dict(d=4, k=4, r=3, log_theta=[0.0, 2.0, -1.0]),
    dict(d=16, k=4, r=2, log_theta=[0.5, -3.0]),
    dict(d=4, k=16, r=2, log_theta=[1.0, 1.5]),
]
BEFORE = f64([0.0, 2.0, -1.0, 0.5, -3.0, 1.0, 1.5])
COSTS = f64([8.0, 8.0, 8.0, 20.0, 20.0, 20.0, 20.0])


def moved(density, away=0.0, container="list"):
    """log_theta (7,) after project, every log_theta having been moved away before."""
    layers = [layer | dict(log_theta=[x + away for x in layer["log_theta"]]) for layer in BANK]
    after = projected(layers, density, container)
    holds(all(after["trains"]), f"project(layers, {density})", "a log_theta without gradient", "one that still trains")
    return torch.cat(after["log_theta"]).double()


def density_of(log_theta):
    return prob_open(log_theta) @ COSTS / COSTS.sum()


@about(FORWARD, "12")
def test_the_penalty_is_lambda_times_the_squared_gap():
    for lam, C in ((3.0, 0.7), (3.0, 0.3), (0.0, 0.7), (2.0, 0.5)):
        same(penalty(lam, C, 0.5), lam * (C - 0.5) ** 2, f"lambda = {lam}, C = {C}, b = 0.5")


@about(FORWARD, "12")
def test_the_gradient_of_the_penalty_reaches_c_and_lambda():
    found = learned(penalty_gradients(3.0, 0.7, 0.5), "lagrangian(C)", "C and lambda")
    same(found[0], 2 * 3 * 0.2, "the derivative by C at lambda = 3, C = 0.7, b = 0.5: 2 lambda (C - b)")
    same(found[1], [0.04], "the derivative by lambda at C = 0.7, b = 0.5: (C - b)^2")


@about(FORWARD, "12")
def test_the_target_may_be_set_anew():
    same(penalty(1.0, 0.75, 0.5, new_target=0.25), 0.25, "lambda = 1, C = 0.75, target set to 0.25")


@about(ASCEND, "12")
def test_lambda_climbs_along_its_gradient():
    steps = ascended(0.0, [0.16], lr=0.1)["steps"]
    same(steps[0], [0.016], "lambda after a step of plain gradient ascent, from 0, gradient 0.16, lr 0.1")


@about(ASCEND, "12")
def test_lambda_climbs_in_every_step():
    words = "lambda after three steps, gradient 0.1, lr 0.1: it stays the Parameter that the optimizer holds"
    same(torch.cat(ascended(0.0, [0.1, 0.1, 0.1], lr=0.1)["steps"]), [0.01, 0.02, 0.03], words)


@about(ASCEND, "12")
def test_lambda_is_never_negative():
    steps = ascended(0.01, [-1.0, 0.5], lr=0.1)["steps"]
    same(steps[0], [0.0], "lambda after a step from 0.01, gradient -1, lr 0.1")
    same(steps[1], [0.05], "lambda after another step, gradient 0.5")


@about(ASCEND, "12")
def test_no_gradient_is_left_for_the_next_step():
    after = ascended(0.0, [0.3], lr=0.1)
    same(after["steps"][0], [0.03], "lambda after a step, gradient 0.3, lr 0.1")
    same(after["left"], 0.0, "the gradient of lambda after ascend()")


@about("project", "projection")
def test_the_projection_puts_c_on_the_target():
    for density in (0.05, 0.25, 0.5, 0.9):
        same(density_of(moved(density)), density, f"expected_density after project(layers, {density})", within=1e-5)


@about("project", "projection")
def test_the_projection_is_one_shift_for_all_log_thetas():
    after = moved(0.5)
    same(density_of(after), 0.5, "expected_density after project(layers, 0.5)", within=1e-5)
    shifts = after - BEFORE
    same(shifts, shifts[:1].expand(7), "by how much project(layers, 0.5) moved each log_theta", within=1e-4)


@about("project", "projection")
def test_the_projection_reaches_gates_that_are_far_away():
    for away in (-60.0, 60.0):
        words = f"expected_density after project(layers, 0.5), every log_theta {away} away"
        same(density_of(moved(0.5, away)), 0.5, words, within=1e-4)


@about("project", "projection")
def test_the_projection_takes_a_dict_and_changes_parameters_in_place():
    after = moved(0.25, container="dict")
    words = "expected_density after project({name: layer}, 0.25), of the Parameters that were there before"
    same(density_of(after), 0.25, words, within=1e-5)
