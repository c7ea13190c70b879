"""A pytest plugin that runs the checks of one exercise and says in a few lines what failed.

    python -m pytest --exercise 3                       against the files of this folder
    SALORA_IMPL=folder python -m pytest --exercise 3    against those of another folder; what it lacks is from here

Each failed test says what it checks, which function and equation it is about, and what came out. No traceback: the
last line of the student's own file is enough.
"""

import inspect

import pytest

from course.checking import LIMIT, Different, TooSlow, limited
from course.exercises import FILES, ROOT, chosen
from course.graft import Unusable, blanked, graft, place_of, reference_texts, said


def begin(config, number, folder):
    """Puts a student's functions into place before anything imports them. Raises UsageError where they do not load."""
    try:
        exercises = chosen(number)
    except ValueError as error:
        raise pytest.UsageError(f"--exercise: {error}") from None
    if len(exercises) > 1:
        raise pytest.UsageError(f"--exercise takes one number, got {number!r}; for several: python course/grade.py .")
    [exercise] = exercises
    if folder and not any(place_of(file, folder) for file in FILES):
        raise pytest.UsageError(f"SALORA_IMPL: {folder} holds none of {', '.join(FILES)}")
    places = [place_of(file, folder) if folder else None for file in FILES]
    places = {file: place or place_of(file, ROOT) for file, place in zip(FILES, places)}
    student = {file: (str(place), place.read_bytes()) for file, place in places.items() if place}
    of = len(exercise.tests())
    try:
        with limited(LIMIT):
            graft(blanked(reference_texts(), exercise), exercise.targets, student)
    except Unusable as error:
        raise pytest.UsageError(f"{error}\nexercise {exercise.number}: 0 of {of}") from None
    config.args[:] = [str(exercise.checks)]
    config.pluginmanager.register(Lesson(exercise, [path for path, _ in student.values()]))
    for name, value in dict(verbose=-1, no_header=True, reportchars="", importmode="importlib").items():
        setattr(config.option, name, value)


def words(test, happened, before=()):
    """What a student reads about a failed test: what it states, whom it blames, and what happened.

    before: the pairs (function, equation) of tests that failed earlier; their equation is not repeated.
    """
    from conftest import EQUATIONS

    function, key = test.about
    statement = inspect.getdoc(test) or test.__name__.removeprefix("test_").replace("_", " ")
    blamed = f"{function}: {'as above' if test.about in before else EQUATIONS[key]}"
    return f"{statement}\n{blamed}\n{happened}"


class Lesson:
    def __init__(self, exercise, paths):
        self.exercise, self.paths = exercise, paths
        self.outcomes, self.blamed = {}, []  # {test: passed}, (function, equation) of those that failed

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if call.excinfo is not None and report.outcome == "failed":
            error = call.excinfo.value
            happened = str(error) if isinstance(error, (Different, TooSlow)) else said(error, self.paths)
            report.longrepr = words(item.function, happened, self.blamed)
            report.sections = [(name, text) for name, text in report.sections if name.startswith("Captured")]
            self.blamed.append(item.function.about)
            if isinstance(error, TooSlow):
                item.session.shouldstop = f"{item.name} was too slow"
        passed = report.outcome == "passed" and not hasattr(report, "wasxfail")
        self.outcomes[item.name] = passed and self.outcomes.get(item.name, True)
        return report

    def pytest_terminal_summary(self, terminalreporter):
        passed, of = sum(self.outcomes.values()), len(self.exercise.tests())
        terminalreporter.write_line(f"exercise {self.exercise.number}: {passed} of {of}", bold=True)
