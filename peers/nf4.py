"""NF4, four bits per weight, and linear layers that hold their weights in it (QLoRA: Dettmers et al., NeurIPS 2023,
arXiv 2305.14314, section 3).

Pre-trained weights are about normal with mean 0. So the 16 levels are quantiles of the normal distribution, stretched
to [-1, 1]: each of them stands for about as many weights as any other. W is cut into blocks of 64 entries, and an entry
is kept as the index of the level that is nearest to it once its block is divided by its largest absolute value, c:

    W ~ c levels[codes]         4 bits for a code; 8 bits for c, which is quantized itself; 32 bits for 256 values of c

That is 4 + 8/64 + 32/(64 256) = 4.127 bits per weight. QLoRA is LoRA on such a base, computed in bfloat16; here any
other method with triplets can have such a base, too. Levels and codes are those of bitsandbytes.
Left out: kernels that multiply by W without writing it down, FP4, paged optimizers.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from salora import replace_modules

BLOCK = 64  # entries of W that share one c
BLOCK_2 = 256  # values of c that share one scale


@cache
def nf4_levels(device="cpu"):
    """The 16 levels (16,), ascending: 7 below 0, 0 itself, 8 above.

    Sixteen equal steps of probability would have no level at 0, which many weights are near to. So the negative half
    has 8 quantiles, the positive half 9, and 0 is the last of one and the first of the other. Quantiles of 0 and 1 are
    infinite: the outermost probabilities stay off them by half a step, the mean of that of 15 and that of 16 steps.
    """
    edge = (1 / 32 + 1 / 30) / 2
    negative = torch.linspace(edge, 0.5, 8, dtype=torch.float64)  # probabilities
    positive = torch.linspace(0.5, 1 - edge, 9, dtype=torch.float64)
    levels = torch.special.ndtri(torch.cat([negative, positive[1:]]))  # their quantiles: 7 negative, 0, 8 positive
    return (levels / levels[-1]).float().to(device)


@cache
def dynamic_levels(device="cpu"):
    """The 256 levels (256,), ascending, that the values of c are kept in: an 8-bit float that is finest where it is
    needed. On both sides of 0 there are 64 levels between .1 and 1, 32 between .01 and .1, and so on; then 0 and 1."""
    positive = []
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6))
    positive = torch.cat(positive)  # (127,)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)]).to(device)


def quantize(x, levels, size):
    """Any x, flattened -> (codes (n,) uint8, the index of the nearest level; c (blocks,), its blocks' largest |x|)."""
    x = x.detach().flatten().float()
    blocks = F.pad(x, (0, -len(x) % size)).view(-1, size)  # (blocks, size); the last one filled up with 0
    c = blocks.abs().amax(1)  # (blocks,)
    scaled = blocks / c.where(c > 0, 1)[:, None]  # in [-1, 1]
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(scaled, between).to(torch.uint8)
    return codes.flatten()[: len(x)], c


def dequantize(codes, c, levels, size):
    """The way back: levels[codes], times c block by block. (n,) float32."""
    values = levels[codes.int()]  # (n,)
    return values * c[:, None].expand(-1, size).flatten()[: len(codes)]


def pack(codes):
    """Codes (n,) below 16 -> bytes (ceil(n / 2),): the first of two in the upper half."""
    first, second = F.pad(codes, (0, len(codes) % 2)).view(-1, 2).T
    return first * 16 + second


def unpack(packed, n):
    """The way back: (n,) codes."""
    return torch.stack([packed // 16, packed % 16], dim=1).flatten()[:n]


class NF4Linear(nn.Module):
    """A linear layer, d outputs and k inputs, whose frozen W is dequantized in every forward and backward pass."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        device = linear.weight.device
        codes, c = quantize(linear.weight, nf4_levels(device), BLOCK)
        mean = c.mean()  # without it c would be positive, and half of its levels would never be used
        c_codes, c_scales = quantize(c - mean, dynamic_levels(device), BLOCK_2)
        parts = {"codes": pack(codes), "c_codes": c_codes, "c_scales": c_scales, "c_mean": mean}
        for name, value in parts.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        self.bias = linear.bias

    @property
    def weight(self):
        """W (d, k), float32."""
        device = self.codes.device
        c = dequantize(self.c_codes, self.c_scales, dynamic_levels(device), BLOCK_2) + self.c_mean
        n = self.out_features * self.in_features
        W = dequantize(unpack(self.codes, n), c, nf4_levels(device), BLOCK)
        return W.view(self.out_features, self.in_features)

    def forward(self, x):
        """x (..., k) -> (..., d), computed in the dtype of x, or in that of autocast."""
        h = Product.apply(x, self)  # (..., d)
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def plain(self):
        """An nn.Linear with the dequantized W."""
        with torch.device(self.codes.device):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Product(torch.autograd.Function):
    """x W^T. Autograd would keep W from the forward to the backward pass; here it keeps the layer, and W is made again,
    so that at any time only one layer's W is there."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantize_linears(model, names):
    """Put an NF4Linear in the place of every nn.Linear that has one of these names, in place. Returns the model."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = [m for path, m in linears.items() if path.rsplit(".", 1)[-1] in names]
    return replace_modules(model, {id(linear): NF4Linear(linear) for linear in found})
