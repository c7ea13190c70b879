"""Exercise 6: total_parameters, expected_density, Eq. (11), and kept_density."""

import math

from course.checking import about, f64, learned, same
from course.questions import (
    expected_density,
    expected_density_gradients,
    kept_density,
    total_of_shapes,
    total_parameters,
)

TWO = "layers of 4 x 3 with 2 triplets and 6 x 5 with 1"  # triplets of 7 and of 11 parameters: 25 in all


def two_layers(first="free", second="free", **how):
    """Their gates: free, held, or constants."""
    return [
        dict(d=4, k=3, r=2, log_theta=[0.0, -3.0], gates=first, **how),
        dict(d=6, k=5, r=1, log_theta=[1.0], seed=1, gates=second, **how),
    ]


def odds(x):
    return 11 * math.exp(x)


@about("total_parameters", "11")
def test_a_triplet_costs_a_column_of_b_and_a_row_of_a():
    same(total_parameters(two_layers()), 2 * 7 + 11, f"total_parameters of {TWO}")
    same(total_parameters(two_layers()[:1], "dict"), 14, "total_parameters({name: layer}): as of salora_layers")


@about("total_parameters", "11")
def test_roberta_base_has_the_papers_1_33_million():
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    same(total_of_shapes(shapes * 12, 8), 1_327_104, "total_parameters of 12 blocks of six matrices, r = 8")


@about("total_parameters", "11")
def test_the_total_is_that_at_creation_even_after_pruning():
    layers = two_layers(first=[1.0, 0.0], second=[1.0], pruned=True)
    same(total_parameters(layers), 25, f"total_parameters of {TWO}, one of them pruned away")


@about("expected_density", "11")
def test_fresh_gates_give_11_in_12_and_gates_held_open_give_1():
    layers = two_layers("held", "held")
    same(expected_density(layers), 1.0, "expected_density before the gates are released")
    fresh = [layer | dict(gates="free", log_theta=None) for layer in layers]
    same(expected_density(fresh), 11 / 12, "expected_density of released gates, log_theta = 0")


@about("expected_density", "11")
def test_probabilities_are_weighted_by_parameters():
    p = [odds(x) / (1 + odds(x)) for x in (0, -3, 1)]
    expected = (7 * p[0] + 7 * p[1] + 11 * p[2]) / 25
    same(expected_density(two_layers()), expected, f"expected_density of {TWO}")
    same(expected_density(two_layers(), "iterator"), expected, "expected_density(iter(layers)): any iterable")


@about("expected_density", "11")
def test_a_fixed_gate_counts_as_what_it_is_and_pruned_triplets_count_in_the_total():
    for pruned in (False, True):
        layers = two_layers([0.5, 0.0], [1.0], pruned=pruned)
        when = "after pruning: the total is that at creation" if pruned else "with gates fixed at [1/2, 0] and [1]"
        same(expected_density(layers), 18 / 25, f"expected_density of {TWO}, {when}")


@about("expected_density", "11")
def test_the_gradient_of_the_density_reaches_every_log_theta():
    first, second = learned(expected_density_gradients(two_layers()), "expected_density(layers)", "log_theta")
    slope = [odds(x) / (1 + odds(x)) ** 2 for x in (0, -3, 1)]
    same(first, [7 * s / 25 for s in slope[:2]], "dC / d log_theta of the first layer")
    same(second, [11 * slope[2] / 25], "dC / d log_theta of the second layer")


@about("kept_density", "11")
def test_the_kept_density_counts_triplets_whose_settled_gate_is_open():
    same(kept_density(two_layers()), 18 / 25, f"kept_density of {TWO}, log_theta = [0, -3] and [1]: medians decide")
    same(kept_density(two_layers(), "iterator"), 18 / 25, "kept_density(iter(layers)): any iterable")


@about("kept_density", "11")
def test_noise_has_no_say_in_what_is_kept():
    first, second = two_layers()
    layers = [first | dict(u=[0.001, 0.999]), second | dict(u=[0.001])]  # their samples are 0, 1 and 0
    words = f"kept_density of {TWO} in train mode, noise [0.001, 0.999] and [0.001]: settled gates have none"
    same(kept_density(layers), 18 / 25, words)


@about("kept_density", "11")
def test_pruning_does_not_change_what_is_kept():
    for pruned in (False, True):
        layers = two_layers([0.0, 0.25], [0.0], pruned=pruned)
        when = "then pruned" if pruned else "not yet pruned"
        same(kept_density(layers), 7 / 25, f"kept_density of {TWO}, gates fixed at [0, 1/4] and [0], {when}")


@about("kept_density", "11")
def test_the_kept_density_is_a_plain_number():
    same(f64(kept_density(two_layers())), 18 / 25, "float(kept_density(layers))")
