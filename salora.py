"""SaLoRA: low-rank adapters whose rank-1 triplets carry gates (Hu et al. 2023, section 3).

A frozen linear map W (d, k) gets an update of r triplets: column B[:, i], gate g[i], row A[i, :].

    h = W x + (alpha / r0) B diag(g) A x        Eqs. (3) and (5); r0 is the rank at creation

`adapt` puts such layers into any model, `orthogonality` keeps the triplets independent (Eq. 9), `canonicalize` makes
them so, `prune` removes the closed ones for good, and `merge` folds the rest into W. Functions over layers take any
iterable of SaLoRALinear, or what `salora_layers` returns.

Nothing merges or prunes by itself. Left out: adapters for embeddings and convolutions, several adapters per matrix,
and files (hub/adapters.py).
"""

import re
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain
from math import isfinite

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from hard_concrete import HardConcreteGate, set_data

HEADS = {"classifier", "pre_classifier", "classification_head", "qa_outputs", "score", "head", "cls"}


class SaLoRALinear(nn.Module):
    """A frozen linear map `base` (d outputs, k inputs) plus r gated triplets, scaled by alpha / r0.

    base: an nn.Linear, or any other module with in_features, out_features and a linear forward, such as one with
    weights in 4 bits. dropout: the share of the adapter's inputs, not those of the base, that training zeroes.
    A (r, k) starts as N(0, 1/k), so that E[A A^T] = I; B (d, r) starts at 0, so that at first nothing changes. Both
    are float32, or float64 where the base is, since half precision is too coarse to train in; forward casts them.
    `r0` stays the rank at creation, and with it the scale, when pruning makes `r` smaller.
    Raises ValueError for a base that cannot be adapted, and for a rank, alpha or dropout that makes no sense.
    """

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        check(base, r, alpha, dropout)
        d, k = base.out_features, base.in_features
        weight = next(chain(base.parameters(), base.buffers()))
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        kind = dict(device=weight.device, dtype=dtype)
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, k).to(**kind) / k**0.5)  # drawn on the CPU: one A per seed, anywhere
        self.B = nn.Parameter(torch.zeros(d, r, **kind))
        self.gate = HardConcreteGate(r).to(weight.device)
        self.r0, self.alpha, self.dropout = r, alpha, dropout
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

    # Some models, such as T5, read these from their linear layers
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)
    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x):
        """x (..., k) -> (..., d)."""
        if self.r == 0:
            return self.base(x)
        h = F.linear(F.dropout(x, self.dropout, self.training), self.A.to(x.dtype))  # (..., r)  A x
        h = h * (self.scale * self.gate()).to(h.dtype)  # (..., r)  times the gate and alpha / r0
        return self.base(x) + F.linear(h, self.B.to(h.dtype))  # (..., d)  Eq. (5)

    def delta(self):
        """The update of W (d, k) with settled gates: (alpha / r0) B diag(g) A."""
        return self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A

    def keep(self, kept):
        """Keep only the triplets with these indices. A and B stay the same Parameters: optimizers still hold them."""
        for p, axis in ((self.A, 0), (self.B, 1)):
            grad = p.grad
            set_data(p, p.data.index_select(axis, kept))
            p.grad = None if grad is None else grad.index_select(axis, kept)
        self.gate.keep(kept)

    def extra_repr(self):
        return f"r={self.r}, r0={self.r0}, alpha={self.alpha}"

    def __getstate__(self):
        """No allocator is at work on a copy that is made after T_end, such as an average of the weights."""
        return {**self.__dict__, "allocating": self.allocating and self.gate.state != "fixed"}

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        """A state decides the rank: a pruned layer's fits a fresh one."""
        r = len(state_dict.get(prefix + "A", self.A))
        if r != self.r:  # else all stays in place, and with it what DistributedDataParallel has attached
            set_data(self.A, self.A.data.new_zeros(r, self.A.shape[1]))
            set_data(self.B, self.B.data.new_zeros(self.B.shape[0], r))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def is_linear(module):
    """Whether a module says that it is a linear map, as nn.Linear and its quantized relatives do."""
    sizes = [getattr(module, side, None) for side in ("in_features", "out_features")]
    return all(type(size) is int and size > 0 for size in sizes) and not isinstance(module, SaLoRALinear)


