"""Of each exercise a third version, as in a.py. Gates are described by other numbers here:

kappa = 1 / tau is the inverse temperature, and the sample is stretched to (-below, 1 + above).
"""

from math import log

import numpy as np
import torch
import torch.nn.functional as F

from budget import _nonempty, affordable, total_parameters
from hard_concrete import GAMMA, TAU, ZETA, prob_above
from salora import layer_list, orthogonality


def prob_open_of(log_theta, kappa, below, above):
    """P(g > 0) by other numbers: kappa = 1 / tau, and the sample is stretched to (-below, 1 + above)."""
    return torch.sigmoid(log_theta - log(below / (1 + above)) / kappa)


def prob_open(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (8): P(g > 0), by way of prob_open_of. Summed over gates it is E||G||_0."""
    return prob_open_of(log_theta, 1 / tau, -gamma, zeta - 1)


def gate_of(log_theta, u, kappa, below, above):
    """Eq. (7) by other numbers: kappa = 1 / tau, and the sample is stretched to (-below, 1 + above)."""
    s = torch.sigmoid((torch.logit(u) + log_theta) * kappa) * (1 + above + below) - below
    return s.clamp(0, 1)


def sample_gate(log_theta, u, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (7), by way of gate_of. log_theta and u broadcast; returns g in [0, 1]."""
    return gate_of(log_theta, u, 1 / tau, -gamma, zeta - 1)


def mean_of(log_theta, kappa, below, above):
    """E[g] by other numbers: kappa = 1 / tau, and the sample is stretched to (-below, 1 + above)."""
    nodes, weights = np.polynomial.legendre.leggauss(64)  # on (-1, 1)
    terms = [w / 2 * prob_above(log_theta, (x + 1) / 2, 1 / kappa, -below, 1 + above) for x, w in zip(nodes, weights)]
    return torch.stack(terms).sum(0)


def mean_gate(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """E[g], by way of mean_of."""
    return mean_of(log_theta, 1 / tau, -gamma, zeta - 1)


class SaLoRALinear:
    def terms(self, x):
        """Both terms of Eq. (5), not yet added: x (..., k) -> a pair of (..., d), the frozen layer's output first."""
        h = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))  # (..., r)  A x
        h = h * (self.scale * self.gate()).to(h.dtype)  # (..., r)  times the gate and alpha / r0
        return self.base(x), F.linear(h, self.B.to(h.dtype))

    def forward(self, x):
        """x (..., k) -> (..., d): Eq. (5), by way of `terms`."""
        frozen, update = self.terms(x)
        return frozen + update


@torch.no_grad()
def canonicalize_to_left(layer):
    """Rotate the triplets, in place, into the singular basis of B A, with all of S in B: B <- U S and A <- V^T."""
    kind = torch.promote_types(layer.B.dtype, torch.float32)  # no SVD in half precision
    U, S, Vt = torch.linalg.svd(layer.B.to(kind) @ layer.A.to(kind), full_matrices=False)
    n = min(layer.r, len(S))
    layer.B.zero_()[:, :n] = U[:, :n] * S[:n]
    layer.A.zero_()[:n] = Vt[:n]


@torch.no_grad()
def canonicalize(layer):
    """Rotate the triplets of one layer, in place, into the singular basis of B A, unless B = 0: half of S in each."""
    if layer.B.any():
        canonicalize_to_left(layer)
        root = layer.B.norm(dim=0).sqrt()  # (r,)  S^(1/2)
        layer.B /= root.clamp(min=1e-30)
        layer.A *= root[:, None]


def expected_to_go(layers):
    """How many of the parameters at creation are expected to go: a scalar with a gradient, (1 - C) times them all."""
    layers = _nonempty(layers)
    spent = sum(layer.gate.open_probability().sum() * layer.triplet_size for layer in layers)
    return total_parameters(layers) - spent


def expected_density(layers):
    """Eq. (11): C, by way of expected_to_go. A fixed gate counts as the 0 or 1 it is."""
    layers = _nonempty(layers)
    return 1 - expected_to_go(layers) / total_parameters(layers)


def mask_within_budget(layers, budget):
    """One boolean tensor (n,) for the n triplets of all layers in their order: True for what stays."""
    left = affordable(budget, total_parameters(layers))
    log_theta = torch.cat([layer.gate.log_theta for layer in layers]).tolist()
    costs = [layer.triplet_size for layer in layers for _ in range(layer.r)]
    mask = torch.zeros(len(costs), dtype=torch.bool)
    for i in sorted(range(len(costs)), key=lambda i: -log_theta[i]):  # a stable sort keeps ties in order
        if costs[i] <= left:
            left -= costs[i]
            mask[i] = True
    return mask


