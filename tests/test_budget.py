"""The budget: C in closed form, the rule that never overspends, the Lagrangian, the schedule."""

import math

import pytest
import torch
from hypothesis import example, given, note
from hypothesis import strategies as st
from strategies import assert_close, banks, generator, make_layer, row, seeds
from torch import nn

from budget import (
    GateSchedule,
    Lagrangian,
    expected_density,
    freeze_gates,
    kept_density,
    project,
    resample,
    start_gates,
    total_parameters,
)
from hard_concrete import median_gate
from salora import SaLoRALinear, prune

pytestmark = pytest.mark.equation("budget rule")
budgets = st.floats(0.01, 1) | st.sampled_from([0.125, 0.25, 0.5, 0.75, 1.0])


def sizes_of(bank):
    """[(parameters of a triplet, log theta), ...] of all triplets in order, as plain numbers."""
    return [(sum(layer.base.weight.shape), value) for layer in bank for value in layer.gate.log_theta.tolist()]


def mask_of(bank):
    return [bool(g > 0) for layer in bank for g in layer.gate.fixed.tolist()]


# Eq. (11)


@pytest.mark.equation("11")
@given(banks())
def test_expected_density_and_its_gradient_are_eq_11_by_hand(bank):
    """A ratio of sums over the matrices, weighted by parameters: not a sum or a mean of ratios."""
    open_ = [1 / (1 + math.exp(-(x - math.log(0.1 / 1.1)))) for _, x in sizes_of(bank)]
    share = [cost / total_parameters(bank) for cost, _ in sizes_of(bank)]
    C = expected_density(iter(bank))
    assert float(C.detach()) == pytest.approx(sum(p * c for p, c in zip(open_, share)), rel=1e-5), "Eq. (11)"
    assert expected_density({str(i): layer for i, layer in enumerate(bank)}) == C, "layers may come by name"
    C.backward()
    gradient = torch.cat([layer.gate.log_theta.grad for layer in bank]).tolist()
    assert gradient == pytest.approx([p * (1 - p) * c for p, c in zip(open_, share)], rel=1e-3, abs=1e-6)
    assert total_parameters(bank) == sum(cost for cost, _ in sizes_of(bank))


@pytest.mark.equation("projection")
@given(banks(), budgets.filter(lambda b: b < 1), st.sampled_from([-60.0, 0.0, 60.0]))
def test_projection_puts_c_on_the_target_by_one_shift_for_all_however_far_away_they_are(bank, target, away):
    before = [layer.gate.log_theta.detach() + away for layer in bank]
    for layer, values in zip(bank, before):
        layer.gate.log_theta.data = values.clone()
    project(iter(bank), target)
    assert float(expected_density(bank).detach()) == pytest.approx(target, abs=1e-5), "Eq. (11) = b"
    shifts = torch.cat([layer.gate.log_theta.detach() - old for layer, old in zip(bank, before)])
    assert float(shifts.max() - shifts.min()) <= 5e-5, "differences between gates do not change"


@pytest.mark.equation("first odds")
@given(banks(), st.floats(0, 8))
def test_gates_start_at_odds_that_grow_with_energy_per_parameter_and_c_as_in_the_paper(bank, spread):
    start_gates(iter(bank), spread)
    assert float(expected_density(bank).detach()) == pytest.approx(11 / 12, abs=2e-6)
    energies = [(layer.scale * torch.outer(b, a)).square().sum() / layer.triplet_size
                for layer in bank for b, a in zip(layer.B.detach().T, layer.A.detach())]  # fmt: skip
    sizes = torch.stack(energies).sqrt()
    values = torch.cat([layer.gate.log_theta.detach() for layer in bank])
    assert torch.allclose(values - values[0], spread * (sizes / sizes[0]).log(), atol=1e-3)
    if spread == 0:
        assert values.abs().max() < 1e-4, "without spread all start at log theta = 0"


# Noise


@pytest.mark.equation("noise")
@given(banks(), seeds)
def test_noise_is_one_draw_for_all_layers_and_stays_until_it_is_drawn_anew(bank, seed):
    g = generator(seed)
    resample(bank, g)
    u = torch.cat([layer.gate.u for layer in bank])
    assert torch.isfinite(torch.logit(u)).all(), "u in (0, 1)"
    assert len(set(u.tolist())) >= len(u) - 1, "layers share noise"
    resample(bank, g)
    assert not torch.equal(torch.cat([layer.gate.u for layer in bank]), u), "drawn anew, but still the old noise"
    resample(bank, generator(seed))
    assert torch.equal(torch.cat([layer.gate.u for layer in bank]), u), "the same seed, but other noise"


