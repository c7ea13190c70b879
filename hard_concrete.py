"""The Hard-Concrete gate (Louizos et al. 2018; SaLoRA, Hu et al. 2023, section 3.2).

A gate g in [0, 1] that is exactly 0 or exactly 1 with positive probability, and yet has a gradient. Uniform noise
becomes a sigmoid sample on (0, 1), which is stretched to (GAMMA, ZETA) and clamped back to [0, 1]:

    s = sigmoid((logit(u) + log_theta) / tau) (zeta - gamma) + gamma,     g = clamp(s, 0, 1)                Eq. (7)

s grows with u, so every question about g is a question about u, and all answers but the mean are one line long.
First come pure functions of (log_theta, u), element by element and in any shape; then one module that holds log_theta.
Left out: how gates are trained towards a budget (budget.py) and what they multiply (salora.py).
"""

from math import log

import numpy as np
import torch
from torch import nn

GAMMA, ZETA, TAU = -0.1, 1.1, 1.0  # paper, App. B: the stretch interval and the temperature


def sample_gate(log_theta, u, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (7): the gates that noise u in (0, 1) gives. log_theta and u broadcast; returns g in [0, 1]."""
    s = torch.sigmoid((torch.logit(u) + log_theta) / tau) * (zeta - gamma) + gamma
    return s.clamp(0, 1)


def prob_above(log_theta, t, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """P(s > t) of the stretched sample s before clamping, for t in (gamma, zeta). Solves Eq. (7) for u."""
    return torch.sigmoid(log_theta - tau * log((t - gamma) / (zeta - t)))


def prob_open(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """Eq. (8): P(g > 0) = sigmoid(log_theta - tau log(-gamma / zeta)). Summed over gates it is E||G||_0."""
    return prob_above(log_theta, 0.0, tau, gamma, zeta)


def prob_one(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """P(g = 1): the sample lies above 1 before clamping."""
    return prob_above(log_theta, 1.0, tau, gamma, zeta)


def median_gate(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """The median of g: Eq. (7) at u = 1/2. Positive exactly where P(g > 0) > 1/2."""
    return (torch.sigmoid(log_theta / tau) * (zeta - gamma) + gamma).clamp(0, 1)


def mean_gate(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):
    """E[g] = integral of P(g > t) over t in (0, 1), by Gauss-Legendre quadrature; exact to rounding for tau <= 2."""
    nodes, weights = np.polynomial.legendre.leggauss(64)  # on (-1, 1)
    terms = [w / 2 * prob_above(log_theta, (x + 1) / 2, tau, gamma, zeta) for x, w in zip(nodes, weights)]
    return torch.stack(terms).sum(0)


class HardConcreteGate(nn.Module):
    """r gates. Free, they are sampled in train mode and take their median in eval mode; fixed, they are constants.

    log_theta  (r,) parameter, 0 at the start, where P(g > 0) = 11/12: Fig. 6 starts there
    u          (r,) noise in (0, 1), the same until `budget.resample` draws it anew; 1/2 until then
    fixed      (r,) the constants, or None while the gates are free
    """

    def __init__(self, r):
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(r))
        self.register_buffer("u", torch.full((r,), 0.5), persistent=False)
        self.register_buffer("fixed", None)

    def settled(self):
        """The gates (r,) without noise: what evaluation, pruning and merging use in either mode."""
        return median_gate(self.log_theta) if self.fixed is None else self.fixed

    def forward(self):
        """The gates (r,) of this pass."""
        if self.training and self.fixed is None:
            return sample_gate(self.log_theta, self.u)  # Eq. (7)
        return self.settled()
