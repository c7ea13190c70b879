"""The tests themselves: every fault of tools/faults.py is noticed, and the switch and the hints of conftest.py work."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from conftest import EQUATIONS, IMPL, MODULES, ROOT

from tools import faults


@pytest.mark.slow  # not in the default run, where a student who renames something would meet it
def test_every_fault_has_its_place_once_and_its_test_exists():
    faults.check(faults.FAULTS)
    files = {place.split()[0] for place, *_ in faults.FAULTS}
    assert len(set(faults.FAULTS)) == len(faults.FAULTS)
    assert {f"{name}.py" for name in MODULES} <= files, "every file of the core"
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders <= {file.split("/")[0] for file in files}, "and some of every folder"


@pytest.mark.slow
@pytest.mark.skipif(IMPL is not None, reason="the table is about our own files")
def test_every_fault_is_noticed_by_a_test_that_passes_without_it(request):
    by_file = {}
    for *_, test in faults.FAULTS:
        test = faults.test_id(test)
        by_file.setdefault(test.split("::")[0], set()).add(test)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for passed, said in faults.in_processes(faults.tests_pass, [sorted(tests) for tests in by_file.values()]):
            assert passed, said
        assert faults.attempt_all(faults.FAULTS) == []


def test_a_folder_without_any_of_our_files_is_refused(tmp_path, monkeypatch, pytestconfig):
    for folder, lack in ((tmp_path / "nowhere", "is not a folder"), (tmp_path, "holds none of hard_concrete.py, ")):
        monkeypatch.setattr(conftest, "IMPL", folder)
        with pytest.raises(pytest.UsageError, match=f"SALORA_IMPL: {folder} {lack}"):
            conftest.pytest_configure(pytestconfig)


def test_files_in_a_folder_replace_ours_and_a_failed_test_points_to_its_equation(tmp_path):
    text = (ROOT / "hard_concrete.py").read_text(encoding="utf-8")
    (tmp_path / "hard_concrete.py").write_text(text.replace("-0.1, 1.1, 1.0", "-0.1, 1.1, 0.5"), encoding="utf-8")
    test = ["tests/test_hard_concrete.py", "-k", "constants_are_the_papers"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *test]
    environment = {**os.environ, "SALORA_IMPL": os.path.relpath(tmp_path, ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"hard_concrete from {tmp_path / 'hard_concrete.py'}\nsalora from {ROOT / 'salora.py'}\n" in done.stdout
    assert "What this test states" in done.stdout and "hard_concrete.py, Eq. (8): P(g > 0) = " in done.stdout


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