@pytest.mark.equation("noise")
@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_noise_that_falls_on_the_edge_is_moved_inside(monkeypatch, edge):
    layer = make_layer(5, 4, 3, seed=0, dtype=torch.float32)
    monkeypatch.setattr(torch, "rand", lambda n, **kw: torch.full((n,), edge))
    resample([layer])
    assert torch.isfinite(torch.logit(layer.gate.u)).all()


# Which triplets stay


@pytest.mark.parametrize("r,budget,kept", [(100, 0.29, 29), (49, 1 / 49, 1), (7, 6 / 7, 6), (100, 0.2899, 28)])
def test_budget_rule_loses_no_triplet_to_rounding(r, budget, kept):
    layer = make_layer(64, 64, r, seed=0)
    freeze_gates([layer], budget)
    assert int(layer.gate.fixed.sum()) == kept, f"{budget} of {r} triplets"


@given(banks() | banks(ties=True), budgets)
@example(bank=[make_layer(3, 2, 4, seed=1)], budget=1e-6)
@example(bank=[make_layer(3, 2, 4, seed=1)], budget=1 - 1e-16)
def test_budget_rule_never_overspends_wastes_no_room_and_respects_the_order(bank, budget):
    note(f"(cost, log theta) of the triplets: {sizes_of(bank)}")
    freeze_gates(iter(bank), budget)
    costs, mask = [cost for cost, _ in sizes_of(bank)], mask_of(bank)
    total = total_parameters(bank)
    room = max(n for n in range(total + 1) if n / total <= budget)  # what a kept density up to the budget leaves
    for i in sorted(range(len(mask)), key=lambda i: (-sizes_of(bank)[i][1], i)):  # ties: the earlier triplet
        assert mask[i] == (costs[i] <= room), f"triplet {i}: closed only if those before it left too little room"
        room -= costs[i] if mask[i] else 0
    assert room >= 0
    spent = sum(cost for cost, kept in zip(costs, mask) if kept)
    for prune_first in (False, True):  # densities are counted against the rank at creation
        for layer in bank if prune_first else []:
            prune(layer)
        assert kept_density(bank) == pytest.approx(spent / total_parameters(bank)) == float(expected_density(bank))


@pytest.mark.equation("median rule", "11")
@given(banks(), budgets, st.sampled_from(["budget", "median"]))
def test_survivors_are_worth_one_or_their_median_and_count_whole_however_little_that_is(bank, budget, rule):
    freeze_gates(bank, budget, rule, survivors="one")
    ones = [layer.gate.fixed for layer in bank]
    assert all(set(fixed.tolist()) <= {0.0, 1.0} for fixed in ones)
    if rule == "median":  # log theta > -tau log(zeta / -gamma): open more often than closed
        assert mask_of(bank) == [x > -math.log(11) for _, x in sizes_of(bank)]
    kept = kept_density(bank)
    freeze_gates(bank, budget, rule, survivors="median")
    for layer, mask in zip(bank, ones):
        assert_close(layer.gate.fixed, mask * median_gate(layer.gate.log_theta).detach())
        assert not layer.gate.fixed.requires_grad, "a fixed gate is a constant"
    positive = sum(cost for (cost, _), kept in zip(sizes_of(bank), mask_of(bank)) if kept) / total_parameters(bank)
    assert kept_density(bank) == pytest.approx(positive) == float(expected_density(bank)) and positive <= kept + 1e-9


REFUSED = [  # (call, error)
    *[(lambda b=b: freeze_gates([make_layer(2, 2, 1, seed=0)], b), f"budget .*{b}") for b in (0, 1.5, math.nan)],
    (lambda: Lagrangian(-0.5), "budget must be in .*-0.5"),
    *[(lambda f=f: f([]), "so there is no density: call adapt") for f in (expected_density, kept_density)],
    (lambda: freeze_gates([make_layer(2, 2, 1, seed=0)], 0.5, rule="best"), "rule.*best"),
    (lambda: freeze_gates([make_layer(2, 2, 1, seed=0)], 0.5, survivors="two"), "survivors.*two"),
    *[(lambda w=w: GateSchedule(100, *w), "0 <= start <= end <= 1") for w in ((-0.1, 0.5), (0.5, 0.4), (0.5, 1.1))],
]


