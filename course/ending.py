"""How the programs of the course end when something comes in between: in one line, without a traceback."""

import argparse
import os
import signal
import sys
from contextlib import contextmanager


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


@contextmanager
def ending_in_a_line(program, hint="nothing is left behind"):
    """Exit status 2 and the error's words for what the user can mend; 130 and a hint after Ctrl-C or SIGTERM."""

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it ends
        _end(2, f"{program}: standard output was closed")
    except (OSError, ValueError) as error:
        _end(2, f"{program}: {error}")
    except KeyboardInterrupt:
        _end(130, f"\n{program}: interrupted; {hint}")
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(status, line):
    print(line, file=sys.stderr)
    sys.exit(status)
