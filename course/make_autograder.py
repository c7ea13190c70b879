"""Make the autograder.zip that Gradescope takes.

    python course/make_autograder.py ../autograder.zip
    python course/make_autograder.py ../autograder.zip --hidden SEED --exercises 1-4

It holds the grader, the reference, and two scripts: setup.sh installs Python's packages, once, and run_autograder
grades a submission and writes results.json. Students see points and failures by exercise.
"""

import os
import shlex
import sys
import zipfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.ending import Parser, ending_in_a_line
from course.exercises import MODULES, ROOT, chosen
from course.variant import run

PACKED = (*MODULES, "course/*.py", "course/checks/*.py", "course/exercises.md", "tests/conftest.py", "requirements.txt")
SETUP = """#!/usr/bin/env bash
set -e
apt-get update
apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install -r /autograder/source/requirements.txt
"""
RUN = """#!/usr/bin/env bash
# AUTOGRADER is where Gradescope mounts everything; set it to try this script elsewhere.
cd "${AUTOGRADER:=/autograder}"
PATH="$AUTOGRADER/venv/bin:$PATH"
mkdir -p results
python3 source/course/grade.py submission --gradescope FLAGS > results/results.json
"""


def make_autograder(out, flags):
    """Write the zip file, with these flags for grade.py. Raises OSError for a path that is taken or leads nowhere."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists: name a new file")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}")
    files = [path for pattern in PACKED for path in sorted(ROOT.glob(pattern))]
    partial = out.with_name(f"{out.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in dict.fromkeys(files):
            packed.write(path, path.relative_to(ROOT))
        for name, text in {"setup.sh": SETUP, "run_autograder": RUN.replace("FLAGS", shlex.join(flags))}.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o755 << 16  # may be executed
            packed.writestr(info, text)
    partial.rename(out)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a zip file that does not exist yet")
    parser.add_argument("--exercises", metavar="1-4", help="default: all")
    parser.add_argument("--hidden", metavar="SEED", help="more tests, with other numbers and shapes; SEED is any word")
    parser.add_argument("--variant", metavar="SEED", help="the SEED of make_handout.py --variant")
    args = parser.parse_args(argv)
    if args.variant is not None:
        return run(args.variant, "make_autograder.py", argv)
    flags = [f"--{name}={value}" for name in ("exercises", "hidden") if (value := getattr(args, name)) is not None]
    with ending_in_a_line("make_autograder.py"):
        if args.exercises:
            chosen(args.exercises)
        make_autograder(args.out, flags)
        print(f"{args.out} is ready for Gradescope.")


if __name__ == "__main__":
    main()