def best_within_budget(layers, budget):
    """A mask (r,) per layer, True for the triplets that stay, by way of mask_within_budget."""
    return list(mask_within_budget(layers, budget).split([layer.r for layer in layers]))


@torch.no_grad()
def projected(layers, density):
    """The new log_theta of each layer, a list of tensors (r,). They are returned, and nothing is changed."""
    log_theta = torch.cat([layer.gate.log_theta for layer in layers])  # (n,)
    cost = torch.cat([torch.full_like(layer.gate.log_theta, layer.triplet_size) for layer in layers])  # (n,)
    low, high = -log_theta.max() - 30, -log_theta.min() + 30  # all closed, all open
    for _ in range(60):
        middle = (low + high) / 2
        C = prob_open(log_theta + middle) @ (cost / cost.sum())  # Eq. (11)
        low, high = torch.where(C < density, middle, low), torch.where(C < density, high, middle)
    return [layer.gate.log_theta + (low + high) / 2 for layer in layers]


@torch.no_grad()
def project(layers, density):
    """Add one number to every log_theta, the one with which C = density in (0, 1), by way of projected."""
    layers = layer_list(layers)
    for layer, log_theta in zip(layers, projected(layers, density)):
        layer.gate.log_theta.copy_(log_theta)


def after_backward_in(layers, phase, lagrangian, beta):
    """Add the gradient of beta R_orth and, where phase is "window", not "before" or "after", of lambda (C - b)^2."""
    penalty = beta * orthogonality(layers)  # Eq. (9)
    if phase == "window":
        penalty = penalty + lagrangian(expected_density(layers))  # Eq. (12)
    penalty.backward()


def after_backward(layers, schedule, step, lagrangian, beta):
    """After the loss's backward pass: add the gradient of beta R_orth and, in the window, of lambda (C - b)^2."""
    after_backward_in(layers, schedule.phase(step), lagrangian, beta)


QUESTIONS = {  # exercise: {text of exercises.md or answers.md: what stands there instead}
    1: {
        "A fresh layer has 8 gates": "A fresh layer has 24 gates",
        "gives even odds?": "gives odds of 9 to 1 for an open gate?",
        "11/12 of 8 gates are open: 7.33. The odds are even where the argument of the sigmoid is 0: `log_theta` =\n"
        "tau log(-gamma / zeta) = -log 11 = -2.398. `prob_open(torch.tensor([0., -2.3979]))` is (0.9167, 0.5000).":
        "11/12 of 24 gates are open: 22. The odds are 9 to 1 where the argument of the sigmoid is log 9:\n"
        "`log_theta` = log 9 - log 11 = -0.201.",
        "7.33 gates, or 8 x 11/12. 1: -log 11, or -2.398.":
        "22 gates, or 24 x 11/12. 1: log 9 - log 11, or -0.201.",
    },
    2: {
        "a fresh gate exactly 0": "a gate with\n`log_theta` = 2 exactly 0",
        "With `log_theta` = 0 the sample is 1.2 u - 0.1, so g = 0 for u <= 1/12 and g = 1 for u >= 11/12.":
        "g = 0 where the sigmoid is at most 1/12: u <= 1 / (1 + 11 e^2) = 0.0122. g = 1 where it is at least 11/12:\n"
        "u >= 11 / (11 + e^2) = 0.5982.",
        "u up to 1/12 and from 11/12 on": "u up to 0.0122 and from 0.5982 on",
    },
    3: {"-10": "-10.5", "0.000085": "0.000052", "0.0005": "0.0003"},
    6: {
        "at r = 8?": "at r = 12?",
        "x 8 = 1,327,104 parameters, the paper's 1.33 M, and 12 x 6 x 8 = 576 gates":
        "x 12 = 1,990,656 parameters, and 12 x 6 x 12 = 864 gates",
        "1: 1,327,104 and 576": "1: 1,990,656 and 864",
    },
    8: {
        "0.145 after 100\nsteps, 0.126 after 200, 0.125 after 300":
        "0.158 after 100\nsteps, 0.150 after 200, 0.150 after 300",
        "0.145 and 0.126": "0.158 and 0.150",
        "0.125": "0.15",
    },
}  # fmt: skip
