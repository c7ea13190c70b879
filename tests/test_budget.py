"""The budget: closed-form C, the rule that never overspends, the controller, the schedule."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, note
from hypothesis import strategies as st
from strategies import assert_close, banks, generator, layers, make_layer, seeds
from torch import nn

from budget import (
    GateSchedule,
    Lagrangian,
    Recipe,
    expected_density,
    freeze_gates,
    kept_density,
    project,
    resample,
    start_gates,
    total_parameters,
)
from hard_concrete import sample_gate
from salora import SaLoRALinear, prune

OPTIMIZERS = [torch.optim.Adam, torch.optim.SGD]
densities = st.floats(0.01, 1) | st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0])


def sizes_of(bank):
    """[(parameters of a triplet, log theta), ...] of all triplets in order, as plain numbers."""
    return [(sum(layer.base.weight.shape), value) for layer in bank for value in layer.gate.log_theta.tolist()]


def mask_of(bank):
    return [bool(g > 0) for layer in bank for g in layer.gate.fixed.tolist()]


# Eq. (11)


@pytest.mark.equation("11")
@given(banks())
def test_expected_density_is_eq_11_by_hand(bank):
    """A ratio of sums over the matrices, weighted by parameters: not a sum or a mean of ratios."""
    spent = sum(cost / (1 + math.exp(-(x - math.log(0.1 / 1.1)))) for cost, x in sizes_of(bank))
    total = sum(cost for cost, _ in sizes_of(bank))
    assert float(expected_density(iter(bank)).detach()) == pytest.approx(spent / total, rel=1e-5), "Eq. (11)"


@pytest.mark.equation("11")
@given(banks(), seeds)
def test_expected_density_is_the_mean_of_what_samples_keep(bank, seed):
    """E||G||_0 over a stratified grid of noise: each gate sees every cell once, in an order of its own."""
    n, g = 4000, generator(seed)
    kept = torch.zeros(n, dtype=torch.float64)
    for layer in bank:
        for x in layer.gate.log_theta.detach().double():
            u = (torch.randperm(n, generator=g) + 0.5) / n
            kept += (sample_gate(x, u.double()) > 0) * float(layer.triplet_size)
    share = float(kept.mean()) / total_parameters(bank)
    assert float(expected_density(bank).detach()) == pytest.approx(share, abs=2 / n)


@pytest.mark.equation("11")
@pytest.mark.parametrize("density_of", [expected_density, kept_density])
def test_without_layers_there_is_no_density(density_of):
    with pytest.raises(ValueError, match="call adapt"):
        density_of([])


@pytest.mark.equation("11")
@pytest.mark.parametrize("density_of", [expected_density, kept_density])
@given(banks())
def test_layers_may_come_by_name(density_of, bank):
    assert density_of({str(i): layer for i, layer in enumerate(bank)}) == density_of(bank)


@pytest.mark.equation("11")
@given(banks(), seeds)
def test_the_order_of_layers_does_not_matter_to_densities(bank, seed):
    shuffled = random.Random(seed).sample(bank, len(bank))
    assert float(expected_density(bank).detach()) == pytest.approx(float(expected_density(shuffled).detach()), rel=1e-5)
    assert kept_density(bank) == pytest.approx(kept_density(shuffled))


@pytest.mark.equation("11")
def test_fresh_roberta_shapes_cost_what_the_paper_says():
    for d, blocks, budgeted, gates in ((768, 12, 1_327_104, 576), (1024, 24, 3_538_944, 1152)):
        with torch.device("meta"):
            shapes = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
            bank = [SaLoRALinear(nn.Linear(k, m), 8, 16) for m, k in shapes * blocks]
        assert total_parameters(bank) == budgeted, "1.33 M and 3.54 M in the paper"
        assert sum(layer.r for layer in bank) == gates
    bank = [SaLoRALinear(nn.Linear(k, m), 8, 16) for m, k in ((12, 12), (48, 12), (12, 48))]
    assert float(expected_density(bank).detach()) == 1, "held open until the window"
    for layer in bank:
        layer.gate.release()
    assert float(expected_density(bank).detach()) == pytest.approx(11 / 12, abs=1e-6), "Fig. 6 starts at 0.92"


@pytest.mark.equation("projection")
@given(banks(), densities.filter(lambda density: density < 1))
def test_projection_puts_c_on_the_target_by_one_shift_for_all(bank, density):
    before = [layer.gate.log_theta.detach().clone() for layer in bank]
    project(iter(bank), density)
    assert float(expected_density(bank).detach()) == pytest.approx(density, abs=2e-6), "Eq. (11) = b"
    shifts = torch.cat([layer.gate.log_theta.detach() - old for layer, old in zip(bank, before)])
    assert float(shifts.max() - shifts.min()) <= 2e-5, "differences between gates do not change"


@pytest.mark.equation("projection")
@given(banks(), densities.filter(lambda density: density < 1), st.sampled_from([-60.0, 60.0]))
def test_projection_reaches_gates_that_are_far_away(bank, density, away):
    for layer in bank:
        layer.gate.log_theta.data += away
    project(bank, density)
    assert float(expected_density(bank).detach()) == pytest.approx(density, abs=1e-5)


@pytest.mark.equation("budget rule")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_theta_that_is_not_finite_is_refused_where_triplets_are_chosen(value):
    layer = SaLoRALinear(nn.Linear(5, 4), 3, 16)
    layer.gate.log_theta.data[1] = value
    project([layer], 0.5)  # must not turn it into a number
    with pytest.raises(FloatingPointError, match="log_theta is not finite"):
        freeze_gates([layer], 0.5)


@pytest.mark.equation("first odds")
@given(banks(), st.floats(0, 8))
def test_gates_start_at_odds_that_grow_with_energy_per_parameter_and_c_as_in_the_paper(bank, spread):
    start_gates(iter(bank), spread)
    assert float(expected_density(bank).detach()) == pytest.approx(11 / 12, abs=2e-6)
    energies = [layer.B.square().sum(0) * layer.A.square().sum(1) / layer.triplet_size for layer in bank]
    sizes = torch.cat(energies).detach().sqrt()
    values = torch.cat([layer.gate.log_theta.detach() for layer in bank])
    expected = spread * (sizes / sizes[0]).log()
    assert torch.allclose(values - values[0], expected, atol=1e-3)
    if spread == 0:
        assert values.abs().max() < 1e-4, "without spread all start at log theta = 0"


@pytest.mark.equation("first odds")
def test_gates_of_untrained_layers_start_alike():
    layer = SaLoRALinear(nn.Linear(5, 4), 3, 16)
    start_gates([layer], 4.0)
    assert layer.gate.log_theta.abs().max() < 1e-4


@pytest.mark.equation("7", "11")
def test_gradient_reaches_log_theta_through_the_sample_and_through_c():
    layer = make_layer(4, 3, 3, seed=1)
    layer.gate.log_theta.data.zero_()
    layer.gate.u.fill_(0.5)
    layer(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
    through_sample = layer.gate.log_theta.grad.clone()
    layer.gate.log_theta.grad = None
    expected_density([layer]).backward()
    assert through_sample.all() and (layer.gate.log_theta.grad > 0).all()


# Noise


@pytest.mark.equation("noise")
@given(banks(), seeds)
def test_noise_is_one_draw_for_all_layers_and_stays_inside_the_unit_interval(bank, seed):
    resample(bank, generator(seed))
    u = torch.cat([layer.gate.u for layer in bank])
    assert 0 < float(u.min()) and float(u.max()) < 1 and torch.isfinite(torch.logit(u)).all(), "u in (0, 1)"
    resample(bank, generator(seed))
    assert torch.equal(torch.cat([layer.gate.u for layer in bank]), u), "the same seed, but other noise"
    for one, other in zip(bank, bank[1:]):
        n = min(one.r, other.r)
        assert n == 1 or not torch.equal(one.gate.u[:n], other.gate.u[:n]), "two layers never share noise"


@pytest.mark.equation("noise")
def test_noise_changes_only_when_it_is_drawn_anew():
    layer = make_layer(4, 4, 6, seed=1, dtype=torch.float32)
    layer.gate.log_theta.data.zero_()
    x, g = torch.randn(2, 4), generator(5)
    resample([layer], g)
    first, same = layer(x), layer(x)
    resample([layer], g)
    assert torch.equal(first, same), "the same noise, until it is drawn anew"
    assert not torch.equal(first, layer(x)), "drawn anew, but still the old noise"


# Which triplets stay


@pytest.mark.equation("budget rule")
@pytest.mark.parametrize("r,density,kept", [(100, 0.29, 29), (49, 1 / 49, 1), (7, 6 / 7, 6), (100, 0.2899, 28)])
def test_budget_rule_loses_no_triplet_to_rounding(r, density, kept):
    layer = make_layer(64, 64, r, seed=0)
    freeze_gates([layer], density)
    assert int(layer.gate.fixed.sum()) == kept, f"{density} of {r} triplets"


@pytest.mark.equation("budget rule")
@given(banks() | banks(ties=True), densities)
def test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order(bank, density):
    note(f"(cost, log theta) of the triplets: {sizes_of(bank)}")
    freeze_gates(iter(bank), density)
    costs, mask = [cost for cost, _ in sizes_of(bank)], mask_of(bank)
    limit = math.floor(Fraction(str(density)) * total_parameters(bank) + Fraction(1, 10**6))  # exact but for rounding
    spent = sum(cost for cost, kept in zip(costs, mask) if kept)
    assert spent <= limit, f"kept {spent} parameters, but should keep at most {limit}"
    assert all(spent + cost > limit for cost, kept in zip(costs, mask) if not kept), "a closed triplet would still fit"

    order = sorted(range(len(mask)), key=lambda i: (-sizes_of(bank)[i][1], i))  # ties: the earlier triplet
    room = limit
    for i in order:  # a triplet is closed only if those before it in the order left too little room
        assert mask[i] == (costs[i] <= room), f"triplet {i} of {order}"
        room -= costs[i] if mask[i] else 0
    assert kept_density(bank) == pytest.approx(spent / total_parameters(bank))


@pytest.mark.equation("budget rule")
@given(banks(), densities, seeds)
def test_without_ties_the_budget_rule_does_not_depend_on_the_order_of_layers(bank, density, seed):
    values = [value for _, value in sizes_of(bank)]
    assume(len(set(values)) == len(values))
    freeze_gates(bank, density)
    before = [layer.gate.fixed.clone() for layer in bank]
    freeze_gates(random.Random(seed).sample(bank, len(bank)), density)
    assert all(torch.equal(a, layer.gate.fixed) for a, layer in zip(before, bank))


@pytest.mark.equation("budget rule")
@given(banks())
def test_budget_rule_at_density_one_keeps_everything_and_at_almost_zero_nothing(bank):
    freeze_gates(bank, 1.0)
    assert all(mask_of(bank)) and kept_density(bank) == pytest.approx(1) == float(expected_density(bank))
    freeze_gates(bank, 1e-6)
    assert not any(mask_of(bank)) and kept_density(bank) == 0


@pytest.mark.equation("median rule")
@given(banks(), densities)
def test_median_rule_keeps_the_gates_that_are_open_more_often_than_closed(bank, density):
    freeze_gates(bank, density, rule="median")
    threshold = -math.log(11)
    assert mask_of(bank) == [x > threshold for _, x in sizes_of(bank)], "log theta > -tau log(zeta / -gamma)"


@pytest.mark.equation("budget rule", "median rule")
@given(banks(), densities, st.sampled_from(["budget", "median"]))
def test_survivors_are_worth_one_or_their_median(bank, density, rule):
    freeze_gates(bank, density, rule, survivors="one")
    ones = [layer.gate.fixed for layer in bank]
    assert all(set(fixed.tolist()) <= {0.0, 1.0} for fixed in ones)
    freeze_gates(bank, density, rule, survivors="median")
    for layer, mask in zip(bank, ones):
        u = torch.full_like(layer.gate.u, 0.5)
        assert_close(layer.gate.fixed, mask * sample_gate(layer.gate.log_theta, u).detach())
        assert not layer.gate.fixed.requires_grad, "a fixed gate is a constant"


@pytest.mark.equation("11")
@given(banks(), densities)
def test_densities_are_counted_against_the_rank_at_creation(bank, density):
    freeze_gates(bank, density)
    before, expected = kept_density(bank), float(expected_density(bank))
    for layer in bank:
        prune(layer)
    assert kept_density(bank) == pytest.approx(before) and float(expected_density(bank)) == pytest.approx(expected)
    assert sum(layer.r * layer.triplet_size for layer in bank) == round(before * total_parameters(bank))


@pytest.mark.equation("budget rule", "12")
@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan])
def test_impossible_densities_are_refused(density):
    for use in (lambda: freeze_gates([make_layer(2, 2, 1, seed=0)], density), lambda: Lagrangian(density)):
        with pytest.raises(ValueError, match=f"density.*{density}"):
            use()


@pytest.mark.equation("budget rule", "median rule")
def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="rule.*best"):
        freeze_gates([make_layer(2, 2, 1, seed=0)], 0.5, rule="best")
    with pytest.raises(ValueError, match="survivors.*two"):
        freeze_gates([make_layer(2, 2, 1, seed=0)], 0.5, survivors="two")
    for name, value in (("controller", "pid"), ("rule", "best"), ("survivors", "two")):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            Recipe(**{name: value})
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        Recipe(window=(0.6, 0.5))


# Eq. (12)


@pytest.mark.equation("12")
@given(st.floats(0, 1), st.floats(0.05, 1), st.floats(0, 9))
def test_quadratic_penalty_is_eq_12(C, target, lam):
    lagrangian = Lagrangian(target)
    lagrangian.lam.data.fill_(lam)
    assert float(lagrangian(torch.tensor(C)).detach()) == pytest.approx(lam * (C - target) ** 2, abs=1e-5)


@pytest.mark.equation("phases")
@given(st.integers(2, 200), st.integers(0, 100), st.floats(0.05, 1))
@example(window=40, start=10, density=0.95)  # above 11/12 there is nothing to come down from
def test_the_target_of_the_schedule_falls_from_c_of_fresh_gates_to_b_in_half_of_the_window(window, start, density):
    total = start + window + 10
    schedule = GateSchedule(total, start / total, (start + window) / total)
    targets = [schedule.target_at(step, density) for step in range(schedule.T_start, schedule.T_end)]
    top = max(density, 11 / 12)
    line = [max(density, top - (top - density) * 2 * (i + 1) / window) for i in range(window)]
    assert targets == pytest.approx(line, abs=1e-9), "a straight line, then b"
    assert targets[-1] == density


@pytest.mark.equation("12")
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.sampled_from(OPTIMIZERS))
def test_lambda_climbs_the_penalty_and_is_never_negative(densities_seen, Optimizer):
    lagrangian = Lagrangian(0.5, 0.3, Optimizer)
    for C in densities_seen:
        before = lagrangian.lam.detach().clone()
        lagrangian(torch.tensor(C)).backward()
        lagrangian.ascend()
        assert (lagrangian.lam >= 0).all(), "lambda is never negative"
        assert lagrangian.lam.grad is None or not lagrangian.lam.grad.any(), "a gradient is left for the next step"
        assert (lagrangian.lam >= before).all(), "(C - b)^2 is never negative: lambda only grows"
        assert abs(C - 0.5) < 0.01 or (lagrangian.lam > 0).all(), "where C is not b, lambda climbs"


@pytest.mark.equation("12")
def test_ascent_is_projected_onto_lambda_of_at_least_0():
    """(C - b)^2 never pushes it below; a penalty of another form could."""
    lagrangian = Lagrangian(0.5)
    lagrangian.lam.grad = torch.tensor([-1.0])
    lagrangian.ascend()
    assert lagrangian.lam.tolist() == [0]


@pytest.mark.equation("12")
def test_lambda_starts_at_zero_and_ascends_by_the_papers_step():
    lagrangian = Lagrangian(0.5)
    assert lagrangian.lam.tolist() == [0] and lagrangian.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.equation("budget rule", "median rule")
def test_names_of_rules_may_come_from_a_command_line():
    """A string from there is equal to the one in the code, but another object."""
    one, median = (name[:1] + name[1:] for name in ("one", "median"))
    layer = make_layer(2, 2, 3, seed=0)
    layer.gate.log_theta.data = torch.tensor([0.5, -9.0, 0.5], dtype=torch.float64)
    freeze_gates([layer], 0.5, median, one)
    assert layer.gate.fixed.tolist() == [1, 0, 1]


@pytest.mark.equation("12")
def test_literal_sgd_ascent_is_one_gradient_step():
    lagrangian = Lagrangian(0.5, 0.1, torch.optim.SGD)
    lagrangian(torch.tensor(0.9)).backward()
    lagrangian.ascend()
    assert float(lagrangian.lam.detach()) == pytest.approx(0.1 * 0.4**2), "lambda <- lambda + lr (C - b)^2"


@pytest.mark.equation("12")
@pytest.mark.parametrize("target", [0.125, 0.25, 0.5, 0.75, 0.9])
def test_the_lagrangian_drives_c_to_the_target_on_a_bare_problem(target):
    """No task, only gates of unequal cost: gradient descent on log theta, ascent on lambda."""
    bank = [make_layer(d, k, 8, seed=d, dtype=torch.float32) for d, k in ((4, 4), (16, 4), (4, 16))]
    for layer in bank:
        layer.gate.log_theta.data.zero_()
    lagrangian = Lagrangian(target, lr=0.05)
    descent = torch.optim.Adam([layer.gate.log_theta for layer in bank], lr=0.05)
    for _ in range(300):
        lagrangian(expected_density(bank)).backward()
        descent.step()
        descent.zero_grad()
        lagrangian.ascend()
    C = float(expected_density(bank).detach())
    assert abs(C - target) <= 0.02, f"C is {C:.3f}, but should be {target}"


# The schedule


@pytest.mark.equation("phases")
@given(st.integers(0, 500), st.floats(0, 1), st.floats(0, 1))
def test_phases_partition_the_steps_in_order(total, a, b):
    schedule = GateSchedule(total, min(a, b), max(a, b))
    phases = [schedule.phase(step) for step in range(total)]
    assert phases == sorted(phases, key=["open", "window", "frozen"].index)
    assert phases.count("window") == schedule.window == schedule.T_end - schedule.T_start
    assert phases.count("open") == schedule.T_start and 0 <= schedule.T_start <= schedule.T_end <= total


@pytest.mark.equation("phases")
def test_schedule_is_the_papers_by_default_and_can_be_empty_or_everything():
    schedule = GateSchedule(1000)
    assert (schedule.T_start, schedule.T_end) == (200, 500), "App. B: 0.2 T and 0.5 T"
    assert GateSchedule(10, 0.5, 0.5).window == 0 and GateSchedule(10, 0, 1).window == 10


@pytest.mark.equation("phases")
@pytest.mark.parametrize("window", [(-0.1, 0.5), (0.5, 0.4), (0.5, 1.1)])
def test_impossible_windows_are_refused(window):
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        GateSchedule(100, *window)


@pytest.mark.equation("11")
@given(layers())
def test_a_free_gate_counts_by_probability_and_a_fixed_one_by_what_it_is(layer):
    layer.gate.fix(torch.tensor([float(j % 2) for j in range(layer.r)]))
    assert float(expected_density([layer])) == pytest.approx((layer.r // 2) / layer.r)
