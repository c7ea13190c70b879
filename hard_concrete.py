"""The Hard-Concrete gate (Louizos et al. 2018; SaLoRA, Hu et al. 2023, section 3.2).

A gate g in [0, 1] that is exactly 0 or exactly 1 with positive probability, and yet has a gradient. Uniform noise
becomes a sigmoid sample on (0, 1), which is stretched to (GAMMA, ZETA) and clamped back to [0, 1]:

    s = sigmoid((logit(u) + log_theta) / tau) (zeta - gamma) + gamma,     g = clamp(s, 0, 1)                Eq. (7)

log_theta is the one trainable number of a gate. s grows with u, so every question about g is a question about u. The
functions are elementwise, in any shape; the module at the end holds log_theta.
Left out: how gates are trained toward a budget (budget.py) and what they multiply (salora.py).
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
    """r gates, one per triplet. Calling the module returns the gates (r,) of this forward pass.

    state "held"   all 1, so that the layer is plain LoRA; log_theta does not train. Every gate starts this way.
    state "free"   sampled in train mode, the median in eval mode; log_theta trains. `release` begins it.
    state "fixed"  constants for good. `fix` begins it.

    log_theta  (r,) parameter, 0 at the start, where P(g > 0) = 11/12: the paper's Fig. 6 starts there
    u          (r,) noise in (0, 1), the same until `budget.resample` draws it anew; 1/2 (the median) until then
    held       (r,) ones while the gates are held, otherwise None: a tensor, since a state dict keeps nothing else
    fixed      (r,) the constants once the gates are fixed, otherwise None
    """

    def __init__(self, r):
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(r))
        self.register_buffer("u", torch.full((r,), 0.5), persistent=False)
        self.register_buffer("held", None)
        self.register_buffer("fixed", None)
        self.hold_open()

    @property
    def state(self):
        """The state of all r gates: "held", "free" or "fixed"."""
        if self.held is not None:
            return "held"
        return "free" if self.fixed is None else "fixed"

    def hold_open(self):
        """All gates are 1 until they are released."""
        self.fix(torch.ones_like(self.log_theta))
        self.held, self.fixed = self.fixed, None

    def release(self):
        """From here on the gates are random and log_theta trains."""
        self.held = self.fixed = None
        self.log_theta.requires_grad_(True)

    def fix(self, gates):
        """From here on the gates are these constants (r,), and log_theta does not train."""
        self.held, self.fixed = None, gates.detach()
        self.log_theta.requires_grad_(False)
        self.log_theta.grad = None

    def settled(self):
        """The gates (r,) without noise: what evaluation, pruning and merging use in either mode."""
        if self.state == "free":
            return median_gate(self.log_theta)
        return self.held if self.state == "held" else self.fixed

    def open_probability(self):
        """P(g > 0) of every gate (r,): Eq. (8) where it is free, and 0 or 1 where it is a constant."""
        return prob_open(self.log_theta) if self.state == "free" else (self.settled() > 0).float()

    def forward(self):
        if self.training and self.state == "free":
            return sample_gate(self.log_theta, self.u)  # Eq. (7)
        return self.settled()

    def keep(self, kept):
        """Keep only the gates with these indices."""
        set_data(self.log_theta, self.log_theta.data[kept])
        self.u = self.u[kept]
        self.held = None if self.held is None else self.held[kept]
        self.fixed = None if self.fixed is None else self.fixed[kept]

    def extra_repr(self):
        r = len(self.log_theta)
        if r == 0 or self.log_theta.is_meta:
            return f"{r} gates"
        if self.state != "free":
            return f"{r} gates, {self.state}, {int((self.settled() > 0).sum())} of them open"
        low, high = self.log_theta.min().item(), self.log_theta.max().item()
        return f"{r} gates, free, log_theta {low:.2f} to {high:.2f}"

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """A state dict decides how many gates there are, and their state: a pruned layer's fits a fresh one."""
        log_theta = state_dict.get(prefix + "log_theta")
        if log_theta is not None:
            if log_theta.shape != self.log_theta.shape:
                set_data(self.log_theta, self.log_theta.data.new_zeros(log_theta.shape))
            self.u = self.u.new_full(log_theta.shape, 0.5)
            for name in ("held", "fixed"):
                saved = state_dict.get(prefix + name)
                setattr(self, name, None if saved is None else self.u.new_ones(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def set_data(p, data):
    """Give a Parameter data of another shape, and no gradient. It stays the same object for all who hold it.

    An empty one stops requiring a gradient, for which DistributedDataParallel would wait.
    """
    p.grad = None
    # Autograd remembers a Parameter's shape while any graph through it lives, that of the last loss for instance.
    # A change of dtype makes it forget.
    p.data = torch.empty(0, dtype=torch.float16 if p.dtype != torch.float16 else torch.float32, device=p.device)
    p.data = data
    p.requires_grad_(p.requires_grad and p.numel() > 0)
