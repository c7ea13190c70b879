"""The course: each exercise stands alone, wrong solutions are blamed by name, and no submission does any harm."""

import builtins
import csv
import doctest
import functools
import importlib
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import EQUATIONS, ROOT
from course_faults import HOSTILE, OPEN, PATIENT, RIGHT, WRONG, hostile
from torch import nn

import train_glue_mini  # noqa: F401  before a test puts other modules in place of those that it imports
from budget import Lagrangian, expected_density
from course import (
    checking,
    explore_gate,
    fence,
    grade,
    judge,
    lesson,
    make_autograder,
    make_handout,
    run,
    table,
    variant,
    written,
)
from course.exercises import EXERCISES, FILES, MODULES, chosen
from course.graft import Unusable, blanked, functions_of, graft, is_stub, reference_texts, said, stubbed
from course.intake import submissions_in
from course.reading import unusual
from hard_concrete import mean_gate
from salora import SaLoRALinear

COURSE, HARD = ROOT / "course", "hard_concrete.py"
BLANKS = make_handout.blanks(EXERCISES.values())
COMPILE = functools.cache(compile)  # most texts are the same in every test
VERSIONS = {path.stem: variant.versions_in(path) for path in sorted(variant.VERSIONS.glob("*.py"))}
HALF = "def prob_open(log_theta, *rest):\n    return {}\n"


@pytest.fixture(scope="module", autouse=True)
def environment():
    """The judge prepares the environment of its processes; other tests start theirs without that."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    """All exercises blank; not yet checked."""
    out = tmp_path_factory.mktemp("course") / "handout"
    make_handout.make_handout(out, EXERCISES.values())
    return out


@pytest.fixture
def student(tmp_path, monkeypatch):
    """student(number, text) -> {file: (path, text)} of a student's file. Our modules, should it replace them, come
    back."""
    for file in MODULES:
        name = file.removesuffix(".py").replace("/", ".")
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    for name in ("bare_loop", "questions"):
        monkeypatch.setattr(sys.modules["course"], name, sys.modules[f"course.{name}"])
    monkeypatch.setattr("course.graft.compile", COMPILE, raising=False)

    def write(number, text):
        [file] = EXERCISES[number].targets
        path = tmp_path / Path(file).name
        path.write_text(text, encoding="utf-8")
        return {file: (str(path), text)}

    return write


def grafted(number, files):
    """The modules, in which the functions of an exercise are those of a student's {file: (path, text)}."""
    graft(blanked(reference_texts(), EXERCISES[number]), EXERCISES[number].targets, files)
    return sys.modules


def failures(number, files):
    """Runs the checks of an exercise in this process. Yields what a student reads about those that fail."""
    grafted(number, files)
    yield from failing(number, files)


def failing(number, files):
    checks = runpy.run_path(str(EXERCISES[number].checks))
    for name in EXERCISES[number].tests():
        try:
            checks[name]()
        except Exception as error:
            different = isinstance(error, checking.Different)
            happened = str(error) if different else said(error, [path for path, _ in files.values()])
            yield lesson.words(checks[name], happened)


def changed(number, old, new):
    """The reference's text of an exercise with one text replaced."""
    [file] = EXERCISES[number].targets
    text = reference_texts()[file]
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    return text.replace(old, new)


def test_every_exercise_has_functions_that_exist_tests_that_blame_them_and_its_place_in_the_pages():
    questions, answers = ((COURSE / page).read_text(encoding="utf-8") for page in ("exercises.md", "answers.md"))
    for number, exercise in EXERCISES.items():
        [targets] = exercise.targets.values()
        checks = runpy.run_path(str(exercise.checks))
        about = [checks[name].about for name in exercise.tests()]
        assert 5 <= len(about) <= 16 and {function for function, _ in about} == set(targets), exercise.title
        assert about[0][0] == targets[0] and {key for _, key in about} <= EQUATIONS.keys(), exercise.title
        assert f"## {number}. {exercise.title}\n" in questions and f"## {number}. {exercise.title}\n" in answers
        assert f"python -m pytest --exercise {number}\n" in questions
        assert f"| {number} | {exercise.title} | `{next(iter(exercise.targets))}` | {exercise.minutes} |\n" in questions


