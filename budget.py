"""The parameter budget: how many triplets are expected to stay, how many do, and what keeps both to it.

    C = sum_i E||G_i||_0 (d_i + k_i) / sum_i r_i (d_i + k_i)        Eq. (11), over matrices i of rank r_i at creation
    min over A, B, Theta, max over lambda >= 0 of   loss + beta R_orth + lambda (C - b)^2        Eq. (12)

b is the budget; what is measured is a density, either expected (C) or kept. C = b holds in expectation only; which
triplets are kept is decided once, at T_end, by `freeze_gates` (section 3.5). Left out: when each of these functions is
called, which is Algorithm 1 (rank_allocator.py).
"""

from math import floor
from numbers import Real

import torch
from torch import nn

from hard_concrete import median_gate, prob_open
from salora import layer_list

C_START = 11 / 12  # C of fresh gates: Eq. (8) at log_theta = 0
TRAVEL = 14  # how far log_theta must be able to go: from P(g > 0) = 11/12 to 1e-5
EPS = 1e-6  # noise stays in [EPS, 1 - EPS]: float32 could draw an exact 0, whose logit is -inf
GRID = 64  # points at which `project` tries C: 63^5 intervals are more than float32 can tell apart
RULES, SURVIVORS = ("budget", "median"), ("one", "median")  # of freeze_gates


def expected_density(layers):
    """Eq. (11): C, a scalar in [0, 1] with a gradient for log_theta. A fixed gate counts 1 if open, else 0."""
    layers = _nonempty(layers)
    spent = sum(layer.gate.open_probability().sum() * layer.triplet_size for layer in layers)
    return spent / total_parameters(layers)


def _nonempty(layers):
    layers = layer_list(layers)
    if not layers:
        raise ValueError("no SaLoRA layers, so there is no density: call adapt(model, targets) first")
    return layers


def total_parameters(layers):
    """How many adapter parameters there were at creation: an int, the denominator of every density."""
    return sum(layer.r0 * layer.triplet_size for layer in layer_list(layers))


def kept_density(layers):
    """The share of the adapter parameters that is in triplets whose settled gate is open, a float."""
    layers = _nonempty(layers)
    kept = sum(int((layer.gate.settled() > 0).sum()) * layer.triplet_size for layer in layers)
    return kept / total_parameters(layers)


def resample(layers, generator=None):
    """Draw the gates' noise anew: once an optimizer step, so that all passes of that step see the same gates.

    One draw serves all layers, on the generator's device (the CPU without one): a seed gives the same gates on any
    hardware and on every data-parallel rank.
    """
    layers = layer_list(layers)
    device = generator.device if generator is not None else "cpu"
    u = torch.rand(sum(layer.r for layer in layers), generator=generator, device=device).clamp(EPS, 1 - EPS)
    hand_out(on_device(u, layers[0].gate.u.device), [layer.gate.u for layer in layers])


def on_device(values, device):
    """A tensor of the CPU on another device; a GPU is not waited for."""
    pinned = values.device.type == "cpu" and torch.device(device).type == "cuda"
    return (values.pin_memory() if pinned else values).to(device, non_blocking=True)


def hand_out(values, tensors):
    """Fill the tensors, in place, with the parts of a vector as long as all of them. A GPU does it at once."""
    torch._foreach_copy_(tensors, values.split([len(tensor) for tensor in tensors]))


@torch.no_grad()
def start_gates(layers, spread):
    """Give gates better odds where triplets do more (not in the paper): log_theta = spread log(s) + constant.

    s = (alpha / r0) |B[:, i]| |A[i, :]| / sqrt(d + k), at least 1e-6: s^2 is the energy of a triplet's update, its
    squared Frobenius norm, per parameter. The constant makes C = 11/12, as in the paper, where log_theta starts at 0.
    """
    layers = layer_list(layers)
    for layer in layers:
        s = layer.scale * layer.B.norm(dim=0) * layer.A.norm(dim=1) / layer.triplet_size**0.5
        layer.gate.log_theta.copy_(spread * torch.log(s.clamp_min(1e-6)))
    project(layers, C_START)


@torch.no_grad()
def project(layers, density):
    """Add one number to every log_theta, the one with which C = density in (0, 1) (not in the paper).

    C grows with that number, so it lies between two neighbors of a grid that spans all closed to all open. Five grids,
    each between the neighbors found in the last, reach float32's precision, and no step waits for the device.
    """
    layers = layer_list(layers)
    log_theta = torch.cat([layer.gate.log_theta for layer in layers])  # (n,)
    sizes = torch.tensor([layer.triplet_size for layer in layers for _ in range(layer.r)])  # (n,)
    cost = on_device(sizes.to(log_theta.dtype), log_theta.device)
    low, high = -log_theta.max() - 30, -log_theta.min() + 30  # all closed, all open: P(g > 0) is 1e-12 at -30
    grid = torch.linspace(0, 1, GRID, device=log_theta.device)
    for _ in range(5):
        shifts = low + (high - low) * grid  # (GRID,)
        C = prob_open(log_theta + shifts[:, None]) @ (cost / cost.sum())  # (GRID,)  Eq. (11)
        right = (C < density).sum().clamp(1, GRID - 1)
        low, high = shifts.take(right - 1), shifts.take(right)
    hand_out(log_theta + (low + high) / 2, [layer.gate.log_theta for layer in layers])


