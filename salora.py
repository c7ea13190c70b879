"""SaLoRA: low-rank adapters whose rank-1 triplets carry gates (Hu et al. 2023, section 3).

A frozen linear map W (d, k) gets an update of r triplets: column B[:, i], gate g[i], row A[i, :].

    h = W x + (alpha / r0) B diag(g) A x        Eqs. (3) and (5); r0 is the rank at creation

`adapt` puts such layers into any model, `orthogonality` keeps the triplets independent (Eq. 9), `canonicalize` makes
them so, `prune` removes the closed ones for good, and `merge` folds the rest into W. `save_adapter` and `load_adapter`
keep all but W in a file. Functions over layers take any iterable of SaLoRALinear, or what `salora_layers` returns.

Nothing merges or prunes by itself. Left out: adapters for embeddings and convolutions, dropout inside the adapter,
several adapters at once. PEFT's files are read and written in hub/peft.py.
"""

import os
import re
from math import isfinite

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
        self.A = nn.Parameter(torch.randn(r, k).to(base.weight) / k**0.5)  # drawn on the CPU: one seed, one start
        self.B = nn.Parameter(base.weight.new_zeros(d, r))
        self.gate = HardConcreteGate(r).to(base.weight.device)
        self.r0, self.alpha = r, alpha
        self.allocating = False  # while a RankAllocator is still to decide which triplets stay

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
        h = h * (self.scale * self.gate()).to(h.dtype)  # (..., r)  times (alpha / r0) and the gate
        return self.base(x) + F.linear(h, self.B)  # (..., d)  Eq. (5)

    def delta(self):
        """The update of W (d, k) with settled gates: (alpha / r0) B diag(g) A."""
        return self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A

    def keep(self, kept):
        """Only the triplets with these indices stay. A and B remain the same Parameters, so optimizers keep track."""
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
    """Freeze the model, and replace, in place, every nn.Linear that a target names by a SaLoRALinear.

    targets: names or name suffixes ("query", "layers.0.query"), or regular expressions for the whole name.
    What should train beside them, such as a classifier head or earlier adapters, is to be unfrozen afterwards.
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
            raise ValueError("in eval mode nn.TransformerEncoderLayer reads the weights of its linear layers past "
                             "their forward: call torch.backends.mha.set_fastpath_enabled(False) first")  # fmt: skip
    new = {key: SaLoRALinear(linear, r, alpha) for key, linear in chosen.items()}
    model.requires_grad_(False)
    return _replace(model, new)


def _replace(model, new):
    """Put new[id(m)] in the place of every submodule m that has one, wherever it is used. Returns the model."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # not named_children: that skips a module's second name
            if id(child) in new:
                setattr(parent, name, new[id(child)])
    return new.get(id(model), model)