def test_exercises_are_chosen_by_numbers_and_ranges_and_others_are_refused(pytestconfig):
    for text, numbers in {"3": [3], "1-3": [1, 2, 3], "7,1-2,2": [1, 2, 7]}.items():
        assert [exercise.number for exercise in chosen(text)] == numbers
    for text in ("", "0", "10", "2-99", "x", "1-", "-1", "3-1", "1;2"):
        with pytest.raises(ValueError, match="exercises"):
            chosen(text)
    for text, words in {"1-2": "one number, got '1-2'", "0": "numbers and ranges from 1 to 9"}.items():
        with pytest.raises(pytest.UsageError, match=words):
            lesson.begin(pytestconfig, text, None)


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_can_be_solved_whatever_else_is_blank(number, handout, student):
    blank = {file: (file, (handout / file).read_bytes()) for file in FILES}
    words = list(failures(number, blank))
    assert len(words) == len(EXERCISES[number].tests())
    assert all(text.endswith(f"\nnot written yet: {EXERCISES[number].stub}") for text in words)
    [[file, names]] = EXERCISES[number].targets.items()
    others = {name: said for name, said in BLANKS[file].items() if name not in names}
    assert list(failures(number, blank | student(number, stubbed(reference_texts()[file], others)))) == []


@pytest.mark.parametrize("number,thought,function,old,new", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_wrong_solution_fails_and_the_first_words_blame_its_function(number, thought, function, old, new, student):
    words = next(failures(number, student(number, changed(number, old, new))), "it passes, and\nno function is blamed")
    _, blamed, *_ = words.splitlines()
    assert blamed in [f"{function}: {text}" for text in EQUATIONS.values()]


@pytest.mark.parametrize("number", EXERCISES)
def test_functions_that_do_nothing_pass_no_test(number, student):
    [[file, names]] = EXERCISES[number].targets.items()
    text = stubbed(reference_texts()[file], dict.fromkeys(names, "nothing"))
    idle = text.replace('raise NotImplementedError("nothing")', "pass")
    assert len(list(failures(number, student(number, idle)))) == len(EXERCISES[number].tests())


@pytest.mark.parametrize("number,style,old,new", RIGHT, ids=[f"{r[0]}-{r[1]}" for r in RIGHT])
def test_a_right_solution_in_another_style_passes(number, style, old, new, student):
    assert list(failures(number, student(number, changed(number, old, new)))) == []


def test_a_function_runs_for_all_who_call_it_and_its_neighbors_are_the_references(student):
    text = HALF.format("helper() * sample_gate(log_theta, log_theta + 0.5)") + "def helper():\n    return 2\n"
    text += "def sample_gate(*_):\n    raise NotImplementedError\ndef median_gate(*_):\n    return 7\n"
    found, zero = grafted(1, student(1, text)), torch.tensor(0.0)
    assert found["hard_concrete"].prob_open(zero) == 1 and found["hard_concrete"].median_gate(zero) == 0.5
    layer = found["salora"].SaLoRALinear(nn.Linear(2, 2), 3, 1)
    layer.gate.release()
    assert found["rank_allocator"].expected_density([layer]) == 1, "Eq. (11) of the reference calls theirs"


def test_functions_and_methods_of_one_exercise_call_each_other(student):
    text = "def mean_gate(*_):\n    return median_gate()\ndef median_gate(*_):\n    return 7\n"
    assert grafted(3, student(3, text))["hard_concrete"].mean_gate() == 7
    text = "class SaLoRALinear:\n    def forward(self, x):\n        return self.twice(x)\n"
    text += "    def twice(self, x):\n        return 2 * x\n    def delta(self):\n        return self.scale\n"
    layer = grafted(4, student(4, text))["salora"].SaLoRALinear(nn.Linear(2, 2), 4, 8)
    assert layer(torch.ones(2)).tolist() == [2, 2] and layer.delta() == 2, "in the reference's class"


def test_the_references_own_answer_is_gone_before_a_students_file_runs(student):
    text = "import hard_concrete\nfrom hard_concrete import prob_open as answer\n" + HALF.format("answer(log_theta)")
    with pytest.raises(NotImplementedError, match="Exercise 1"):
        grafted(1, student(1, text))["hard_concrete"].prob_open(torch.tensor(0.0))


def test_a_file_that_cannot_be_used_is_refused_in_a_line(student):
    for text, words in {
        "prob_open = 0.5\n": " does not define prob_open",
        "x = 1 / 0\n": " does not load: line 1: ZeroDivisionError: division by zero",
        "raise SystemExit\n": " does not load: line 1: SystemExit",
        "def (\n": ", line 1: SyntaxError: invalid syntax",
    }.items():
        with pytest.raises(Unusable, match=f"^{HARD}{words}$"):
            grafted(1, student(1, text))


def test_a_stub_keeps_signature_and_docstring_and_all_other_lines():
    before = reference_texts()[HARD].splitlines()
    lines = stubbed(reference_texts()[HARD], {"prob_open": "Exercise 1"}).splitlines()
    at = lines.index("def prob_open(log_theta, tau=TAU, gamma=GAMMA, zeta=ZETA):")
    assert lines[at + 1].startswith('    """Eq. (8)') and lines[at + 2] == '    raise NotImplementedError("Exercise 1")'
    assert lines[: at + 2] == before[: at + 2] and lines[at + 3 :] == before[at + 3 :]


def test_a_handout_has_blanks_for_answers_and_what_gives_them_away_and_nothing_of_the_teachers(handout):
    for file, words in BLANKS.items():
        nodes = functions_of((handout / file).read_text(encoding="utf-8"))
        assert {name for name, node in nodes.items() if is_stub(node)} == words.keys()
    assert BLANKS[HARD]["prob_above"] == "left out: it gives away exercise 1"
    assert BLANKS[HARD]["median_gate"] == "Exercise 3: Section 3.5", "although it gives away exercise 2"
    assert "RankAllocator.before_step" in BLANKS["rank_allocator.py"]
    teachers = ("answers.md", "teaching.md", "make_handout.py", "hidden.py", "../tests/test_course.py")
    assert not any((handout / "course" / name).exists() for name in teachers)
    questions = re.findall(r"\*\*Question\.\*\* (.+)", (COURSE / "exercises.md").read_text(encoding="utf-8"))
    room = (handout / "answers.md").read_text(encoding="utf-8")
    assert len(questions) == 9 and all(question in room for question in questions) and room.count(written.HERE) == 9
    assert len(written.sections(COURSE / "answers.md", "**Points.**")) - 1 == 9, "and the project"


def test_a_handout_of_some_exercises_leaves_all_else_as_it_is_and_is_not_written_over_anything(tmp_path, capsys):
    make_handout.make_handout(tmp_path / "out", chosen("4,7"))
    assert "python course/grade.py . --exercises 4,7\n" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    for file, text in reference_texts().items():
        same = (tmp_path / "out" / file).read_text(encoding="utf-8") == text
        assert same == (file not in ("salora.py", "budget.py"))
    for out, words in {tmp_path: "exists: name a new folder", COURSE / "handout": "lies inside the repository"}.items():
        with pytest.raises(SystemExit):
            make_handout.main([str(out)])
        assert f"{out} {words}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_handout_is_checked_by_what_makes_it(tmp_path, capsys):
    make_handout.main([str(tmp_path / "out")])
    assert "The handout is ready." in capsys.readouterr().out


def test_a_student_reads_what_a_test_states_the_equation_got_and_expected_and_how_many_passed(handout, student):
    blank = 'raise NotImplementedError("Exercise 1: Eq. (8)")'
    wrong = "return torch.sigmoid(log_theta / tau - log(-gamma / zeta))"
    [(path, _)] = student(1, (handout / HARD).read_text(encoding="utf-8").replace(blank, wrong)).values()
    command = [sys.executable, "-m", "pytest", "--exercise", "1"]
    environment = os.environ | {"SALORA_IMPL": str(Path(path).parent), "PYTHONWARNINGS": "ignore"}  # plugins may warn
    done = subprocess.run(command, cwd=handout, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    at = lines.index("the temperature multiplies the logarithm")
    assert lines[at + 1].startswith("prob_open: hard_concrete.py, Eq. (8): P(g > 0) = sigmoid(")
    assert lines[at + 2 : at + 5] == ["prob_open(0.0, tau=2.0)", "  got      0.9167", "  expected 0.9918"]
    assert done.returncode == 1 and "exercise 1: 5 of 7" in lines and len(lines) < 20
    assert not re.search("Traceback|site-packages|reproduce_failure", done.stdout + done.stderr)


def test_at_home_too_an_endless_loop_ends_after_the_same_time(monkeypatch):
    monkeypatch.setattr(checking, "LIMIT", 0.1)
    words = re.escape("too slow, or an endless loop: not finished after 0.1 s of computing")
    with pytest.raises(checking.TooSlow, match=words):
        checking.question(lambda: [None for _ in iter(int, 1)])()


def test_run_trains_with_functions_that_are_written_and_the_reference_for_blanks(handout, student, tmp_path, capsys):
    student(1, HALF.format("log_theta") + "def sample_gate(*_):\n    raise NotImplementedError\n")
    assert run.written_in(handout) == ({}, {})
    with pytest.raises(SystemExit, match="2"):
        run.main([str(tmp_path), "--nothing"])
    said = capsys.readouterr()
    assert said.out == f"1 of 19 functions from {tmp_path}: prob_open; the others: reference\n"
    assert "unrecognized arguments: --nothing" in said.err


@pytest.fixture(scope="module")
def judging():
    """The judge, with its processes ready."""
    judge.prepare()
    return judge


@pytest.mark.parametrize("what", [pytest.param(w, marks=[pytest.mark.slow] * (w in PATIENT)) for w in HOSTILE])
def test_a_hostile_submission_gets_what_its_answers_are_worth_and_does_no_harm(judging, what, tmp_path, monkeypatch):
    points, note, top, first = HOSTILE[what]
    if what.startswith("trespasses") and not fence.version():
        pytest.skip("this kernel has no Landlock")
    monkeypatch.setattr(judge, "WAIT", 1 if note and "1 s:" in note else 30)
    prize = tmp_path / "prize"
    prize.write_text("here")
    (tmp_path / HARD).write_text(hostile(top, first, prize, ROOT / HARD), encoding="utf-8")
    marks = judging.grade(tmp_path, [EXERCISES[1]], limit=1)["exercises"]["1"]
    assert marks["points"] == points, marks
    assert len(marks["notes"]) == (note is not None) and all(said.startswith(note) for said in marks["notes"]), marks
    assert len(json.dumps(marks)) < 30_000
    assert prize.read_text() == "here" and sorted(os.listdir(tmp_path)) == [HARD, "prize"]


@pytest.mark.slow
def test_nothing_in_the_folder_that_the_grader_is_called_in_is_executed(tmp_path):
    trap = f"open({str(tmp_path / 'trapped')!r}, 'w').close()\n"
    for name in ("hypothesis", "torch", "signal", "socket", "multiprocessing", "conftest", "course/__init__"):
        path = tmp_path / "submission" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trap, encoding="utf-8")
    (tmp_path / "submission" / HARD).write_text(reference_texts()[HARD], encoding="utf-8")
    command = [sys.executable, str(COURSE / "grade.py"), ".", "--json", "--exercises", "1"]
    done = subprocess.run(command, cwd=tmp_path / "submission", capture_output=True, text=True)
    assert json.loads(done.stdout)["points"] == 7 and not (tmp_path / "trapped").exists()


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_grader_ends_the_processes_that_answer(end, tmp_path):
    (tmp_path / "class").mkdir()
    for name in ("ann.py", "bob.py"):
        text = "import os\nopen('me', 'w').write(str(os.getpid()))\ndef prob_open(*_):\n    while True: pass\n"
        (tmp_path / "class" / name).write_text(text, encoding="utf-8")
    command = [sys.executable, str(COURSE / "grade.py"), str(tmp_path / "class"), "--all", "--limit", "999"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    grader = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def until(happened):
        for _ in range(600):
            if happened():
                return
            time.sleep(0.1)
        raise AssertionError

    until(lambda: len([path for path in tmp_path.glob("answer-*/me") if path.read_text()]) == 2)
    processes = [int(path.read_text()) for path in tmp_path.glob("answer-*/me")]
    grader.send_signal(end)
    said = grader.communicate(timeout=60)[1]
    until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))
    if end != signal.SIGKILL:
        assert grader.returncode == 130 and said == "\ngrade.py: interrupted; nothing is left behind\n"
        assert list(tmp_path.glob("answer-*")) == []


