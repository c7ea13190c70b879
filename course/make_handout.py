"""Make the folder that students get: a copy of the repository in which the exercises are blank.

    python course/make_handout.py ../handout                       all exercises
    python course/make_handout.py ../handout --exercises 1-4       these; all else stays as it is
    python course/make_handout.py ../handout --variant SEED        a variant, which public solutions do not solve

Functions that would give an answer away are blanked, too. course/reference.zip holds the complete files, because the
tests of one exercise need the functions of the others; it is not a secret, and exercises.md says so. The folder appears
once it has been checked: its files import, every exercise is blank, and with the reference put back all tests pass.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.ending import Parser, ending_in_a_line
from course.exercises import EXERCISES, MODULES, NOT_WRITTEN, ROOT, chosen
from course.graft import reference_texts, stubbed
from course.intake import PAGE
from course.variant import copy_of, run, versions_for
from course.written import page

LEFT_OUT = ("answers.md", "teaching.md", "slides.md", "make_handout.py", "make_autograder.py", "hidden.py",
            "variant.py", "versions")  # fmt: skip
README = """# Exercises on SaLoRA

Start with `course/exercises.md`. Set up once, with Python 3.11 or later, then see how far you are:

    pip install -r requirements.txt
    python course/grade.py .FLAGS

You write in `hard_concrete.py`, `salora.py`, `budget.py`, `course/bare_loop.py` and `answers.md`. All other files are
as in the repository that this handout was made from.
"""


def make_handout(out, exercises):
    """Write the handout into a new folder."""
    texts = reference_texts()
    out.mkdir(parents=True)
    flags = f" --exercises {','.join(str(exercise.number) for exercise in exercises)}"
    readme = README.replace("FLAGS", flags if len(exercises) < len(EXERCISES) else "")
    (out / "README.md").write_text(readme, encoding="utf-8")
    (out / PAGE).write_text(page(exercises), encoding="utf-8")
    copy_of(out, LEFT_OUT)
    for file, words in blanks(exercises).items():
        (out / file).write_text(stubbed(texts[file], words), encoding="utf-8")
    with zipfile.ZipFile(out / "course" / "reference.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for file, text in texts.items():
            packed.writestr(zipfile.ZipInfo(file), text)  # ZipInfo: without today's date, so equal bytes every time


def blanks(exercises):
    """{file: {function: what it raises}} of a handout with these exercises."""
    words = {file: {} for file in MODULES}
    for exercise in exercises:
        for file, names in exercise.gives_away.items():
            words[file] |= dict.fromkeys(names, f"left out: it gives away exercise {exercise.number}")
    for exercise in exercises:
        for file, names in exercise.targets.items():
            words[file] |= dict.fromkeys(names, exercise.stub)
    return words


def check_handout(out, exercises):
    """Raises ValueError if the handout does not do what it should."""
    from course import judge  # only here: the processes that answer import this file, and nothing of the judge's

    judge.prepare()
    modules = ", ".join(file.removesuffix(".py").replace("/", ".") for file in MODULES)
    done = subprocess.run([sys.executable, "-B", "-c", f"import {modules}"], cwd=out, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the handout does not import: {done.stderr.strip().splitlines()[-1]}")
    for number, marks in judge.grade(out, exercises)["exercises"].items():
        if marks["notes"] != [NOT_WRITTEN]:
            raise ValueError(f"exercise {number}: it should be blank, but {marks}")
    with tempfile.TemporaryDirectory() as folder:
        for file, text in reference_texts().items():
            (Path(folder) / Path(file).name).write_text(text, encoding="utf-8")
        for number, marks in judge.grade(folder, exercises)["exercises"].items():
            if marks["points"] != marks["out_of"]:
                raise ValueError(f"exercise {number}: the reference should pass, but {marks}")


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--exercises", type=chosen, default=EXERCISES.values(), metavar="1-4", help="default: all")
    parser.add_argument("--variant", metavar="SEED", help="a variant of the course; SEED is any word")
    args = parser.parse_args(argv)
    if os.path.lexists(args.out):
        parser.error(f"{args.out} exists: name a new folder")
    if args.out.resolve().is_relative_to(ROOT):
        parser.error(f"{args.out} lies inside the repository: name a folder outside it")
    if not args.out.parent.is_dir():
        parser.error(f"{args.out}: there is no folder {args.out.parent}")
    if args.variant is not None:
        print(f"Variant {args.variant}: {', '.join(version.new for version in versions_for(args.variant).values())}")
        return run(args.variant, "make_handout.py", argv)
    with ending_in_a_line("make_handout.py"), tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        folder = Path(folder) / args.out.name
        make_handout(folder, args.exercises)
        numbers = ", ".join(str(exercise.number) for exercise in args.exercises)
        print(f"{args.out}: exercises {numbers} are blank. Checking that the reference passes their tests ...")
        check_handout(folder, args.exercises)
        folder.rename(args.out)
        print("The handout is ready.")


if __name__ == "__main__":
    main()