def salora_layers(model):
    """{name: SaLoRALinear} in the order of the model; a layer used in two places appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SaLoRALinear)}


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
    U, S, Vt = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)  # the r x r heart of B A = Qb (Rb Ra^T) Qa^T
    n = len(S)  # min(r, d, k): triplets beyond it add nothing
    layer.B.zero_()[:, :n] = Qb @ U * S.sqrt()  # (d, n)
    layer.A.zero_()[:n] = S.sqrt()[:, None] * (Vt @ Qa.T)  # (n, k)


@torch.no_grad()
def prune(layer):
    """Remove, in place, the triplets of one layer whose settled gate is 0; its outputs in eval mode do not change.

    Returns the indices (r',) of the triplets that stay, to slice an optimizer's state with. A second call removes
    nothing. A, B and log_theta stay the same Parameters with smaller data, so that whoever holds them goes on.
    """
    kept = layer.gate.settled().nonzero().flatten()
    layer.keep(kept)
    return kept


@torch.no_grad()
def merge(model):
    """Fold every update into its frozen weight, in place; returns the model, with plain nn.Linear layers again.

    W <- W + (alpha / r0) B diag(g) A with settled gates, so the merged model equals the gated one in eval mode.
    The new W is a tensor of its own: whatever else uses the old one, such as a tied embedding, keeps it.
    """
    layers = salora_layers(model).values()
    for layer in layers:
        layer.base.weight = nn.Parameter(layer.base.weight + layer.delta(), requires_grad=False)
    return _replace(model, {id(layer): layer.base for layer in layers})


def adapter_state(model):
    """A snapshot of the triplets by layer, of every other trained weight, and of running statistics (BatchNorm's).

    A dict of plain tensors and numbers that shares no memory with the model. W is not in it: names are those of the
    model before `adapt`, so a bias that trains inside an adapted layer is found again.
    """
    layers = salora_layers(model)
    ours = {id(p) for layer in layers.values() for p in (layer.A, layer.B, layer.gate.log_theta)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours}
    running = {name: b for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in RUNNING_STATISTICS}
    return {
        "format": "salora-1",
        "others": {_name_before_adapt(name, layers): p.detach().clone() for name, p in trained.items()},
        "running": {name: b.clone() for name, b in running.items()},
        "layers": {name: _layer_state(layer) for name, layer in layers.items()},
    }


RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def _layer_state(layer):
    gate = layer.gate
    return {
        "r0": layer.r0,
        "alpha": layer.alpha,
        "A": layer.A.detach().clone(),
        "B": layer.B.detach().clone(),
        "log_theta": gate.log_theta.detach().clone(),
        "fixed": None if gate.fixed is None else gate.fixed.clone(),
    }


def _name_before_adapt(name, layers):
    """encoder.query.base.bias -> encoder.query.bias, where encoder.query is an adapted layer."""
    for layer in layers:
        name = name.replace(f"{layer}.base.", f"{layer}.") if name.startswith(f"{layer}.base.") else name
    return name


@torch.no_grad()
def load_adapter_state(model, state):
    """Give a model the layers and weights of `adapter_state` instead of those it had. Returns it, otherwise frozen.

    Free gates come back free, but log_theta requires no gradient until it is released (a RankAllocator does that).
    Raises ValueError, before anything changes, where the state is damaged or does not fit the model.
    """
    values = _check_adapter(model, state)
    tensors = _tensors_before_adapt(model)
    model.requires_grad_(False)
    new = {id(layer): layer.base for layer in salora_layers(model).values()}
    modules = dict(model.named_modules())
    for name, saved in state["layers"].items():
        module = modules[name]
        base = module.base if isinstance(module, SaLoRALinear) else module
        new[id(module)] = layer = SaLoRALinear(base, 1, saved["alpha"]).train(module.training)
        layer.r0 = saved["r0"]
        layer.A.data, layer.B.data = (saved[side].to(base.weight, copy=True) for side in "AB")
        gate, device = layer.gate, base.weight.device
        gate.log_theta.data = saved["log_theta"].to(device, copy=True)
        gate.u = torch.full_like(gate.log_theta, 0.5)
        gate.fixed = None if saved["fixed"] is None else saved["fixed"].to(device, copy=True)
    for name, value in values.items():
        tensors[name].copy_(value).requires_grad_(name in state["others"])
    return _replace(model, new)


def _tensors_before_adapt(model):
    """Every parameter and buffer of a model under the name that it had before `adapt`."""
    layers = salora_layers(model)
    return {_name_before_adapt(name, layers): t for name, t in (*model.named_parameters(), *model.named_buffers())}


def _check_adapter(model, state):
    """The weights {name: tensor} of a state beside its layers. Raises ValueError for a state that does not fit."""
    if not isinstance(state, dict) or state.get("format") != "salora-1":
        raise ValueError("not a SaLoRA adapter: no 'format': 'salora-1' in it")
    parts = [state.get("layers"), state.get("others"), state.get("running", {})]
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError("the adapter is damaged: expected dictionaries 'layers' and 'others'")
    modules = dict(model.named_modules())
    for name, saved in parts[0].items():
        module, shape = modules.get(name), _shape_of(name, saved)
        base = module.base if isinstance(module, SaLoRALinear) else module
        if type(base) is not nn.Linear or base.weight.shape != shape:
            raise ValueError(f"the adapter has a layer {name} of shape {shape}, but the model has {base} there")
    tensors, values = _tensors_before_adapt(model), {**parts[1], **parts[2]}
    for name, value in values.items():
        if not _is_whole(value):
            raise ValueError(f"the adapter's weight {name} is damaged, or not finite")
        if name not in tensors or tensors[name].shape != value.shape:
            raise ValueError(f"the adapter has a weight {name} of shape {tuple(value.shape)} that the model lacks")
    return values


def _shape_of(name, saved):
    """The (d, k) that a layer's part of a state was made for. Raises ValueError where it is damaged."""
    saved = saved if isinstance(saved, dict) and "fixed" in saved else {}
    A, B, log_theta, fixed, r0, alpha = map(saved.get, ("A", "B", "log_theta", "fixed", "r0", "alpha"))
    fixed = log_theta if fixed is None else fixed
    whole = all(_is_whole(t) and t.is_floating_point() for t in (A, B, log_theta, fixed)) and A.dim() == B.dim() == 2
    r = len(A) if whole else 0
    shapes = whole and B.shape[1] == r and log_theta.shape == fixed.shape == (r,)
    if not shapes or type(r0) is not int or r0 < max(r, 1) or type(alpha) not in (int, float) or not isfinite(alpha):
        raise ValueError(f"layer {name} of the adapter is damaged, or not finite")
    return len(B), A.shape[1]


def _is_whole(value):
    """Whether a value is a dense tensor of finite elements."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.is_contiguous() and bool(value.isfinite().all())  # expanded ones pretend to be larger than they are


def save_adapter(model, path):
    """Write the finished adapter to a file, whole or not at all. `base` weights are not in it.

    Raises ValueError while a RankAllocator is still at work: a snapshot on the way is `adapter_state`.
    """
    unfinished = [name for name, layer in salora_layers(model).items() if layer.allocating]
    if unfinished:
        raise ValueError(f"the ranks of {unfinished[0]} are not decided yet: call the allocator's finish() first")
    torch.save(adapter_state(model), f"{path}.part")
    os.replace(f"{path}.part", path)


def load_adapter(model, path):
    """Read a file of `save_adapter` into a model of the same shape. Returns the model.

    Raises OSError for a file that is not there and ValueError for one that is damaged or made for another model.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}; expected an adapter that save_adapter wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # bytes that mean something else can stop an unpickler anywhere
        raise ValueError(f"{path} is damaged or not an adapter: expected a file of save_adapter") from None
    return load_adapter_state(model, state)