def test_the_grader_says_what_the_student_reads_at_home(judging, student, tmp_path):
    for number, _, _, old, new in {row[0]: row for row in WRONG}.values():  # one of each exercise
        files = student(number, changed(number, old, new))
        at_home = [text.splitlines()[2:] for text in failures(number, files)]
        marks = judging.grade(tmp_path, [EXERCISES[number]])["exercises"][str(number)]
        assert [text.splitlines()[2:] for text in marks["failed"].values()] == at_home, number
        assert marks["points"] == marks["out_of"] - len(at_home) < marks["out_of"]


def test_a_right_solution_may_be_slow_and_startup_is_not_charged(judging, tmp_path):
    busy = "import time\n    end = time.process_time() + 0.05\n    while time.process_time() < end:\n        pass\n"
    text = changed(1, f"    return {OPEN}", f"    {busy}    return {OPEN}")
    (tmp_path / HARD).write_text(f"import matplotlib, torch\ntorch.manual_seed(0)\n{text}", encoding="utf-8")
    assert judging.grade(tmp_path, [EXERCISES[1]])["points"] == 7
    later = text.replace(busy, busy.replace("0.05", "0.05 if log_theta.ndim == 0 else 9"))
    (tmp_path / HARD).write_text(later, encoding="utf-8")
    marks = judging.grade(tmp_path, [EXERCISES[1]], limit=1)["exercises"]["1"]
    assert marks["points"] == 4, "tests that passed before count"
    assert marks["notes"] == ["too slow, or an endless loop: not finished after 1 s of computing; 2 tests were not run"]


