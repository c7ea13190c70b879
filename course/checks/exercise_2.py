"""Exercise 2: sample_gate, Eq. (7)."""

import math

import torch

from course.checking import about, f64, learned, same
from course.questions import derivative, sample_gate
from hard_concrete import prob_open


@about("sample_gate", "7")
def test_at_log_theta_0_the_sample_is_the_noise_itself_stretched():
    u = [0.2, 0.5, 0.8]
    same(sample_gate(f64(0.0), f64(u)), [1.2 * x - 0.1 for x in u], "sample_gate(0.0, [0.2, 0.5, 0.8])")


@about("sample_gate", "7")
def test_what_lies_below_0_or_above_1_is_clamped():
    same(sample_gate(f64(0.0), f64([0.05, 0.95])), [0.0, 1.0], "sample_gate(0.0, [0.05, 0.95])")


@about("sample_gate", "7")
def test_log_theta_shifts_the_logit_of_the_noise():
    odds = 0.3 / 0.7 * math.e
    same(sample_gate(f64(1.0), f64(0.3)), 1.2 * odds / (1 + odds) - 0.1, "sample_gate(1.0, 0.3)")


@about("sample_gate", "7")
def test_the_temperature_divides_noise_and_log_theta_alike():
    odds = (0.3 / 0.7 * math.e) ** 2
    same(sample_gate(f64(1.0), f64(0.3), 0.5), 1.2 * odds / (1 + odds) - 0.1, "sample_gate(1.0, 0.3, tau=0.5)")


@about("sample_gate", "7")
def test_another_stretch_gives_another_sample():
    same(sample_gate(f64(0.0), f64(0.7), 1.0, -0.5, 1.5), 0.9, "sample_gate(0.0, 0.7, tau=1.0, gamma=-0.5, zeta=1.5)")


@about("sample_gate", "7")
def test_noise_and_log_theta_broadcast():
    u = f64([[0.2, 0.2, 0.2], [0.6, 0.6, 0.6]])
    one = [[float(sample_gate(f64(x), f64(y))) for x in (-1.0, 0.0, 1.0)] for y in (0.2, 0.6)]
    same(sample_gate(f64([-1.0, 0.0, 1.0]), u), one, "sample_gate of shapes (3,) and (2, 3), and number by number")


@about("sample_gate", "8")
def test_the_share_of_open_gates_is_the_probability_of_eq_8():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # every quantile once
    share = (sample_gate(f64(-1.5), u, 0.7) > 0).double().mean()
    same(share, prob_open(f64(-1.5), 0.7), "the share of sample_gate(-1.5, u, tau=0.7) > 0 over all u", within=1e-4)


@about("sample_gate", "7")
def test_open_gates_have_a_gradient_and_clamped_ones_have_none():
    slopes = derivative("sample_gate", f64([0.0, 0.0, 0.0]), f64([0.01, 0.5, 0.99]))
    slopes = learned(slopes, "sample_gate(log_theta, u)", "log_theta")
    same(slopes, [0.0, 0.3, 0.0], "the derivatives of sample_gate(0.0, [0.01, 0.5, 0.99])")
