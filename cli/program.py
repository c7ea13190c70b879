"""What every program has around it: whatever its user can mend ends it with one line, and so does Ctrl-C."""

import argparse
import os
import sys
from contextlib import contextmanager

from cli.interrupts import interruptible


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, without the usage


@contextmanager
def errors_as_lines(parser, hint=""):
    """Errors that the user can mend end the program with one line and exit status 2.

    An interruption ends it with exit status 130, and says how to go on: what the KeyboardInterrupt says, or `hint`.
    """
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
        wrong = flush()
        if wrong:
            parser.error(wrong)


def is_avoidable(error):
    """Whether other flags avoid a RuntimeError of torch: an SVD without convergence, or too little memory."""
    import torch

    kinds = (torch.linalg.LinAlgError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def line_about(error):
    if isinstance(error, BrokenPipeError):
        return "standard output was closed"
    return str(error) or "not enough memory"


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
