"""Every program in every kind of trouble: it ends with one line and a status, and nothing is in the way of the same
command. Nothing is trained here: what a run measures is made up."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import ROOT
from strategies import row

import train_glue_mini
from cli import table
from cli.flags import build_parser
from cli.table import read_table
from experiments import compare, cost, decoder, figures, ladder, planted_ranks, real, shift, table2

FILES = [path for path in [ROOT / "train_glue_mini.py", *sorted((ROOT / "experiments").glob("*.py"))]
         if "__main__" in path.read_text(encoding="utf-8")]  # fmt: skip
STUDIES = {
    "compare": compare.STUDY,
    "compare on GLUE": compare.ON_GLUE,
    "compare on a shift": compare.ON_SHIFT,
    "decoder": decoder.STUDY,
    "ladder": ladder.STUDY,
    "planted_ranks": planted_ranks.STUDY,
    "real": real.STUDY,
    "shift": shift.STUDY,
    "table2": table2.STUDY,
    **{f"figures {name}": study for name, study in figures.ITEMS.items()},
}
PROGRAMS = [*STUDIES, "cost", "figures fig3", "train_glue_mini"]
every_study = pytest.mark.parametrize("name", STUDIES)
every_program = pytest.mark.parametrize("name", PROGRAMS)


class Measured:
    """In the place of what a study measures: notes its runs, and does what it is told to before a certain one."""

    def __init__(self, study):
        self.study, self.runs, self.trouble = study, [], {}

    def __call__(self, args, task, arm, seed, trial):
        self.runs.append((task, arm.name, seed))
        self.trouble.pop(len(self.runs), lambda: None)()
        score, *others = self.study.columns
        return {score: 0.5, **{column: 1.0 if column in self.study.more else "[1]" for column in others}}


@pytest.fixture
def measured(monkeypatch):
    """measured(study): from here on its runs are made up."""

    def put(study):
        new = Measured(study)
        changes = {"measure": new, "draw": None, "trial_for": lambda *_: (0.01, 1.0)}
        for name, value in changes.items():
            monkeypatch.setitem(vars(study), name, value)
        return new

    return put


@pytest.fixture
def program(measured, monkeypatch, tmp_path, tiny_weights):
    """program(name)(*flags): a run of it with --out in an empty folder, which is the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def start(name, *flags):
        flags = [str(flag) for flag in flags]
        if name in STUDIES:
            study = STUDIES[name]
            needs = [text for flag in study.needs for text in (f"--{flag}", "x")]
            return study.main(["--seeds", "0", "1", "--arms", *study.arms[:2], "--out", "new", *needs, *flags])
        if name == "cost":
            return cost.main(["--out", "new", *flags])
        if name == "figures fig3":
            return figures.main(["fig3", "--out", "new", *flags])
        return train_glue_mini.main(["--weights", str(tiny_weights), "--device", "cpu", "--out", "new", *flags])

    def make(name):
        if name in STUDIES:
            measured(STUDIES[name])
        values = dict.fromkeys(cost.COLUMNS, 1)
        monkeypatch.setattr(cost, "measure", lambda args, shape, n: [{**values, "shape": shape, "batch_size": n}])
        monkeypatch.setattr(train_glue_mini, "prepare", lambda settings: (None, None, None))
        monkeypatch.setattr(train_glue_mini, "run", lambda *_: print("a run") or {})
        return partial(start, name)

    return make


