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
        kept = F.dropout(x, self.dropout, self.training) if self.dropout else x
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
