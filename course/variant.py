"""A variant of the course, whose exercises the public solutions, or those of another variant, do not solve.

    python course/make_handout.py ../handout --variant SEED
    python course/grade.py ../submissions --all --variant SEED

SEED is any word. For each exercise it chooses one of the files in course/versions. There one function of the exercise
calls another, which is what students write: not P(g > 0), for instance, but P(g = 0). All that this changes is text:
the function in the reference, its name in course/exercises.py, the checks and the hidden tests, and a paragraph in
exercises.md; and the numbers of some questions, with their answers. The program then runs in a temporary copy of the
repository that has these texts.
"""

import argparse
import ast
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from course.ending import ending_in_a_line
from course.exercises import COURSE, EXERCISES, ROOT
from course.graft import functions_of

VERSIONS = COURSE / "versions"
COPIED = ("*.txt", "*.toml", "*.py", "LICENSE", "assets", "cli", "course", "experiments", "glue", "hub", "peers",
          "tests/conftest.py")  # fmt: skip
PARAGRAPH = """**In this version of the course,** `{old}` is written already.
It calls a function that you write instead:

    {signature}

{doc}
The tests call `{old}`.

"""


@dataclass(frozen=True)
class Version:
    """Of one exercise: students write the function `new`, and `old`, which the public course asks for, calls it."""

    new: str
    old: str
    file: str  # of the reference
    text: str  # of both functions
    signature: str  # of `new`
    doc: str
    questions: dict  # {text of exercises.md or answers.md: what stands there instead}


def copy_of(folder, left_out=()):
    """Copy what the course needs into a folder, without files and folders of these names."""
    ignored = shutil.ignore_patterns(*left_out, ".*", "__pycache__")
    for source in [path for pattern in COPIED for path in ROOT.glob(pattern)]:
        copy = folder / source.relative_to(ROOT)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=ignored)
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)


def versions_in(path):
    """{number: Version} of the exercises in a file of course/versions."""
    text, found = path.read_text(encoding="utf-8"), {}
    nodes, questions = functions_of(text), ast.literal_eval(ast.parse(text).body[-1].value)
    names = list(nodes)
    for new, old in zip(names[::2], names[1::2]):
        node = nodes[new]
        lines = text.splitlines(keepends=True)[first_line(node) : nodes[old].end_lineno]
        signature, doc = f"def {node.name}({ast.unparse(node.args)}):", ast.get_docstring(node)
        for number, exercise in EXERCISES.items():
            for file, targets in exercise.targets.items():
                if old in targets:
                    more = signature, doc, questions.get(number, {})
                    found[number] = Version(new, old, file, "".join(lines), *more)
    return found


def first_line(node):
    """The index of the line in which a function begins, with its decorators."""
    return min(part.lineno for part in [node, *node.decorator_list]) - 1


def versions_for(seed):
    """{number: Version} of a variant."""
    choice, files = random.Random(seed), sorted(VERSIONS.glob("*.py"))
    return {number: versions_in(choice.choice(files))[number] for number in EXERCISES}


def with_version(text, version):
    """The text of a file of the reference in which the old function calls the new one."""
    node, lines = functions_of(text)[version.old], text.splitlines(keepends=True)
    lines[first_line(node) : node.end_lineno] = [version.text]
    return "".join(lines)


def blaming(text, version):
    """The text of checks in which failed tests blame the new function. Names in calls of questions stay."""
    return re.sub(rf'"{re.escape(version.old)}"(?=, "|\n)', f'"{version.new}"', text)


def in_section(text, number, exchanged):
    """The text of a page in whose section about an exercise texts were exchanged {old: new}."""
    head, start, rest = text.partition(f"\n## {number}. ")
    section, end, tail = rest.partition("\n## ")
    for old, new in exchanged.items():
        section = section.replace(old, new)
    return "".join((head, start, section, end, tail))


def explained(text, number, version):
    """The text of exercises.md with a paragraph about the new function, before how to run the exercise's tests."""
    paragraph = PARAGRAPH.format(old=version.old, signature=version.signature, doc=version.doc)
    command = f"    python -m pytest --exercise {number}\n"
    return in_section(text, number, version.questions | {command: paragraph + command})


def write(folder, seed):
    """Write a variant of the repository's course, with the teacher's part, into a folder."""
    copy_of(folder)

    def change(file, function, *args):
        path = folder / file
        path.write_text(function(path.read_text(encoding="utf-8"), *args), encoding="utf-8")

    for number, version in versions_for(seed).items():
        change(version.file, with_version, version)
        change("course/exercises.py", str.replace, f'"{version.old}"', f'"{version.new}"')
        change(f"course/checks/exercise_{number}.py", blaming, version)
        change("course/hidden.py", blaming, version)
        change("course/exercises.md", explained, number, version)
        change("course/answers.md", in_section, number, version.questions)


def run(seed, program, argv):
    """Run one of the course's programs in a variant, with the flags argv but for --variant, and end if it fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--variant")
    flags = parser.parse_known_args(argv)[1]
    with tempfile.TemporaryDirectory(prefix="variant-") as folder:
        with ending_in_a_line(program):
            write(Path(folder), seed)
        process = subprocess.Popen([sys.executable, str(Path(folder) / "course" / program), *flags])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches that program, too, which then ends by itself
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        status = process.wait()
    if status:
        sys.exit(status)
