"""Adapters: a small bottleneck of its own behind frozen modules.

    x -> x + W_up f(W_down x + b_down) + b_up        W_down (m, d), W_up (d, m)

`houlsby` (Houlsby et al., ICML 2019, arXiv 1902.00751): two in every block, behind the attention's output matrix and
behind the feed-forward net, each before the residual; LayerNorms train, too. `pfeiffer` (Pfeiffer et al., EACL 2021,
arXiv 2005.00247): one in every block, behind the LayerNorm that follows the feed-forward net; nothing else trains.
f is GELU in both. A bottleneck has a nonlinearity in it, so it cannot be folded into the matrix before it.
As in Houlsby's code, the block's dropout comes before the adapter, and none after it. Pfeiffer's stays where it is.
Left out: Pfeiffer's second residual around that LayerNorm, AdapterFusion, dropping adapters.
"""

import torch.nn.functional as F
from torch import nn

STD = 0.01  # Houlsby, section 3.6: near the identity at the start; larger values did worse. The released code has .001


class Adapter(nn.Module):
    """A frozen module `base` with d outputs, and behind it a bottleneck of m units and a residual around that.

    dropout: a module between the two.
    """

    def __init__(self, base, d, m, dropout=None):
        super().__init__()
        self.base = base
        self.dropout = dropout or nn.Identity()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=STD, a=-2 * STD, b=2 * STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        h = self.dropout(self.base(x))  # (..., d)
        return h + self.up(F.gelu(self.down(h)))  # (..., d) through (..., m)


def houlsby(model, m):
    """Freeze the encoder, and put two adapters of m units into every block. Per block 2 (2 d m + d + m) + 4 d train."""
    encoder = model.encoder.requires_grad_(False)
    d = encoder.config.hidden_size
    for block in encoder.layers:
        block.out = Adapter(block.out, d, m, block.dropout)
        block.down = Adapter(block.down, d, m, block.dropout)
        block.dropout = nn.Identity()
        for norm in (block.norm1, block.norm2):
            norm.requires_grad_(True)


def pfeiffer(model, m):
    """Freeze the encoder, and put one adapter of m units into every block. Per block 2 d m + d + m train."""
    encoder = model.encoder.requires_grad_(False)
    for block in encoder.layers:
        block.norm2 = Adapter(block.norm2, encoder.config.hidden_size, m)
