"""Exercise 4: SaLoRALinear.forward and .delta, Eq. (5)."""

import torch

from course.checking import about, f64, holds, layer_of, learns, numbers, same
from hard_concrete import sample_gate
from salora import prune

FORWARD = "SaLoRALinear.forward"
DELTA = "SaLoRALinear.delta"


def by_hand():
    """d = k = 2, one triplet, W = 0: A = [1, 2], B = [3, 4], gate 1/2, alpha / r0 = 2."""
    layer = layer_of(2, 2, 1, alpha=2)
    layer.base.weight.data.zero_()
    layer.base.bias.data.zero_()
    layer.A.data, layer.B.data = f64([[1.0, 2.0]]), f64([[3.0], [4.0]])
    layer.gate.fix(f64([0.5]))
    return layer


@about(FORWARD, "5")
def test_one_triplet_by_hand():
    same(by_hand()(f64([[1.0, 1.0]])), [[9.0, 12.0]], "x = [1, 1]: A x = 3, times 2 x 1/2 is 3, times B = [3, 4]")


@about(FORWARD, "5")
def test_closed_gates_leave_the_frozen_layer():
    layer, x = layer_of(4, 3, 2), numbers(5, 3)
    layer.gate.fix(torch.zeros(2))
    same(layer(x), layer.base(x), "layer(x) with all gates 0: W x and the bias")


@about(FORWARD, "3")
def test_open_gates_are_plain_lora():
    layer, x = layer_of(4, 3, 2), numbers(5, 3)
    layer.gate.fix(torch.ones(2))
    same(layer(x), layer.base(x) + 8 * x @ layer.A.T @ layer.B.T, "layer(x) with all gates 1, alpha / r0 = 8")


@about(FORWARD, "5")
def test_each_gate_multiplies_its_own_triplet():
    layer, x = layer_of(4, 3, 3, alpha=3), numbers(5, 3)
    layer.gate.fix(f64([1.0, 0.25, 0.0]))
    first, second = (x @ layer.A[i, :, None] * layer.B[:, i] for i in (0, 1))
    same(layer(x), layer.base(x) + first + second / 4, "layer(x) with gates [1, 1/4, 0] and alpha / r0 = 1")


@about(FORWARD, "5")
def test_gates_are_sampled_in_train_mode_and_are_their_medians_in_eval_mode():
    layer, x = layer_of(4, 3, 2, alpha=2), numbers(5, 3)
    layer.gate.u.copy_(f64([0.3, 0.8]))
    for mode, u in (("train", layer.gate.u), ("eval", f64([0.5, 0.5]))):
        layer.train(mode == "train")
        g = sample_gate(layer.gate.log_theta, u)
        same(layer(x), layer.base(x) + (x @ layer.A.T * g) @ layer.B.T, f"layer(x) in {mode} mode")


@about(FORWARD, "5")
def test_what_stays_after_pruning_keeps_its_scale():
    layer, x = layer_of(4, 3, 2, alpha=2), numbers(5, 3)
    layer.gate.fix(f64([1.0, 0.0]))
    prune(layer)
    expected = layer.base(x) + x @ layer.A.T @ layer.B.T
    same(layer(x), expected, "layer(x), alpha = 2, one of two triplets pruned: the scale is 2 / 2, for r0 is still 2")
    layer.gate.fix(f64([0.0]))
    prune(layer)
    same(layer(x), layer.base(x), "layer(x) with both triplets pruned")


@about(FORWARD, "5")
def test_axes_before_the_last_are_free():
    layer, x = layer_of(4, 3, 2), numbers(2, 5, 3)
    rows = layer(x.reshape(10, 3)).reshape(2, 5, 4)
    same(layer(x), rows, "layer(x) for x of shape (2, 5, 3), and row by row")
    same(layer(x[0, 0]), rows[0, 0], "layer(x) for x of shape (3,)")


@about(FORWARD, "5")
def test_gradients_reach_a_b_and_log_theta():
    layer = layer_of(4, 3, 2)
    y = layer(numbers(5, 3))
    learns(y, "layer(x)", "A, B and log_theta")
    y.square().sum().backward()
    for name, p in (("A", layer.A), ("B", layer.B), ("log_theta", layer.gate.log_theta)):
        reached = p.grad is not None and bool(p.grad.any())
        holds(reached, f"the gradient of {name}", "none" if p.grad is None else "0", "one that is not 0")


@about(DELTA, "5")
def test_the_update_as_a_matrix_by_hand():
    same(by_hand().delta(), [[3.0, 6.0], [4.0, 8.0]], "delta(): 2 x 1/2 times [3, 4] by [1, 2]")


@about(DELTA, "merge")
def test_the_update_as_a_matrix_does_what_the_layer_does_in_eval_mode():
    layer, x = layer_of(4, 3, 3, log_theta=[-0.5, 0.0, 0.5]), numbers(5, 3)
    layer.gate.u.fill_(0.9)  # of no concern without noise
    layer.eval()
    medians = sample_gate(layer.gate.log_theta, torch.full_like(layer.gate.u, 0.5))
    update = 16 / 3 * (x @ layer.A.T * medians) @ layer.B.T
    same(x @ layer.delta().T, update, "x @ delta().T, with gates at their medians")
    layer.train()
    same(x @ layer.delta().T, update, "the same in train mode: a merged weight has no noise")
