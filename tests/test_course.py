"""The course: each exercise stands alone, wrong solutions are blamed by name, and no submission does any harm."""

import builtins
import csv
import doctest
import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import course_faults
import pytest
import torch
from conftest import EQUATIONS, ROOT
from course_faults import HOSTILE, RIGHT, WRONG, hostile, marks_of
from torch import nn

from course import grade as grader
from course import lesson, make_handout
from course.exercises import EXERCISES, FILES, chosen
from course.graft import Unusable, blanked, functions_of, graft, is_stub, reference_texts, stubbed


def graded(folder, *numbers, limit=60):
    return grader.grade(folder, [EXERCISES[number] for number in numbers or EXERCISES], limit)


def run(*command, folder=ROOT, **environment):
    """A command with its output: (exit status, text)."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    """All exercises blank; not yet checked."""
    out = tmp_path_factory.mktemp("course") / "handout"
    make_handout.make_handout(out, EXERCISES.values())
    return out


# The table of exercises


def test_every_exercise_has_functions_that_exist_and_tests_that_say_whom_they_are_about():
    texts = reference_texts()
    for exercise in EXERCISES.values():
        for places in (exercise.targets, exercise.gives_away):
            for file, names in places.items():
                assert set(names) <= functions_of(texts[file]).keys(), exercise.title
        source = exercise.checks.read_text(encoding="utf-8")
        targets = [name for names in exercise.targets.values() for name in names]
        namespace = {"__name__": "checks"}
        exec(compile(source, str(exercise.checks), "exec"), namespace)
        about = [namespace[name].about for name in exercise.tests()]
        assert 5 <= len(about) <= 12 and {function for function, _ in about} == set(targets), exercise.title
        assert about[0][0] == targets[0] and {key for _, key in about} <= EQUATIONS.keys(), exercise.title


def test_every_exercise_has_its_place_in_the_text_and_in_the_answers():
    for page in ("exercises.md", "answers.md"):
        text = (ROOT / "course" / page).read_text(encoding="utf-8")
        for exercise in EXERCISES.values():
            assert f"## {exercise.number}. {exercise.title}\n" in text, page
            assert page == "answers.md" or f"python -m pytest --exercise {exercise.number}\n" in text
    assert text.count("\n## 10. ") == 1


def test_exercises_are_chosen_by_numbers_and_ranges_and_others_are_refused():
    for text, numbers in (("3", [3]), ("1-3", [1, 2, 3]), ("7,1-2,2", [1, 2, 7])):
        assert [exercise.number for exercise in chosen(text)] == numbers
    for text in ("", "0", "10", "2-99", "x", "1-", "-1", "3-1", "1;2"):
        with pytest.raises(ValueError, match="exercises"):
            chosen(text)


# Blanks


def test_a_stub_keeps_signature_and_docstring_and_all_other_lines():
    text = reference_texts()["hard_concrete.py"]
    lines = stubbed(text, {"prob_open": "Exercise 1"}).splitlines()
    at = lines.index("def prob_open(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):")
    assert lines[at + 1].startswith('    """Eq. (8)') and lines[at + 2] == '    raise NotImplementedError("Exercise 1")'
    before = text.splitlines()
    assert lines[: at + 2] == before[: at + 2] and lines[at + 3 :] == before[at + 3 :]


def test_a_handout_has_blanks_in_place_of_answers_and_of_what_gives_them_away(handout):
    for file in FILES:
        nodes = functions_of((handout / file).read_text(encoding="utf-8"))
        blank = {name for e in EXERCISES.values() for part in (e.targets, e.gives_away) for name in part.get(file, ())}
        assert {name for name, node in nodes.items() if is_stub(node)} == blank
    text = (handout / "hard_concrete.py").read_text(encoding="utf-8")
    assert text.count('raise NotImplementedError("Exercise 1: Eq. (8)")') == 1
    assert text.count('raise NotImplementedError("left out: it gives away exercise 1")') == 1
    assert text.count('raise NotImplementedError("Exercise 3: Section 3.5")') == 2, "an exercise, though 2 hides it too"


