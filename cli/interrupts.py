"""Ctrl-C ends a program at once and silently while it is imported, and raises KeyboardInterrupt while it works.

Nothing that takes long is imported here, so that a program can begin with this.
"""

import signal
from contextlib import contextmanager


def end_on_interrupt():
    """From here on Ctrl-C ends the program at once, without a traceback, but for what `interruptible` surrounds."""
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
