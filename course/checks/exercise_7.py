"""Exercise 7: best_within_budget, the budget rule."""

import torch

from course.checking import about, holds, same
from course.plain import Other
from course.questions import best_within_budget

RULE = ("best_within_budget", "budget rule")


CALL = "best_within_budget(layers, budget)"


def kept(layers, budget):
    """The masks as lists of 0 and 1."""
    masks = best_within_budget(layers, budget)
    got = "None: is a return missing?" if masks is None else type_of(masks)
    one_each = isinstance(masks, list) and len(masks) == len(layers)
    holds(one_each, CALL, got, f"a list of {len(layers)} masks, one per layer")
    return [[int(bool(value)) for value in mask] for mask in masks]


def type_of(value):
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {value.type if isinstance(value, Other) else type(value).__name__}"


def compare(got, expected, call):
    holds(got == expected, call, got, expected)


@about(*RULE)
def test_in_one_layer_the_largest_log_thetas_stay():
    layer = dict(d=4, k=4, r=4, log_theta=[0.3, -2.0, 1.5, 0.1])
    compare(kept([layer], 0.5), [[1, 0, 1, 0]], "one layer, log_theta = [0.3, -2, 1.5, 0.1], budget 1/2")


@about(*RULE)
def test_layers_compete_for_one_budget():
    layers = [dict(d=4, k=4, r=2, log_theta=[2.0, 1.0]), dict(d=4, k=4, r=2, log_theta=[-1.0, -2.0])]
    compare(kept(layers, 0.5), [[1, 1], [0, 0]], "log_theta = [2, 1] and [-1, -2], equal costs, budget 1/2")


@about(*RULE)
def test_the_budget_is_counted_in_parameters_not_in_triplets():
    layers = [dict(d=12, k=12, r=2, log_theta=[3.0, 2.0]), dict(d=2, k=2, r=2, log_theta=[1.0, 0.0])]
    words = "log_theta = [3, 2] at 24 parameters each, [1, 0] at 4 each, budget 1/2: 28 of 56 parameters"
    compare(kept(layers, 0.5), [[1, 0], [1, 0]], words)


@about(*RULE)
def test_the_largest_log_theta_goes_first_whatever_it_costs():
    layers = [dict(d=2, k=2, r=1, log_theta=[0.9]), dict(d=12, k=12, r=1, log_theta=[1.0])]
    compare(kept(layers, 0.9), [[0], [1]], "log_theta = 0.9 at 4 parameters and 1.0 at 24, budget 0.9: room for 25")


@about(*RULE)
def test_the_budget_is_a_share_of_the_parameters_at_creation():
    layer = dict(d=4, k=4, r=4, log_theta=[0.0, 3.0, 2.0, 1.0], gates=[0.0, 1.0, 1.0, 1.0], pruned=True)
    words = "one of four triplets was pruned before; log_theta = [3, 2, 1] are left, budget 1/2: two of four may stay"
    compare(kept([layer], 0.5), [[1, 1, 0]], words)


@about(*RULE)
def test_a_triplet_that_does_not_fit_does_not_stop_smaller_ones_after_it():
    layers = [dict(d=8, k=8, r=2, log_theta=[3.0, 2.0]), dict(d=2, k=2, r=3, log_theta=[1.0, 0.0, -1.0])]
    words = "log_theta = [3, 2] at 16 parameters each, [1, 0, -1] at 4 each, budget 0.6: 26 of 44 parameters"
    compare(kept(layers, 0.6), [[1, 0], [1, 1, 0]], words)


@about(*RULE)
def test_ties_go_to_the_earlier_layer_and_then_to_the_earlier_triplet():
    layers = [dict(d=4, k=4, r=2, log_theta=[1.0, 1.0])] * 2
    compare(kept(layers, 0.75), [[1, 1], [1, 0]], "four equal log_thetas, budget 3/4")


@about(*RULE)
def test_no_triplet_is_lost_to_rounding():
    layer = dict(d=64, k=64, r=100, log_theta=[float(-i) for i in range(100)])
    number = sum(kept([layer], 0.29)[0])
    same(number, 29, "100 equal triplets, budget 0.29: how many stay (0.29 x 12800 is 3711.9999... in floats)")
    same(sum(kept([layer], 0.2899)[0]), 28, "100 equal triplets, budget 0.2899: how many stay")


@about(*RULE)
def test_the_budget_is_never_exceeded_and_no_room_is_wasted():
    layers = [dict(d=d, k=k, r=3, log_theta=[d - 5.0, k - 4.0, d - k]) for d, k in ((3, 9), (7, 2), (5, 5))]
    costs = [layer["d"] + layer["k"] for layer in layers]
    for budget in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        masks, limit = kept(layers, budget), budget * 3 * sum(costs)
        spent = sum(cost * sum(mask) for cost, mask in zip(costs, masks))
        closed = [cost for cost, mask in zip(costs, masks) if not all(mask)]
        words = f"parameters kept within budget {budget}"
        holds(spent <= limit + 1e-6, words, spent, f"at most {limit:.1f}")
        wasted = f"{spent} of {limit:.1f}, although a closed triplet of {min(closed)} parameters still fits"
        holds(spent + min(closed) > limit, words, wasted, "that no closed triplet fits")


@about(*RULE)
def test_masks_are_boolean_tensors_of_one_number_per_triplet():
    layers = [dict(d=4, k=4, r=2, log_theta=[2.0, 1.0]), dict(d=4, k=4, r=1, log_theta=[-1.0])]
    masks = best_within_budget(layers, 0.7)
    compare(kept(layers, 0.7), [[1, 1], [0]], "log_theta = [2, 1] and [-1], equal costs, budget 0.7")
    for mask in masks:
        boolean = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
        holds(boolean, CALL, f"a list with {type_of(mask)} in it", "a list of tensors of bool")


@about(*RULE)
def test_budget_1_keeps_everything_and_almost_0_nothing():
    layers = [dict(d=4, k=3, r=2), dict(d=6, k=5, r=1)]
    compare(kept(layers, 1.0), [[1, 1], [1]], "budget 1")
    compare(kept(layers, 1e-6), [[0, 0], [0]], "budget 0.000001")
