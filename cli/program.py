"""What every program has around it: whatever its user can mend ends it with one line, and so does Ctrl-C."""

import argparse
import os
import sys
import warnings
from contextlib import contextmanager

from cli.interrupts import interruptible


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, without the usage


@contextmanager
def errors_as_lines(parser, hint=""):
    """Errors that the user can mend end the program with one line and exit status 2.

    An interruption ends it with exit status 130, and says how to go on: what the KeyboardInterrupt says, or `hint`.
    Warnings are lines, too, without the place in the code.
    """
    formatted, warnings.formatwarning = warnings.formatwarning, lambda message, *_: f"warning: {message}\n"
    try:
        with interruptible():
            yield
    except KeyboardInterrupt as stop:
        flush()
        parser.exit(130, f"\n{'; '.join(filter(None, ['interrupted', str(stop) or hint]))}\n")
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        parser.error(flush() or line_about(error))
    except RuntimeError as error:
        if not is_avoidable(error):
            raise
        parser.error(flush() or line_about(error))
    finally:  # also where --help ends the program
        warnings.formatwarning = formatted
        wrong = flush()
        if wrong:
            parser.error(wrong)


def is_avoidable(error):
    """Whether other flags avoid a RuntimeError of torch: an SVD without convergence, or too little memory."""
    import torch

    return isinstance(error, torch.linalg.LinAlgError) or memory_error(error) is not None


def memory_error(error):
    """The error that says that memory was too small: this one or what led to it, since the recording of a CUDA graph
    ends with an error of its own then. None if there is none."""
    import torch

    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            return error
        error = error.__context__


def line_about(error):
    if isinstance(error, BrokenPipeError):
        return "standard output was closed"
    if (memory := memory_error(error)) is not None:
        return f"too little memory: take smaller batches, or what else saves it (see --help). {memory}".rstrip()
    return str(error)


def flush():
    """Write what was printed. Returns a line about why that is impossible, or None."""
    if sys.stdout is None:  # as under pythonw
        return None
    try:
        sys.stdout.flush()
        return None
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more when it ends
        if isinstance(error, BrokenPipeError):
            return line_about(error)
        return f"standard output cannot be written: {error.strerror}"
