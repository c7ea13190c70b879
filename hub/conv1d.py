"""Turns GPT-2's Conv1D, a linear layer with a transposed weight, into nn.Linear and back. Convert before `adapt`, and
back before `save_pretrained`."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from salora import replace_modules


def to_linear(model):
    """Put an nn.Linear in the place of every Conv1D of a model, in place. Returns their names, for `to_conv1d`."""
    names = [name for name, m in model.named_modules() if isinstance(m, Conv1D)]
    _replace(model, names, lambda m: nn.Linear(m.nx, m.nf))
    return names


def to_conv1d(model, names):
    """The way back, once adapters are merged: the modules of these names become Conv1D again. Returns the model.

    Raises ValueError where one of them is not an nn.Linear.
    """
    for name in names:
        kind = type(model.get_submodule(name)).__name__
        if kind != "Linear":
            raise ValueError(f"{name} is a {kind}, expected an nn.Linear: merge the adapters first")
    return _replace(model, names, lambda m: Conv1D(m.out_features, m.in_features))


def _replace(model, names, build):
    new = {}
    for name in names:
        old = model.get_submodule(name)
        with torch.device(old.weight.device):
            module = build(old).to(old.weight.dtype).train(old.training)
        module.weight = nn.Parameter(old.weight.detach().T.contiguous(), old.weight.requires_grad)
        module.bias = old.bias
        new[id(old)] = module
    return replace_modules(model, new)
