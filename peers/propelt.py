"""ProPELT: one prototype for all layers, and for every layer a trained mask (Zeng et al., ACL 2023, arXiv 2305.17682,
where it is called ProPETL).

    theta_i = theta * m_i        m_i is 1 for the share k of entries with the largest |s_i|, layer i's scores, else 0

This is Eq. (17) of the survey that peers/README.md follows. The prototype theta is what a single layer would have: an
adapter, a prefix or a pair of LoRA matrices. Prototype and scores train together; the gradient reaches s_i straight
through, as if m_i were |s_i|. What a finished task needs is one prototype and a bit per entry and layer, instead of a
float.

Only the order of scores counts, and a step of Adam does not depend on the size of a gradient. So a higher learning rate
for scores, which the authors have, is the same as scores that start smaller, so here scores start divided by SPEED.
Left out: several tasks that share a prototype, and the network that makes a prefix while it trains.
"""

import torch
import torch.nn.functional as F
from torch import nn

from peers.adapters import Adapter
from peers.prefix import PrefixBlock
from salora import SaLoRALinear

# The authors' for RoBERTa: the share k, and the scores' learning rate over that of the prototype
SHARE = {"adapter": 0.5, "prefix": 0.1, "lora": 0.1}
SPEED = {"adapter": 30, "prefix": 1, "lora": 300}
SCALE = 1.5  # alpha / r of LoRA: the authors' 48 / 32


def mask_of(s, share):
    """m: 1 for the share of entries with the largest |s|, else 0. Its gradient goes to |s| as it is."""
    size = s.abs()
    closed = int((1 - share) * s.numel())
    m = torch.ones_like(s)
    if closed:
        m = (size > size.flatten().kthvalue(closed).values).to(s.dtype)
    return m + (size - size.detach())  # the bracket is 0, and has the gradient


class Mask(nn.Module):
    """The mask of one tensor of a prototype in one layer. kind: "adapter", "prefix" or "lora".

    Without SPEED scores start uniform within 1 / sqrt(k), k the last dimension, about as in the authors' code.
    """

    def __init__(self, p, kind):
        super().__init__()
        bound = 1 / p.shape[-1] ** 0.5
        self.s = nn.Parameter(torch.empty_like(p).uniform_(-bound, bound) / SPEED[kind])
        self.share = SHARE[kind]

    def forward(self, p):
        return p * mask_of(self.s, self.share)


# Adapter


class MaskedAdapter(nn.Module):
    """A frozen module `base`, and behind it the adapter that a mask makes of the prototype. Biases are not masked."""

    def __init__(self, base, prototype):
        super().__init__()
        self.base, self.prototype = base, prototype
        self.mask_down, self.mask_up = (Mask(linear.weight, "adapter") for linear in (prototype.down, prototype.up))

    def forward(self, x):
        h, down, up = self.base(x), self.prototype.down, self.prototype.up
        inner = F.gelu(F.linear(h, self.mask_down(down.weight), down.bias))  # (..., m)
        return h + F.linear(inner, self.mask_up(up.weight), up.bias)  # (..., d)


def propelt_adapter(model, m):
    """Freeze the encoder, and put masks of one adapter of m units where `pfeiffer` puts adapters.

    2 d m + d + m train, and 2 d m scores per block.
    """
    encoder = model.encoder.requires_grad_(False)
    prototype = Adapter(nn.Identity(), encoder.config.hidden_size, m)
    for block in encoder.layers:
        block.norm2 = MaskedAdapter(block.norm2, prototype)


# Prefix


class Prefix(nn.Module):
    """Keys (l, d) and values (l, d)."""

    def __init__(self, l, d, std):
        super().__init__()
        self.key, self.value = (nn.Parameter(torch.randn(l, d) * std) for _ in range(2))


class MaskedPrefixBlock(PrefixBlock):
    """A block of the encoder whose prefix is what masks make of the prototype."""

    def __init__(self, block, prototype):
        nn.Module.__init__(self)
        for name, part in block.named_children():
            setattr(self, name, part)
        self.heads, self.attention_dropout = block.heads, block.attention_dropout
        self.prototype = prototype
        self.mask_key, self.mask_value = (Mask(p, "prefix") for p in (prototype.key, prototype.value))

    prefix_key = property(lambda self: self.mask_key(self.prototype.key))  # (l, d)
    prefix_value = property(lambda self: self.mask_value(self.prototype.value))


def propelt_prefix(model, l):
    """Freeze the encoder, and give every block masks of one prefix of l vectors. 2 l d train, and as many per block."""
    layers, config = model.encoder.requires_grad_(False).layers, model.encoder.config
    prototype = Prefix(l, config.hidden_size, config.initializer_range)
    for i, block in enumerate(layers):
        layers[i] = MaskedPrefixBlock(block, prototype)


# LoRA


class Pair(nn.Module):
    """A (r, k) and B (d, r), which start as in SaLoRALinear."""

    def __init__(self, d, k, r):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(r, k) / k**0.5), nn.Parameter(torch.zeros(d, r))


class MaskedLoRA(nn.Module):
    """A frozen linear map `base`, and LoRA with what masks make of the prototype: h = W x + s (m_B B) (m_A A) x."""

    def __init__(self, base, prototype):
        super().__init__()
        self.base, self.prototype = base, prototype
        self.mask_A, self.mask_B = Mask(prototype.A, "lora"), Mask(prototype.B, "lora")

    def forward(self, x):
        """x (..., k) -> (..., d)."""
        h = F.linear(x, self.mask_A(self.prototype.A))  # (..., r)
        return self.base(x) + F.linear(SCALE * h, self.mask_B(self.prototype.B))  # (..., d)

    @torch.no_grad()
    def plain(self):
        """A SaLoRALinear with the same outputs and all gates open, which can be merged and exported."""
        r = len(self.prototype.A)
        layer = SaLoRALinear(self.base, r, SCALE * r)
        layer.A.copy_(self.mask_A(self.prototype.A))
        layer.B.copy_(self.mask_B(self.prototype.B))
        layer.gate.fix(torch.ones_like(layer.gate.log_theta))
        return layer.train(self.training)


def propelt_lora(model, r):
    """Freeze the encoder, and give every matrix masks of a pair of rank r that all matrices of its name share.

    What one block's LoRA has trains, and as many scores per block.
    """
    layers = model.encoder.requires_grad_(False).layers
    for name in ("query", "key", "value", "out", "up", "down"):  # the paper: query and value
        first = getattr(layers[0], name)
        prototype = Pair(first.out_features, first.in_features, r)
        for block in layers:
            setattr(block, name, MaskedLoRA(getattr(block, name), prototype))
