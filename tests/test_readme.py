"""The README's blocks do what they say."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from cli.flags import build_parser

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
TO_COPY = ["hard_concrete.py", "salora.py", "budget.py", "rank_allocator.py", "guard.py"]


def test_the_program_runs_beside_the_five_files_alone_and_prints_what_it_says(tmp_path):
    [program] = [block for kind, block in BLOCKS if kind == "python" and "RankAllocator" in block]
    expected = re.findall(r"^print\(.*\)  # (.*)$", program, re.M)
    assert all(f"`{name}`" in TEXT for name in TO_COPY) and len(expected) == 2
    for name in TO_COPY:
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "program.py").write_text(program)
    code = "import runpy, sys; sys.path.insert(0, '.'); runpy.run_path('program.py')"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected


def commands():
    for kind, block in BLOCKS:
        for line in block.splitlines() if kind == "" else []:
            if "train_glue_mini.py" in line:
                words = shlex.split(line, comments=True)
                yield words[words.index("train_glue_mini.py") + 1 :]


@pytest.mark.parametrize("flags", list(commands()), ids=" ".join)
def test_every_command_has_flags_that_exist(flags):
    build_parser().parse_args(flags)


@pytest.mark.parametrize("page", ["README.md", "hub/README.md"])
def test_every_file_that_is_named_is_there(page):
    page = ROOT / page
    for name in re.findall(r"`([\w/-]+\.(?:py|txt|md|cff))`|\]\((\w[\w/.-]+)\)", page.read_text(encoding="utf-8")):
        path = next(filter(None, name))
        assert (page.parent / path).exists() or (ROOT / path).exists(), path


def test_it_stays_short():
    assert len(TEXT.splitlines()) <= 126
