"""SaLoRA: low-rank adapters whose rank-1 triplets carry gates (Hu et al. 2023, section 3).

A frozen linear map W (d, k) gets an update of r triplets: column B[:, i], gate g[i], row A[i, :].

    h = W x + (alpha / r0) B diag(g) A x        Eqs. (3) and (5); r0 is the rank at creation

`adapt` puts such layers into any model, `orthogonality` keeps the triplets independent (Eq. 9), `canonicalize` makes
them so, `prune` removes the closed ones for good, `merge` folds the rest into W; then come files, ours and PEFT's.
Nothing merges or prunes by itself. Left out: adapters for embeddings and convolutions, dropout inside the adapter,
several adapters at once.
"""

import json
import os
import re

import torch
import torch.nn.functional as F
from torch import nn

from hard_concrete import HardConcreteGate


class SaLoRALinear(nn.Module):
    """A frozen nn.Linear `base` (d outputs, k inputs) plus r gated triplets, scaled by alpha / r0.

    A (r, k) starts as N(0, 1/k), so that E[A A^T] = I; B (d, r) starts at 0, so that at first nothing changes.
    `r0` stays the rank at creation, and with it the scale, when pruning makes `r` smaller.
    Raises ValueError if base is not an nn.Linear or r < 1.
    """

    def __init__(self, base, r, alpha):
        super().__init__()
        if type(base) is not nn.Linear:  # a subclass may bypass forward, as the one in nn.MultiheadAttention does
            raise ValueError(f"only nn.Linear can be adapted, got {type(base).__name__}; leave it out of the targets")
        if r < 1:
            raise ValueError(f"rank must be at least 1, got {r}")
        d, k = base.weight.shape
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(r, k).to(base.weight) / k**0.5)  # drawn on the CPU: one seed, one start
        self.B = nn.Parameter(base.weight.new_zeros(d, r))
        self.gate = HardConcreteGate(r).to(base.weight.device)
        self.r0, self.alpha = r, alpha

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
        B = self.B * (self.scale * self.gate()).to(self.B.dtype)  # (d, r)  the gate costs d r, not tokens x r
        return self.base(x) + F.linear(F.linear(x, self.A), B)  # Eq. (5)

    def delta(self):
        """The update of W (d, k) with settled gates: (alpha / r0) B diag(g) A."""
        return self.scale * (self.B * self.gate.settled().to(self.B.dtype)) @ self.A

    def extra_repr(self):
        return f"r={self.r}, r0={self.r0}, alpha={self.alpha}"


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


