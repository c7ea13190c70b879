"""Of each exercise one version: the function that students write, and below it the one that calls it.

course/variant.py puts both in the place of the second function. The imports are only for those who read or edit this.
"""

from math import log

import numpy as np
import torch
import torch.nn.functional as F

from budget import _nonempty, affordable, total_parameters
from hard_concrete import GAMMA, TAU, ZETA, prob_above
from salora import layer_list, orthogonality


def prob_closed(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """P(g = 0), the probability that a gate is closed: 1 minus Eq. (8)."""
    return torch.sigmoid(tau * log(-gamma / zeta) - log_theta)


def prob_open(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (8): P(g > 0), by way of prob_closed. Summed over gates it is E||G||_0."""
    return 1 - prob_closed(log_theta, tau, gamma, zeta)


def falling_gate(log_theta, u, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (7) with 1 - u in the place of u: the larger the noise, the smaller the gate."""
    s = torch.sigmoid((log_theta - torch.logit(u)) / tau) * (zeta - gamma) + gamma
    return s.clamp(0, 1)


def sample_gate(log_theta, u, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (7), by way of falling_gate. log_theta and u broadcast; returns g in [0, 1]."""
    return falling_gate(log_theta, 1 - u, tau, gamma, zeta)


def mean_open_gate(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """E[g | g > 0]: the mean of a gate over only that noise for which it is open."""
    nodes, weights = np.polynomial.legendre.leggauss(64)  # on (-1, 1)
    terms = [w / 2 * prob_above(log_theta, (x + 1) / 2, tau, gamma, zeta) for x, w in zip(nodes, weights)]
    return torch.stack(terms).sum(0) / prob_above(log_theta, 0.0, tau, gamma, zeta)


def mean_gate(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """E[g], by way of mean_open_gate: P(g > 0) E[g | g > 0]."""
    return prob_open(log_theta, tau, gamma, zeta) * mean_open_gate(log_theta, tau, gamma, zeta)


class SaLoRALinear:
    def update(self, x):
        """The second term of Eq. (5) alone, without the frozen layer: x (..., k) -> (..., d)."""
        h = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))  # (..., r)  A x
        h = h * (self.scale * self.gate()).to(h.dtype)  # (..., r)  times the gate and alpha / r0
        return F.linear(h, self.B.to(h.dtype))  # (..., d)

    def forward(self, x):
        """x (..., k) -> (..., d): Eq. (5), by way of `update`."""
        return self.base(x) + self.update(x)


@torch.no_grad()
def singular_triplets(layer):
    """New tensors (B, A), U S^(1/2) and S^(1/2) V^T: the layer stays as it is. For B = 0 they equal the layer's."""
    if not layer.B.any():
        return layer.B, layer.A
    B, A = torch.zeros_like(layer.B), torch.zeros_like(layer.A)
    kind = torch.promote_types(layer.B.dtype, torch.float32)  # no SVD in half precision
    U, S, Vt = torch.linalg.svd(layer.B.to(kind) @ layer.A.to(kind), full_matrices=False)
    n = min(layer.r, len(S))
    B[:, :n] = U[:, :n] * S[:n].sqrt()
    A[:n] = S[:n].sqrt()[:, None] * Vt[:n]
    return B, A


@torch.no_grad()
def canonicalize(layer):
    """Rotate the triplets of one layer, in place, into the singular basis of B A, by way of singular_triplets."""
    B, A = singular_triplets(layer)
    layer.B.copy_(B)
    layer.A.copy_(A)


def expected_parameters(layers):
    """The numerator of Eq. (11), a scalar with a gradient: how many parameters are expected in open triplets."""
    return sum(layer.gate.open_probability().sum() * layer.triplet_size for layer in layer_list(layers))


def expected_density(layers):
    """Eq. (11): C, by way of expected_parameters. A fixed gate counts as the 0 or 1 it is."""
    layers = _nonempty(layers)
    return expected_parameters(layers) / total_parameters(layers)


def closed_by_budget(layers, budget):
    """A mask (r,) for each layer with True for what does not stay: the triplets that have to be closed."""
    masks = [torch.ones(layer.r, dtype=torch.bool) for layer in layers]
    left = affordable(budget, total_parameters(layers))
    triplets = [
        (log_theta, i, j)
        for i, layer in enumerate(layers)
        for j, log_theta in enumerate(layer.gate.log_theta.tolist())
    ]
    for _, i, j in sorted(triplets, key=lambda t: -t[0]):  # a stable sort keeps ties in order
        if layers[i].triplet_size <= left:
            left -= layers[i].triplet_size
            masks[i][j] = False
    return masks


def best_within_budget(layers, budget):
    """A mask (r,) per layer, True for the triplets that stay, by way of closed_by_budget."""
    return [~mask for mask in closed_by_budget(layers, budget)]


@torch.no_grad()
def shift_to(layers, density):
    """The number that makes C = density if it is added to every log_theta. It is returned, and nothing is changed."""
    log_theta = torch.cat([layer.gate.log_theta for layer in layers])  # (n,)
    cost = torch.cat([torch.full_like(layer.gate.log_theta, layer.triplet_size) for layer in layers])  # (n,)
    low, high = -log_theta.max() - 30, -log_theta.min() + 30  # all closed, all open
    for _ in range(60):
        middle = (low + high) / 2
        C = prob_open(log_theta + middle) @ (cost / cost.sum())  # Eq. (11)
        low, high = torch.where(C < density, middle, low), torch.where(C < density, high, middle)
    return (low + high) / 2


@torch.no_grad()
def project(layers, density):
    """Add one number to every log_theta, the one with which C = density in (0, 1): shift_to finds it."""
    layers = layer_list(layers)
    shift = shift_to(layers, density)
    for layer in layers:
        layer.gate.log_theta += shift


def penalty_at(layers, schedule, step, lagrangian, beta):
    """The penalty of a step, a scalar with a gradient: beta R_orth and, in the window, lambda (C - b)^2. Only that."""
    penalty = beta * orthogonality(layers)  # Eq. (9)
    if schedule.phase(step) == "window":
        penalty = penalty + lagrangian(expected_density(layers))  # Eq. (12)
    return penalty


def after_backward(layers, schedule, step, lagrangian, beta):
    """After the loss's backward pass: add the gradient of penalty_at."""
    penalty_at(layers, schedule, step, lagrangian, beta).backward()


QUESTIONS = {  # exercise: {text of exercises.md or answers.md: what stands there instead}
    1: {
        "A fresh layer has 8 gates": "A fresh layer has 12 gates",
        "gives even odds?": "gives odds of 3 to 1 for an open gate?",
        "11/12 of 8 gates are open: 7.33. The odds are even where the argument of the sigmoid is 0: `log_theta` =\n"
        "tau log(-gamma / zeta) = -log 11 = -2.398. `prob_open(torch.tensor([0., -2.3979]))` is (0.9167, 0.5000).":
        "11/12 of 12 gates are open: 11. The odds are 3 to 1 where the argument of the sigmoid is log 3:\n"
        "`log_theta` = log 3 - log 11 = -1.299.",
        "7.33 gates, or 8 x 11/12. 1: -log 11, or -2.398.":
        "11 gates, or 12 x 11/12. 1: log 3 - log 11, or -1.299.",
    },
    2: {
        "a fresh gate exactly 0": "a gate with\n`log_theta` = 1 exactly 0",
        "With `log_theta` = 0 the sample is 1.2 u - 0.1, so g = 0 for u <= 1/12 and g = 1 for u >= 11/12.":
        "g = 0 where the sigmoid is at most 1/12: u <= 1 / (1 + 11 e) = 0.0324. g = 1 where it is at least 11/12:\n"
        "u >= 11 / (11 + e) = 0.8018.",
        "u up to 1/12 and from 11/12 on": "u up to 0.0324 and from 0.8018 on",
    },
    3: {"-10": "-11", "0.000085": "0.000031", "0.0005": "0.0002"},
    6: {
        "at r = 8?": "at r = 4?",
        "x 8 = 1,327,104 parameters, the paper's 1.33 M, and 12 x 6 x 8 = 576 gates":
        "x 4 = 663,552 parameters, and 12 x 6 x 4 = 288 gates",
        "1: 1,327,104 and 576": "1: 663,552 and 288",
    },
    8: {
        "0.145 after 100\nsteps, 0.126 after 200, 0.125 after 300":
        "0.134 after 100\nsteps, 0.105 after 200, 0.101 after 300",
        "0.145 and 0.126": "0.134 and 0.105",
        "0.125": "0.1",
    },
}  # fmt: skip
