"""A pytest plugin that runs the checks of one exercise and says in a few lines what failed.

    python -m pytest --exercise 3                       against the files of this folder
    SALORA_IMPL=folder python -m pytest --exercise 3    against those of another folder; what it lacks is from here

Each failed test says what it checks, which function and equation it is about, and what came out. No traceback: the
last line of the student's own file is enough.
"""

import inspect
import signal
from contextlib import contextmanager

import pytest

from course.exercises import EXERCISES, FILES, ROOT, chosen
from course.graft import Unusable, blanked, graft, place_of, reference_texts, said


def begin(config, number, folder):
    """Puts a student's functions into place before anything imports them. Raises UsageError where they do not load."""
    try:
        [exercise] = chosen(number)
    except ValueError:
        raise pytest.UsageError(f"--exercise takes one number from 1 to {max(EXERCISES)}, got {number!r}") from None
    if folder and not any(place_of(file, folder) for file in FILES):
        raise pytest.UsageError(f"SALORA_IMPL: {folder} holds none of {', '.join(FILES)}")
    student = {file: place_of(file, ROOT) for file in FILES}
    if folder:
        student |= {file: place_of(file, folder) for file in FILES if place_of(file, folder)}
    of = len(exercise.tests())
    try:
        with limited(Lesson.limit):
            graft(blanked(reference_texts(), exercise), exercise.targets, student)
    except Unusable as error:
        raise pytest.UsageError(f"{error}\nexercise {exercise.number}: 0 of {of}") from None
    config.args[:] = [str(exercise.checks)]
    config.pluginmanager.register(Lesson(exercise, student.values()))
    for name, value in dict(verbose=-1, no_header=True, reportchars="", importmode="importlib").items():
        setattr(config.option, name, value)


class TooLong(Exception):
    pass


@contextmanager
def limited(seconds, late=lambda: None):
    """Calls late() and raises TooLong after so many seconds of computing; 0 is no limit.

    Time at a debugger's prompt does not count. One long call into torch is only stopped when it returns.
    """
    if not seconds or not hasattr(signal, "setitimer"):  # Windows has none
        yield
        return

    def stop(*_):
        late()
        raise TooLong(f"not finished after {seconds} s: an endless loop?")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class Lesson:
    limit = 10  # seconds per test

    def __init__(self, exercise, paths):
        self.exercise, self.paths = exercise, list(map(str, paths))
        self.outcomes = {}  # {test: passed}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is not None and report.outcome == "failed":
            report.longrepr = self.words(item, call.excinfo.value)
            report.sections = [(name, text) for name, text in report.sections if name.startswith("Captured")]
        passed = report.outcome == "passed" and not hasattr(report, "wasxfail")
        self.outcomes[item.name] = passed and self.outcomes.get(item.name, True)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        def stop():
            item.session.shouldstop = f"{item.name} was not finished after {self.limit} s"

        with limited(self.limit, stop):
            return (yield)

    def words(self, item, error):
        """What a student reads about a failed test."""
        from conftest import EQUATIONS

        function, key = item.function.about
        statement = inspect.getdoc(item.function) or item.name.removeprefix("test_").replace("_", " ")
        if isinstance(error, NotImplementedError) and str(error).startswith("Exercise "):
            happened = f"not written yet: {error}"
        elif isinstance(error, AssertionError):
            happened = str(error)
        else:
            happened = next((said(error, path) for path in self.paths if said(error, path).startswith("line ")), None)
            happened = happened or said(error, "")
        return f"{statement}\n{function}: {EQUATIONS[key]}\n{happened}"

    def pytest_terminal_summary(self, terminalreporter):
        passed, of = sum(self.outcomes.values()), len(self.exercise.tests())
        terminalreporter.write_line(f"exercise {self.exercise.number}: {passed} of {of}", bold=True)
