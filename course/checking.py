"""What the checks of the exercises share: `about` says whom a test is about, `same` compares, `layer_of` builds."""

import math

import torch
from torch import nn


def about(function, equation):
    """The function that a failed test blames, and its equation: a key of EQUATIONS in tests/conftest.py."""

    def mark(test):
        test.about = (function, equation)
        return test

    return mark


class Different(AssertionError):
    """What a comparison says to a student. Nothing has to be added to it."""


def same(got, expected, call, within=1e-6):
    """Raises Different unless numbers, lists of numbers or tensors are equal to within an absolute tolerance.

    call: what was called, in the words of the code. The numbers are compared in plain Python.
    """
    if got is None:
        raise Different(f"{call}\n  got      None: is a return missing?\n  expected {show(expected)}")
    one, other = _numbers(got), _numbers(expected)
    if _shape(got) != _shape(expected):
        raise Different(f"{call}\n  got      shape {_shape(got)}\n  expected shape {_shape(expected)}")
    if not all(_near(a, b, within) for a, b in zip(one, other, strict=True)):
        raise Different(f"{call}\n  got      {show(got)}\n  expected {show(expected)}")


def holds(truth, call, got, expected):
    """Raises Different with these words unless `truth`."""
    if not truth:
        raise Different(f"{call}\n  got      {got}\n  expected {expected}")


def learns(value, call, who):
    """Raises Different unless `value` is a tensor with a gradient."""
    learnable = isinstance(value, torch.Tensor) and value.requires_grad
    holds(learnable, call, "no gradient", f"a tensor that {who} can learn from")


def _near(a, b, within):
    return a == b or (math.isfinite(a) and abs(a - b) <= within)


def _shape(value):
    return tuple(torch.as_tensor(value).shape)


def _numbers(value):
    return torch.as_tensor(value).detach().double().flatten().tolist()


def show(value):
    """At most eight numbers, to four digits behind the point."""
    numbers = [f"{x:.4f}".rstrip("0").rstrip(".") for x in _numbers(value)]
    if not _shape(value):
        return numbers[0]
    more = f", ... {len(numbers)} in all" if len(numbers) > 8 else ""
    shape = f" of shape {_shape(value)}" if len(_shape(value)) > 1 else ""
    return f"[{', '.join(numbers[:8])}{more}]{shape}"


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def numbers(*shape, seed=0, dtype=torch.float64):
    """Normal numbers, the same for every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_of(d, k, r, alpha=16, log_theta=None, seed=0, dtype=torch.float64):
    """A gated layer with random W, bias, A and B; its gates are free, in train mode, with noise 1/2."""
    from salora import SaLoRALinear  # by now a student's functions are in it

    layer = SaLoRALinear(nn.Linear(k, d), r, alpha).to(dtype)
    layer.gate.release()
    with torch.no_grad():
        for i, p in enumerate((layer.base.weight, layer.base.bias, layer.A, layer.B)):
            p.copy_(numbers(*p.shape, seed=10 * seed + i))
        layer.gate.log_theta.copy_(torch.zeros(r) if log_theta is None else torch.as_tensor(log_theta))
    return layer
