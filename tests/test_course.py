"""The course: each exercise stands alone, wrong solutions are blamed by name, and no submission does any harm."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import course_faults
import pytest
from conftest import EQUATIONS, ROOT
from course_faults import HOSTILE, RIGHT, WRONG, hostile, marks_of

from course import grade as grader
from course import make_handout
from course.exercises import EXERCISES, FILES, chosen
from course.graft import functions_of, is_stub, reference_texts, stubbed


def graded(folder, *numbers, limit=60):
    return grader.grade(folder, [EXERCISES[number] for number in numbers or EXERCISES], limit)


def run(*command, folder=ROOT, **environment):
    """A command with its output: (exit status, text, seconds)."""
    started = time.time()
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, time.time() - started


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


@pytest.mark.parametrize("text,numbers", [("3", [3]), ("1-3", [1, 2, 3]), ("7,1-2,2", [1, 2, 7])])
def test_exercises_are_chosen_by_numbers_and_ranges(text, numbers):
    assert [exercise.number for exercise in chosen(text)] == numbers


@pytest.mark.parametrize("text", ["", "0", "10", "2-99", "x", "1-", "-1", "3-1", "1;2"])
def test_what_is_no_exercise_is_refused(text):
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


# In class: python -m pytest --exercise N


def test_a_student_reads_what_a_test_states_the_equation_got_and_expected_and_how_many_passed(handout, tmp_path):
    course_faults.write(tmp_path, *WRONG[2][3:])
    status, text, _ = run("-m", "pytest", "--exercise", "1", folder=handout, SALORA_IMPL=str(tmp_path))
    lines = text.splitlines()
    at = lines.index("the temperature multiplies the logarithm")
    assert lines[at + 1].startswith("prob_open: hard_concrete.py, Eq. (8): P(g > 0) = sigmoid(")
    assert lines[at + 2 : at + 5] == ["prob_open(0.0, tau=2.0)", "  got      0.9167", "  expected 0.9918"]
    assert status == 1 and "exercise 1: 5 of 7" in lines and len(lines) < 20
    assert "Traceback" not in text and "site-packages" not in text and "reproduce_failure" not in text


def test_one_function_is_tested_alone_while_all_others_are_still_blank(handout, tmp_path):
    """The handout lacks prob_above, so the answer must do without it; prob_open's tests call sample_gate, a blank."""
    text = (handout / "hard_concrete.py").read_text(encoding="utf-8")
    answer = "return torch.sigmoid(log_theta - tau * log(-gamma / zeta))"
    blank = 'raise NotImplementedError("Exercise 1: Eq. (8)")'
    (tmp_path / "hard_concrete.py").write_text(text.replace(blank, answer), encoding="utf-8")
    status, said, seconds = run("-m", "pytest", "--exercise", "1", folder=handout, SALORA_IMPL=str(tmp_path))
    assert status == 0 and "exercise 1: 7 of 7" in said, said


@pytest.mark.parametrize("name", ["0", "10", "x", "1-2"])
def test_a_number_without_an_exercise_is_refused_in_one_line(pytestconfig, name):
    from course.lesson import begin

    with pytest.raises(pytest.UsageError, match=f"one number from 1 to 9, got '{name}'"):
        begin(pytestconfig, name, None)


# Grades: what needs one process each, and is quick


def test_wrong_and_right_and_hostile_solutions_are_graded_as_what_they_are(tmp_path):
    """One of each kind; the whole tables are in the slow tests."""
    marks = marks_of(1, *WRONG[0][3:])
    assert marks["points"] == 0 and marks["out_of"] == 7
    assert marks_of(2, *RIGHT[1][2:])["points"] == 8
    prize = tmp_path / "prize"
    prize.write_text("here")
    hostile(tmp_path, "import os\nos.remove(PRIZE)", "", prize)
    marks = graded(tmp_path, 1)
    assert marks["points"] == 0 and prize.read_text() == "here"
    assert f"refused: os.remove: {prize}" in marks["exercises"]["1"]["notes"]


def test_without_a_file_or_with_a_link_there_is_nothing_to_grade(tmp_path):
    (tmp_path / "hard_concrete.py").symlink_to(ROOT / "hard_concrete.py")
    marks = graded(tmp_path, 1)
    assert marks["points"] == 0 and marks["notes"] == ["hard_concrete.py is a link or not a file, and was not read"]
    assert marks["exercises"]["1"]["notes"] == ["there is no hard_concrete.py"]


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


def test_marks_come_as_json(tmp_path, capsys):
    course_faults.write(tmp_path, *WRONG[3][3:])
    grader.main([str(tmp_path), "--json", "--exercises", "1"])
    marks = json.loads(capsys.readouterr().out)
    assert (marks["points"], marks["out_of"], marks["exercises"]["1"]["points"]) == (6, 7, 6)


def test_a_report_that_is_not_signed_with_the_key_does_not_count(tmp_path):
    from course.judge import signature

    report, key = tmp_path / "report", b"key"
    facts = [json.dumps({"test": "test_x", "passed": True}), json.dumps({"end": True, "refused": [], "changed": []})]
    report.write_text("".join(f"{signature(b'other', fact)} {fact}\n" for fact in facts) + "garbage\n")
    assert grader._signed(report, key) == []
    report.write_text("".join(f"{signature(key, fact)} {fact}\n" for fact in facts))
    assert [fact.get("test") for fact in grader._signed(report, key)] == ["test_x", None]


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
    marks = graded(tmp_path, 1, limit=20)["exercises"]["1"]
    assert time.time() - started < 30 and prize.read_text() == "here" and sorted(Path(os.getcwd()).iterdir()) == before
    assert points is None or marks["points"] == points, marks
    assert note is None or any(note in said for said in marks["notes"]), marks
    assert len(json.dumps(marks)) < 30_000


@pytest.mark.slow
@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_takes_seconds_in_class(handout, number):
    status, text, seconds = run("-m", "pytest", "--exercise", str(number), folder=handout)
    of = len(EXERCISES[number].tests())
    assert status == 1 and f"exercise {number}: 0 of {of}" in text and len(text.splitlines()) < 10 + 6 * of
    print(f"exercise {number}: {seconds:.1f} s")
