"""Methods that train no matrix at all.

`bitfit` (Ben Zaken et al., ACL 2022, arXiv 2106.10199) trains every bias there is, those of LayerNorms included.
`ia3` (Liu et al., NeurIPS 2022, arXiv 2205.05638) rescales keys, values and the inner activations of the feed-forward
net by vectors that start at 1:

    softmax(q (l_k * k)^T / sqrt(d_h)) (l_v * v)        (l_ff * f(W_1 x)) W_2

Both start as the frozen model exactly. Left out: the choice of some biases only, and pre-training the vectors.
"""

import torch
from torch import nn


def bitfit(model):
    """Freeze all of the encoder but its biases. Per block 7 d + m train, and d in front of the blocks."""
    for name, p in model.encoder.named_parameters():
        p.requires_grad_(name.endswith("bias"))


class Rescaled(nn.Module):
    """A frozen linear map `base` whose outputs, or whose inputs, are multiplied by a trained vector `scale`."""

    def __init__(self, base, of_inputs=False):
        super().__init__()
        d, k = base.weight.shape
        self.base, self.of_inputs = base, of_inputs
        self.scale = nn.Parameter(torch.ones(k if of_inputs else d))

    def forward(self, x):
        """x (..., k) -> (..., d)."""
        if self.of_inputs:
            return self.base(x * self.scale)
        return self.base(x) * self.scale


def ia3(model):
    """Freeze the encoder, and rescale keys, values and what enters `down`. Per block 2 d + m train."""
    for block in model.encoder.requires_grad_(False).layers:
        block.key = Rescaled(block.key)  # l_k
        block.value = Rescaled(block.value)  # l_v
        block.down = Rescaled(block.down, of_inputs=True)  # l_ff