def why_not(base):
    """Why a module cannot be the base of a SaLoRALinear: a text, or None if it can."""
    kind = type(base).__name__
    if not is_linear(base):
        hint = "; hub/conv1d.py turns it into nn.Linear" if kind == "Conv1D" else ""
        return f"only nn.Linear and its like can be adapted, got {kind}{hint}"
    if isinstance(base, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"nn.MultiheadAttention bypasses the forward of its {kind}"
    if parametrize.is_parametrized(base) or (isinstance(base, nn.Linear) and "weight" not in base._parameters):
        return f"the weight of this {kind} is computed before every forward: remove weight_norm, pruning and the like"
    return None


def check(base, r, alpha, dropout):
    """Raises ValueError for what SaLoRALinear cannot be made of."""
    if problem := why_not(base):
        raise ValueError(f"{problem}; leave it out of the targets")
    if type(r) is not int or r < 1:
        raise ValueError(f"rank must be a whole number above 0, got {r!r}")
    if type(alpha) not in (int, float) or not isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}")
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")


def adapt(model, targets, r=8, alpha=16, dropout=0.0):
    """Freeze the model, and replace, in place, every linear layer that a target names with a SaLoRALinear.

    targets: names or name suffixes ("query", "layers.0.query"), or regular expressions for the whole name;
    {target: rank} gives each a rank of its own; "all-linear" names all linear layers that are not in a head.
    What should train beside adapters, such as a classifier head, must be unfrozen afterwards, and before the optimizer
    is made. Adapters of an earlier call keep training.
    Returns the model. Raises ValueError, before anything changes, for a target without a match and for a layer that
    cannot be adapted.
    """
    targets = [targets] if isinstance(targets, str) else targets
    ranks = targets if isinstance(targets, dict) else dict.fromkeys(targets, r)
    if not ranks:
        raise ValueError(f"targets must name at least one linear layer, got {targets!r}")
    chosen = {}  # {id of a layer: (layer, its rank)}
    for target, rank in ranks.items():
        chosen |= {id(m): (m, rank) for m in matches(model, target)}
    for linear, rank in chosen.values():
        check(linear, rank, alpha, dropout)
    for parent in model.modules():
        skips = isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled()
        if skips and any(id(child) in chosen for child in parent.children()):
            raise ValueError("in eval mode nn.TransformerEncoderLayer bypasses the forward of its linear "
                             "layers: call torch.backends.mha.set_fastpath_enabled(False) first")  # fmt: skip
    earlier = [p for layer in salora_layers(model).values() for p in layer.parameters() if p.requires_grad]
    new = {key: SaLoRALinear(linear, rank, alpha, dropout) for key, (linear, rank) in chosen.items()}
    model.requires_grad_(False)
    for p in earlier:
        p.requires_grad_(True)
    return replace_modules(model, new)


def matches(model, target):
    """The linear layers that a target of `adapt` names. Raises ValueError where there are none."""
    inside = {id(layer.base) for layer in salora_layers(model).values()}
    modules = {name: m for name, m in model.named_modules(remove_duplicate=False) if name and id(m) not in inside}
    linears = {name: m for name, m in modules.items() if is_linear(m)}
    if target == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        body = [m for name, m in linears.items() if m is not output and not HEADS & set(name.split("."))]
        found = [m for m in body if why_not(m) is None]
        if not found:
            raise ValueError("'all-linear' matches no module: expected linear layers outside of heads")
        return found
    try:
        hits = [n for n in modules if n == target or n.endswith("." + target) or re.fullmatch(target, n)]
    except re.error:
        raise ValueError(f"target {target!r} is neither a name nor a regular expression") from None
    found = [linears[n] for n in hits if n in linears]
    if not found:
        kinds = sorted({type(modules[n]).__name__ for n in hits})
        matched = f"matches only {', '.join(kinds)}" if hits else "matches no module"
        names = sorted({n.rsplit(".", 1)[-1] for n in linears}) or ["none"]
        raise ValueError(f"target {target!r} {matched}; linear layers here: {', '.join(names)}")
    return found


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


def is_sharded(tensor):
    """Whether a tensor is a DTensor, of which every process holds a part."""
    return hasattr(tensor, "full_tensor")