@torch.no_grad()
def freeze_gates(layers, budget, rule="budget", survivors="one"):
    """Section 3.5: decide which triplets stay, and fix all gates for good. `prune` then removes the closed ones.

    rule "budget": from the largest log_theta down, keep each triplet that still fits budget x total parameters;
                   ties go to the earlier layer, then to the earlier triplet
    rule "median": keep the gates whose median is positive, however many they are; the budget has no say
    survivors "one": a kept gate becomes 1, a plain LoRA triplet; "median": it keeps its median
    Raises ValueError for a budget outside (0, 1] and for other rules and survivors, FloatingPointError for a
    log_theta that is not finite.
    """
    layers = layer_list(layers)
    check_budget(budget)
    if rule not in RULES or survivors not in SURVIVORS:
        raise ValueError(f"rule is budget or median and survivors one or median, got {rule!r} and {survivors!r}")
    if not all(layer.gate.log_theta.isfinite().all() for layer in layers):
        raise FloatingPointError("log_theta is not finite, so nothing can be decided: try a smaller learning rate")
    medians = [median_gate(layer.gate.log_theta) for layer in layers]
    if rule == "median":
        masks = [median > 0 for median in medians]
    else:
        masks = best_within_budget(layers, budget)
    for layer, mask, median in zip(layers, masks, medians):
        worth = torch.ones_like(median) if survivors == "one" else median
        layer.gate.fix(worth * mask.to(worth.device))


def best_within_budget(layers, budget):
    """A mask (r,) per layer: the triplets of largest log_theta, each that still fits what the budget has left."""
    masks = [torch.zeros(layer.r, dtype=torch.bool) for layer in layers]
    left = affordable(budget, total_parameters(layers))
    triplets = [
        (log_theta, i, j)
        for i, layer in enumerate(layers)
        for j, log_theta in enumerate(layer.gate.log_theta.tolist())
    ]
    for _, i, j in sorted(triplets, key=lambda t: -t[0]):  # a stable sort keeps ties in order
        if layers[i].triplet_size <= left:
            left -= layers[i].triplet_size
            masks[i][j] = True
    return masks


def affordable(budget, total):
    """The largest int n with n / total <= budget. floor(budget x total) is not always it: 0.29 x 12,800 is a little
    less than 3,712 in floats."""
    n = floor(budget * total) + 1
    while n / total > budget:
        n -= 1
    return n


def check_budget(budget):
    """Raises ValueError unless budget is a number in (0, 1]."""
    if not isinstance(budget, Real) or not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget!r}")


class GateSchedule:
    """Algorithm 1's three phases over `total_steps`: the gates train while T_start <= step < T_end.

    start and end are fractions of total_steps (App. B: 0.2 and 0.5). Before the window gates are held, after it fixed.
    Raises ValueError unless 0 <= start <= end <= 1.
    """

    def __init__(self, total_steps, start=0.2, end=0.5):
        if not 0 <= start <= end <= 1:
            raise ValueError(f"the gates' window needs 0 <= start <= end <= 1, got start={start}, end={end}")
        self.T_start, self.T_end = round(start * total_steps), round(end * total_steps)
        self.window_steps = self.T_end - self.T_start  # how many steps the gates train

    def phase(self, step):
        """'before', 'window' or 'after'."""
        if step < self.T_start:
            return "before"
        return "window" if step < self.T_end else "after"

    def target_at(self, step, budget):
        """The C to aim at: it falls linearly over the window, from C_START to the budget (not in the paper)."""
        progress = (step + 1 - self.T_start) / self.window_steps
        return budget + (1 - progress) * max(0.0, C_START - budget)


class Lagrangian(nn.Module):
    """The last term of Eq. (12) with its multiplier: call it on C, backpropagate, then `ascend`.

    target: b in (0, 1]. lr: eta_c, the step size of the ascent. lam (1,) starts at 0.
    Raises ValueError for a target outside (0, 1].
    """

    def __init__(self, target, lr=0.01, Optimizer=torch.optim.Adam, device="cpu"):
        super().__init__()
        check_budget(target)
        self.target = target
        self.lam = nn.Parameter(torch.zeros(1, device=device))
        self.optimizer = Optimizer([self.lam], lr=lr, maximize=True)

    def forward(self, C):
        """lambda (C - b)^2, a scalar."""
        return self.lam[0] * (C - self.target) ** 2

    def ascend(self):
        """One step of gradient ascent for lam, then the constraint lam >= 0.

        The gradient, (C - b)^2, is never negative, so lam only grows: the constraint would bind for other penalties.
        """
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.lam.clamp_(min=0)
