"""SaLoRA: low-rank adapters whose rank-1 triplets carry gates (Hu et al. 2023, section 3).

A frozen linear map W (d, k) gets an update of r triplets: column B[:, i], gate g[i], row A[i, :].

    h = W x + (alpha / r0) B diag(g) A x        Eqs. (3) and (5); r0 is the rank at creation

`adapt` puts such layers into any model, `orthogonality` keeps the triplets independent (Eq. 9), `canonicalize` makes
them so, `prune` removes the closed ones for good, and `merge` folds the rest into W. Functions over layers take any
iterable of SaLoRALinear, or what `salora_layers` returns.

Nothing merges or prunes by itself. Left out: adapters for embeddings and convolutions, dropout inside the adapter,
several adapters at once, and files (hub/adapters.py).
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from hard_concrete import HardConcreteGate, set_data


class SaLoRALinear(nn.Module):
    """A frozen nn.Linear `base` (d outputs, k inputs) plus r gated triplets, scaled by alpha / r0.

    A (r, k) starts as N(0, 1/k), so that E[A A^T] = I; B (d, r) starts at 0, so that at first nothing changes.
    `r0` stays the rank at creation, and with it the scale, when pruning makes `r` smaller.
    Raises ValueError if base is not a plain nn.Linear or r is not an int above 0.
    """

    def __init__(self, base, r, alpha):
        super().__init__()
        if type(base) is not nn.Linear:  # a subclass may bypass forward, as the one in nn.MultiheadAttention does
            raise ValueError(f"only nn.Linear can be adapted, got {type(base).__name__}; leave it out of the targets")
        if not isinstance(base.weight, nn.Parameter):  # weight_norm and pruning compute it before every forward
            raise ValueError("the weight of this nn.Linear is computed by hooks: remove them before adapting it")
        if type(r) is not int or r < 1:
            raise ValueError(f"rank must be a whole number above 0, got {r!r}")
        d, k = base.weight.shape
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, k).to(base.weight) / k**0.5)  # drawn on the CPU: one A per seed, anywhere
        self.B = nn.Parameter(base.weight.new_zeros(d, r))
        self.gate = HardConcreteGate(r).to(base.weight.device)
        self.r0, self.alpha = r, alpha
        self.allocating = False  # True from the making of a RankAllocator until its finish()

    @property
    def r(self):
        """How many triplets are here now."""
        return self.A.shape[0]

    @property
    def triplet_size(self):
        """d + k: the parameters that one triplet costs."""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def scale(self):
        return self.alpha / self.r0

    def forward(self, x):
        """x (..., k) -> (..., d)."""
        if self.r == 0:
            return self.base(x)
        h = F.linear(x, self.A)  # (..., r)  A x
        h = h * (self.scale * self.gate()).to(h.dtype)  # (..., r)  times the gate and alpha / r0
        return self.base(x) + F.linear(h, self.B)  # (..., d)  Eq. (5)

    def delta(self):
        """The update of W (d, k) with settled gates: (alpha / r0) B diag(g) A."""
        return self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A

    def keep(self, kept):
        """Keep only the triplets with these indices. A and B remain the same Parameters, so optimizers keep track."""
        for p, axis in ((self.A, 0), (self.B, 1)):
            grad = p.grad
            set_data(p, p.data.index_select(axis, kept))
            p.grad = None if grad is None else grad.index_select(axis, kept)
        self.gate.keep(kept)

    def extra_repr(self):
        return f"r={self.r}, r0={self.r0}, alpha={self.alpha}"

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """A state decides the rank: a pruned layer's fits a fresh one."""
        if prefix + "A" in state_dict:
            r = len(state_dict[prefix + "A"])
            set_data(self.A, self.A.data.new_zeros(r, self.A.shape[1]))
            set_data(self.B, self.B.data.new_zeros(self.B.shape[0], r))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def adapt(model, targets, r=8, alpha=16):
    """Freeze the model, and replace, in place, every nn.Linear that a target names with a SaLoRALinear.

    targets: names or name suffixes ("query", "layers.0.query"), or regular expressions for the whole name.
    What should train beside them, such as a classifier head or earlier adapters, must be unfrozen afterwards, and
    before the optimizer is made.
    Returns the model. Raises ValueError for a target without a match or with none but other kinds of module.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    inside = {id(layer.base) for layer in salora_layers(model).values()}
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name and id(m) not in inside}
    linears = [name for name, m in modules.items() if isinstance(m, nn.Linear)]
    chosen = {}
    for target in targets:
        hits = [n for n in modules if n == target or n.endswith("." + target) or re.fullmatch(target, n)]
        found = [n for n in hits if n in linears]
        if not found:
            kinds = sorted({type(modules[n]).__name__ for n in hits})
            matched = f"matches only {', '.join(kinds)}" if hits else "matches no module"
            names = sorted({n.rsplit(".", 1)[-1] for n in linears}) or ["none"]
            raise ValueError(f"target {target!r} {matched}; nn.Linear layers here: {', '.join(names)}")
        chosen.update({id(modules[n]): modules[n] for n in found})
    for parent in model.modules():
        skips = isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()
        if skips and any(id(child) in chosen for child in parent.children()):
            raise ValueError("in eval mode nn.TransformerEncoderLayer bypasses the forward of its linear "
                             "layers: call torch.backends.mha.set_fastpath_enabled(False) first")  # fmt: skip
    new = {key: SaLoRALinear(linear, r, alpha) for key, linear in chosen.items()}
    model.requires_grad_(False)
    return replace_modules(model, new)


def replace_modules(model, new):
    """Put new[id(m)] in the place of every submodule m that has one, wherever it is used. Returns the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # not named_children: that skips a module's second name
            if id(child) in new:
                setattr(parent, name, new[id(child)])
    return new.get(id(model), model)


