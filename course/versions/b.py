"""Of each exercise another version, as in a.py."""

from math import log

import numpy as np
import torch
import torch.nn.functional as F

from budget import _nonempty, affordable, total_parameters
from hard_concrete import GAMMA, TAU, ZETA, prob_above
from salora import layer_list, orthogonality


def open_logit(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """The logit of P(g > 0), that is log P(g > 0) - log P(g = 0)."""
    return log_theta - tau * log(-gamma / zeta)


def prob_open(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (8): P(g > 0), by way of open_logit. Summed over gates it is E||G||_0."""
    return torch.sigmoid(open_logit(log_theta, tau, gamma, zeta))


def sample_closure(log_theta, u, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """1 - g for the g of Eq. (7): how far the gate is closed, exactly 1 for a closed one."""
    s = torch.sigmoid((torch.logit(u) + log_theta) / tau) * (zeta - gamma) + gamma
    return 1 - s.clamp(0, 1)


def sample_gate(log_theta, u, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (7), by way of sample_closure. log_theta and u broadcast; returns g in [0, 1]."""
    return 1 - sample_closure(log_theta, u, tau, gamma, zeta)


def mean_closure(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """E[1 - g]: how far a gate is closed on average."""
    nodes, weights = np.polynomial.legendre.leggauss(64)  # on (-1, 1)
    terms = [w / 2 * prob_above(log_theta, (x + 1) / 2, tau, gamma, zeta) for x, w in zip(nodes, weights)]
    return 1 - torch.stack(terms).sum(0)


def mean_gate(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """E[g], by way of mean_closure."""
    return 1 - mean_closure(log_theta, tau, gamma, zeta)


class SaLoRALinear:
    def forward_columns(self, x):
        """Eq. (5) as it stands there, for vectors that are the columns of x: (k, n) -> (d, n)."""
        kept = F.dropout(x, self.dropout, self.training)
        h = self.A.to(x.dtype) @ kept  # (r, n)  A x
        h = (self.scale * self.gate()).to(h.dtype)[:, None] * h  # (r, n)  times the gate and alpha / r0
        return self.base(x.T).T + self.B.to(h.dtype) @ h  # (d, n)

    def forward(self, x):
        """x (..., k) -> (..., d): Eq. (5), by way of `forward_columns`."""
        rows = x.reshape(-1, x.shape[-1])  # (n, k)
        return self.forward_columns(rows.T).T.reshape(*x.shape[:-1], -1)


@torch.no_grad()
def canonicalize_ascending(layer):
    """Rotate the triplets, in place, into the singular basis of B A: smallest first, empty ones before all others."""
    kind = torch.promote_types(layer.B.dtype, torch.float32)  # no SVD in half precision
    U, S, Vt = torch.linalg.svd(layer.B.to(kind) @ layer.A.to(kind), full_matrices=False)
    n = min(layer.r, len(S))
    layer.B.zero_()[:, layer.r - n :] = (U[:, :n] * S[:n].sqrt()).flip(1)
    layer.A.zero_()[layer.r - n :] = (S[:n].sqrt()[:, None] * Vt[:n]).flip(0)


@torch.no_grad()
def canonicalize(layer):
    """Rotate the triplets of one layer, in place, into the singular basis of B A, unless B = 0: largest first."""
    if layer.B.any():
        canonicalize_ascending(layer)
        layer.B.copy_(layer.B.flip(1))
        layer.A.copy_(layer.A.flip(0))


def expected_sparsity(layers):
    """1 - C, a scalar with a gradient: the share of the parameters at creation that is expected to go."""
    layers = _nonempty(layers)
    spent = sum(layer.gate.open_probability().sum() * layer.triplet_size for layer in layers)
    return 1 - spent / total_parameters(layers)


def expected_density(layers):
    """Eq. (11): C, by way of expected_sparsity. A fixed gate counts as the 0 or 1 it is."""
    return 1 - expected_sparsity(layers)


def order_within_budget(layers, budget):
    """What stays, as a list of pairs (layer index, triplet index) in the order of the decision."""
    left, order = affordable(budget, total_parameters(layers)), []
    triplets = [
        (log_theta, i, j)
        for i, layer in enumerate(layers)
        for j, log_theta in enumerate(layer.gate.log_theta.tolist())
    ]
    for _, i, j in sorted(triplets, key=lambda t: -t[0]):  # a stable sort keeps ties in order
        if layers[i].triplet_size <= left:
            left -= layers[i].triplet_size
            order.append((i, j))
    return order


def best_within_budget(layers, budget):
    """A mask (r,) per layer, True for the triplets that stay, by way of order_within_budget."""
    masks = [torch.zeros(layer.r, dtype=torch.bool) for layer in layers]
    for i, j in order_within_budget(layers, budget):
        masks[i][j] = True
    return masks


@torch.no_grad()
def project_to_sparsity(layers, sparsity):
    """Add one number to every log_theta, in place, the one with which 1 - C, the share that goes, is the sparsity."""
    log_theta = torch.cat([layer.gate.log_theta for layer in layers])  # (n,)
    cost = torch.cat([torch.full_like(layer.gate.log_theta, layer.triplet_size) for layer in layers])  # (n,)
    low, high = -log_theta.max() - 30, -log_theta.min() + 30  # all closed, all open
    for _ in range(60):
        middle = (low + high) / 2
        closed = 1 - prob_open(log_theta + middle) @ (cost / cost.sum())  # 1 - C, Eq. (11)
        low, high = torch.where(closed > sparsity, middle, low), torch.where(closed > sparsity, high, middle)
    for layer in layers:
        layer.gate.log_theta += (low + high) / 2


@torch.no_grad()
def project(layers, density):
    """Add one number to every log_theta, the one with which C = density in (0, 1), by way of project_to_sparsity."""
    project_to_sparsity(layer_list(layers), 1 - density)


def penalty_terms(layers, schedule, step, lagrangian, beta):
    """The terms of the penalty, a list of scalars with gradients: beta R_orth and, in the window, lambda (C - b)^2."""
    terms = [beta * orthogonality(layers)]  # Eq. (9)
    if schedule.phase(step) == "window":
        terms.append(lagrangian(expected_density(layers)))  # Eq. (12)
    return terms


def after_backward(layers, schedule, step, lagrangian, beta):
    """After the loss's backward pass: add the gradients of all penalty_terms."""
    sum(penalty_terms(layers, schedule, step, lagrangian, beta)).backward()


QUESTIONS = {  # exercise: {text of exercises.md or answers.md: what stands there instead}
    1: {
        "A fresh layer has 8 gates": "A fresh layer has 16 gates",
        "gives even odds?": "gives odds of 1 to 3 for an open gate?",
        "11/12 of 8 gates are open: 7.33. The odds are even where the argument of the sigmoid is 0: `log_theta` =\n"
        "tau log(-gamma / zeta) = -log 11 = -2.398. `prob_open(torch.tensor([0., -2.3979]))` is (0.9167, 0.5000).":
        "11/12 of 16 gates are open: 14.67. The odds are 1 to 3 where the argument of the sigmoid is -log 3:\n"
        "`log_theta` = -log 3 - log 11 = -3.497.",
        "7.33 gates, or 8 x 11/12. 1: -log 11, or -2.398.":
        "14.67 gates, or 16 x 11/12. 1: -log 3 - log 11, or -3.497.",
    },
    2: {
        "a fresh gate exactly 0": "a gate with\n`log_theta` = -1 exactly 0",
        "With `log_theta` = 0 the sample is 1.2 u - 0.1, so g = 0 for u <= 1/12 and g = 1 for u >= 11/12.":
        "g = 0 where the sigmoid is at most 1/12: u <= 1 / (1 + 11 / e) = 0.1982. g = 1 where it is at least 11/12:\n"
        "u >= 11 / (11 + 1 / e) = 0.9676.",
        "u up to 1/12 and from 11/12 on": "u up to 0.1982 and from 0.9676 on",
    },
    3: {"-10": "-12", "0.000085": "0.000012", "0.0005": "0.00007", "100,000": "1,000,000"},
    6: {
        "at r = 8?": "at r = 16?",
        "x 8 = 1,327,104 parameters, the paper's 1.33 M, and 12 x 6 x 8 = 576 gates":
        "x 16 = 2,654,208 parameters, and 12 x 6 x 16 = 1,152 gates",
        "1: 1,327,104 and 576": "1: 2,654,208 and 1,152",
    },
    8: {
        "0.145 after 100\nsteps, 0.126 after 200, 0.125 after 300":
        "0.126 after 100\nsteps, 0.091 after 200, 0.083 after 300",
        "0.145 and 0.126": "0.126 and 0.091",
        "0.125": "0.08",
    },
}  # fmt: skip
