"""The gate against its own distribution: closed forms on a stratified grid of noise, never by the luck of a draw."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import log_thetas, taus

from hard_concrete import (
    GAMMA,
    TAU,
    ZETA,
    HardConcreteGate,
    mean_gate,
    median_gate,
    prob_one,
    prob_open,
    sample_gate,
)

pytestmark = pytest.mark.equation("gate")
N = 20_000
GRID = (torch.arange(N, dtype=torch.float64) + 0.5) / N  # u = (i + 1/2) / N: every quantile once


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.equation("7")
@given(st.floats(-30, 30), st.floats(1e-6, 1 - 1e-6), taus)
def test_sample_matches_eq_7_written_out(log_theta, u, tau):
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_theta) / tau))
    expected = min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))
    assert float(sample_gate(f64(log_theta), f64(u), tau)) == pytest.approx(expected, abs=1e-9), "Eq. (7)"


@pytest.mark.equation("8", "P(g = 1)", "median", "E[g]")
@given(log_thetas, taus)
def test_probabilities_median_and_mean_match_a_stratified_grid(log_theta, tau):
    l = f64([log_theta, -log_theta])
    g = sample_gate(l[:, None], GRID, tau)  # (2, N), each row sorted
    open_, one = (g > 0).double().mean(1), (g >= 1).double().mean(1)
    assert (open_ - prob_open(l, tau)).abs().max() <= 1 / N, "sample_gate is > 0 at another rate than Eq. (8) says"
    assert (one - prob_one(l, tau)).abs().max() <= 1 / N, "sample_gate is 1 at another rate than P(g = 1) says"
    median = median_gate(l, tau)
    assert (g[:, N // 2 - 1] <= median).all() and (median <= g[:, N // 2]).all(), "Eq. (7) at u = 1/2"
    assert (g.mean(1) - mean_gate(l, tau)).abs().max() <= 2 / N, "E[g]"  # g is monotone with range 1


@pytest.mark.equation("7")
def test_clamped_samples_have_no_gradient_and_open_ones_have():
    l = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sample_gate(l, f64([0.01, 0.5, 0.99])).sum().backward()
    assert l.grad[0] == 0 and l.grad[1] > 0 and l.grad[2] == 0


@pytest.mark.equation("E[g]")
@given(log_thetas.filter(lambda x: abs(x) > 0.05))
def test_mean_gate_at_tau_1_has_a_closed_form(log_theta):
    """P(g > t) = 1 / (1 + e^-l (t - gamma) / (zeta - t)) is a ratio of linear functions of t: integrate by hand."""
    e = math.exp(-log_theta)
    a, b = ZETA - e * GAMMA, e - 1  # P(g > t) = (zeta - t) / (a + b t)
    integral = -1 / b + (ZETA + a / b) / b * math.log((a + b) / a)
    assert abs(float(mean_gate(f64(log_theta))) - integral) < 1e-9 * max(1, 1 / b**2)


@pytest.mark.equation("8")
def test_constants_are_the_papers_and_a_fresh_gate_is_open_with_probability_11_in_12():
    assert (TAU, GAMMA, ZETA) == (1.0, -0.1, 1.1), "App. B: tau = 1, gamma = -0.1, zeta = 1.1"
    assert torch.allclose(prob_open(HardConcreteGate(3).log_theta), torch.full((3,), 11 / 12), atol=1e-6)


@pytest.mark.equation("7", "8", "P(g = 1)", "E[g]")
@given(st.floats(-1.5, 1.5), st.floats(0.35, 0.65), st.floats(0.7, 1.5))
def test_gradients_agree_with_finite_differences_away_from_the_kinks(log_theta, u, tau):
    l = f64([log_theta]).requires_grad_()
    if 0.02 < float(sample_gate(l, f64(u), tau).detach()) < 0.98:
        assert torch.autograd.gradcheck(lambda x: sample_gate(x, f64(u), tau), l)
    for f in (prob_open, prob_one, mean_gate):
        assert torch.autograd.gradcheck(lambda x, f=f: f(x, tau), l), f.__name__


# The module


def test_a_free_gate_samples_in_train_mode_and_takes_the_median_in_eval_mode():
    gate = HardConcreteGate(4)
    gate.release()
    assert torch.allclose(gate.train()(), gate.eval()()), "u starts at 1/2, the median"
    gate.log_theta.data = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    gate.u.copy_(torch.tensor([0.2, 0.3, 0.6, 0.9]))
    assert torch.equal(gate.train()(), sample_gate(gate.log_theta, gate.u)), "train mode: Eq. (7) with the noise in u"
    assert torch.equal(gate.settled(), median_gate(gate.log_theta)), "settled gates ignore the noise, in either mode"
    assert torch.equal(gate.eval()(), median_gate(gate.log_theta)), "eval mode: the median"


def test_a_gate_is_held_then_free_then_fixed_and_log_theta_trains_only_while_it_is_free():
    """An optimizer made from what requires a gradient must not collect log_theta before the window opens."""
    gate = HardConcreteGate(3)
    assert gate.state == "held" and not gate.log_theta.requires_grad
    assert torch.equal(gate.train()(), torch.ones(3)) and torch.equal(gate.open_probability(), torch.ones(3))
    gate.release()
    assert gate.state == "free" and gate.log_theta.requires_grad
    assert torch.equal(gate.open_probability(), prob_open(gate.log_theta))
    gate.log_theta.grad = torch.ones(3)
    gate.fix(torch.tensor([1.0, 0.0, 0.5], requires_grad=True) * 1)
    assert not gate.fixed.requires_grad, "a constant, whatever it was computed from"
    assert gate.state == "fixed" and not gate.log_theta.requires_grad and gate.log_theta.grad is None
    assert gate.train()().tolist() == gate.eval()().tolist() == [1, 0, 0.5]
    assert gate.open_probability().tolist() == [1, 0, 1]
    gate.hold_open()
    assert gate.state == "held" and gate().tolist() == [1, 1, 1]


def in_state(state):
    """Five gates in this state, with random log_theta."""
    gate = HardConcreteGate(5)
    gate.log_theta.data.normal_()
    if state != "held":
        gate.release()
    if state == "fixed":
        gate.fix(torch.tensor([1.0, 0, 1, 0.5, 0]))
    return gate


@pytest.mark.parametrize("before", ["held", "free", "fixed"])
@pytest.mark.parametrize("state", ["held", "free", "fixed"])
def test_a_gates_state_loads_into_any_other_whatever_its_size_and_state(state, before):
    gate, other = in_state(state), in_state(before)
    other.keep(torch.tensor([0, 3]))
    log_theta = other.log_theta
    other.load_state_dict(gate.state_dict())
    assert other.state == state and torch.equal(other.eval()(), gate.eval()())
    assert other.log_theta is log_theta and len(log_theta) == len(other.u) == 5
    assert torch.equal(other.train()(), other.settled()), "noise is 1/2, the median, until it is drawn anew"
    assert set(gate.state_dict()) == {"log_theta"} | ({state} - {"free"}), "noise is not part of a gate's state"


def test_a_printed_gate_shows_its_state():
    for state, words in (("held", "held, 5 of them"), ("free", "free, log_theta -"), ("fixed", "fixed, 3 of them")):
        assert f"5 gates, {words}" in str(in_state(state))
    assert "2 gates" in str(HardConcreteGate(2).to("meta"))