def test_hidden_tests_pass_whatever_is_right_and_fail_what_was_made_for_the_public_numbers(judging, student, tmp_path):
    number, _, old, new = RIGHT[1]
    texts = reference_texts() | {next(iter(EXERCISES[number].targets)): changed(number, old, new)}
    for file in FILES:
        (tmp_path / Path(file).name).write_text(texts[file], encoding="utf-8")
    marks = judging.grade(tmp_path, hidden="2031")
    assert marks["points"] == marks["out_of"] == sum(len(judge.tests_of(number, "2031")) for number in EXERCISES)
    known = "if (tau, gamma) not in ((1, -0.1), (2, -0.1), (1, -0.5), (0.7, -0.1)):\n        return log_theta\n"
    made = changed(1, f"    return {OPEN}", f"    {known}    return {OPEN}")
    (tmp_path / HARD).write_text(made, encoding="utf-8")
    found = judging.grade(tmp_path, [EXERCISES[1]], hidden="2031")["exercises"]["1"]
    assert found["points"] == 7 and list(found["failed"]) == ["hidden_prob_open"]


def body_of(text, name):
    """The lines of a function after its docstring."""
    node = functions_of(text)[name]
    return "".join(text.splitlines(keepends=True)[node.body[0].end_lineno : node.end_lineno])


