"""AdaLoRA: singular values that are masked by importance (Zhang et al., ICLR 2023, arXiv 2303.10512).

The update P Lambda Q (Eq. 3) is B diag(g) A here: P = B, Q = A, and g holds the singular values. All three are trained,
with a pull of P and Q toward orthogonality (Eq. 4). Every triplet has an importance: the smoothed sensitivity of its
entries times their uncertainty (Eqs. 7 to 11). The b(t) most important triplets of all matrices together keep their
singular value (Eq. 6), and that of the others becomes 0. Their vectors stay, so that a triplet can come back until
b(t) has reached its end.

Where the paper and the authors' code differ, this is the code:

- Eq. (4) is a sum of squares. The code pulls with the mean of the norms themselves, which is far weaker: `mean_norm`
  is the default, and `orthogonality` the paper's.
- An importance multiplies an entry *after* the optimizer's step by the gradient that this step went down, the pull
  included. In the paper both are of the same moment.
- b(t) falls along a cubic curve from t_i to T - t_f. In the formula that appendix A prints, t_f is subtracted from t
  as well, so that b(t) would start above b(0).
- t counts the steps before this one: it is 0 in the first and T - 1 in the last.

The paper's budget counts triplets, whatever they cost: it is the share of triplets that stay, not of parameters.
Exactly b(t) stay, while the code closes all triplets that tie at the threshold. PEFT's AdaLoRA is the authors' but for
step T - t_f, in which it always allocates.
Left out: the code's other measures of importance (magnitude, plain sensitivity).
"""

import torch

from budget import affordable, check_budget
from peers.allocator import Allocator, normal, train_gates

BETA_1 = BETA_2 = 0.85  # smoothing of sensitivity and of uncertainty: the authors' value for all GLUE tasks
GAMMA = 0.1  # weight of the pull: the authors' value for most tasks
STD = 0.02  # of the entries of P and Q at the start
INTERVAL = 10  # steps from one allocation to the next, Delta_T: in between, masked values move and can show their worth
INITIAL, FINAL = 0.1, 0.5  # t_i and t_f over T: about what the authors have for CoLA (.12, .52) and MNLI (.09, .58)


def mean_norm(layers):
    """The authors' pull: the mean over all P and Q of ||P^T P - I||_F, for Q ||Q Q^T - I||_F. A scalar with gradient.

    `orthogonality` is the paper's, Eq. (4): the sum over all of them of the square of this norm.
    """
    norms = []
    for layer in layers.values():
        I = torch.eye(layer.r, dtype=layer.A.dtype, device=layer.A.device)
        norms.append((layer.B.T @ layer.B - I).norm())
        norms.append((layer.A @ layer.A.T - I).norm())
    return sum(norms) / len(norms)


def budget_at(t, T, t_i, t_f, first, last):
    """Appendix A: b(t), how many triplets keep their value in step t of T, from `first` down to `last`."""
    if t <= t_i:
        return first
    if t >= T - t_f:
        return last
    left = 1 - (t - t_i) / (T - t_i - t_f)
    return int(last + (first - last) * left**3)


class AdaLoRA(Allocator):
    """The hooks of RankAllocator, for AdaLoRA. after_step reads gradients, so zero_grad comes after it.

    budget: the share of triplets that stay. regularizer: the pull toward orthogonality, a function of the layers:
    `mean_norm` or, for the paper's Eq. (4), `orthogonality` of salora.py.
    """

    def __init__(self, model, optimizer, total_steps, budget=0.5, interval=INTERVAL, regularizer=mean_norm, **rest):
        check_budget(budget)
        super().__init__(model, optimizer, total_steps, **rest)
        self.budget, self.interval, self.regularizer = budget, interval, regularizer
        self.t_f = max(2, round(FINAL * total_steps))  # the last t_f - 1 steps mask: one at least
        self.t_i = min(round(INITIAL * total_steps), total_steps - self.t_f)
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
        t = self.step - 1  # of the step that is done
        return "before" if t <= self.t_i else "window" if t <= self.total_steps - self.t_f else "after"

    def masks(self):
        return self.kept

    @torch.no_grad()
    def before_step(self, step):
        """At the start P and Q are N(0, .02^2) and the singular values 0, so that nothing has changed yet."""
        super().before_step(step)
        if step == 0:
            for layer in self.layers.values():
                for p in (layer.A, layer.B):
                    p.copy_(STD * normal(p.shape, self.noise, p))
                layer.gate.log_theta.zero_()
                layer.gate.release()

    def after_backward(self):
        """Add the gradient of the pull."""
        super().after_backward()
        (GAMMA * self.regularizer(self.layers)).backward()

    def after_step(self):
        """Note importances until b(t) is at its end. Mask every few steps, and in the end after every step."""
        t, end = self.step, self.total_steps - self.t_f
        if t < end:
            self.measure()
        if t > end or (t > self.t_i and t % self.interval == 0):
            self.allocate(budget_at(t, self.total_steps, self.t_i, self.t_f, self.first, self.last))
        super().after_step()

    @torch.no_grad()
    def measure(self):
        """Smooth how sensitive the loss is to every entry."""
        for p, I_bar, U_bar in zip(self.entries, self.sensitivity, self.uncertainty):
            gradient = 0.0 if p.grad is None else p.grad  # None: the model did not use this layer
            I = (p * gradient).abs()  # Eq. (8)
            I_bar.lerp_(I, 1 - BETA_1)  # Eq. (9): beta_1 I_bar + (1 - beta_1) I
            U_bar.lerp_((I - I_bar).abs(), 1 - BETA_2)  # Eq. (10)

    def importance(self):
        """S (r,) of every matrix."""
        s = [I_bar * U_bar for I_bar, U_bar in zip(self.sensitivity, self.uncertainty)]  # Eq. (11)
        return [value + P.mean(0) + Q.mean(1) for value, P, Q in zip(s[0::3], s[1::3], s[2::3])]  # Eq. (7)

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
