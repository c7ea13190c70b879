"""What the property tests draw from, how closely they compare, and the naive oracles they compare with.

Hypothesis draws structure and edge values; bulk tensors come from a drawn seed through torch.Generator.
"""

from contextlib import contextmanager

import torch
from hypothesis import strategies as st
from torch import nn

from salora import SaLoRALinear, salora_layers

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


@contextmanager
def row(*words):
    """A failure inside says which row of a table it is about."""
    try:
        yield
    except BaseException as error:  # pytest's "did not raise" is not an Exception
        error.add_note(f"in the row {words}")
        raise


@contextmanager
def unchanged(model):
    """What happens inside leaves every parameter, its name and whether it trains as they were."""
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    yield
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    for name, (p, value, trains) in before.items():
        assert after[name] is p and torch.equal(p, value) and p.requires_grad == trains, name


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


class Net(nn.Module):
    """A model that is not ours: one linear layer used under two names, one inside a list, and others."""

    def __init__(self, seed=None):
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.body = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6, bias=False)])
        self.shared = nn.Linear(6, 6)
        self.alias = nn.Sequential(self.shared, nn.Tanh())
        self.conv = nn.Conv1d(1, 1, 3)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.body[1](torch.tanh(self.body[0](x)))
        return self.head(self.alias(self.shared(x)))


def randomize(model, seed=0):
    """Give every adapter of a model a B and free gates at random: some open, some closed, some between."""
    g = generator(seed)
    for layer in salora_layers(model).values():
        layer.B.data.normal_(generator=g)
        layer.gate.release()
        layer.gate.log_theta.data.normal_(generator=g).mul_(3)
    return model


def installed_parameters(method, size, layers, d, m):
    """How many of an encoder's parameters train once a peer is installed: its closed form."""
    return {
        "adapter-h": layers * (2 * (2 * d * size + d + size) + 4 * d),
        "adapter-p": layers * (2 * d * size + d + size),
        "prefix": layers * 2 * size * d,
        "prompt": size * d,
        "bitfit": layers * (7 * d + m) + d,
        "ia3": layers * (2 * d + m),
        "mam": layers * (2 * d * size + d + size + 2 * max(1, size // 16) * d),
        "propelt-adapter": 2 * d * size + d + size + layers * 2 * d * size,
        "propelt-prefix": (1 + layers) * 2 * size * d,
        "propelt-lora": (1 + layers) * size * (4 * 2 * d + 2 * (d + m)),
    }[method]
