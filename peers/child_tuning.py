"""Child-Tuning_D: full fine-tuning of a part of the weights, chosen before it starts (Xu et al., EMNLP 2021, arXiv
2109.05687).

    W <- W - M * eta dL/dW        M is 1 for the share p of weights with the largest Fisher information, and never moves

The Fisher information of a weight is estimated as the sum of (dL/dw)^2 over the training data. As in the authors' code,
L is the loss of a batch rather than of a row, so that the estimate costs no more than an epoch, and all weights of all
blocks compete for the share p, while embeddings and the head train whole.

Weight decay moves a weight whose gradient is 0, too; here the weights outside M keep their value.
Left out: Child-Tuning_F, whose M is drawn anew in every step, and clipping of the gradients that are squared.
"""

import torch
import torch.distributed as dist

from guard import world_size
from peers.fixed_ranks import FixedRanks

SHARE = 0.3  # p: the authors' script has .3, for RTE; the paper chooses .1, .2 or .3 by the dev score


def fisher_information(parameters, losses):
    """Sum of (dL/dw)^2 over some losses, each of them with gradient: a tensor like every parameter."""
    total = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        for F, gradient in zip(total, torch.autograd.grad(loss, parameters)):
            F += gradient.square()
    return total


def largest(tensors, share):
    """Masks of the entries that are among the share of largest ones in all tensors together; of equal ones, all."""
    values = torch.cat([tensor.flatten() for tensor in tensors])
    k = max(1, round(share * len(values)))
    threshold = values.kthvalue(len(values) - k + 1).values
    return [tensor >= threshold for tensor in tensors]


class ChildTuning(FixedRanks):
    """The hooks of RankAllocator, for Child-Tuning_D.

    model: one with an `encoder`, whose blocks are masked. losses(): yields the loss, with gradient, of one batch of
    training rows after the other. share: p, in (0, 1]; with 1 this is full fine-tuning.
    """

    def __init__(self, model, optimizer, total_steps, losses, share=SHARE, **rest):
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        super().__init__(model, optimizer, total_steps, **rest)
        self.model, self.losses, self.share = model, losses, share
        self.parameters = list(model.encoder.layers.parameters())
        self.masks = None  # M of every parameter, from the first step on

    def before_step(self, step):
        """Before the first step, choose the weights that train."""
        if self.masks is None:
            self.masks = largest(self.fisher_information(), self.share)

    def fisher_information(self):
        """Without dropout, so that it is the same for every seed."""
        training = self.model.training
        self.model.eval()
        total = fisher_information(self.parameters, self.losses())
        self.model.train(training)
        if world_size() > 1:  # all have the same rows; rounding may differ, masks must not
            for F in total:
                dist.all_reduce(F)
        return total

    def after_backward(self):
        """Mask the gradients, and note the weights that must not change."""
        super().after_backward()
        for p, M in zip(self.parameters, self.masks):
            p.grad *= M
        self.before = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after_step(self):
        """Put back what weight decay has moved in spite of the mask."""
        for p, M, before in zip(self.parameters, self.masks, self.before):
            p.copy_(torch.where(M, p, before))
        super().after_step()

    def state_dict(self):
        return {**super().state_dict(), "masks": self.masks}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if state["masks"] is not None:
            self.masks = [M.to(p.device) for M, p in zip(state["masks"], self.parameters)]