def test_a_handout_lacks_what_is_the_teachers_and_what_shows_the_answers(handout):
    names = {path.relative_to(handout).as_posix() for path in handout.rglob("*")}
    teachers = ["answers.md", "teaching.md", "grade.py", "judge.py", "make_handout.py"]
    assert not names & {f"course/{name}" for name in teachers}
    assert not names & {".git", ".ci", "tests/mutants.py", "tests/course_faults.py", "tests/test_course.py"}
    assert {"course/exercises.md", "course/reference.zip", "course/run.py", "train_glue_mini.py"} <= names


def test_a_handout_of_some_exercises_leaves_all_else_as_it_is(tmp_path):
    make_handout.make_handout(tmp_path / "out", chosen("4,7"))
    for file, text in reference_texts().items():
        nodes = functions_of((tmp_path / "out" / file).read_text(encoding="utf-8"))
        blank = [name for name, node in nodes.items() if is_stub(node)]
        assert blank == {"salora.py": ["SaLoRALinear.forward", "SaLoRALinear.delta"],
                         "budget.py": ["best_within_budget"]}.get(file, [])  # fmt: skip


def test_a_handout_is_not_written_over_what_is_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_handout.main([str(tmp_path)])
    assert f"{tmp_path} exists: name a new folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        make_handout.main([str(ROOT / "course" / "handout")])
    assert "lies inside the repository" in capsys.readouterr().err


# A student's functions, with the reference behind them


@pytest.fixture
def grafted(tmp_path, monkeypatch):
    """grafted(number, text) -> the module hard_concrete with the functions of an exercise from this text."""
    for file in FILES:
        name = file.removesuffix(".py").replace("/", ".")
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    monkeypatch.setattr(sys.modules["course"], "bare_loop", sys.modules["course.bare_loop"])

    def make(number, text, file="hard_concrete.py"):
        path = tmp_path / "theirs.py"
        path.write_text("import torch\n" + text, encoding="utf-8")
        graft(blanked(reference_texts(), EXERCISES[number]), EXERCISES[number].targets, {file: path})
        return sys.modules[file.removesuffix(".py")]

    return make


HALF = "def prob_open(log_theta, *rest):\n    return {}\n"


def test_a_function_runs_for_all_who_call_it_and_its_neighbors_are_the_references(grafted):
    """A blank and a wrong neighbor in the same file do not matter, and a helper of their own stays."""
    text = HALF.format("helper() * sample_gate(log_theta, torch.tensor(0.5))") + "def helper():\n    return 2\n"
    module = grafted(
        1, text + "def sample_gate(*_):\n    raise NotImplementedError\ndef median_gate(*_):\n    return 7\n"
    )
    zero = torch.tensor(0.0)
    assert module.prob_open(zero) == 1 and module.sample_gate(zero, zero + 0.5) == module.median_gate(zero) == 0.5
    layer = sys.modules["salora"].SaLoRALinear(nn.Linear(2, 2), 3, 1)
    layer.gate.release()
    assert sys.modules["budget"].expected_density([layer]) == 1, "Eq. (11) of the reference calls theirs"


def test_functions_of_one_exercise_call_each_other(grafted):
    text = "def mean_gate(*_):\n    return median_gate()\ndef median_gate(*_):\n    return 7\n"
    assert grafted(3, text).mean_gate() == 7


def test_the_references_own_answer_is_gone_before_a_students_file_runs(grafted):
    text = "import hard_concrete\nfrom hard_concrete import prob_open as answer\n" + HALF.format("answer(log_theta)")
    with pytest.raises(NotImplementedError, match="Exercise 1"):
        grafted(1, text).prob_open(torch.tensor(0.0))


def test_methods_come_with_the_methods_that_they_call(grafted):
    text = "class SaLoRALinear:\n    def forward(self, x):\n        return self.twice(x)\n"
    text += "    def twice(self, x):\n        return 2 * x\n    def delta(self):\n        return self.scale\n"
    layer = grafted(4, text, "salora.py").SaLoRALinear(nn.Linear(2, 2), 4, 8)
    assert layer(torch.ones(2)).tolist() == [2, 2] and layer.delta() == 2, "in the reference's class"