def line_of(capsys, call, status=2):
    """What a program says that ends with this status: one line on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        call()
    error = capsys.readouterr().err
    assert ended.value.code == status and error.strip().count("\n") == 0 and error.endswith("\n"), error
    return error.strip()


PLACES = {  # of --out, and what is said
    "file": "file is a file: choose another --out",
    "file/inside/deep": "file is a file: choose another --out",
    "/dev/null": "/dev/null is a file: choose another --out",
    "/proc/new": "nothing can be written in /proc/new (No such file or directory): choose another --out",
    "x" * 300: "File name too long",
    "": "argument --out: expected a path, got an empty text",
    "a\0b": "null byte",
}


@every_program
def test_a_place_where_nothing_can_be_written_is_refused_before_anything_is_done(name, program, capsys):
    start = program(name)
    with open("file", "w") as file:
        file.write("mine")
    if name in STUDIES:
        vars(STUDIES[name])["measure"].trouble[1] = lambda: pytest.fail("it should not have come so far")
    for place, said in PLACES.items():
        with row(place):
            assert said in line_of(capsys, lambda: start("--out", place))
    assert os.listdir() == ["file"] and open("file").read() == "mine"


NEVER = ["nan", "inf", "-inf", "1e400", "", " ", "x", "0x10", "½", "9" * 5000]  # what no flag takes
NUMBERS = [*NEVER, "1e-400", "-1", "0", "-0.0", "1_0", "٣", *(str(10**exponent) for exponent in (9, 11, 12, 18, 30))]
OF_COST = [["--rounds"], ["--batches"]]


def numeric_flags(name):
    if name in STUDIES:
        return [action.option_strings for action in STUDIES[name].parser()._actions if action.type]
    if name == "train_glue_mini":
        return [action.option_strings for action in build_parser()._actions if action.type]
    return OF_COST if name == "cost" else []


@every_program
def test_an_odd_number_is_refused_in_a_line_and_leaves_nothing_or_is_taken(name, program, capsys):
    start = program(name)
    files = ("--out", "--weights", "--resume", "--evaluate", "--export", "--predict", "--data", "--model")
    for [flag, *_] in numeric_flags(name):
        for number in NUMBERS if flag not in files else []:
            more = {"--grid": ["--tune"], "--window": ["0.5"]}.get(flag, [])
            with row(flag, number):
                try:
                    start(flag, number, *more)
                    assert number not in NEVER
                except SystemExit as ended:
                    error = capsys.readouterr().err
                    assert ended.code == 2 and error.count("\n") == 1 and "error: " in error
                    assert os.listdir() == []
                shutil.rmtree("new", ignore_errors=True)


@every_study
def test_a_study_that_is_interrupted_goes_on_with_the_run_that_it_was_in(name, program, capsys, monkeypatch):
    start = program(name)
    measure, path = vars(STUDIES[name])["measure"], Path(f"new/{STUDIES[name].name}.csv")

    def stop(*_):
        raise KeyboardInterrupt

    def half(file, data):
        file.write(data[: len(data) // 2])
        stop()

    said = "interrupted; the same command goes on with this run"
    measure.trouble = {1: stop, 4: stop}
    assert line_of(capsys, start, 130) == said and os.listdir() == [], "there was nothing to keep"
    assert line_of(capsys, start, 130) == said and len(read_table(path)) == 2
    with monkeypatch.context() as now:
        now.setattr(table, "write_all", half)
        assert line_of(capsys, start, 130) == said and len(read_table(path)) == 2
    start()
    assert len(set(measure.runs)) == len(measure.runs) - 3, "two that were interrupted, and one whose row was"


def closed_pipe():
    """An open file at the end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@every_program
def test_output_that_nobody_reads_or_that_fits_nowhere_is_one_line(name, program, capsys, monkeypatch):
    """Help as well, which is short enough to be written when the program ends."""
    start = program(name)
    for open_output, said in (
        (closed_pipe, "standard output was closed"),
        (lambda: open("/dev/full", "w"), "standard output cannot be written: No space left on device"),
    ):
        for flags in ([], ["--help"]):
            with row(said, flags), open_output() as output, monkeypatch.context() as now:
                now.setattr(sys, "stdout", output)
                assert said in line_of(capsys, lambda: start(*flags))
    start()


@every_study
def test_on_a_full_disk_a_study_keeps_whole_rows_and_later_goes_on(name, program, capsys):
    """A limit on the size of files stands for the disk."""
    start, study = program(name), STUDIES[name]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 30, 150, 250):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            assert "csv cannot be written: File too large" in line_of(capsys, start)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        study.rows_of(Path(f"new/{study.name}.csv"))
    assert len(start()) == 4 * len(study.default_tasks or study.tasks)


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_an_interruption_while_torch_is_imported_prints_nothing(path, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    program = subprocess.Popen([sys.executable, path], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert program.stdout.readline() == "importing\n", program.stderr.read()
    program.send_signal(signal.SIGINT)
    assert (program.wait(timeout=60), program.stderr.read()) == (-signal.SIGINT, "")