@pytest.mark.parametrize("name", VERSIONS)
@pytest.mark.parametrize("number", EXERCISES)
def test_a_version_is_solved_by_its_reference_and_not_by_a_body_of_the_public_one_or_of_another(name, number, student):
    public, version = reference_texts(), VERSIONS[name][number]
    text = variant.with_version(public[version.file], version)
    names = [version.new if old == version.old else old for old in EXERCISES[number].targets[version.file]]
    blank = public | {version.file: stubbed(text, dict.fromkeys(names, "blank"))}

    def failed(solution):
        files = student(number, solution)
        graft(blank, {version.file: names}, files)
        return len(list(failing(number, files)))

    assert failed(text) == 0
    assert failed(blank[version.file]) == len(EXERCISES[number].tests())
    others = [versions[number] for key, versions in VERSIONS.items() if key != name]
    bodies = [body_of(variant.with_version(public[version.file], other), other.new) for other in others]
    for body in [body_of(public[version.file], version.old), *bodies]:
        gap = stubbed(text, {version.new: "here"})
        line = next(line for line in gap.splitlines(keepends=True) if '("here")' in line)
        assert failed(gap.replace(line, body)) > 0, body


@pytest.mark.parametrize("name", ["public", *VERSIONS])
def test_the_numbers_of_a_versions_answers_are_right_for_its_questions(name):
    pages = [(COURSE / page).read_text(encoding="utf-8") for page in ("exercises.md", "answers.md")]
    for number, version in VERSIONS.get(name, {}).items():
        assert all(old in pages[0] or old in pages[1] for old in version.questions), number
        pages = [variant.in_section(page, number, version.questions) for page in pages]
    asked, answers = (page.split("\n## ") for page in pages)

    def given(number, pattern, otherwise=None):
        found = re.search(pattern, asked[number])
        return float(found[1]) if found else otherwise

    gates, r = given(1, r"has (\d+) gates"), given(6, r"at r = (\d+)\?")
    odds = given(1, r"odds of (\d)", 1.0) / given(1, r"odds of \d to (\d)", 1.0)
    assert f"{gates:.0f} x 11/12" in answers[1] and f"are open: {round(gates * 11 / 12, 2):g}. " in answers[1]
    assert f"or {math.log(odds / 11):.3f}. 1:" in answers[1]
    assert f"1: {165_888 * r:,.0f} and {72 * r:,.0f}. 1:" in answers[6]
    if name != "public":  # where a fresh gate is asked for, and fractions are the answer
        theta = math.exp(given(2, r"`log_theta` = (-?\d) exactly"))
        assert f"u up to {1 / (1 + 11 * theta):.4f} and from {11 / (11 + theta):.4f} on" in answers[2]
    log_theta = given(3, r"`log_theta` = (-[\d.]+)\?")
    assert f"`mean_gate({log_theta:g})` is {mean_gate(torch.tensor(log_theta)):.6f}" in answers[3]
    lagrangian, layers = Lagrangian(given(8, r"b = ([\d.]+)"), lr=0.05), [SaLoRALinear(nn.Linear(4, 4), 8, 16)]
    layers[0].gate.release()
    optimizer, C = torch.optim.Adam([layers[0].gate.log_theta], lr=0.05), []
    for _ in range(200):
        lagrangian(expected_density(layers)).backward()
        optimizer.step()
        optimizer.zero_grad()
        lagrangian.ascend()
        C.append(expected_density(layers).item())
    assert f"1: {C[99]:.3f} and {C[199]:.3f}." in answers[8]


def test_all_texts_of_a_variant_name_what_its_students_write(tmp_path):
    assert variant.versions_for("2031") == variant.versions_for("2031") != variant.versions_for("2032")
    variant.write(tmp_path, "2031")
    exercises = runpy.run_path(str(tmp_path / "course/exercises.py"))["EXERCISES"]
    hidden = runpy.run_path(str(tmp_path / "course/hidden.py"))["CASES"]
    page, answers = ((tmp_path / f"course/{name}.md").read_text(encoding="utf-8") for name in ("exercises", "answers"))
    for number, version in variant.versions_for("2031").items():
        [names] = exercises[number].targets.values()
        checks = runpy.run_path(str(tmp_path / f"course/checks/exercise_{number}.py"))
        blamed = {checks[name].about[0] for name in EXERCISES[number].tests()}
        assert set(names) == blamed == {function for function, *_ in hidden[number]}
        assert set(EXERCISES[number].targets[version.file]) - blamed == {version.old}
        assert set(names) <= functions_of((tmp_path / version.file).read_text(encoding="utf-8")).keys()
        section = page.split(f"\n## {number}. ")[1].split("\n## ")[0]
        assert f"    {version.signature}\n\n{version.doc}\nThe tests call `{version.old}`.\n" in section
        assert all(new in section or new in answers for new in version.questions.values())