def salora_layers(model):
    """{name: SaLoRALinear} in the order of the model; a layer used in two places appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SaLoRALinear)}


def finished_layers(model):
    """`salora_layers`, but raises ValueError while a RankAllocator is at work on them."""
    layers = salora_layers(model)
    for name, layer in layers.items():
        if layer.allocating:
            raise ValueError(f"a RankAllocator is still at work on {name}: call its finish() first")
    return layers


def layer_list(layers):
    """A list of SaLoRALinear, from any iterable of them or from the dict that `salora_layers` returns."""
    return list(layers.values() if isinstance(layers, dict) else layers)


def orthogonality(layers):
    """Eq. (9): the sum over layers of ||B^T B - I||^2_F + ||A A^T - I||^2_F. A scalar with gradient."""
    total = 0.0
    for layer in layer_list(layers):
        I = torch.eye(layer.r, dtype=layer.A.dtype, device=layer.A.device)
        total = total + (layer.B.T @ layer.B - I).square().sum() + (layer.A @ layer.A.T - I).square().sum()
    return total


@torch.no_grad()
def canonicalize(layer):
    """Rotate the triplets of one layer, in place, into the singular basis of B A, largest first (not in the paper).

    B <- U S^1/2 and A <- S^1/2 V^T with U S V^T = B A, so the product is unchanged while columns of B and rows of A
    become orthogonal: a gate then decides about one singular direction. Gates are ignored: call it where they are 1.
    A layer with B = 0 has no such basis and stays as it is.
    """
    if not layer.B.any():
        return
    B, A = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (layer.B, layer.A))  # no QR in half precision
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)  # B = Qb Rb, A^T = Qa Ra
    U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)  # the r x r core of B A = Qb (Rb Ra^T) Qa^T
    n = len(S)  # min(r, d, k): triplets beyond it add nothing
    layer.B.zero_()[:, :n] = Qb @ U * S.sqrt()  # (d, n)
    layer.A.zero_()[:n] = S.sqrt()[:, None] * (Vt @ Qa.T)  # (n, k)


@torch.no_grad()
def prune(layer):
    """Remove, in place, the triplets of one layer whose settled gate is 0; its outputs in eval mode do not change.

    Returns the indices (r',) of the triplets that stay, to slice an optimizer's state with. A second call removes
    nothing. A, B and log_theta stay the same Parameters with smaller data, so optimizers that hold them keep working.
    """
    kept = layer.gate.settled().nonzero().flatten()
    layer.keep(kept)
    return kept


@torch.no_grad()
def merge(model):
    """Fold every update into its frozen weight, in place; returns the model, with plain nn.Linear layers again.

    W <- W + (alpha / r0) B diag(g) A with settled gates, so the merged model equals the gated one in eval mode.
    The new W is a tensor of its own: whatever else uses the old one, such as a tied embedding, keeps it.
    No adapter is left to be saved afterwards. Raises ValueError while a RankAllocator is at work.
    """
    layers = finished_layers(model).values()
    for layer in layers:
        layer.base.weight = nn.Parameter(layer.base.weight + layer.delta(), requires_grad=False)
    return replace_modules(model, {id(layer): layer.base for layer in layers})
