"""SoRA: gates that a proximal step makes exactly zero (Ding et al., EMNLP 2023, arXiv 2311.11696).

LoRA with a trained gate g between A and B (Eqs. 6 to 9), which is B diag(g) A here. A, B and g go down the gradient;
then g is shrunk toward 0 by the threshold xi = eta_t lambda, and is exactly 0 when it is smaller (Eqs. 10 and 11). A
gate at 0 still has a gradient, so it can open again. After training, triplets whose gate is 0 are pruned (Eq. 12).

lambda rises in levels, as in the authors' schedule, whose aim is a curve of score against size. SoRA has no budget: how
much is pruned follows from lambda, the learning rate and the number of steps. `reach` puts them together: it is the sum
of a run's thresholds, so that a gate ends at 0 if it starts within reach of 0 and no gradient moves it. The gradient
step of g is that of the optimizer, Adam's in the authors' code.
Left out: Algorithm 1's record of a model at every level of lambda; only the last is kept.
"""

import torch

from peers.allocator import Allocator, normal, train_gates

LAMBDA = 0.6  # at its highest: the authors' threshold, 7e-4, over their learning rate for it, 1.2e-3
LEVELS = 7  # of lambda, from 0 up: the authors' number


def soft_threshold(x, xi):
    """Eq. (11): the minimizer over z of (z - x)^2 / 2 + xi |z|, entry by entry. Exactly 0 where |x| <= xi."""
    return x.sign() * (x.abs() - xi).clamp_min(0)


def lambda_at(step, total_steps, highest=LAMBDA, levels=LEVELS):
    """lambda of a step: `levels` of equal length, from 0 to `highest`."""
    level = step * levels // total_steps
    return highest * (level / (levels - 1))


def lambda_of(reach, rates):
    """The highest lambda with which all thresholds of a run add up to `reach`. rates: eta_t of every step.

    Raises ValueError for a run so short that lambda never rises.
    """
    total = sum(eta * lambda_at(step, len(rates), 1.0) for step, eta in enumerate(rates))
    if not total:
        raise ValueError(f"a reach of {reach:g} needs more steps than {len(rates)}: lambda is 0 in all of them")
    return reach / total


class SoRA(Allocator):
    """The moments of RankAllocator, for SoRA.

    highest: lambda at the end. Adam moves a gate by eta_t or so a step, and the threshold by eta_t lambda.
    reach: what all thresholds add up to, instead of `highest`. The learning rate is the optimizer's own.
    """

    def __init__(self, model, optimizer, total_steps, highest=LAMBDA, reach=None, **rest):
        super().__init__(model, optimizer, total_steps, **rest)
        self.highest = highest
        if reach is not None:
            rates = [optimizer.defaults["lr"] * self.lr_factor(step) for step in range(total_steps)]
            self.highest = lambda_of(reach, rates)
        train_gates(self.layers.values(), optimizer, weight_decay=0.0)  # the threshold is decay enough

    @property
    def lam(self):
        return lambda_at(max(0, self.step - 1), self.total_steps, self.highest)

    @torch.no_grad()
    def before_step(self, step):
        """At the start g is N(0, 1), as in the authors' code. B = 0, so that nothing has changed yet."""
        super().before_step(step)
        if step == 0:
            for layer in self.layers.values():
                g = layer.gate.log_theta
                g.copy_(normal(g.shape, self.noise, g))
                layer.gate.release()

    @torch.no_grad()
    def after_step(self):
        """The proximal half of Eq. (10), with xi = eta_t lambda."""
        xi = self.optimizer.param_groups[-1]["lr"] * lambda_at(self.step, self.total_steps, self.highest)
        for layer in self.layers.values():
            layer.gate.log_theta.copy_(soft_threshold(layer.gate.log_theta, xi))
        super().after_step()
