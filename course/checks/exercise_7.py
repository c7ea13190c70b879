"""Exercise 7: best_within_budget, the budget rule."""

from budget import best_within_budget
from course.checking import about, holds, layer_of, same

RULE = ("best_within_budget", "budget rule")


def kept(layers, budget):
    """The masks as lists of 0 and 1."""
    masks = best_within_budget(layers, budget)
    got = "None: is a return missing?" if masks is None else f"{len(masks)} masks"
    one_each = masks is not None and len(masks) == len(layers)
    holds(one_each, "best_within_budget(layers, budget)", got, f"a list of {len(layers)} masks, one per layer")
    return [[int(bool(value)) for value in mask] for mask in masks]


def compare(got, expected, call):
    holds(got == expected, call, got, expected)


@about(*RULE)
def test_in_one_layer_the_largest_log_thetas_stay():
    layer = layer_of(4, 4, 4, log_theta=[0.3, -2.0, 1.5, 0.1])
    compare(kept([layer], 0.5), [[1, 0, 1, 0]], "one layer, log_theta = [0.3, -2, 1.5, 0.1], budget 1/2")


@about(*RULE)
def test_layers_compete_for_one_budget():
    layers = [layer_of(4, 4, 2, log_theta=[2.0, 1.0]), layer_of(4, 4, 2, log_theta=[-1.0, -2.0])]
    compare(kept(layers, 0.5), [[1, 1], [0, 0]], "log_theta = [2, 1] and [-1, -2], equal costs, budget 1/2")


@about(*RULE)
def test_the_budget_is_counted_in_parameters_not_in_triplets():
    layers = [layer_of(12, 12, 2, log_theta=[3.0, 2.0]), layer_of(2, 2, 2, log_theta=[1.0, 0.0])]
    words = "log_theta = [3, 2] at 24 parameters each, [1, 0] at 4 each, budget 1/2: 28 of 56 parameters"
    compare(kept(layers, 0.5), [[1, 0], [1, 0]], words)


@about(*RULE)
def test_a_triplet_that_does_not_fit_does_not_stop_smaller_ones_after_it():
    layers = [layer_of(8, 8, 2, log_theta=[3.0, 2.0]), layer_of(2, 2, 3, log_theta=[1.0, 0.0, -1.0])]
    words = "log_theta = [3, 2] at 16 parameters each, [1, 0, -1] at 4 each, budget 0.6: 26 of 44 parameters"
    compare(kept(layers, 0.6), [[1, 0], [1, 1, 0]], words)


@about(*RULE)
def test_ties_go_to_the_earlier_layer_and_then_to_the_earlier_triplet():
    layers = [layer_of(4, 4, 2, log_theta=[1.0, 1.0]), layer_of(4, 4, 2, log_theta=[1.0, 1.0])]
    compare(kept(layers, 0.75), [[1, 1], [1, 0]], "four equal log_thetas, budget 3/4")


@about(*RULE)
def test_no_triplet_is_lost_to_rounding():
    layer = layer_of(64, 64, 100, log_theta=[float(-i) for i in range(100)])
    number = sum(kept([layer], 0.29)[0])
    same(number, 29, "100 equal triplets, budget 0.29: how many stay (0.29 x 12800 is 3711.9999... in floats)")
    same(sum(kept([layer], 0.2899)[0]), 28, "100 equal triplets, budget 0.2899: how many stay")


@about(*RULE)
def test_the_budget_is_never_exceeded_and_no_room_is_wasted():
    layers = [layer_of(d, k, 3, log_theta=[d - 5.0, k - 4.0, d - k], seed=d) for d, k in ((3, 9), (7, 2), (5, 5))]
    for budget in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        masks, limit = kept(layers, budget), budget * sum(3 * layer.triplet_size for layer in layers)
        spent = sum(layer.triplet_size * sum(mask) for layer, mask in zip(layers, masks))
        closed = [layer.triplet_size for layer, mask in zip(layers, masks) for value in mask if not value]
        words = f"parameters kept within budget {budget}"
        holds(spent <= limit + 1e-6, words, spent, f"at most {limit:.1f}")
        wasted = f"{spent} of {limit:.1f}, although a closed triplet of {min(closed)} parameters still fits"
        holds(spent + min(closed) > limit, words, wasted, "that no closed triplet fits")


@about(*RULE)
def test_budget_1_keeps_everything_and_almost_0_nothing():
    layers = [layer_of(4, 3, 2), layer_of(6, 5, 1)]
    compare(kept(layers, 1.0), [[1, 1], [1]], "budget 1")
    compare(kept(layers, 1e-6), [[0, 0], [0]], "budget 0.000001")
