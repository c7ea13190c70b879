"""AdaLoRA: singular values that are masked by importance (Zhang et al., ICLR 2023, arXiv 2303.10512).

The update P Lambda Q (Eq. 3) is B diag(g) A here: P = B, Q = A, and g holds the singular values. All three are trained,
with a pull of P and Q toward orthogonality (Eq. 4). Every triplet has an importance: the smoothed sensitivity of its
entries times their uncertainty (Eqs. 7 to 11). The b(t) most important triplets of all matrices together keep their
singular value (Eq. 6), and that of the others becomes 0. Their vectors stay, so that a triplet can come back until
b(t) has reached its end; it falls along a cubic curve, as in the authors' code (in the formula that appendix A prints,
t_f is subtracted from t as well, so that b(t) would start above b(0)).

The paper's budget counts triplets, whatever they cost: it is the share of triplets that stay, not of parameters.
Left out: the paper's other measures of importance (magnitude, plain sensitivity).
"""

import torch

from budget import affordable, check_budget
from peers.allocator import Allocator, normal, train_gates
from salora import orthogonality

BETA_1 = BETA_2 = 0.85  # smoothing of sensitivity and of uncertainty: the authors' value for all GLUE tasks
GAMMA = 0.1  # weight of Eq. (4): the authors' value for most tasks
INTERVAL = 10  # steps from one allocation to the next, Delta_T: in between, masked values move and can show their worth
INITIAL, FINAL = 0.1, 0.5  # t_i and t_f over T: about what the authors have for CoLA (.12, .52) and MNLI (.09, .58)


def budget_at(t, T, t_i, t_f, first, last):
    """Appendix A: b(t), how many triplets keep their value after t of T steps, from `first` down to `last`."""
    if t <= t_i:
        return first
    if t >= T - t_f:
        return last
    left = 1 - (t - t_i) / (T - t_i - t_f)
    return int(last + (first - last) * left**3)


class AdaLoRA(Allocator):
    """The hooks of RankAllocator, for AdaLoRA. budget: the share of triplets that stay."""

    def __init__(self, model, optimizer, total_steps, budget=0.5, interval=INTERVAL, **rest):
        check_budget(budget)
        super().__init__(model, optimizer, total_steps, **rest)
        self.budget, self.interval = budget, interval
        self.t_i, self.t_f = round(INITIAL * total_steps), max(1, round(FINAL * total_steps))
        layers = self.layers.values()
        train_gates(layers, optimizer)
        self.first = sum(layer.r for layer in layers)
        self.last = affordable(budget, self.first)
        self.entries = [p for layer in layers for p in (layer.gate.log_theta, layer.B, layer.A)]
        self.sensitivity = [torch.zeros_like(p) for p in self.entries]  # I bar
        self.uncertainty = [torch.zeros_like(p) for p in self.entries]  # U bar
        self.kept = [torch.ones(layer.r, dtype=torch.bool, device=layer.A.device) for layer in layers]

    @property
    def phase(self):
        return "before" if self.step <= self.t_i else "window" if self.step < self.total_steps - self.t_f else "after"

    def masks(self):
        return self.kept

    @torch.no_grad()
    def before_step(self, step):
        """At the start P and Q are Gaussian, with columns and rows of norm 1 or so, and the singular values are 0."""
        super().before_step(step)
        if step == 0:
            for layer in self.layers.values():
                layer.B.copy_(normal(layer.B.shape, self.noise, layer.B) / layer.B.shape[0] ** 0.5)
                layer.gate.log_theta.zero_()
                layer.gate.release()

    def after_backward(self):
        """Add the gradient of Eq. (4), then note how sensitive the loss is to every entry, until b(t) is at its end."""
        super().after_backward()
        (GAMMA * orthogonality(self.layers)).backward()
        if self.step + 1 < self.total_steps - self.t_f:
            self.measure()

    @torch.no_grad()
    def measure(self):
        for p, I_bar, U_bar in zip(self.entries, self.sensitivity, self.uncertainty):
            gradient = 0.0 if p.grad is None else p.grad  # None: the model did not use this layer
            I = (p * gradient).abs()  # Eq. (8)
            I_bar.lerp_(I, 1 - BETA_1)  # Eq. (9): beta_1 I_bar + (1 - beta_1) I
            U_bar.lerp_((I - I_bar).abs(), 1 - BETA_2)  # Eq. (10)

    def importance(self):
        """S (r,) of every matrix."""
        s = [I_bar * U_bar for I_bar, U_bar in zip(self.sensitivity, self.uncertainty)]  # Eq. (11)
        return [value + P.mean(0) + Q.mean(1) for value, P, Q in zip(s[0::3], s[1::3], s[2::3])]  # Eq. (7)

    def after_step(self):
        """Allocate every few steps, and in the end after every step."""
        super().after_step()
        t = self.step
        last_phase = t > self.total_steps - self.t_f
        if last_phase or (t > self.t_i and t % self.interval == 0):
            self.allocate(budget_at(t, self.total_steps, self.t_i, self.t_f, self.first, self.last))

    @torch.no_grad()
    def allocate(self, b):
        """Eq. (6): only the b most important values stay."""
        S = torch.cat(self.importance())
        best = S.argsort(descending=True, stable=True)[:b]  # stable: ties go to the earlier triplet
        kept = torch.zeros_like(S, dtype=torch.bool)
        kept[best] = True
        self.kept = list(kept.split([layer.r for layer in self.layers.values()]))
        for layer, mask in zip(self.layers.values(), self.kept):
            layer.gate.log_theta.masked_fill_(~mask, 0)

    def state_dict(self):
        lists = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "kept": self.kept}
        return {**super().state_dict(), **{name: [x.clone() for x in tensors] for name, tensors in lists.items()}}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for mine in ("sensitivity", "uncertainty", "kept"):
            for tensor, saved in zip(getattr(self, mine), state[mine]):
                tensor.copy_(saved)
