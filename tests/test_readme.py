"""The README's blocks do what they say."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from cli.flags import build_parser

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
PROGRAMS = [block for kind, block in BLOCKS if kind == "python"]
NUMBER = r"\d\.?\d*e-\d+"  # a loss: its last digits are the machine's


def test_the_program_runs_as_it_stands_and_prints_what_follows_it(tmp_path):
    program = PROGRAMS[0]
    expected = BLOCKS[BLOCKS.index(("python", program)) + 1][1]
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.sub(NUMBER, "x", done.stdout) == re.sub(NUMBER, "x", expected)
    losses = re.findall(NUMBER, done.stdout)
    assert len(losses) == 2 and losses[0] == losses[1], "merged, the model is the same"


def test_the_trainer_callback_is_the_one_that_is_tested_and_has_at_most_twenty_lines():
    [callback] = [program for program in PROGRAMS if "TrainerCallback" in program]
    assert callback in (ROOT / "tests" / "trainer_callback.py").read_text(encoding="utf-8")
    lines = callback[callback.index("class ") :].splitlines()
    assert len([line for line in lines if line.strip()]) <= 20


def commands():
    for kind, block in BLOCKS:
        for line in block.splitlines() if kind == "" else []:
            if "train_glue_mini.py" in line:
                words = shlex.split(line, comments=True)
                yield words[words.index("train_glue_mini.py") + 1 :]


@pytest.mark.parametrize("flags", list(commands()), ids=" ".join)
def test_every_command_has_flags_that_exist(flags):
    build_parser().parse_args(flags)


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`([\w/-]+\.(?:py|txt|md|cff))`|\]\((\w[\w/.-]+)\)", TEXT):
        path = next(filter(None, name))
        assert (ROOT / path).exists(), path


def test_it_stays_short():
    text = re.sub(r"^```python\n.*?^```$", "", TEXT, flags=re.M | re.S)
    assert len(text.splitlines()) <= 135, "without the two programs"
