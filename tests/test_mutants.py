"""The tests themselves: each fault of the table in mutants.py is noticed, and the switch and the hints work."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from conftest import EQUATIONS, IMPL, MODULES, ROOT

NAMES = [f"{i:03}-{file.removesuffix('.py')}" for i, (file, *_) in enumerate(mutants.MUTANTS)]


@pytest.mark.slow  # not in the default run, where a student who renames something would meet it
def test_every_fault_has_its_place_once_and_its_test_exists():
    for file, old, new, test in mutants.MUTANTS:
        mutants.check(file, old, new)
        path, name = test.split("::")
        assert f"def {name.split('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8"), test
    assert len(set(mutants.MUTANTS)) == len(mutants.MUTANTS) >= 150
    files = {file for file, *_ in mutants.MUTANTS}
    assert {f"{name}.py" for name in MODULES} <= files, "every core file, and something in every folder"
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= {file.split("/")[0] for file in files}


@pytest.fixture(scope="module")
def killed(request):
    """(status and output of all named tests on the files as they are, results of the table); prints the table."""
    if IMPL:
        pytest.skip("the table is about our own files")
    [unchanged] = mutants.in_processes(mutants.run_tests, [sorted({test for *_, test in mutants.MUTANTS})])
    results = []
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for mutant, result in zip(mutants.MUTANTS, mutants.in_processes(mutants.kill, mutants.MUTANTS), strict=True):
            results.append(result)
            print(mutants.line_of(mutant, result[0]), flush=True)
    return unchanged, results


@pytest.mark.slow
def test_the_tests_that_notice_faults_pass_without_them(killed):
    status, said = killed[0]
    assert status == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(NAMES)), ids=NAMES)
def test_fault_is_noticed(killed, i):
    noticed, said = killed[1][i]
    assert noticed, f"{mutants.line_of(mutants.MUTANTS[i], False)}\n{said}"


def run_pytest(folder, *tests):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "SALORA_IMPL": str(folder)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_folder_without_any_of_our_files_is_refused(tmp_path):
    for folder, lack in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "holds none of hard_concrete.py, ")):
        done = run_pytest(folder, "tests/test_hard_concrete.py")
        assert done.returncode == 4 and f"ERROR: SALORA_IMPL: {folder} {lack}" in done.stderr, done.stderr


def test_files_in_a_folder_replace_ours_and_a_failed_test_points_to_its_equation(tmp_path):
    text = (ROOT / "hard_concrete.py").read_text(encoding="utf-8")
    (tmp_path / "hard_concrete.py").write_text(text.replace("-0.1, 1.1, 1.0", "-0.1, 1.1, 0.5"), encoding="utf-8")
    done = run_pytest(os.path.relpath(tmp_path, ROOT), "tests/test_hard_concrete.py::test_constants_are_the_papers")
    assert done.returncode == 1
    assert f"hard_concrete from {tmp_path / 'hard_concrete.py'}\nsalora from {ROOT / 'salora.py'}\n" in done.stdout
    assert "What this test states" in done.stdout and "hard_concrete.py, Eq. (7): g = " in done.stdout


def keys_of_tests(file):
    """{test: the keys of its equation marker, or else of its module's}, for the tests of one file."""
    module = importlib.import_module(file)
    shared = getattr(module, "pytestmark", [])
    shared = shared if isinstance(shared, list) else [shared]
    found = {}
    for name, test in vars(module).items():
        if name.startswith("test_"):
            own = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "equation"]
            nearest = own or [mark for mark in shared if mark.name == "equation"]
            found[name] = [key for mark in nearest for key in mark.args]
    return found


def test_every_test_of_the_mathematics_points_to_an_equation_and_every_equation_has_a_test():
    files = {path.stem: keys_of_tests(path.stem) for path in Path(__file__).parent.glob("test_*.py")}
    for file in ("test_hard_concrete", "test_salora", "test_budget"):
        assert files[file] and [test for test, keys in files[file].items() if not keys] == []
    assert {key for tests in files.values() for keys in tests.values() for key in keys} == set(EQUATIONS)