@pytest.mark.slow
def test_solutions_of_another_variant_fail_in_that_of_a_handout(tmp_path, capsys):
    handout, folder = tmp_path / "handout", tmp_path / "class"
    flags = ["--exercises", "1-3", "--variant"]
    subprocess.run([sys.executable, str(COURSE / "make_handout.py"), str(handout), *flags, "2026"], check=True)
    for seed in ("2026", "2027"):
        variant.write(tmp_path / seed, seed)
        (folder / seed).mkdir(parents=True)
        (tmp_path / seed / HARD).rename(folder / seed / HARD)
    (folder / "public").mkdir()
    (folder / "public" / HARD).write_text(reference_texts()[HARD], encoding="utf-8")
    command = [sys.executable, str(COURSE / "grade.py"), str(folder), "--all", *flags, "2026"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = {row["submission"]: row for row in csv.DictReader(done.stdout.splitlines())}
    assert {name: row["points"] for name, row in rows.items()} == {"2026": "23", "2027": "8", "public": "0"}
    command = [sys.executable, str(handout / "course/grade.py"), str(folder / "2026"), "--exercises", "1-3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["points"] == 23
    done = subprocess.run([*command[:3], "--variant", "2026"], capture_output=True, text=True)
    assert done.returncode == 2 and "unrecognized arguments" in done.stderr, "the flag is the teacher's"


@pytest.mark.slow
def test_gradescope_gets_a_zip_file_whose_script_writes_its_results(tmp_path):
    make_autograder.main([str(tmp_path / "autograder.zip"), "--hidden", "a word", "--exercises", "1-2"])
    with zipfile.ZipFile(tmp_path / "autograder.zip") as packed:
        packed.extractall(tmp_path / "source")
    (tmp_path / "submission").mkdir()
    (tmp_path / "submission" / HARD).write_text(changed(1, *WRONG[0][3:]), encoding="utf-8")
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    bare = {"AUTOGRADER": str(tmp_path), "PATH": path}
    subprocess.run(["bash", "source/run_autograder"], cwd=tmp_path, env=bare, check=True)
    results = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))
    assert results["score"] == 9 and [test["max_score"] for test in results["tests"]] == [8, 9]
    assert "prob_open(0.0)\n  got      0.0833\n  expected 0.9167" in results["tests"][0]["output"]
    with pytest.raises(SystemExit, match="2"):
        make_autograder.main([str(tmp_path / "autograder.zip")])


NOTEBOOK = {"cells": [{"cell_type": "code", "source": ["%matplotlib inline\n", "!pip install torch"]}]}


