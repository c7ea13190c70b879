"""Adapters on disk: all that training changed, in one file, without the frozen weights.

`save_adapter` and `load_adapter` write and read the file of a finished adapter. `adapter_state` and
`load_adapter_state` are the same for a snapshot in memory, at any moment. A file may come from anywhere, so a state is
checked as a whole before the model changes. Names are those of the plain model: before `adapt`, and without the words
that torch.compile and DistributedDataParallel put into them. PEFT's files are read and written in hub/peft.py.
"""

import os
from math import isfinite
from pathlib import Path

import torch
from torch import nn

from hub.checkpoints import read_torch, write_atomically
from salora import SaLoRALinear, finished_layers, is_sharded, replace_modules, salora_layers, why_not

FORMAT = "salora-1"
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def bare(model):
    """The model inside of what torch.compile, DistributedDataParallel and DataParallel return."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def plain_name(name):
    """A name in a bare model without what torch.compile added where it was called on a part of the model.

    layers.0._orig_mod.query.bias -> layers.0.query.bias
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_layers(model):
    """`salora_layers` of a bare model, with plain names."""
    return {plain_name(name): layer for name, layer in salora_layers(model).items()}


def ids_of_adapters(model):
    """The ids of all A, B and log_theta: a set. What has lost all triplets requires no gradient, but is no base."""
    return {id(p) for layer in salora_layers(model).values() for p in (layer.A, layer.B, layer.gate.log_theta)}


def adapter_state(model):
    """A snapshot of the triplets by layer, of every other trained weight, and of running statistics (BatchNorm's).

    A dict of plain tensors and numbers that shares no memory with the model. W is not in it: names are those of the
    model before `adapt`, so a bias that trains inside an adapted layer is found again.
    """
    model = bare(model)
    layers, ours = plain_layers(model), ids_of_adapters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours}
    running = {name: b for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in RUNNING_STATISTICS}
    for name, p in trained.items():
        if is_sharded(p):
            raise ValueError(f"{name} trains and is sharded: give it to fully_shard as one of its ignored_params")
    return {
        "format": FORMAT,
        "others": {_name_before_adapt(name, layers): copy_of(p) for name, p in trained.items()},
        "running": {plain_name(name): copy_of(b) for name, b in running.items()},
        "layers": {name: _layer_state(layer) for name, layer in layers.items()},
    }


def trained_state(model):
    """The part of model.state_dict() that training changes: a dict of tensors, for load_state_dict(..., strict=False).

    Unlike `adapter_state` it loads into the same parameters, as resuming with an optimizer needs it.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    kept = trained | {id(b) for b in model.buffers()} | ids_of_adapters(model)
    return {n: t.detach() for n, t in model.state_dict(keep_vars=True).items() if id(t) in kept}


def copy_of(tensor):
    """A copy of a tensor without its gradient; None stays None."""
    return None if tensor is None else tensor.detach().clone()


def _layer_state(layer):
    gate = layer.gate
    tensors = dict(A=layer.A, B=layer.B, log_theta=gate.log_theta, held=gate.held, fixed=gate.fixed)
    return {"r0": layer.r0, "alpha": layer.alpha, **{name: copy_of(tensor) for name, tensor in tensors.items()}}


def _name_before_adapt(name, layers):
    """encoder.query.base.bias -> encoder.query.bias, where encoder.query is an adapted layer; and a plain name."""
    name = plain_name(name)
    for layer in layers:
        if name.startswith(f"{layer}.base."):
            name = name.replace(f"{layer}.base.", f"{layer}.")
    return name


@torch.no_grad()
def load_adapter_state(model, state):
    """Give a model the layers and weights of `adapter_state` in place of its own. Returns it, otherwise frozen.

    Free gates come back free, but log_theta requires no gradient until it is released (a RankAllocator does that).
    Raises ValueError, before anything changes, where the state is damaged or does not fit the model.
    """
    wrapped, model = model, bare(model)
    bases, tensors = _linear_layers(model), _tensors_before_adapt(model)
    _check(state, bases, tensors)
    model.requires_grad_(False)
    # A compiled nn.Linear has the name of its wrapper, which goes as well: it would call the old one
    modules = {plain_name(name): m for name, m in reversed(list(model.named_modules()))}
    new = {id(layer): layer.base for layer in salora_layers(model).values()}
    for name, saved in state["layers"].items():
        before = modules[name]
        layer = SaLoRALinear(bases[name], 1, saved["alpha"], getattr(before, "dropout", 0.0)).train(before.training)
        layer.r0 = saved["r0"]
        device, gate = layer.A.device, layer.gate
        layer.A.data = saved["A"].to(layer.A, copy=True)
        layer.B.data = saved["B"].to(layer.B, copy=True)
        gate.log_theta.data = saved["log_theta"].to(device, copy=True)
        gate.u = torch.full_like(gate.log_theta, 0.5)
        for kind in ("held", "fixed"):
            value = saved.get(kind)
            setattr(gate, kind, None if value is None else value.to(device, copy=True))
        new[id(before)] = layer
    for name, value in {**state["others"], **state.get("running", {})}.items():
        tensors[name].copy_(value).requires_grad_(name in state["others"])
    replaced = replace_modules(model, new)
    return wrapped if replaced is model else replaced  # else the model was one nn.Linear, which its wrapper still calls


def _linear_layers(model):
    """{name: module} of what can be adapted; an adapted layer's base stands under the name of its adapter."""
    layers = plain_layers(model)
    linears = {plain_name(name): m for name, m in model.named_modules() if why_not(m) is None}
    return {**linears, **{name: layer.base for name, layer in layers.items()}}


