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

N = 20_000
GRID = (torch.arange(N, dtype=torch.float64) + 0.5) / N  # u = (i + 1/2) / N: every quantile once


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


@pytest.mark.equation("7")
def test_constants_are_the_papers():
    assert (TAU, GAMMA, ZETA) == (1.0, -0.1, 1.1), "App. B: tau = 1, gamma = -0.1, zeta = 1.1"


@pytest.mark.equation("7")
@given(st.floats(-30, 30), st.floats(1e-6, 1 - 1e-6), taus)
def test_sample_matches_eq_7_written_out(log_theta, u, tau):
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_theta) / tau))
    expected = min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))
    assert float(sample_gate(f64(log_theta), f64(u), tau)) == pytest.approx(expected, abs=1e-9), "Eq. (7)"


@pytest.mark.equation("7")
@given(log_thetas, st.floats(1e-3, 1 - 1e-3), taus)
def test_sample_is_symmetric_under_flipping_log_theta_and_noise(log_theta, u, tau):
    """gamma + zeta = 1 and the logistic is odd: g(-l, 1 - u) = 1 - g(l, u)."""
    g = sample_gate(f64(log_theta), f64(u), tau)
    flipped = sample_gate(f64(-log_theta), 1 - f64(u), tau)
    assert float(g + flipped) == pytest.approx(1, abs=1e-9)


@pytest.mark.equation("7")
def test_clamped_samples_have_no_gradient_and_open_ones_have():
    l = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    sample_gate(l, f64([0.01, 0.5, 0.99])).sum().backward()
    assert l.grad[0] == 0 and l.grad[1] > 0 and l.grad[2] == 0


@pytest.mark.equation("8")
@given(log_thetas, taus)
def test_open_probability_matches_eq_8_on_a_stratified_grid(log_theta, tau):
    share = (sample_gate(f64(log_theta), GRID, tau) > 0).double().mean()
    assert abs(share - prob_open(f64(log_theta), tau)) <= 1 / N, "sample_gate is > 0 at another rate than Eq. (8) says"


@pytest.mark.equation("P(g = 1)")
@given(log_thetas, taus)
def test_probability_of_one_matches_the_grid(log_theta, tau):
    share = (sample_gate(f64(log_theta), GRID, tau) >= 1).double().mean()
    assert abs(share - prob_one(f64(log_theta), tau)) <= 1 / N, "sample_gate is 1 at another rate than P(g = 1) says"


