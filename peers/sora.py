"""SoRA: gates that a proximal step makes exactly zero (Ding et al., EMNLP 2023, arXiv 2311.11696).

LoRA with a trained gate g between A and B (Eqs. 6 to 9), which is B diag(g) A here. A, B and g go down the gradient;
then g is shrunk toward 0 by a threshold xi, and is exactly 0 when it is smaller (Eqs. 10 and 11). A gate at 0 still has
a gradient, so it can open again. After training, triplets whose gate is 0 are pruned (Eq. 12).

Where the paper and the authors' code differ, this is the code:

- In Eq. (10) xi is the learning rate times lambda. In the code that runs it is lambda itself, which goes on shrinking
  gates when the learning rate has become too small for A and B to make up for it. `times_lr` is for the paper's.
- Eq. (11) closes gates in [-xi, xi]. The code shrinks first and then closes what is left below xi, so that every gate
  in (-2 xi, 2 xi) is 0, and none is open that is smaller than xi.
- The loss has a small multiple of the mean of |g| as well.
- lambda rises in levels, from 0 (Algorithm 1), and the first of them takes more than a third of the training.

One thing is the paper's. The code's learning rate has fallen to 0 when the first level ends, so that nothing but the
threshold moves the gates at all others; here it falls over the whole run, for Algorithm 1 trains at every level.
SoRA has no budget: how much is pruned follows from lambda and the number of steps. A gate whose |g| is
smaller at the start than the sum of all thresholds ends at 0, unless the loss keeps it open.
Left out: Algorithm 1's record of a model at every level of lambda; only the last is kept.
"""

import torch

from peers.allocator import Allocator, normal, train_gates

LAMBDA = 7e-4  # at its highest: the authors' value, as are the next three
LEVELS = 7  # of lambda, from 0 up
FIRST, OTHER = 50, 15  # epochs of the first level, and of each of the others
L1 = 1e-3  # weight of the mean of |g|


def soft_threshold(x, xi):
    """Eq. (11): the minimizer over z of (z - x)^2 / 2 + xi |z|, entry by entry. Exactly 0 where |x| <= xi."""
    return x.sign() * (x.abs() - xi).clamp_min(0)


def shrink(g, xi):
    """Eq. (11), and 0 also where that leaves less than xi: for |g| < 2 xi."""
    left = soft_threshold(g, xi)
    return left.masked_fill(left.abs() < xi, 0)


def lambda_at(step, total_steps, highest=LAMBDA, levels=LEVELS):
    """lambda of a step: from 0 to `highest` in levels, whose lengths have the proportions of the authors'."""
    epochs = FIRST + (levels - 1) * OTHER
    epoch = step * epochs // total_steps
    level = max(0, 1 + (epoch - FIRST) // OTHER)
    return highest * (level / (levels - 1))


class SoRA(Allocator):
    """The hooks of RankAllocator, for SoRA.

    sparse_lambda: lambda at its highest level, as the authors' optimizer calls it. times_lr: the threshold is that of
    Eq. (10), the learning rate times lambda; a lambda of about 0.6 then takes as much as the authors' at their rate.
    """

    def __init__(self, model, optimizer, total_steps, sparse_lambda=LAMBDA, times_lr=False, **rest):
        super().__init__(model, optimizer, total_steps, **rest)
        self.sparse_lambda, self.times_lr = sparse_lambda, times_lr
        self.gates = [layer.gate.log_theta for layer in self.layers.values()]
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

    def after_backward(self):
        """Add the gradient of the mean of |g| over all matrices."""
        super().after_backward()
        (L1 * torch.cat(self.gates).abs().mean()).backward()

    def threshold(self):
        """xi of the step in progress."""
        lam = lambda_at(self.step, self.total_steps, self.sparse_lambda)
        return self.optimizer.param_groups[-1]["lr"] * lam if self.times_lr else lam

    @torch.no_grad()
    def after_step(self):
        """The proximal half of Eq. (10)."""
        for g in self.gates:
            g.copy_(shrink(g, self.threshold()))
        super().after_step()
