"""What the checks share: `question` asks a student's functions, `same` compares, `about` says whom a test blames."""

import functools
import math
import signal
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from course.plain import Other, dumps, loads

LIMIT = 10  # seconds of computing per question, at home and in the grader; the slowest takes half a second
ANSWERS = ContextVar("ANSWERS", default=None)  # while a submission is graded: what asks the process that runs it


def about(function, equation):
    """The function that a failed test blames, and its equation: a key of EQUATIONS in tests/conftest.py."""

    def mark(test):
        test.about = (function, equation)
        return test

    return mark


def question(function):
    """A function of plain arguments that calls a student's functions and returns plain data: see course/questions.py.

    It runs in this process, so that a debugger works, unless ANSWERS has another process to ask.
    """

    @functools.wraps(function)
    def asked(*args, **kwargs):
        ask = ANSWERS.get()
        if ask is not None:
            return ask(function.__name__, args, kwargs)
        with limited(LIMIT):
            return loads(dumps(function(*args, **kwargs)))

    return asked


class TooSlow(Exception):
    pass


def too_slow(seconds):
    return f"too slow, or an endless loop: not finished after {seconds:g} s of computing"


@contextmanager
def limited(seconds):
    """Raises TooSlow after so many seconds of computing. Time at a debugger's prompt does not count."""
    if not hasattr(signal, "setitimer"):  # Windows has none
        yield
        return

    def stop(*_):
        raise TooSlow(too_slow(seconds))

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Different(AssertionError):
    """A failed comparison, in the words that the student reads."""


def same(got, expected, call, within=1e-6):
    """Raises Different unless numbers, lists of numbers or tensors are equal to within an absolute tolerance.

    call: what was called, as code or in words.
    """
    if got is None:
        raise Different(f"{call}\n  got      None: is a return missing?\n  expected {show(expected)}")
    if isinstance(got, (Other, str, dict)):
        kind = got.type if isinstance(got, Other) else type(got).__name__
        raise Different(f"{call}\n  got      a {kind}\n  expected {show(expected)}")
    try:
        got, expected = (torch.as_tensor(value).double() for value in (got, expected))
    except (TypeError, ValueError, RuntimeError):
        raise Different(f"{call}\n  got      {got!r:.80}\n  expected {show(expected)}") from None
    if got.shape != expected.shape:
        words = [f"shape {tuple(value.shape)}{'' if value.ndim else ', one number'}" for value in (got, expected)]
        raise Different(f"{call}\n  got      {words[0]}\n  expected {words[1]}")
    one, other = got.flatten().tolist(), expected.flatten().tolist()
    far = [i for i in range(len(one)) if not _near(one[i], other[i], within)]
    if not far:
        return
    if len(one) <= 8:
        raise Different(f"{call}\n  got      {show(got)}\n  expected {show(expected)}")
    index = [int(axis) for axis in torch.unravel_index(torch.tensor(far[0]), got.shape)]
    raise Different(f"{call}, at {index}\n  got      {show(one[far[0]])}\n  expected {show(other[far[0]])}")


def holds(truth, call, got, expected):
    """Raises Different with these words unless `truth`."""
    if not truth:
        raise Different(f"{call}\n  got      {got}\n  expected {expected}")


def learned(gradient, call, who):
    """The gradient, or Different where a question answered that there is none."""
    holds(gradient is not None, call, "no gradient", f"a tensor that {who} can learn from")
    return gradient


def _near(a, b, within):
    return a == b or (math.isfinite(a) and abs(a - b) <= within)


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