@pytest.mark.parametrize("text,words", [
    ("def other():\n    pass\n", "hard_concrete.py does not define prob_open"),
    ("prob_open = 0.5\n", "hard_concrete.py does not define prob_open"),
    ("x = 1 / 0\n", "hard_concrete.py does not load: line 2: ZeroDivisionError: division by zero"),
    ("def (\n", "hard_concrete.py, line 2: SyntaxError: invalid syntax"),
    ("raise SystemExit\n", "hard_concrete.py does not load: line 2: SystemExit"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_in_a_line(grafted, text, words):
    with pytest.raises(Unusable) as error:
        grafted(1, text)
    assert str(error.value) == words


# In class: python -m pytest --exercise N


def test_a_student_reads_what_a_test_states_the_equation_got_and_expected_and_how_many_passed(handout, tmp_path):
    """One exercise alone, all others still blank: its tests call sample_gate."""
    text = (handout / "hard_concrete.py").read_text(encoding="utf-8")
    blank = 'raise NotImplementedError("Exercise 1: Eq. (8)")'
    (tmp_path / "hard_concrete.py").write_text(text.replace(blank, WRONG[2][5]), encoding="utf-8")
    quiet = {"PYTHONWARNINGS": "ignore"}  # of plugins that happen to be installed
    status, said = run("-m", "pytest", "--exercise", "1", folder=handout, SALORA_IMPL=str(tmp_path), **quiet)
    lines = said.splitlines()
    at = lines.index("the temperature multiplies the logarithm")
    assert lines[at + 1].startswith("prob_open: hard_concrete.py, Eq. (8): P(g > 0) = sigmoid(")
    assert lines[at + 2 : at + 5] == ["prob_open(0.0, tau=2.0)", "  got      0.9167", "  expected 0.9918"]
    assert status == 1 and "exercise 1: 5 of 7" in lines and len(lines) < 20
    assert "Traceback" not in said and "site-packages" not in said and "reproduce_failure" not in said


def test_a_number_without_an_exercise_is_refused_in_one_line(pytestconfig):
    for name in ("0", "10", "x", "1-2"):
        with pytest.raises(pytest.UsageError, match=f"one number from 1 to 9, got '{name}'"):
            lesson.begin(pytestconfig, name, None)


# Grades: what needs one process each, and is quick


def test_a_wrong_solution_and_a_right_one_are_graded_as_what_they_are():
    assert marks_of(1, *WRONG[0][3:])["points"] == 0
    assert marks_of(2, *RIGHT[1][2:])["points"] == 8


def test_without_a_file_or_with_a_link_there_is_nothing_to_grade(tmp_path):
    (tmp_path / "hard_concrete.py").symlink_to(ROOT / "hard_concrete.py")
    (tmp_path / "course").symlink_to(ROOT / "course")
    marks = graded(tmp_path, 1)
    assert marks["points"] == 0 and marks["exercises"]["1"]["notes"] == ["there is no hard_concrete.py"]
    refused = [f"{name} is a link or not a file, and was not read" for name in ("hard_concrete.py", "bare_loop.py")]
    assert marks["notes"] == refused


def test_a_class_is_graded_into_a_table(tmp_path, capsys):
    for name in ("ada", "ben"):
        (tmp_path / name).mkdir()
    course_faults.write(tmp_path / "ada", *RIGHT[0][2:])
    course_faults.write(tmp_path, *WRONG[3][3:]).rename(tmp_path / "cem.py")
    (tmp_path / "notes.txt").write_text("not a submission")
    grader.main([str(tmp_path), "--all", "--exercises", "1"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [(row["submission"], row["points"], row["exercise_1"]) for row in rows] == [
        ("ada", "7", "7"), ("ben", "0", "0"), ("cem.py", "6", "6")]  # fmt: skip
    assert rows[1]["notes"] == "1: there is no hard_concrete.py" and rows[0]["out_of"] == "7"


def test_marks_come_as_json_and_say_what_a_submission_tried(tmp_path):
    """It is right, but it tries to write elsewhere, hides the error, and changes the comparison."""
    prize = tmp_path / "elsewhere" / "prize"
    prize.parent.mkdir()
    prize.write_text("here")
    top = "try:\n    open(PRIZE, 'w')\nexcept OSError:\n    pass\nimport course.checking\ncourse.checking.math = None"
    hostile(tmp_path, top + "\ncourse.checking.same = print", "", prize)
    status, text = run("course/grade.py", str(tmp_path), "--json", "--exercises", "1")
    marks = json.loads(text)
    assert status == 0 and (marks["points"], marks["out_of"]) == (0, 7) and prize.read_text() == "here"
    assert marks["exercises"]["1"]["notes"] == [
        f"refused: write: {prize}", "changes code outside the submission: course.checking.same"]  # fmt: skip


def test_points_are_tests_that_passed_in_a_process_that_came_to_its_end():
    exercise = EXERCISES[1]
    first, second, *_ = exercise.tests()
    facts = [{"test": first, "passed": True}, {"test": second, "passed": False}, {"test": "other", "passed": True}]
    end = {"end": True, "refused": [], "changed": []}

    def points(*more, late=False):
        return grader._marks(exercise, [*facts, *more], late, 9)["points"]

    assert points(end) == 1 and points(end | {"changed": ["torch.equal"]}) == 0
    assert points() == points(late=True) == 0, "no last word: an exit, or the time limit"


def test_a_report_that_is_not_signed_with_the_key_does_not_count(tmp_path):
    from course.judge import signature

    report, key = tmp_path / "report", b"key"
    facts = [json.dumps({"test": "test_x", "passed": True}), json.dumps({"end": True, "refused": [], "changed": []})]
    report.write_text("".join(f"{signature(b'other', fact)} {fact}\n" for fact in facts) + "garbage\n")
    assert grader._signed(report, key) == []
    report.write_text("".join(f"{signature(key, fact)} {fact}\n" for fact in facts))
    assert [fact.get("test") for fact in grader._signed(report, key)] == ["test_x", None]


# The pages


def test_the_numbers_of_the_walkthrough_are_those_that_the_code_prints(grafted):
    results = doctest.testfile(str(ROOT / "course" / "WALKTHROUGH.md"), module_relative=False)
    assert results.attempted > 50 and results.failed == 0


@pytest.mark.parametrize("page", ["exercises.md", "answers.md", "teaching.md", "WALKTHROUGH.md"])
def test_files_and_functions_that_the_pages_name_exist(page):
    text = (ROOT / "course" / page).read_text(encoding="utf-8").replace("exercise_N", "exercise_1")
    code = "".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.py"), *ROOT.glob("course/*.py")))
    for word in re.findall(r"`(\w[\w./]+)`", text):
        if word.endswith((".py", ".md", ".png")):
            assert any((ROOT / folder / word).exists() for folder in ("", "course")), word
        elif "." not in word and not hasattr(builtins, word):
            assert re.search(rf"\b{word}\b", code), word


def test_run_says_whose_functions_run_and_takes_the_reference_for_blanks(handout, tmp_path):
    from course.run import written_in

    answer = HALF.format("log_theta") + "def sample_gate(*_):\n    raise NotImplementedError\n"
    (tmp_path / "hard_concrete.py").write_text(answer, encoding="utf-8")
    paths, written = written_in(tmp_path)
    assert written == {"hard_concrete.py": ["prob_open"]} and list(paths) == ["hard_concrete.py"]
    assert written_in(handout) == ({}, {})
    status, text = run("course/run.py", str(tmp_path), "--version-of-nothing")
    assert text.startswith(f"1 of 19 functions from {tmp_path}: prob_open; the others: reference\n")
    assert status == 2 and "unrecognized arguments" in text


# The whole tables


@pytest.mark.slow
def test_the_handout_is_checked_by_what_makes_it(tmp_path, capsys):
    make_handout.main([str(tmp_path / "out"), "--exercises", "1-9"])
    assert "The handout is ready." in capsys.readouterr().out


@pytest.mark.slow
def test_points_grow_exercise_by_exercise_from_0_to_full_marks(handout, tmp_path):
    """After each exercise: its own points are full, those of the exercises to come are 0, and the others stay full."""
    full = {number: len(exercise.tests()) for number, exercise in EXERCISES.items()}
    (tmp_path / "course").mkdir()
    for done in range(len(EXERCISES) + 1):
        blank = make_handout.blanks([exercise for number, exercise in EXERCISES.items() if number > done])
        for file, text in reference_texts().items():
            (tmp_path / file).write_text(stubbed(text, blank[file]), encoding="utf-8")
        marks = graded(tmp_path)
        points = {int(number): result["points"] for number, result in marks["exercises"].items()}
        assert points == {number: full[number] if number <= done else 0 for number in full}
        assert marks["points"] == sum(full[number] for number in full if number <= done)


@pytest.mark.slow
@pytest.mark.parametrize("exercise,thought,function,file,old,new", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_wrong_solution_loses_points_and_the_first_message_blames_its_function(
    exercise, thought, function, file, old, new
):
    marks = marks_of(exercise, file, old, new)
    assert marks["points"] < marks["out_of"] and not marks["notes"]
    _, blamed, *_ = next(iter(marks["failed"].values())).splitlines()
    assert blamed.startswith(f"{function}: ") and any(blamed == f"{function}: {text}" for text in EQUATIONS.values())


@pytest.mark.slow
@pytest.mark.parametrize("exercise,style,file,old,new", RIGHT, ids=[f"{r[0]}-{r[1]}" for r in RIGHT])
def test_a_right_solution_in_another_style_gets_full_marks(exercise, style, file, old, new):
    marks = marks_of(exercise, file, old, new)
    assert marks["points"] == marks["out_of"], marks


@pytest.mark.slow
@pytest.mark.parametrize("what,points,note,top,first", HOSTILE, ids=[h[0].replace(" ", "-") for h in HOSTILE])
def test_a_hostile_submission_does_no_harm_and_ends_within_its_limit(tmp_path, what, points, note, top, first):
    prize = tmp_path / "elsewhere" / "prize"
    prize.parent.mkdir()
    prize.write_text("here")
    hostile(tmp_path, top, first, prize)
    started, before = time.time(), sorted(Path(os.getcwd()).iterdir())
    marks = graded(tmp_path, 1, limit=15)["exercises"]["1"]
    assert time.time() - started < 30 and prize.read_text() == "here" and sorted(Path(os.getcwd()).iterdir()) == before
    assert points is None or marks["points"] == points, marks
    assert note is None or any(note in said for said in marks["notes"]), marks
    assert len(json.dumps(marks)) < 30_000


@pytest.mark.slow
def test_an_endless_loop_ends_in_class_too(tmp_path):
    hostile(tmp_path, "while True:\n    pass", "", "")
    status, text = run("-m", "pytest", "--exercise", "1", SALORA_IMPL=str(tmp_path))
    assert status == 4 and "hard_concrete.py does not load: line" in text and "TooLong: not finished after 10 s" in text
    hostile(tmp_path, "", "    while True:\n        pass\n", "")
    status, text = run("-m", "pytest", "--exercise", "1", SALORA_IMPL=str(tmp_path))
    assert status == 2 and ": TooLong: not finished after 10 s: an endless loop?" in text
    assert "exercise 1: 0 of 7" in text and len(text.splitlines()) < 20


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_takes_seconds_in_class(handout, number):
    started = time.time()
    status, text = run("-m", "pytest", "--exercise", str(number), folder=handout)
    of = len(EXERCISES[number].tests())
    assert status == 1 and f"exercise {number}: 0 of {of}" in text and len(text.splitlines()) < 10 + 6 * of
    assert time.time() - started < 30, "on a busy machine; on a quiet core it is less than 10"
