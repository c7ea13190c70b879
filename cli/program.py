"""What every program has around it: whatever its user can mend ends it with one line, and so does Ctrl-C.

    if __name__ == "__main__":
        end_on_interrupt()                  # before torch is imported

    def main(argv=None):
        parser = Parser(...)
        with errors_as_lines(parser):
            args = parser.parse_args(argv)
            ...

Nothing that takes long is imported here, so that a program can begin with this.
"""

import argparse
import os
import signal
import sys
from contextlib import contextmanager


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")  # one line, without the usage


def end_on_interrupt():
    """From here on Ctrl-C ends the program at once, without a traceback, but for what `errors_as_lines` surrounds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interruptible():
    """Ctrl-C raises KeyboardInterrupt in this block, even after `end_on_interrupt`."""
    ends = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


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
