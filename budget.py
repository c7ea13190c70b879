"""The parameter budget: how many triplets are expected, how many stay, and what drives the one to the other.

    C = sum_i E||G_i||_0 (d_i + k_i) / sum_i r_i (d_i + k_i)        Eq. (11), over matrices i of rank r_i at creation
    min over A, B, Theta, max over lambda >= 0 of   loss + beta R_orth + lambda (C - b)^2        Eq. (12)

with b the target density. C = b holds in expectation; what is kept is decided once, at T_end, by `freeze_gates`
(section 3.5). Functions over layers take any iterable of SaLoRALinear.
"""

from math import floor

import torch
from torch import nn

from hard_concrete import median_gate, prob_open

C_START = 11 / 12  # C of fresh gates: Eq. (8) at log_theta = 0
EPS = 1e-6  # noise stays in [EPS, 1 - EPS]: float32 could draw an exact 0, whose logit is -inf


def expected_density(layers):
    """Eq. (11): C, a scalar in [0, 1] with a gradient for log_theta. A fixed gate counts as the 0 or 1 it is."""
    spent, total = 0.0, 0
    for layer in layers:
        gate = layer.gate
        open_ = prob_open(gate.log_theta) if gate.fixed is None else (gate.fixed > 0).float()
        spent = spent + open_.sum() * layer.triplet_size  # E||G_i||_0 (d_i + k_i)
        total += layer.r0 * layer.triplet_size
    return spent / total


def total_parameters(layers):
    """How many adapter parameters there were at creation, the 1 of every density: an int."""
    return sum(layer.r0 * layer.triplet_size for layer in layers)


def kept_density(layers):
    """What `expected_density` promises, counted: the share of parameters in triplets whose settled gate is open."""
    layers = list(layers)
    kept = sum(int((layer.gate.settled() > 0).sum()) * layer.triplet_size for layer in layers)
    return kept / total_parameters(layers)


def resample(layers, generator=None):
    """Draw the gates' noise anew: once an optimiser step, so that all passes of that step see the same gates.

    One draw serves all layers, on the generator's device (the CPU without one): a seed gives the same gates on any
    hardware and on every data-parallel rank.
    """
    layers = list(layers)
    device = generator.device if generator is not None else "cpu"
    u = torch.rand(sum(layer.r for layer in layers), generator=generator, device=device).clamp(EPS, 1 - EPS)
    for layer, part in zip(layers, u.split([layer.r for layer in layers])):
        layer.gate.u.copy_(part)


@torch.no_grad()
def start_gates(layers, spread):
    """Give gates better odds where triplets are worth more (not in the paper): log_theta = spread log(s) + constant.

    s = |B[:, i]| |A[i, :]| / sqrt(d + k), at least 1e-6: of canonical layers, s squared is the energy per parameter.
    The constant makes C = 11/12, its value in the paper, where all gates start at log_theta = 0.
    """
    layers = list(layers)
    for layer in layers:
        s = layer.B.norm(dim=0) * layer.A.norm(dim=1) / layer.triplet_size**0.5
        layer.gate.log_theta.copy_(spread * torch.log(s.clamp_min(1e-6)))
    project(layers, C_START)


@torch.no_grad()
def project(layers, density):
    """Add one number to every log_theta, the one with which C = density in (0, 1) (not in the paper).

    C grows with that number, so bisection finds it: 60 halvings of an interval that holds it, to float32's last digit.
    """
    layers = list(layers)
    log_theta = torch.cat([layer.gate.log_theta for layer in layers])
    cost = torch.cat([torch.full_like(layer.gate.log_theta, layer.triplet_size) for layer in layers])
    low, high = -log_theta.max() - 30, -log_theta.min() + 30  # all gates closed, all gates open
    for _ in range(60):
        middle = (low + high) / 2
        below = (prob_open(log_theta + middle) * cost).sum() / cost.sum() < density
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    for layer in layers:
        layer.gate.log_theta += middle