def _tensors_before_adapt(model):
    """Every parameter and buffer of a model under the name that it had before `adapt`."""
    layers = plain_layers(model)
    return {_name_before_adapt(name, layers): t for name, t in (*model.named_parameters(), *model.named_buffers())}


def _check(state, bases, tensors):
    """Raises ValueError for a state that is damaged, or does not fit a model with these linear layers and tensors."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"not a SaLoRA adapter: no 'format': {FORMAT!r} in it")
    layers, others, running = state.get("layers"), state.get("others"), state.get("running", {})
    if not all(isinstance(part, dict) for part in (layers, others, running)):
        raise ValueError("the adapter is damaged: expected dictionaries 'layers' and 'others'")
    for name, saved in layers.items():
        if name not in bases:
            raise ValueError(f"the adapter has a layer {name}, but the model has no linear layer of that name")
        d, k = bases[name].out_features, bases[name].in_features
        if not _fits(saved, d, k):
            raise ValueError(f"layer {name} of the adapter is damaged, not finite, or not made for a matrix of "
                             f"shape ({d}, {k}), which the model has there")  # fmt: skip
    for name, value in {**others, **running}.items():
        if not _is_sound(value):
            raise ValueError(f"the adapter's weight {name} is damaged, or not finite")
        if name not in tensors or tensors[name].shape != value.shape:
            raise ValueError(f"the adapter has a weight {name} of shape {tuple(value.shape)}, but the model has none")


def _fits(saved, d, k):
    """Whether a layer's part of a state is sound, and made for a matrix of shape (d, k)."""
    if not isinstance(saved, dict) or "fixed" not in saved:
        return False
    A, r0, alpha = saved.get("A"), saved.get("r0"), saved.get("alpha")
    if type(r0) is not int or type(alpha) not in (int, float) or not isfinite(alpha):
        return False
    if not isinstance(A, torch.Tensor) or A.dim() != 2 or max(len(A), 1) > r0:
        return False
    r = len(A)
    shapes = {"A": (r, k), "B": (d, r), "log_theta": (r,)}
    shapes |= {kind: (r,) for kind in ("held", "fixed") if saved.get(kind) is not None}
    return all(
        _is_sound(saved.get(name)) and saved[name].is_floating_point() and saved[name].shape == shape
        for name, shape in shapes.items()
    )


def _is_sound(value):
    """Whether a value is a dense tensor of finite elements."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.is_contiguous() and bool(value.isfinite().all())  # an expanded one pretends to be larger than it is


def save_adapter(model, path):
    """Write the finished adapter to a file, atomically. `base` weights are not in it.

    Raises ValueError where there is nothing to save, as after `merge`, which leaves no adapter, and while a
    RankAllocator is still at work: a snapshot on the way is `adapter_state`. OSError where the file cannot be written.
    """
    finished_layers(model)
    state = adapter_state(model)
    if not state["layers"] and not state["others"]:
        raise ValueError("the model has no adapter, and nothing in it trains: save before merge, which leaves none")
    write_atomically(Path(path), lambda part: torch.save(state, part))


def load_adapter(model, path):
    """Read a file of `save_adapter` into a model with the same frozen weights. Returns the model.

    The frozen weights are not in the file, so whether they are the same is not checked.
    Raises OSError for a file that is not there and ValueError for one that is damaged or made for another model.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}; expected an adapter that save_adapter wrote")
    try:
        state = read_torch(Path(path))
    except ValueError:
        raise ValueError(f"{path} is damaged or not an adapter: expected a file of save_adapter") from None
    load_adapter_state(model, state)
    for layer in salora_layers(model).values():
        if layer.r == 0:
            layer.requires_grad_(False)  # DistributedDataParallel would wait for its gradient
    return model
