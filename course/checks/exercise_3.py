"""Exercise 3: median_gate and mean_gate, section 3.5."""

import math

import torch

from course.checking import about, f64, holds, same
from course.questions import mean_gate, median_gate
from hard_concrete import prob_open, sample_gate


@about("median_gate", "median")
def test_the_median_is_the_sample_with_noise_one_half():
    values = [-1.0, 0.0, 1.0]
    stretched = [1.2 / (1 + math.exp(-x)) - 0.1 for x in values]
    same(median_gate(f64(values)), stretched, "median_gate([-1.0, 0.0, 1.0])")


@about("median_gate", "median")
def test_the_median_too_is_clamped():
    same(median_gate(f64([-3.0, 3.0])), [0.0, 1.0], "median_gate([-3.0, 3.0])")


@about("median_gate", "median")
def test_the_temperature_and_the_stretch_count_for_the_median():
    same(median_gate(f64(-1.0), 0.5), 1.2 / (1 + math.e**2) - 0.1, "median_gate(-1.0, tau=0.5)")
    other = 2 / (1 + math.e) - 0.5
    same(median_gate(f64(-1.0), 1.0, -0.5, 1.5), other, "median_gate(-1.0, tau=1.0, gamma=-0.5, zeta=1.5)")


@about("median_gate", "median")
def test_the_median_is_positive_exactly_where_open_is_likelier_than_closed():
    for x in (-2.5, -2.39, -2.41, -2.3):
        likelier = float(prob_open(f64(x))) > 0.5
        positive = float(median_gate(f64(x))) > 0
        holds(positive == likelier, f"median_gate({x}) > 0", positive, f"{likelier}: P(g > 0) > 1/2 is {likelier}")


@about("mean_gate", "E[g]")
def test_the_mean_of_a_gate_with_even_odds_is_one_half():
    same(mean_gate(f64(0.0)), 0.5, "mean_gate(0.0)", within=1e-3)


@about("mean_gate", "E[g]")
def test_the_mean_is_still_positive_where_the_gate_is_closed_half_of_the_time():
    same(mean_gate(f64(-math.log(11))), 0.1261, "mean_gate(-log(11))", within=5e-4)


@about("mean_gate", "E[g]")
def test_the_mean_is_the_average_over_all_noise():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # every quantile once
    for x, tau in ((-4.0, 1.0), (1.5, 0.7), (3.0, 1.0)):
        average = sample_gate(f64(x), u, tau).mean()
        same(mean_gate(f64(x), tau), average, f"mean_gate({x}, tau={tau})", within=5e-4)
    average = sample_gate(f64(1.0), u, 1.0, -0.5, 1.5).mean()
    same(mean_gate(f64(1.0), 1.0, -0.5, 1.5), average, "mean_gate(1.0, tau=1, gamma=-0.5, zeta=1.5)", within=5e-4)


@about("mean_gate", "E[g]")
def test_every_gate_of_a_layer_has_its_own_mean():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    averages = [sample_gate(f64(x), u).mean() for x in (-1.0, 0.5, 2.0)]
    same(mean_gate(f64([-1.0, 0.5, 2.0])), averages, "mean_gate([-1.0, 0.5, 2.0])", within=5e-4)