@pytest.mark.equation("median")
@given(log_thetas, taus)
def test_median_gate_is_the_middle_sample(log_theta, tau):
    middle = sample_gate(f64(log_theta), GRID, tau).median()  # the (N/2 - 1)-th: half a cell below u = 1/2
    above = sample_gate(f64(log_theta), GRID[N // 2], tau)
    assert middle <= median_gate(f64(log_theta), tau) <= above, "the median gate is Eq. (7) at u = 1/2"


@pytest.mark.equation("E[g]")
@given(log_thetas, taus)
def test_mean_gate_matches_the_mean_over_the_grid(log_theta, tau):
    g = sample_gate(f64(log_theta), GRID, tau)
    assert abs(g.mean() - mean_gate(f64(log_theta), tau)) <= 2 / N, "E[g]"  # g is monotone with range 1


@pytest.mark.equation("E[g]")
@given(log_thetas.filter(lambda x: abs(x) > 0.05))
def test_mean_gate_at_tau_1_has_a_closed_form(log_theta):
    """P(g > t) = 1 / (1 + e^-l (t - gamma) / (zeta - t)) is a ratio of linear functions of t: integrate by hand."""
    e = math.exp(-log_theta)
    a, b = ZETA - e * GAMMA, e - 1  # P(g > t) = (zeta - t) / (a + b t)
    integral = -1 / b + (ZETA + a / b) / b * math.log((a + b) / a)
    assert abs(float(mean_gate(f64(log_theta))) - integral) < 1e-9 * max(1, 1 / b**2)


@pytest.mark.equation("8", "P(g = 1)")
@given(log_thetas, taus)
def test_open_probability_of_log_theta_and_one_probability_of_its_negative_add_up(log_theta, tau):
    """The same symmetry for the distribution: P(g = 0 | l) = P(g = 1 | -l)."""
    assert float(prob_open(f64(log_theta), tau) + prob_one(f64(-log_theta), tau)) == pytest.approx(1, abs=1e-12)


@pytest.mark.equation("7", "8", "P(g = 1)", "median", "E[g]")
@given(st.floats(-6, 6), st.floats(0.01, 3), taus, st.floats(1e-3, 1 - 1e-3))
def test_everything_grows_with_log_theta(log_theta, step, tau, u):
    low, high = f64(log_theta), f64(log_theta + step)
    assert prob_open(low, tau) < prob_open(high, tau), "P(g > 0) grows with log theta"
    assert prob_one(low, tau) < prob_one(high, tau)
    assert mean_gate(low, tau) < mean_gate(high, tau)
    assert median_gate(low, tau) <= median_gate(high, tau)
    assert sample_gate(low, f64(u), tau) <= sample_gate(high, f64(u), tau)


@pytest.mark.equation("median", "8")
@given(log_thetas, taus)
def test_median_is_positive_exactly_where_open_is_likelier_than_closed(log_theta, tau):
    threshold = -tau * math.log(ZETA / -GAMMA)
    if abs(log_theta - threshold) > 1e-9:
        likely = bool(prob_open(f64(log_theta), tau) > 0.5)
        assert bool(median_gate(f64(log_theta), tau) > 0) == likely == (log_theta > threshold)


@pytest.mark.equation("8")
def test_a_fresh_gate_is_open_with_probability_11_in_12():
    assert float(prob_open(f64(0.0))) == pytest.approx(11 / 12, abs=1e-7)
    assert float(prob_open(HardConcreteGate(3).log_theta.detach()).mean()) == pytest.approx(11 / 12, abs=1e-6)


@pytest.mark.equation("E[g]")
def test_mean_of_a_gate_that_is_closed_half_the_time():
    """Section 3.5's "expected value > 0" is always true: at P(g > 0) = 1/2 the mean is still .126."""
    log_theta = f64(-math.log(ZETA / -GAMMA))
    assert float(prob_open(log_theta)) == pytest.approx(0.5)
    assert float(mean_gate(log_theta)) == pytest.approx(0.126, abs=5e-4)


@pytest.mark.equation("7", "8", "P(g = 1)", "E[g]")
@given(st.floats(-1.5, 1.5), st.floats(0.35, 0.65), st.floats(0.7, 1.5))
def test_gradients_agree_with_finite_differences_away_from_the_kinks(log_theta, u, tau):
    l = f64([log_theta]).requires_grad_()
    if 0.02 < float(sample_gate(l, f64(u), tau).detach()) < 0.98:
        assert torch.autograd.gradcheck(lambda x: sample_gate(x, f64(u), tau), l)
    for f in (prob_open, prob_one, mean_gate):
        assert torch.autograd.gradcheck(lambda x, f=f: f(x, tau), l), f.__name__


@pytest.mark.equation("gate")
def test_module_samples_in_train_mode_takes_the_median_in_eval_mode_and_obeys_fixed():
    gate = HardConcreteGate(4)
    gate.release()
    gate.log_theta.data = torch.tensor([-3.0, -0.5, 0.5, 3.0])
    gate.u.copy_(torch.tensor([0.2, 0.3, 0.6, 0.9]))
    assert torch.equal(gate(), gate()), "train mode: the noise u stays until it is drawn anew"
    assert torch.allclose(gate(), sample_gate(gate.log_theta, gate.u)), "train mode: Eq. (7) with the noise in u"
    assert torch.allclose(gate.settled(), median_gate(gate.log_theta)), "settled gates ignore the noise, in either mode"
    assert torch.allclose(gate.eval()(), median_gate(gate.log_theta)), "eval mode: the median"
    gate.fix(torch.tensor([1.0, 0.0, 0.25, 1.0]))
    assert torch.equal(gate.train()(), gate.fixed) and torch.equal(gate.eval()(), gate.fixed), "fixed in either mode"


@pytest.mark.equation("gate")
def test_without_noise_train_and_eval_mode_agree():
    gate = HardConcreteGate(5)
    gate.release()
    assert torch.allclose(gate.train()(), gate.eval()()), "u starts at 1/2, the median"


@pytest.mark.equation("gate")
def test_noise_is_not_part_of_a_gates_state():
    gate = HardConcreteGate(2)
    assert set(gate.state_dict()) == {"log_theta", "fixed"}
    gate.release()
    assert set(gate.state_dict()) == {"log_theta"}


@pytest.mark.equation("gate")
def test_a_fresh_gate_is_held_open_and_log_theta_trains_between_release_and_fix():
    """An optimizer made from what requires a gradient must not collect log_theta before the window opens."""
    gate = HardConcreteGate(3)
    assert torch.equal(gate(), torch.ones(3)) and not gate.log_theta.requires_grad
    assert torch.equal(gate.open_probability(), torch.ones(3))
    gate.release()
    assert gate.fixed is None and gate.log_theta.requires_grad
    assert torch.allclose(gate.open_probability(), prob_open(gate.log_theta))
    gate.log_theta.grad = torch.ones(3)
    gate.fix(torch.tensor([1.0, 0.0, 0.5]))
    assert gate().tolist() == [1, 0, 0.5] and not gate.log_theta.requires_grad and gate.log_theta.grad is None
    assert gate.open_probability().tolist() == [1, 0, 1]
    gate.hold_open()
    assert gate().tolist() == [1, 1, 1]


@pytest.mark.equation("gate")
def test_a_printed_gate_shows_its_phase_and_log_theta():
    gate = HardConcreteGate(3)
    assert "3 gates, fixed, 3 of them open" in str(gate)
    gate.release()
    gate.log_theta.data = torch.tensor([-1.5, 0, 4.25])
    assert "3 gates, free, log_theta -1.50 to 4.25" in str(gate)
    gate.fix(torch.tensor([1.0, 0, 0]))
    assert "3 gates, fixed, 1 of them open" in str(gate)
    assert "2 gates" in str(HardConcreteGate(2).to("meta"))


@pytest.mark.equation("gate")
@pytest.mark.parametrize("phase", ["open", "free", "fixed"])
def test_a_gates_state_loads_into_a_fresh_one_whatever_its_size_and_phase(phase):
    gate, other = HardConcreteGate(5), HardConcreteGate(8)
    gate.log_theta.data.normal_()
    if phase != "open":
        gate.release()
    if phase == "fixed":
        gate.fix(torch.tensor([1.0, 0, 1, 0.5, 0]))
    held = other.log_theta
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.eval()(), gate.eval()()) and (other.fixed is None) == (phase == "free")
    assert other.log_theta is held and len(held) == len(other.u) == 5


@pytest.mark.equation("8", "P(g = 1)", "median", "E[g]")
@given(st.lists(log_thetas, min_size=2, max_size=5), taus)
def test_every_function_of_gates_works_element_by_element(values, tau):
    for f in (prob_open, prob_one, median_gate, mean_gate):
        one_by_one = torch.stack([f(f64(x), tau) for x in values])
        assert torch.allclose(f(f64(values), tau), one_by_one, rtol=0, atol=1e-12), f.__name__