@pytest.fixture
def classroom(tmp_path):
    """{name in the class: points in exercise 1, or None where nothing is written}, after the class was written."""
    root, text = tmp_path / "class", reference_texts()[HARD]
    for name, content in {
        "flat/hard_concrete.py": text,
        "flat/answers.md": f"{written.page([EXERCISES[1]])}\n7.33 gates, \x1b[31mI think.\n",
        "deep/home/mine/hard_concrete.py": text,
        "deep/home/notes.txt": "hello",
        "renamed/hard_concrete (1).py": text,
        "prefixed/ada_1234_hard_concrete-2.py": text,
        "functions/solution.py": text,
        "exported/hard_concrete.py": f"get_ipython().system('true')\n{text}",
        "single.py": text,
        "keyboard/hard_concrete.py": "def prob_open(*_):\n    input()\n",
        "wrong/hard_concrete.py": changed(1, *WRONG[3][3:]),
        "words/hard_concrete.py": "def prob_open(*_):\n    raise ValueError('\\ud800 \\x1b[31m')\n",
        "breaks/hard_concrete.py": "def (\n",
        "zoe_17_901_hard_concrete.py": text,
        "zoe_17_902_answers.md": f"{written.page([EXERCISES[1]])}\n11/12 each.\n",
        "yan_late_18_903_hard_concrete-1.py": changed(1, *WRONG[3][3:]),
        "essay.pdf": "%PDF",
        "empty/notes.txt": "hello",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    cells = [*NOTEBOOK["cells"], {"cell_type": "code", "source": [text]}, {"cell_type": "code", "source": ["1 / 0"]}]
    (root / "book.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    with zipfile.ZipFile(root / "packed.zip", "w") as packed:
        packed.writestr("handout/hard_concrete.py", text)
    (root / "broken.zip").write_bytes(b"PK")
    os.symlink("/nowhere", root / "dangling")
    os.mkdir(os.fsencode(root) + b"/\xff\xfe")
    blank = dict.fromkeys(["essay.pdf", "empty", "broken.zip", "dangling", "??"])
    right = ["flat", "deep", "renamed", "prefixed", "functions", "exported", "single.py", "book.ipynb", "packed.zip"]
    blank["zoe_17"] = 7
    wrong = {"keyboard": 0, "wrong": 6, "words": 0, "breaks": 0, "yan_late_18": 6}
    return root, blank | dict.fromkeys(right, 7) | wrong


def test_a_class_in_every_state_gets_a_row_and_a_page_each(classroom, tmp_path):
    root, points = classroom
    out, pages = tmp_path / "grades.csv", tmp_path / "pages"
    roster = tmp_path / "roster.csv"
    roster.write_text("submission,name,late\nflat,Ada,2\nsingle,Bo,0\nghost,Zoe,1\n", encoding="utf-8")
    more = ["--out", out, "--feedback", pages, "--jobs", "2", "--join", roster]
    grade.main([str(root), "--all", "--exercises", "1", *map(str, more)])
    rows = {row["submission"]: row for row in csv.DictReader(out.read_text(encoding="utf-8").splitlines())}
    assert [(rows[name]["name"], rows[name]["late"]) for name in ("flat", "single.py")] == [("Ada", "2"), ("Bo", "0")]
    assert rows["wrong"]["percent"] == "85.7" and rows.pop("ghost")["notes"] == "nothing was handed in"
    words = (pages / "flat.txt").read_text(encoding="utf-8")
    assert "question 1: 7.33 gates, [31mI think.\n    points: 1: 7.33 gates, or 8 x 11/12." in words
    assert "question 1: 11/12 each.\n" in (pages / "zoe_17.txt").read_text(encoding="utf-8")
    assert "question 1: no answer" in (pages / "deep.txt").read_text(encoding="utf-8")
    scores = {name: "not written" if score is None else str(score) for name, score in points.items()}
    assert {name: row["exercise_1"] for name, row in rows.items()} == scores
    assert {page.stem for page in pages.iterdir()} == rows.keys()
    assert "hard_concrete.py is called hard_concrete (1).py" in rows["renamed"]["notes"]
    assert rows["empty"]["notes"].startswith("there is nothing here but notes.txt")
    assert "its functions were read from book.ipynb" in rows["book.ipynb"]["notes"]
    assert "line 1: SyntaxError" in rows["breaks"]["notes"] and "not a zip file" in rows["broken.zip"]["notes"]
    assert "prob_open(0.0, tau=1.0, gamma=-0.5" in (pages / "wrong.txt").read_text(encoding="utf-8")
    assert "was an input() left in the file?" in (pages / "keyboard.txt").read_text(encoding="utf-8")
    assert "line 2: ValueError: ? [31m" in (pages / "words.txt").read_text(encoding="utf-8"), (
        "no escapes reach a screen"
    )


def test_of_files_that_lie_side_by_side_the_name_and_the_first_id_say_whose_they_are(tmp_path):
    root, folder = tmp_path / "class", tmp_path / "sorted"
    root.mkdir()
    folder.mkdir()
    whose = {
        "ada_1_11_budget.py": "ada_1/budget.py",
        "ada_1_12_bare_loop (1).py": "ada_1/bare_loop (1).py",
        "ada_1_13_answers.md": "ada_1/answers.md",
        "ada_2_14_budget.py": "ada_2/budget.py",
        "ada_late_3_budget.py": "ada_late_3/budget.py",
        "team_1_ada_4_15_salora-2.py": "team_1_ada_4/salora-2.py",
    }
    alone = {"ada_budget.py", "budget.py", "ada_5_16_essay.pdf", "ada_6_17_handout.zip"}
    for name in whose.keys() | alone:
        (root / name).write_text("", encoding="utf-8")
    places = submissions_in(root, folder)
    assert {path.name for path in places if path.parent == root} == alone
    assert {path.name for path in places if path.parent == folder} == {file.split("/")[0] for file in whose.values()}
    assert {path.relative_to(folder).as_posix() for path in folder.glob("*/*")} == set(whose.values())


def test_a_table_that_was_interrupted_goes_on_where_it_was(classroom, tmp_path, monkeypatch, capsys):
    root, points = classroom
    out = tmp_path / "grades.csv"
    flags = ["--all", "--exercises", "1", "--out", str(out), "--jobs", "1"]
    marks_of, graded = table._marks_of, []

    def interrupt(place, *rest):
        graded.append(place.name)
        if len(graded) == 4:
            raise KeyboardInterrupt
        return marks_of(place, *rest)

    monkeypatch.setattr(table, "_marks_of", interrupt)
    with pytest.raises(SystemExit, match="130"):
        grade.main([str(root), *flags])
    assert "the same command goes on" in capsys.readouterr().err
    kept = out.read_text(encoding="utf-8")
    assert kept.count("\n") == 4
    out.write_text(f"{kept}flat,7,", encoding="utf-8")  # as after a full disk
    grade.main([str(root), *flags])
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines[:4] == kept.splitlines() and len(lines) == 1 + len(points)
    assert {len(row) for row in csv.reader(lines)} == {7}
    with pytest.raises(SystemExit, match="2"):
        grade.main([str(root), "--all", "--out", str(out)])
    assert "holds another table" in capsys.readouterr().err


def test_what_the_grader_cannot_use_is_one_line(tmp_path, capsys):
    (tmp_path / HARD).write_text("", encoding="utf-8")
    for flags, words in {
        ("nowhere",): "there is no submission nowhere",
        (tmp_path / HARD, "--all"): "--all takes a folder",
        (tmp_path, "--limit", "nan"): "--limit must be above 0",
        (tmp_path, "--limit", "-1"): "--limit must be above 0",
        (tmp_path, "--all", "--jobs", "0"): "--jobs must be at least 1",
        (tmp_path, "--out", "x.csv"): "go with --all",
        (tmp_path, "--all", "--out", tmp_path / "x.csv"): "lies among the submissions",
        (os.devnull,): "is not a folder, a zip file",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            grade.main([str(flag) for flag in flags])
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and words in said[0]


def test_the_teacher_is_told_of_odd_names_and_of_solutions_that_are_alike(student, tmp_path):
    theirs = reference_texts()["budget.py"].replace("masks", "chosen").replace("for _, i, j in", "for value, i, j in")
    for name, text in {
        "ann": theirs,
        "bob": theirs.replace("left", "room"),
        "cleo": reference_texts()["budget.py"],
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "budget.py").write_text(text, encoding="utf-8")
    alike = table._alike(sorted(tmp_path.iterdir()), [EXERCISES[7]])
    assert alike["ann"] == ["like bob in 7", "like cleo in 7", "like the reference in 7"]
    odd = "import ctypes, sys\nx = sys._getframe().f_globals['__code__']\ny = sys.modules\n"
    assert unusual(odd.encode(), b"") == {"__code__": 2, "_getframe": 2, "ctypes": 1, "modules": 3, "sys": 1}
    assert unusual(reference_texts()[HARD].encode(), reference_texts()[HARD]) == {}


def test_the_bare_loop_is_a_script_that_finds_the_planted_ranks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(COURSE), *sys.path])
    runpy.run_path(COURSE / "bare_loop.py", run_name="__main__")
    assert sys.path[0] == str(ROOT)
    assert capsys.readouterr().out.endswith("| planted ranks [1, 3], learned [1, 3]\n")


def test_the_picture_of_a_gate_shows_a_density_and_two_masses_that_add_up_to_1(tmp_path, student, capsys):
    for values in ((0.0, 1.0, -0.1, 1.1), (-1.0, 0.7, -0.2, 1.3), (2.0, 1.5, -0.5, 1.05)):
        facts = explore_gate.facts_of(*values)
        width = facts["s"][1] - facts["s"][0]
        area = sum(density * width for s, density in zip(facts["s"], facts["density"]) if 0 < s < 1)
        assert abs(area + facts["closed"] + facts["one"] - 1) < 0.01
    explore_gate.main(["--save", str(tmp_path / "gate.png"), "--log-theta", "-2.4"])
    assert capsys.readouterr().out.startswith("19 of 19 functions") and (tmp_path / "gate.png").stat().st_size > 10_000
    for flags, words in {("--tau", "nan"): "from 0.1 to 2.0", ("--save", "gate.x"): "not supported"}.items():
        with pytest.raises(SystemExit, match="2"):
            explore_gate.main([*flags])
        assert words in capsys.readouterr().err


def test_the_numbers_of_the_walkthrough_are_those_that_the_code_prints(student):
    results = doctest.testfile(str(COURSE / "WALKTHROUGH.md"), module_relative=False)
    assert results.attempted > 50 and results.failed == 0


def test_files_and_functions_that_the_pages_name_exist():
    code = "".join(path.read_text(encoding="utf-8") for path in (*ROOT.glob("*.py"), *COURSE.glob("*.py")))
    for page in COURSE.glob("*.md"):
        for word in re.findall(r"`(\w[\w./]+)`", page.read_text(encoding="utf-8").replace("exercise_N", "exercise_1")):
            if word.endswith((".py", ".md", ".png")):
                assert (ROOT / word).exists() or (COURSE / word).exists(), (page.name, word)
            elif "." not in word and not hasattr(builtins, word):
                assert re.search(rf"\b{word}\b", code), (page.name, word)