def layer_list(layers):
    """A list of SaLoRALinear, from any iterable of them or from the dict that `salora_layers` returns."""
    return list(layers.values() if isinstance(layers, dict) else layers)


def orthogonality(layers):
    """Eq. (9): the sum over layers of ||B^T B - I||^2_F + ||A A^T - I||^2_F. A scalar with gradient."""
    alike = defaultdict(list)  # {shape and dtype: matrices (r, n)}: what is alike is multiplied at once
    for layer in layer_list(layers):
        for rows in (layer.B.T, layer.A):
            alike[rows.shape, rows.dtype].append(rows)
    total = 0.0
    for matrices in alike.values():
        rows = torch.stack(matrices)  # (matrices, r, n)
        I = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        total = total + (rows @ rows.mT - I).square().sum()
    return total


@torch.no_grad()
def canonicalize(layer):
    """Rotate the triplets of one layer, in place, into the singular basis of B A, largest first (not in the paper).

    B <- U S^1/2 and A <- S^1/2 V^T, where U S V^T = B A, so the product is unchanged while columns of B and rows of A
    become orthogonal: a gate then decides about one singular direction. Gates are ignored: call it where they are 1.
    A layer with B = 0 has no such basis and stays as it is.
    """
    if not layer.B.any():
        return
    B, A = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in (layer.B, layer.A))  # no QR in half precision
    Q_B, R_B = torch.linalg.qr(B)  # B = Q_B R_B
    Q_A, R_A = torch.linalg.qr(A.T)  # A^T = Q_A R_A, so that B A = Q_B (R_B R_A^T) Q_A^T
    U, S, Vt = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)  # of the small matrix in the middle
    n = len(S)  # min(r, d, k): triplets beyond it add nothing
    layer.B.zero_()
    layer.A.zero_()
    layer.B[:, :n] = Q_B @ U * S.sqrt()  # (d, n)
    layer.A[:n] = S.sqrt()[:, None] * (Vt @ Q_A.T)  # (n, k)


@torch.no_grad()
def prune(layer):
    """Remove, in place, the triplets of one layer whose settled gate is 0; its outputs in eval mode do not change.

    Returns the indices (r',) of the triplets that stay, to slice an optimizer's state with. A second call removes
    nothing. A, B and log_theta stay the same Parameters with smaller data, so optimizers that hold them keep working.
    """
    kept = layer.gate.settled().nonzero().flatten()
    layer.keep(kept)
    return kept


@contextmanager
def disabled(model):
    """`with disabled(model):` the adapted layers compute their base alone, W x. Yields the model."""
    layers = salora_layers(model).values()
    before = [layer.__dict__.get("forward") for layer in layers]  # None: that of the class
    for layer in layers:
        layer.forward = layer.base.__call__
    try:
        yield model
    finally:
        for layer, forward in zip(layers, before):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def merge(model):
    """Fold every update into its frozen weight, in place; returns the model, with plain nn.Linear layers again.

    W <- W + (alpha / r0) B diag(g) A with settled gates, so the merged model equals the gated one in eval mode.
    The new W is a tensor of its own: whatever else uses the old one, such as a tied embedding, keeps it. A weight that
    torch can dequantize comes back as floats. Save the adapter first: afterwards there is none.
    Raises ValueError, before anything changes, while a RankAllocator is at work, and for sharded or packed weights.
    """
    layers = finished_layers(model)
    for name, layer in layers.items():
        kind = type(layer.base).__name__
        if type(layer.base) is not nn.Linear:
            raise ValueError(f"{name} is a {kind}, whose weight cannot be added to: make it an nn.Linear first, in "
                             "transformers with model.dequantize(), or keep the adapter apart")  # fmt: skip
        if is_sharded(layer.base.weight):
            raise ValueError(f"the weight of {name} is sharded: load the saved adapter into a whole model, merge that")
    for layer in layers.values():
        W = layer.base.weight
        if type(W.data).dequantize is not torch.Tensor.dequantize:  # a class of quantized tensors has its own
            W = W.dequantize()
        layer.base.weight = nn.Parameter((W + layer.delta()).to(W.dtype), requires_grad=False)
    return replace_modules(model, {id(layer): layer.base for layer in layers.values()})
