"""The judge: runs the checks of each exercise, and asks another process for what a student's functions answer.

No student's code runs here, and nothing that comes back is executed: answers are plain data, compared with what the
checks expect. A test passes if the answers are right; there is no other way to a point.
"""

import functools
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from course.answer import answer
from course.checking import ANSWERS, LIMIT, Different, too_slow
from course.exercises import EXERCISES, NOT_WRITTEN, ROOT
from course.graft import PACKED, blanked, graft, is_written, reference_texts
from course.intake import collect, printable
from course.lesson import words
from course.plain import dumps, loads
from course.reading import unusual

LARGEST = 2**22  # bytes of an answer
WAIT = 60  # seconds for an answer, computed or not; the limit on computing is course/checking.py's


class Gone(Exception):
    """The process that answers has ended, or does not answer. The text is for the student."""


class Raised(Exception):
    """What a student's code raised, in a line."""


class Respondent:
    """One exercise of one submission in a process of its own: `ask` is what the questions of the checks call."""

    lock = threading.Lock()  # multiprocessing's list of children is for one thread at a time
    alive, stopped = set(), False

    def __init__(self, exercise, student, folder, limit):
        if self.stopped:
            raise KeyboardInterrupt
        self.limit = limit
        job = (exercise.number, blanked(reference_texts(), exercise), student, str(folder), limit)
        self.line, theirs = socket.socketpair()
        self.process = fork_server().Process(target=answer, args=(theirs, *job))
        with self.lock:
            self.process.start()
            self.alive.add(self)
        theirs.close()

    def ready(self):
        """What is wrong with the student's file, or None."""
        return self.receive().get("unusable")

    def ask(self, name, args, kwargs):
        try:
            self.line.settimeout(WAIT)
            self.line.sendall(dumps([name, list(args), kwargs]) + b"\n")
        except OSError:
            raise Gone(self.why_ended()) from None
        reply = self.receive()
        if "raised" in reply:
            raise Raised(printable(reply["raised"]))
        return reply.get("answer")

    def receive(self):
        """One line of plain data."""
        received, deadline = b"", time.monotonic() + WAIT
        while not received.endswith(b"\n"):
            try:
                self.line.settimeout(max(0.001, deadline - time.monotonic()))
                part = self.line.recv(2**16)
            except TimeoutError:
                raise Gone(f"no answer within {WAIT} s: does it wait for something?") from None
            except OSError:
                part = b""
            received += part
            if not part or len(received) > LARGEST:
                raise Gone(self.why_ended())
        try:
            reply = loads(received)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise Gone("something else was written where answers go")
        return reply

    def why_ended(self):
        """In words, for the student, once the process says nothing more."""
        with self.lock:
            self.process.join(1)
            code = self.process.exitcode
        if code == -signal.SIGXCPU:
            return too_slow(self.limit)
        return "the process ended before it answered: an exit, or too much memory?"

    def end(self):
        """Ends the process, and whatever it has started in its group."""
        with self.lock:
            for kill in (os.killpg, os.kill):
                try:
                    kill(self.process.pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            self.process.join()
            self.alive.discard(self)
        self.line.close()

    @classmethod
    def stop_all(cls):
        """For threads that are grading: ends what they wait for, and lets them begin nothing new."""
        cls.stopped = True
        for respondent in list(cls.alive):
            respondent.end()


def fork_server():
    """Processes that start with torch loaded, and with nothing of ours that knows an answer."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["course.answer"])
    os.environ["PYTHONSAFEPATH"] = "1"  # the folder that grade.py was called in may be a submission
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return context


def prepare():
    """Loads what the tests need, and starts the server of processes, so that no submission waits for it."""
    os.environ.pop("SALORA_IMPL", None)
    sys.path.append(str(ROOT / "tests"))  # conftest.py has the equations
    torch.set_num_threads(1)
    if PACKED.exists():  # in a handout, whose own files are blank
        graft(reference_texts(), {}, {})
    for number in EXERCISES:
        tests_of(number)
    first = fork_server().Process(target=int)
    first.start()
    first.join()


@functools.cache
def tests_of(number, hidden=None):
    """{name: test} of an exercise, in order. hidden: a seed, for hidden tests as well."""
    checks = runpy.run_path(str(EXERCISES[number].checks))
    tests = {name: checks[name] for name in EXERCISES[number].tests()}
    if hidden is not None:
        from course.hidden import tests_for  # a handout has none

        tests |= tests_for(number, hidden)
    return tests


def grade(submission, exercises=EXERCISES.values(), limit=LIMIT, hidden=None):
    """The marks of a submission, as `--json` prints them. Raises OSError where there is no submission.

    limit: seconds of computing per question. hidden: the seed of hidden tests, if there are to be any.
    """
    student, notes = collect(submission)
    texts, results = reference_texts(), {}
    for exercise in exercises:
        results[str(exercise.number)] = _grade_one(exercise, student, limit, tests_of(exercise.number, hidden))
    look = []  # for the teacher
    for file, (_, text) in student.items():
        names = [f"{name} (line {line})" for name, line in unusual(text, texts[file]).items()]
        look += [f"{file} uses {', '.join(names)}"] if names else []
    name = printable(Path(submission).absolute().name)
    return {"submission": name, **totals(results), "notes": notes, "exercises": results, "look": look}


def totals(results):
    """Points, their maximum, and percent: the mean share of the exercises, weighted by their minutes."""
    points, out_of = (sum(result[key] for result in results.values()) for key in ("points", "out_of"))
    minutes = {number: EXERCISES[int(number)].minutes for number in results}
    shares = [minutes[number] * result["points"] / result["out_of"] for number, result in results.items()]
    return {"points": points, "out_of": out_of, "percent": round(100 * sum(shares) / sum(minutes.values()), 1)}


def nothing(out_of, note):
    """The marks of an exercise that is not there."""
    return {"points": 0, "out_of": out_of, "written": False, "notes": [note], "failed": {}}


def _grade_one(exercise, student, limit, tests):
    [[file, names]] = exercise.targets.items()
    if file not in student:
        return nothing(len(tests), f"there is no {file}")
    if not is_written(student[file][1], names):
        return nothing(len(tests), NOT_WRITTEN)
    marks, started = nothing(len(tests), "") | {"written": True}, time.time()
    with tempfile.TemporaryDirectory(prefix="answer-", ignore_cleanup_errors=True) as folder:
        respondent = Respondent(exercise, student, folder, limit)
        try:
            unusable = respondent.ready()
            marks |= {"notes": [printable(unusable)]} if unusable else _run_tests(tests, respondent)
        except Gone as error:
            marks["notes"] = [f"{file} does not load: {error}"]
        finally:
            respondent.end()
    return marks | {"seconds": round(time.time() - started, 1)}


def _run_tests(tests, respondent):
    """{"points", "notes", "failed"} of the tests of one exercise. After one without an answer, no more are run."""
    failed, blamed, notes = {}, [], []
    before = ANSWERS.set(respondent.ask)
    for i, (name, test) in enumerate(tests.items()):
        error = _failure(test)
        if error is None:
            continue
        failed[name] = printable(words(test, str(error), blamed))
        blamed.append(test.about)
        if isinstance(error, Gone):
            left = list(tests)[i + 1 :]
            failed |= dict.fromkeys(left, "")
            notes = [f"{error}{f'; {len(left)} tests were not run' if left else ''}"]
            break
    ANSWERS.reset(before)
    return {"points": len(tests) - len(failed), "notes": notes, "failed": failed}


def _failure(test):
    """The exception of a test that fails, or None."""
    try:
        test()
    except (Different, Raised, Gone) as error:
        return error
    except Exception as error:  # whatever a test runs into that expects another kind of answer
        return TypeError(f"an answer of the wrong kind ({type(error).__name__}: {str(error)[:200]})")
