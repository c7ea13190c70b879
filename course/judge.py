"""The process in which a submission is tested: one for every exercise of every submission.

The fences go up before the student's file runs: no input or output, limits on memory and file size, an empty folder to
work in, and an audit hook that refuses writing anywhere else, reading the repository's answers, starting programs,
sending signals and opening connections. An audit hook cannot be removed. The fences stop accidents and pranks, not a
determined attacker: for a class that you do not trust, run grade.py in a container.

Results are lines of JSON in a file, each signed with a key that only the parent and a closure in this process hold.
Unsigned lines do not count, and without the last line none does, so an early exit earns nothing.
"""

import hmac
import json
import os
import sys
import tempfile
import warnings
from hashlib import sha256
from pathlib import Path
from types import FunctionType

import pytest
import torch  # noqa: F401  here, so that no process has to import it again

import course.checking  # noqa: F401  and watched, like torch
from course.exercises import EXERCISES, ROOT
from course.graft import Unusable, graft, said
from course.lesson import Lesson

try:
    import resource
except ImportError:  # not on Windows
    resource = None

# torch imports more of itself on first use: done here, before anything is watched or fenced.
for Optimizer in (torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW):
    Optimizer([torch.zeros(1, requires_grad=True)], lr=0.1).step()
torch.empty(1, device="meta").clone()

MEGABYTE = 2**20
MEMORY, FILE_SIZE = 2048 * MEGABYTE, 16 * MEGABYTE
WATCHED = ("torch", "pytest", "_pytest", "pluggy", "builtins", "math", "course", "conftest", "hmac", "json", "os")
UNWATCHED = ("torch._C", "torch.distributed")
FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
             "pty.", "signal.", "socket.", "ctypes.", "sys.addaudithook", "sys._current_frames", "gc.get_",
             "resource.", "winreg.", "webbrowser.", "urllib.", "ftplib.", "smtplib.", "os.chown", "os.chmod",
             "os.link", "os.symlink", "shutil.chown", "os.setxattr", "os.removexattr")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.rmtree", "shutil.move",
           "shutil.copyfile", "shutil.copymode", "shutil.copystat", "shutil.unpack_archive")  # fmt: skip


def judge(number, texts, student, folder, report, key):
    """Runs the checks of one exercise and signs the results. Ends the process.

    texts: the reference {file: text} without its answer to this exercise. student: {file: path}. folder: where the
    student's code may write. report: the file for results. key: bytes.
    """
    exercise = EXERCISES[number]
    os.closerange(3, 256)  # the pipes of the process that this one was forked from
    with open(report, "ab", buffering=0) as sink:

        def tell(**facts):
            line = json.dumps(facts)
            sink.write(f"{signature(key, line)} {line}\n".encode())

        _be_quiet()
        _limit()
        os.chdir(folder)
        tempfile.tempdir = str(folder)
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(ROOT / "tests"))
        sys.setrecursionlimit(1000)
        import conftest  # noqa: F401

        warnings.simplefilter("ignore")
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # Hypothesis's plugin, for one, changes pytest
        before, refused = _callables(), []
        _fence(folder, student, refused)
        try:
            graft(texts, exercise.targets, student)
        except Unusable as error:
            tell(unusable=str(error))
        except BaseException as error:
            tell(unusable=f"the file does not load: {said(error, '')}")
        else:
            arguments = ["-q", "-s", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", os.devnull]
            arguments += [f"--rootdir={ROOT}", str(exercise.checks)]
            witness = Witness(exercise, student, tell)
            pytest.main(arguments, [witness])
            if witness.outcomes.keys() != set(exercise.tests()):
                os._exit(3)  # stopped on the way
        changed = _changes(before, _callables())
        tell(end=True, refused=sorted(set(refused))[:20], changed=changed[:5])
    os._exit(0)


class Witness(Lesson):
    """The same plugin as in class; instead of printing, it tells the parent, which holds the clock."""

    limit = 0

    def __init__(self, exercise, student, tell):
        super().__init__(exercise, student.values())
        self.tell = tell

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.rpartition("::")[2]
        if report.when == "teardown":
            self.tell(test=name, passed=bool(self.outcomes[name]))
        elif report.outcome == "failed":
            self.tell(test=name, words=str(report.longrepr)[:2000])

    def pytest_terminal_summary(self):
        pass


def signature(key, line):
    return hmac.new(key, line.encode(), sha256).hexdigest()


def _be_quiet():
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)


def _limit():
    os.setsid()  # a group of its own, so that the parent can end all of it
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fence(folder, student, refused):
    """Refuses what a submission has no business doing, and notes the attempt."""
    own = [folder, *(path.parent for path in student.values())]
    checks = [ROOT / "course" / "checks", ROOT / "course" / "checking.py", ROOT / "tests"]
    python = [sys.prefix, sys.base_prefix, *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    writable = [os.path.realpath(folder)]
    readable = [os.path.realpath(path) for path in (*own, *checks, *python, os.devnull, "/dev/urandom")]

    def inside(path, places):
        path = os.path.realpath(os.fsdecode(path))
        return any(path == place or path.startswith(place + os.sep) for place in places)

    def refuse(event, what):
        refused.append(f"{event}: {what}"[:200])
        raise PermissionError(f"not in a graded submission: {event} {what}")

    def written(event, path):
        if path != os.devnull and not inside(path, writable):
            refuse(event, os.fsdecode(path))

    def hook(event, args):
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                written("write", path)
            elif not inside(path, readable):
                refuse("read", os.fsdecode(path))
        elif event in CHANGES:
            written(event, args[0])
            if event in ("os.rename", "shutil.move", "shutil.copyfile"):
                written(event, args[1])
        elif event.startswith(FORBIDDEN):
            refuse(event, str(args[0])[:100] if args else "")

    sys.addaudithook(hook)


def _callables():
    """{module or class: {name: identity}} of the functions, classes and methods of the watched modules."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in WATCHED and not name.startswith(UNWATCHED):
            found[name] = _identities(module)
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and value.__module__.split(".")[0] in WATCHED:
                    found[f"{value.__module__}.{value.__qualname__}"] = _identities(value)
    return found


def _identities(holder):
    found = {key: value for key, value in list(vars(holder).items()) if callable(value)}
    return {key: (id(f), id(f.__code__)) if isinstance(f, FunctionType) else id(f) for key, f in found.items()}


def _changes(before, after):
    """Names of what was replaced, removed or added in modules and classes that were there before."""
    changed = []
    for holder, names in before.items():
        now = after.get(holder, {})
        changed += [f"{holder}.{name}" for name in names.keys() | now.keys() if names.get(name) != now.get(name)]
    return sorted(changed)
