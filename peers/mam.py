"""MAM adapter: a small prefix in the attention, and a large adapter beside the feed-forward net (He et al., ICLR 2022,
arXiv 2110.04366).

    keys, values   [P_k; W_k x], [P_v; W_v x]                               P_k, P_v (l, d), as in peers/prefix.py
    h              FFN(x) + s (W_up relu(W_down x + b_down) + b_up)         W_down (m, d), W_up (d, m)

It mixes what its authors found best when they wrote prefixes, adapters and LoRA as one formula, h <- h + s f(x): few
parameters suffice to change the attention, the feed-forward net puts more of them to use; an adapter beside a module
reads the module's input and does better than one behind it; and a scale s does better than none. W_up starts at 0, so
that at first only the prefix makes a difference.
Left out: the network that makes the prefix while it trains, as in peers/prefix.py, and dropout in adapter and prefix.
"""

import torch.nn.functional as F
from torch import nn

from peers.prefix import PrefixBlock

SCALE = 2  # s: the authors' for GLUE; for translation and summarization it is 4
UNITS_PER_VECTOR = 16  # m / l: about the paper's 512 to 30. The authors' script for GLUE has 16 of both


class ParallelAdapter(nn.Module):
    """A bottleneck of m units without a residual of its own."""

    def __init__(self, d, m):
        super().__init__()
        self.down, self.up = nn.Linear(d, m), nn.Linear(m, d)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        """(..., d) -> (..., d)."""
        return SCALE * self.up(F.relu(self.down(x)))


class MAMBlock(PrefixBlock):
    """A block of the encoder, made of another one's parts, with a prefix of l vectors and an adapter of m units."""

    def __init__(self, block, l, m, config):
        super().__init__(block, l, config.hidden_size, config.initializer_range)
        self.adapter = ParallelAdapter(config.hidden_size, m)

    def forward(self, x, mask):
        """As Block's."""
        x = self.norm1(x + self.dropout(self.attention(x, mask)))
        h = self.dropout(self.down(F.gelu(self.up(x)))) + self.adapter(x)  # (batch, seq, d)
        return self.norm2(x + h)


def mam(model, m):
    """Freeze the encoder, and give every block an adapter of m units and a prefix of m / 16 vectors, at least one.

    Per block 2 d m + d + m + 2 l d train.
    """
    layers, config = model.encoder.requires_grad_(False).layers, model.encoder.config
    l = max(1, m // UNITS_PER_VECTOR)
    for i, block in enumerate(layers):
        layers[i] = MAMBlock(block, l, m, config)
