"""What the property tests draw from, how closely they compare, and the naive oracles they compare with.

Hypothesis draws structure and edge values; bulk tensors come from a drawn seed through torch.Generator.
"""

import torch
from hypothesis import strategies as st
from torch import nn

from salora import SaLoRALinear

# A sum of n products errs by about n eps relative to its largest terms; the factor leaves room for a few such sums in
# a row, as in x A^T B^T. Algebra is checked in float64; float32 shows that the plain dtype works as well.
EPS = {torch.float64: 2.3e-16, torch.float32: 1.2e-7, torch.bfloat16: 7.9e-3}


def assert_close(actual, expected, inner=1):
    """Equal up to rounding of sums over `inner` terms, relative to the largest entry."""
    scale = max(1.0, float(expected.detach().abs().max()) if expected.numel() else 1.0)
    tolerance = 16 * (inner + 4) * EPS[expected.dtype] * scale
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, but should be {tuple(expected.shape)}"
    worst = float((actual - expected).detach().abs().max()) if expected.numel() else 0.0
    assert worst <= tolerance, f"differs by {worst:.3g}, expected at most {tolerance:.3g}\n{actual}\n{expected}"


seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 12)
log_thetas = st.floats(-12, 12)
taus = st.floats(0.1, 3)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def make_layer(d, k, r, seed, bias=True, alpha=16.0, dtype=torch.float64):
    """A layer with B != 0, free gates at random log_theta and random noise: nothing is at a special value."""
    base = nn.Linear(k, d, bias=bias)
    layer = SaLoRALinear(base, r, alpha)
    layer.gate.release()
    g = generator(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
        layer.gate.log_theta.mul_(3)
        layer.gate.u.copy_(torch.rand(r, generator=g).clamp(1e-3, 1 - 1e-3))
    return layer.to(dtype)


@st.composite
def layers(draw, dtype=torch.float64):
    """One gated layer of any shape, in train mode, gates free."""
    d, k = draw(sizes), draw(sizes)
    r = draw(st.integers(1, 8))
    return make_layer(d, k, r, draw(seeds), bias=draw(st.booleans()), alpha=draw(st.floats(0.5, 32)), dtype=dtype)


@st.composite
def banks(draw, ties=False):
    """Several layers of different shapes; with `ties`, log_theta takes few values, so that many are equal."""
    bank = draw(st.lists(layers(dtype=torch.float32), min_size=1, max_size=5))
    if ties:
        values = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])
        for layer in bank:
            pick = draw(st.lists(st.integers(0, 4), min_size=layer.r, max_size=layer.r))
            layer.gate.log_theta.data = values[pick]
    return bank


def naive_forward(layer, x, gates):
    """Eq. (3) and (5), element by element, in plain Python numbers. x (n, k) -> (n, d)."""
    W, A, B = layer.base.weight.tolist(), layer.A.tolist(), layer.B.tolist()
    b = layer.base.bias.tolist() if layer.base.bias is not None else [0.0] * len(W)
    rows = []
    for row in x.tolist():
        Ax = [sum(a * v for a, v in zip(A[j], row)) for j in range(len(A))]
        h = []
        for i in range(len(W)):
            update = sum(B[i][j] * gates[j] * Ax[j] for j in range(len(A)))
            h.append(sum(w * v for w, v in zip(W[i], row)) + b[i] + layer.alpha / layer.r0 * update)
        rows.append(h)
    return torch.tensor(rows, dtype=x.dtype)


def installed_parameters(method, size, layers, d, m):
    """How many of an encoder's parameters train once a peer is installed: its closed form."""
    return {
        "adapter-h": layers * (2 * (2 * d * size + d + size) + 4 * d),
        "adapter-p": layers * (2 * d * size + d + size),
        "prefix": layers * 2 * size * d,
        "prompt": size * d,
        "bitfit": layers * (7 * d + m) + d,
        "ia3": layers * (2 * d + m),
    }[method]