@torch.no_grad()
def freeze_gates(layers, density, rule="budget", survivors="one"):
    """Section 3.5: decide which triplets stay, and fix all gates for good. `prune` then removes the closed ones.

    rule "budget": from the largest log_theta down, keep each triplet that still fits density x total parameters;
                   ties go to the earlier layer, then to the earlier triplet
    rule "median": keep the gates whose median is positive, however many they are; density has no say
    survivors "one": a kept gate becomes 1, a plain LoRA triplet; "median": it keeps its median
    Raises ValueError for a density outside (0, 1] and for other rules and survivors.
    """
    layers = list(layers)
    check_density(density)
    if rule not in ("budget", "median") or survivors not in ("one", "median"):
        raise ValueError(f"rule is budget or median and survivors one or median, got {rule!r} and {survivors!r}")
    medians = [median_gate(layer.gate.log_theta) for layer in layers]
    if rule == "median":
        masks = [median > 0 for median in medians]
    else:
        masks = [torch.zeros(layer.r, dtype=torch.bool) for layer in layers]
        triplets = [(i, j, v) for i, m in enumerate(layers) for j, v in enumerate(m.gate.log_theta.tolist())]
        limit, spent = floor(density * total_parameters(layers) + 1e-6), 0  # 0.29 x 12,800 is 3,711.9999... in floats
        for i, j, _ in sorted(triplets, key=lambda t: -t[2]):  # a stable sort keeps ties in order
            if spent + layers[i].triplet_size <= limit:
                spent += layers[i].triplet_size
                masks[i][j] = True
    for layer, mask, median in zip(layers, masks, medians):
        worth = torch.ones_like(median) if survivors == "one" else median
        layer.gate.fixed = worth * mask.to(worth.device)


def check_density(density):
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


CONTROLLERS = ("quadratic", "sgd", "linear", "projection")


class GateSchedule:
    """Algorithm 1's three phases over `total_steps`: the gates train while T_start <= step < T_end.

    start and end are fractions of total_steps (App. B: 0.2 and 0.5). Before, the gates are open; after, fixed.
    Raises ValueError unless 0 <= start <= end <= 1.
    """

    def __init__(self, total_steps, start=0.2, end=0.5):
        if not 0 <= start <= end <= 1:
            raise ValueError(f"the gates' window needs 0 <= start <= end <= 1, got start={start}, end={end}")
        self.T_start, self.T_end = round(start * total_steps), round(end * total_steps)

    def phase(self, step):
        """'open', 'window' or 'frozen'."""
        return "open" if step < self.T_start else "window" if step < self.T_end else "frozen"

    @property
    def window(self):
        """How many steps the gates train."""
        return self.T_end - self.T_start


class Lagrangian(nn.Module):
    """The penalty of Eq. (12) with its multipliers: call it on C, backpropagate, then `ascend`.

    controller "quadratic":  lam[0] (C - b)^2, ascent by Adam
               "sgd":        the same with plain gradient steps, as in Algorithm 1: it hardly moves
               "linear":     lam[0] (C - b_t) + lam[1] (C - b_t)^2, ascent by Adam
               "projection": none, lam stays 0; instead `project` puts C on b_t after every step
    b_t falls from C's start to b during the first half of the window.
    target: b in (0, 1]. lr: eta_c, the length of an ascent step. Multipliers start at 0 and are never negative.
    Raises ValueError for another target or controller.
    """

    def __init__(self, target, lr=0.01, controller="quadratic", device="cpu"):
        super().__init__()
        check_density(target)
        if controller not in CONTROLLERS:
            raise ValueError(f"controller must be one of {', '.join(CONTROLLERS)}, got {controller!r}")
        self.target, self.controller = target, controller
        self.lam = nn.Parameter(torch.zeros(2 if controller == "linear" else 1, device=device))
        Optimizer = torch.optim.SGD if controller == "sgd" else torch.optim.Adam
        self.optimizer = Optimizer([self.lam], lr=lr, maximize=True)

    def target_at(self, progress):
        """The density aimed at when the fraction `progress` in [0, 1] of the window has passed."""
        if self.controller in ("quadratic", "sgd"):
            return self.target
        return self.target + max(0.0, 1 - 2 * progress) * max(0.0, C_START - self.target)

    def forward(self, C, progress=1.0):
        """The penalty for density C, a scalar: Eq. (12)'s last term."""
        gap = C - self.target_at(progress)
        if self.controller == "linear":
            return self.lam[0] * gap + self.lam[1] * gap**2
        return self.lam[0] * gap**2  # Eq. (12)

    def ascend(self):
        """One step up along the penalty's gradient for the multipliers, projected onto lam >= 0."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.lam.clamp_(min=0)
