"""Ctrl-C ends a program at once and silently while it is imported, and raises KeyboardInterrupt while it works, as
SIGTERM does, by which clusters and containers end it.

Nothing that takes long is imported here, so that a program can begin with this.
"""

import signal
import threading
from contextlib import contextmanager


def end_on_interrupt():
    """From here on Ctrl-C ends the program at once, without a traceback, but for what `interruptible` surrounds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interruptible():
    """Ctrl-C, even after `end_on_interrupt`, and SIGTERM raise KeyboardInterrupt in this block."""
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return
    ends = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
