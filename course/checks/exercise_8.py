"""Exercise 8: Lagrangian.forward and .ascend, Eq. (12), and project."""

import torch

from budget import Lagrangian, expected_density, project
from course.checking import about, f64, holds, layer_of, same

FORWARD, ASCEND = "Lagrangian.forward", "Lagrangian.ascend"


def bank():
    """Three layers whose triplets cost 8, 20 and 20 parameters."""
    return [
        layer_of(4, 4, 3, log_theta=[0.0, 2.0, -1.0]),
        layer_of(16, 4, 2, log_theta=[0.5, -3.0], seed=1),
        layer_of(4, 16, 2, log_theta=[1.0, 1.5], seed=2),
    ]


@about(FORWARD, "12")
def test_the_penalty_is_lambda_times_the_squared_gap():
    for lam, C in ((3.0, 0.7), (3.0, 0.3), (0.0, 0.7), (2.0, 0.5)):
        lagrangian = Lagrangian(0.5)
        lagrangian.lam.data.fill_(lam)
        same(lagrangian(torch.tensor(C)), lam * (C - 0.5) ** 2, f"lambda = {lam}, C = {C}, b = 0.5")


@about(FORWARD, "12")
def test_the_penalty_is_a_scalar_whose_gradient_reaches_c_and_lambda():
    lagrangian, C = Lagrangian(0.5), torch.tensor(0.7, requires_grad=True)
    lagrangian.lam.data.fill_(3.0)
    penalty = lagrangian(C)
    same(penalty.shape, [], "the shape of lagrangian(C)")
    penalty.backward()
    same(C.grad, 2 * 3 * 0.2, "the derivative by C at lambda = 3, C = 0.7, b = 0.5: 2 lambda (C - b)")
    holds(lagrangian.lam.grad is not None, "the gradient of lambda", "none", "(C - b)^2")
    same(lagrangian.lam.grad, [0.04], "the derivative by lambda at C = 0.7, b = 0.5: (C - b)^2")


@about(FORWARD, "12")
def test_the_target_may_be_set_anew():
    lagrangian = Lagrangian(0.5)
    lagrangian.lam.data.fill_(1.0)
    lagrangian.target = 0.25
    same(lagrangian(torch.tensor(0.75)), 0.25, "lambda = 1, C = 0.75, target set to 0.25")


@about(ASCEND, "12")
def test_lambda_climbs_along_its_gradient():
    lagrangian = Lagrangian(0.5, 0.1, torch.optim.SGD)
    lagrangian.lam.grad = f64([0.16]).float()
    lagrangian.ascend()
    same(lagrangian.lam, [0.016], "lambda after a step of plain gradient ascent, from 0, gradient 0.16, lr 0.1")


@about(ASCEND, "12")
def test_lambda_is_never_negative():
    lagrangian = Lagrangian(0.5, 0.1, torch.optim.SGD)
    lagrangian.lam.data.fill_(0.01)
    lagrangian.lam.grad = torch.tensor([-1.0])
    lagrangian.ascend()
    same(lagrangian.lam, [0.0], "lambda after a step from 0.01, gradient -1, lr 0.1")


@about(ASCEND, "12")
def test_no_gradient_is_left_for_the_next_step():
    lagrangian = Lagrangian(0.5, 0.1)
    lagrangian.lam.grad = torch.tensor([0.3])
    lagrangian.ascend()
    left = 0.0 if lagrangian.lam.grad is None else lagrangian.lam.grad.item()
    same(left, 0.0, "the gradient of lambda after ascend()")


@about("project", "projection")
def test_the_projection_puts_c_on_the_target():
    for density in (0.05, 0.25, 0.5, 0.9):
        layers = bank()
        project(layers, density)
        same(expected_density(layers), density, f"expected_density after project(layers, {density})", within=1e-5)


@about("project", "projection")
def test_the_projection_is_one_shift_for_all_log_thetas():
    layers = bank()
    before = torch.cat([layer.gate.log_theta.detach().clone() for layer in layers])
    project(layers, 0.5)
    shifts = torch.cat([layer.gate.log_theta.detach() for layer in layers]) - before
    same(shifts, [float(shifts[0])] * 7, "by how much project(layers, 0.5) moved each log_theta", within=1e-4)


@about("project", "projection")
def test_the_projection_reaches_gates_that_are_far_away():
    for away in (-60.0, 60.0):
        layers = bank()
        for layer in layers:
            layer.gate.log_theta.data += away
        project(layers, 0.5)
        same(expected_density(layers), 0.5, f"expected_density after project, every log_theta {away} away", within=1e-4)


@about("project", "projection")
def test_the_projection_changes_parameters_in_place():
    layers = bank()
    held = [layer.gate.log_theta for layer in layers]
    project({str(i): layer for i, layer in enumerate(layers)}, 0.5)
    stayed = all(layer.gate.log_theta is p and p.requires_grad for layer, p in zip(layers, held))
    holds(stayed, "project(layers, 0.5)", "other Parameters", "the same ones, with other values")
