"""What the checks share: `about` names the function that a test is about, `same` compares, `layer_of` builds."""

import math

import torch
from torch import nn


def about(function, equation):
    """The function that a failed test blames, and its equation: a key of EQUATIONS in tests/conftest.py."""

    def mark(test):
        test.about = (function, equation)
        return test

    return mark


PLAIN = (torch.Tensor, nn.Parameter, torch.Size, int, float, bool, list, tuple)


class Different(AssertionError):
    """A failed comparison, in the words that the student reads."""


def same(got, expected, call, within=1e-6):
    """Raises Different unless numbers, lists of numbers or tensors are equal to within an absolute tolerance.

    call: what was called, as code or in words. The comparison itself is plain Python.
    """
    if got is None:
        raise Different(f"{call}\n  got      None: is a return missing?\n  expected {show(expected)}")
    if type(got) not in PLAIN:  # a subclass of Tensor, too, could answer as it likes
        raise Different(f"{call}\n  got      a {type(got).__name__}\n  expected {show(expected)}")
    one, other = _numbers(got), _numbers(expected)
    if _shape(got) != _shape(expected):
        raise Different(f"{call}\n  got      shape {_shape(got)}\n  expected shape {_shape(expected)}")
    if all(_near(a, b, within) for a, b in zip(one, other, strict=True)):
        return
    if len(one) <= 8:
        raise Different(f"{call}\n  got      {show(got)}\n  expected {show(expected)}")
    i = next(i for i in range(len(one)) if not _near(one[i], other[i], within))
    index = [int(axis) for axis in torch.unravel_index(torch.tensor(i), _shape(got))]
    raise Different(f"{call}, at {index}\n  got      {show(one[i])}\n  expected {show(other[i])}")


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
    """Numbers to four decimal places, nested like their tensor."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(show, value))}]"
    return f"{round(value, 4) + 0.0:.10g}"  # + 0.0 turns -0 into 0


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def numbers(*shape, seed=0, dtype=torch.float64):
    """Standard normal numbers, the same in every call."""
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