def orthogonality(layers):
    """Eq. (9): the sum over layers of ||B^T B - I||^2_F + ||A A^T - I||^2_F. A scalar with gradient."""
    total = 0.0
    for layer in layers:
        eye = torch.eye(layer.r, dtype=layer.A.dtype, device=layer.A.device)
        total = total + (layer.B.T @ layer.B - eye).square().sum() + (layer.A @ layer.A.T - eye).square().sum()
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

    Returns the indices (r',) of the triplets that stay, to slice optimiser state with. A second call removes nothing.
    A, B and log_theta become new, smaller parameters.
    """
    gate = layer.gate
    kept = gate.settled().nonzero().flatten()
    layer.A, layer.B = nn.Parameter(layer.A[kept]), nn.Parameter(layer.B[:, kept])
    gate.log_theta, gate.u = nn.Parameter(gate.log_theta[kept]), gate.u[kept]
    gate.fixed = None if gate.fixed is None else gate.fixed[kept]
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
    """The triplets by layer and every other trained weight, as plain tensors and numbers; no buffers, no `base`."""
    layers = salora_layers(model)
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    others = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and id(p) not in inside}
    return {
        "format": "salora-1",
        "others": others,
        "layers": {
            name: {"r0": m.r0, "alpha": m.alpha, "A": m.A.detach(), "B": m.B.detach(),
                   "log_theta": m.gate.log_theta.detach(), "fixed": m.gate.fixed}
            for name, m in layers.items()
        },
    }  # fmt: skip


def load_adapter_state(model, state):
    """Give a model the layers and weights of `adapter_state` instead of those it had. Returns it, otherwise frozen.

    Raises ValueError, before any number changes, where a name or a shape does not fit the model.
    """
    if not isinstance(state, dict) or state.get("format") != "salora-1":
        raise ValueError("not a SaLoRA adapter: no 'format': 'salora-1' in it")
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    new = {id(layer): layer.base for layer in salora_layers(model).values()}
    for name, saved in state["layers"].items():
        old = modules.get(name)
        base = old.base if isinstance(old, SaLoRALinear) else old
        shape = (saved["B"].shape[0], saved["A"].shape[1])
        if type(base) is not nn.Linear or base.weight.shape != shape:
            raise ValueError(f"the adapter has a layer {name} of shape {shape}, but the model has {base} there")
        new[id(old)] = layer = SaLoRALinear(base, saved["r0"], saved["alpha"]).train(old.training)
        device = base.weight.device
        layer.A, layer.B = (nn.Parameter(saved[side].to(base.weight)) for side in "AB")  # its device and dtype
        layer.gate.log_theta = nn.Parameter(saved["log_theta"].to(device))
        layer.gate.u = torch.full_like(layer.gate.log_theta, 0.5)
        layer.gate.fixed = None if saved["fixed"] is None else saved["fixed"].to(device)
    for name, value in state["others"].items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise ValueError(f"the adapter has a weight {name} of shape {tuple(value.shape)} that the model lacks")
    model.requires_grad_(False)
    for name, value in state["others"].items():
        parameters[name].copy_(value).requires_grad_(True)
    return _replace(model, new)


def save_adapter(model, path):
    """Write `adapter_state` to a file, whole or not at all. `base` weights are not in it."""
    torch.save(adapter_state(model), f"{path}.part")
    os.replace(f"{path}.part", path)


def load_adapter(model, path):
    """Read a file of `save_adapter` into a model of the same shape. Returns the model."""
    return load_adapter_state(model, torch.load(path, map_location="cpu", weights_only=True))


def export_peft(model, folder, rename=str, pad=False):
    """Write the adapter as PEFT's LoRA: adapter_config.json and adapter_model.safetensors, .bin without that package.

    rename: our name of a module -> its name in the model that PEFT will wrap (tiny_transformer's `hub_name`)
    pad:    False: closed triplets are left out, and rank_pattern and alpha_pattern tell each matrix's rank;
            True: every matrix has the largest rank, filled up with zeros, for engines that know no patterns
    Gates are folded into B. Weights trained beside the triplets, a classifier head, go along as modules_to_save.
    Raises ValueError where there is nothing to export, and for a layer that the model uses under two names.
    """
    names = [name for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SaLoRALinear)]
    if len(names) > len(salora_layers(model)):
        raise ValueError(f"PEFT's files hold one name a layer, but two of these are one layer: {', '.join(names)}")
    state, layers = adapter_state(model), {name: layer for name, layer in salora_layers(model).items() if layer.r}
    gates = {name: layer.gate.settled() for name, layer in layers.items()}
    layers = {name: layer for name, layer in layers.items() if pad or gates[name].any()}  # PEFT knows no rank 0
    if not layers:
        raise ValueError("no triplet is open: the adapter is empty, and PEFT has no such thing")
    r, alpha = max(layer.r0 for layer in layers.values()), next(iter(layers.values())).alpha
    tensors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        kept = gates[name].nonzero().flatten()
        A, B, n = layer.A.detach()[kept], (layer.B.detach() * gates[name].to(layer.B.dtype))[:, kept], rename(name)
        if pad:  # one rank and alpha for all, so a layer with another scale has it in B
            extra = r - len(kept)
            A, B = F.pad(A, (0, 0, 0, extra)), F.pad(B * layer.scale * r / alpha, (0, extra))
        else:  # PEFT's scale is alpha_m / r_m
            ranks[n], alphas[n] = len(kept), layer.scale * len(kept)
        tensors[f"base_model.model.{n}.lora_A.weight"] = A.cpu().contiguous()
        tensors[f"base_model.model.{n}.lora_B.weight"] = B.cpu().contiguous()
    heads = {}
    for name, value in state["others"].items():
        module, kind = name.rsplit(".", 1)
        heads[rename(module)] = None  # a set in order
        tensors[f"base_model.model.{rename(module)}.{kind}"] = value.cpu().contiguous()
    targets = [rename(name) for name in layers]
    if any(rename(n).endswith("." + target) for n in _linears(model) for target in targets):  # PEFT matches suffixes
        ranks, alphas = ({"^" + re.escape(n): v for n, v in table.items()} for table in (ranks, alphas))
        targets = "|".join(map(re.escape, targets))  # as one text it is a pattern for the whole name
    config = {
        "peft_type": "LORA", "task_type": None, "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas,
        "modules_to_save": list(heads) or None, "inference_mode": True,
    }  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    try:
        import safetensors.torch

        safetensors.torch.save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), {"format": "pt"})
    except ImportError:
        torch.save(tensors, os.path.join(folder, "adapter_model.bin"))
    with open(os.path.join(folder, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1)


def _linears(model):
    """Names of all linear layers, adapted or not."""
    inside = {id(layer.base) for layer in salora_layers(model).values()}
    modules = ((n, m) for n, m in model.named_modules() if id(m) not in inside)
    return [n for n, m in modules if isinstance(m, (nn.Linear, SaLoRALinear))]


def import_peft(model, folder, rename=str):
    """The way back: give a model the LoRA adapter of a folder that PEFT or `export_peft` wrote. Returns the model.

    Raises ValueError for a variant whose update is not (alpha / r) B A, and for weights without a place in the model.
    """
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        config = {"bias": "none", **json.load(file)}
    plain = dict(peft_type="LORA", bias="none", lora_bias=0, use_dora=0, use_rslora=0, fan_in_fan_out=0)
    odd = [f"{key} is {config.get(key)}" for key, value in plain.items() if (config.get(key) or 0) != value]
    if re.match("pissa|olora|loftq|corda|lora_ga", str(config.get("init_lora_weights"))):  # these change the base
        odd.append(f"init_lora_weights is {config['init_lora_weights']}")
    if odd:
        raise ValueError(f"{folder} holds no plain LoRA adapter: {', '.join(odd)}")
    path = os.path.join(folder, "adapter_model.safetensors")
    if os.path.isfile(path):
        import safetensors.torch

        tensors = safetensors.torch.load_file(path)
    else:
        tensors = torch.load(os.path.join(folder, "adapter_model.bin"), map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    layers, others = {}, {}
    for name in [n for n in _linears(model) if rename(n) + ".lora_A.weight" in tensors]:
        A, B = (tensors.pop(f"{rename(name)}.lora_{side}.weight") for side in "AB")
        hits = [v for key, v in config.get("alpha_pattern", {}).items() if re.match(rf"(.*\.)?({key})$", rename(name))]
        gates = {"log_theta": torch.zeros(len(A)), "fixed": torch.ones(len(A))}
        layers[name] = {"r0": len(A), "alpha": [*hits, config["lora_alpha"]][0], "A": A, "B": B, **gates}
    for name in [n for n, _ in model.named_parameters() if "." in n and ".base." not in n]:
        module, kind = name.rsplit(".", 1)
        if kind in ("weight", "bias") and f"{rename(module)}.{kind}" in tensors:
            others[name] = tensors.pop(f"{rename(module)}.{kind}")
    if tensors:
        raise ValueError(f"the model has no place for {', '.join(sorted(tensors)[:4])} of {folder}")
    return load_adapter_state(model, {"format": "salora-1", "layers": layers, "others": others})
