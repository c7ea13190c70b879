"""Exercise 6: total_parameters, expected_density, Eq. (11), and kept_density."""

import torch
from torch import nn

from budget import expected_density, kept_density, total_parameters
from course.checking import about, f64, layer_of, learns, same
from salora import SaLoRALinear, prune

TWO = "layers of 4 x 3 with 2 triplets and 6 x 5 with 1"


def two_layers():
    """Triplets of 7 and of 11 parameters: 25 in all."""
    return [layer_of(4, 3, 2, log_theta=[0.0, -3.0]), layer_of(6, 5, 1, log_theta=[1.0], seed=1)]


def odds(x):
    return 11 * torch.tensor(float(x)).exp().item()


@about("total_parameters", "11")
def test_a_triplet_costs_a_column_of_b_and_a_row_of_a():
    same(total_parameters(two_layers()), 2 * 7 + 11, f"total_parameters of {TWO}")
    layer = two_layers()[0]
    same(total_parameters({"a": layer}), 14, "total_parameters({name: layer}): also what salora_layers returns")


@about("total_parameters", "11")
def test_roberta_base_has_the_papers_1_33_million():
    with torch.device("meta"):  # shapes without numbers
        shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
        layers = [SaLoRALinear(nn.Linear(k, d), 8, 16) for d, k in shapes * 12]
    same(total_parameters(layers), 1_327_104, "total_parameters of 12 blocks of six matrices, r = 8")


@about("total_parameters", "11")
def test_the_total_is_that_at_creation_even_after_pruning():
    layers = two_layers()
    layers[0].gate.fix(f64([1.0, 0.0]))
    prune(layers[0])
    same(total_parameters(layers), 25, f"total_parameters of {TWO}, one of them pruned away")


@about("expected_density", "11")
def test_fresh_gates_give_11_in_12_and_gates_held_open_give_1():
    layers = [SaLoRALinear(nn.Linear(3, 4), 2, 16), SaLoRALinear(nn.Linear(5, 6), 1, 16)]
    same(expected_density(layers), 1.0, "expected_density before the gates are released")
    for layer in layers:
        layer.gate.release()
    same(expected_density(layers), 11 / 12, "expected_density of released gates, log_theta = 0")


@about("expected_density", "11")
def test_probabilities_are_weighted_by_parameters():
    p = [odds(x) / (1 + odds(x)) for x in (0, -3, 1)]
    expected = (7 * p[0] + 7 * p[1] + 11 * p[2]) / 25
    same(expected_density(two_layers()), expected, f"expected_density of {TWO}")
    same(expected_density(iter(two_layers())), expected, "expected_density(iter(layers)): any iterable")


@about("expected_density", "11")
def test_a_fixed_gate_counts_as_what_it_is_and_pruned_triplets_count_in_the_total():
    layers = two_layers()
    layers[0].gate.fix(f64([0.5, 0.0]))
    layers[1].gate.fix(f64([1.0]))
    same(expected_density(layers), 18 / 25, f"expected_density of {TWO}, gates fixed at [1/2, 0] and [1]")
    prune(layers[0])
    same(expected_density(layers), 18 / 25, "expected_density after pruning: the total is that at creation")


@about("expected_density", "11")
def test_the_gradient_of_the_density_reaches_every_log_theta():
    layers = two_layers()
    C = expected_density(layers)
    learns(C, "expected_density(layers)", "log_theta")
    C.backward()
    slope = [odds(x) / (1 + odds(x)) ** 2 for x in (0, -3, 1)]
    same(layers[0].gate.log_theta.grad, [7 * s / 25 for s in slope[:2]], "dC / d log_theta of the first layer")
    same(layers[1].gate.log_theta.grad, [11 * slope[2] / 25], "dC / d log_theta of the second layer")


@about("kept_density", "11")
def test_the_kept_density_counts_triplets_whose_settled_gate_is_open():
    same(kept_density(two_layers()), 18 / 25, f"kept_density of {TWO}, log_theta = [0, -3] and [1]: medians decide")


@about("kept_density", "11")
def test_pruning_does_not_change_what_is_kept():
    layers = two_layers()
    layers[0].gate.fix(f64([0.0, 0.25]))
    layers[1].gate.fix(f64([0.0]))
    same(kept_density(layers), 7 / 25, f"kept_density of {TWO}, gates fixed at [0, 1/4] and [0]")
    for layer in layers:
        prune(layer)
    same(kept_density(layers), 7 / 25, "kept_density after pruning")
