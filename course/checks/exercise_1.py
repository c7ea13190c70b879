"""Exercise 1: prob_open, Eq. (8)."""

import math

import torch

from course.checking import about, f64, learned, same
from course.questions import derivative, prob_open
from hard_concrete import sample_gate


@about("prob_open", "8")
def test_a_fresh_gate_is_open_with_probability_11_in_12():
    same(prob_open(f64(0.0)), 11 / 12, "prob_open(0.0)")


@about("prob_open", "8")
def test_a_gate_is_open_half_of_the_time_where_log_theta_is_minus_log_11():
    same(prob_open(f64(-math.log(11))), 0.5, "prob_open(-log(11))")


@about("prob_open", "8")
def test_the_temperature_multiplies_the_logarithm():
    same(prob_open(f64(0.0), 2.0), 121 / 122, "prob_open(0.0, tau=2.0)")


@about("prob_open", "8")
def test_another_stretch_gives_another_probability():
    same(prob_open(f64(0.0), 1.0, -0.5, 1.5), 0.75, "prob_open(0.0, tau=1.0, gamma=-0.5, zeta=1.5)")


@about("prob_open", "8")
def test_every_gate_of_a_layer_has_its_own_probability():
    odds = [11 * math.exp(x) for x in (-5.0, -1.0, 2.0)]
    same(prob_open(f64([-5.0, -1.0, 2.0])), [o / (1 + o) for o in odds], "prob_open([-5.0, -1.0, 2.0])")


@about("prob_open", "8")
def test_it_is_the_share_of_noise_for_which_the_sampled_gate_is_above_zero():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # every quantile once
    share = (sample_gate(f64(-1.5), u, 0.7) > 0).double().mean()
    same(prob_open(f64(-1.5), 0.7), share, "prob_open(-1.5, tau=0.7)", within=1e-4)


@about("prob_open", "8")
def test_its_gradient_reaches_log_theta():
    slope = learned(derivative("prob_open", f64([1.0])), "prob_open(log_theta)", "log_theta")
    odds = 11 * math.e
    same(slope, [odds / (1 + odds) ** 2], "the derivative of prob_open at 1.0: p (1 - p)")
