"""RM-LoRA: regularized and masked LoRA (under review at TMLR, 2024).

Two additions to LoRA, against directions that are never used: a pull of A and B toward orthogonality (Eq. 10), and
random masks, so that a step updates only r_hat of the R directions of a matrix (Algorithm 1). No rank is cut: all R
directions stay. The variants of the paper: beta = 0 is GM-LoRA, share = 1 is R-LoRA, both together are plain LoRA.
Studies have them as rm-lora-4-beta-0 and rm-lora-4-share-1 (experiments/arms.py).

Adam and weight decay move a parameter whose gradient is 0. "Update only these directions" is meant here to the letter:
the other rows of A and columns of B, and their moments, are put back after the step.
"""

import torch

from peers.allocator import Allocator
from rank_allocator import moments_of
from salora import orthogonality

BETA = 0.1  # weight of Eq. (10). The paper does not give it; this is SaLoRA's for the same term
SHARE = 0.5  # r_hat / R. The paper does not give it either


class RMLoRA(Allocator):
    """The hooks of RankAllocator, for RM-LoRA. beta: weight of Eq. (10). share: r_hat / R, in (0, 1]."""

    def __init__(self, model, optimizer, total_steps, beta=BETA, share=SHARE, **rest):
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        super().__init__(model, optimizer, total_steps, **rest)
        self.beta, self.share = beta, share
        self.held = []  # what must not change in this step: (tensor, its axis of directions, which ones, their values)

    def r_hat(self, layer):
        """How many directions of a layer a step updates."""
        return max(1, round(self.share * layer.r))

    def after_backward(self):
        """Add the gradient of beta times Eq. (10); then mask the gradients, and note what must not change."""
        super().after_backward()
        if self.beta:
            (self.beta * orthogonality(self.layers)).backward()
        self.held = []
        for layer in self.layers.values():
            shuffled = torch.randperm(layer.r, generator=self.noise).to(layer.A.device)
            rest = shuffled[self.r_hat(layer) :]  # the directions that are not in R_t
            for p, axis in ((layer.A, 0), (layer.B, 1)):
                if p.grad is not None:  # None: the model did not use this layer
                    p.grad.index_fill_(axis, rest, 0)  # Alg. 1, line 13
                for tensor in (p.data, *moments_of(self.optimizer, p).values()):
                    self.held.append((tensor, axis, rest, tensor.index_select(axis, rest)))

    @torch.no_grad()
    def after_step(self):
        """Put back what Adam's moments and weight decay have moved in spite of the mask."""
        for tensor, axis, rest, before in self.held:
            tensor.index_copy_(axis, rest, before)
        super().after_step()