@pytest.mark.equation("budget rule", "median rule", "11", "12", "phases")
def test_impossible_budgets_rules_and_windows_are_refused():
    for call, match in REFUSED:
        with row(match), pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_log_theta_that_is_not_finite_is_refused_where_triplets_are_chosen(value):
    layer = SaLoRALinear(nn.Linear(5, 4), 3, 16)
    layer.gate.log_theta.data[1] = value
    project([layer], 0.5)  # must not turn it into a number
    with pytest.raises(FloatingPointError, match="log_theta is not finite"):
        freeze_gates([layer], 0.5)


# Eq. (12)


@pytest.mark.equation("12")
@given(st.floats(0, 1), st.floats(0.05, 1), st.floats(0, 9))
def test_quadratic_penalty_is_eq_12(C, target, lam):
    lagrangian = Lagrangian(target)
    assert lagrangian.lam.tolist() == [0] and lagrangian.optimizer.param_groups[0]["lr"] == 0.01, "at the start"
    lagrangian.lam.data.fill_(lam)
    assert float(lagrangian(torch.tensor(C)).detach()) == pytest.approx(lam * (C - target) ** 2, abs=1e-5)


@pytest.mark.equation("12")
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.sampled_from([torch.optim.Adam, torch.optim.SGD])
)
def test_lambda_climbs_the_penalty_and_is_never_negative(densities_seen, Optimizer):
    lagrangian = Lagrangian(0.5, 0.3, Optimizer)
    by_hand = 0.3 * sum((C - 0.5) ** 2 for C in densities_seen)
    for C in densities_seen:
        before = lagrangian.lam.detach().clone()
        lagrangian(torch.tensor(C)).backward()
        lagrangian.ascend()
        assert lagrangian.lam.grad is None or not lagrangian.lam.grad.any(), "a gradient is left for the next step"
        assert (lagrangian.lam >= before).all(), "(C - b)^2 is never negative: lambda only grows"
        assert abs(C - 0.5) < 0.01 or (lagrangian.lam > 0).all(), "where C is not b, lambda climbs"
    if Optimizer is torch.optim.SGD:
        assert float(lagrangian.lam.detach()) == pytest.approx(by_hand, rel=1e-4), "lambda <- lambda + lr (C - b)^2"
    lagrangian.lam.data.zero_()
    lagrangian.lam.grad = torch.tensor([-1.0])  # no C does this; a penalty of another form could
    lagrangian.ascend()
    assert (lagrangian.lam >= 0).all(), "lambda is never negative"


# The schedule


@pytest.mark.equation("phases")
@given(st.integers(0, 500), st.floats(0, 1), st.floats(0, 1))
@example(total=10, a=0.5, b=0.5)
@example(total=10, a=0.0, b=1.0)
def test_phases_partition_the_steps_in_order(total, a, b):
    schedule, papers = GateSchedule(total, min(a, b), max(a, b)), GateSchedule(1000)
    assert (papers.T_start, papers.T_end) == (200, 500), "App. B: 0.2 T and 0.5 T"
    phases = [schedule.phase(step) for step in range(total)]
    assert phases == sorted(phases, key=["before", "window", "after"].index)
    assert phases.count("window") == schedule.window_steps == round(max(a, b) * total) - round(min(a, b) * total)
    assert phases.count("before") == schedule.T_start == round(min(a, b) * total)


@pytest.mark.equation("phases")
@given(st.integers(2, 200), st.integers(0, 100), st.floats(0.05, 1))
@example(window=40, start=10, budget=0.95)  # above 11/12 there is nothing to come down from
def test_the_target_of_the_schedule_falls_from_c_of_fresh_gates_to_b_in_the_window(window, start, budget):
    total = start + window + 10
    schedule = GateSchedule(total, start / total, (start + window) / total)
    targets = [schedule.target_at(step, budget) for step in range(schedule.T_start, schedule.T_end)]
    top = max(budget, 11 / 12)
    line = [top - (top - budget) * (i + 1) / window for i in range(window)]
    assert targets == pytest.approx(line, abs=1e-9), "a straight line"
    assert targets[-1] == budget
