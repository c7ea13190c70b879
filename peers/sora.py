"""SoRA: gates that a proximal step makes exactly zero (Ding et al., EMNLP 2023, arXiv 2311.11696).

LoRA with a trained gate g between A and B (Eqs. 6 to 9), which is B diag(g) A here. A, B and g go down the gradient;
then g is shrunk toward 0 by the threshold xi = eta_t lambda, and is exactly 0 when it is smaller (Eqs. 10 and 11). A
gate at 0 still has a gradient, so it can open again. After training, triplets whose gate is 0 are pruned (Eq. 12).

lambda rises in levels, as in the authors' schedule, whose aim is a curve of score against size. SoRA has no budget: how
much is pruned follows from lambda, the learning rate and the number of steps. A gate that no gradient moves ends at 0
if it starts closer to 0 than the sum of a run's thresholds. The gradient step of g is that of the optimizer, Adam's in
the authors' code.
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


class SoRA(Allocator):
    """The hooks of RankAllocator, for SoRA.

    sparse_lambda: lambda at its highest level, as the authors' code calls it. Adam moves a gate by about eta_t per
    step, and the threshold by eta_t lambda.
    """

    def __init__(self, model, optimizer, total_steps, sparse_lambda=LAMBDA, **rest):
        super().__init__(model, optimizer, total_steps, **rest)
        self.sparse_lambda = sparse_lambda
        train_gates(self.layers.values(), optimizer, weight_decay=0.0)  # the threshold is decay enough

    @property
    def lam(self):
        return lambda_at(max(0, self.step - 1), self.total_steps, self.sparse_lambda)

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
        xi = self.optimizer.param_groups[-1]["lr"] * lambda_at(self.step, self.total_steps, self.sparse_lambda)
        for layer in self.layers.values():
            layer.gate.log_theta.copy_(soft_threshold(layer.gate.log_theta, xi))
        super().after_step()
