"""Run the main job with a student's functions, and with the reference wherever they have not written theirs yet.

    python course/run.py FOLDER [flags of train_glue_mini.py]         in a handout: python course/run.py .

The first line says whose functions run. `mine()` does the same for a Python session. Both execute the student's files
as they are: to grade, use grade.py instead.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.ending import Parser, ending_in_a_line
from course.exercises import EXERCISES, FILES, ROOT
from course.graft import Unusable, functions_of, graft, is_stub, place_of, reference_texts


def mine(folder=ROOT):
    """From here on, imports give the functions that are written in a folder, and the reference's for all others.

    Call it before anything of the repository is imported. Returns a line that says whose functions these are. Raises
    Unusable for a file that does not load.
    """
    student, written = written_in(Path(folder))
    graft(reference_texts(), written, student)
    names = [name for names in written.values() for name in names]
    every = sum(len(names) for exercise in EXERCISES.values() for names in exercise.targets.values())
    return f"{len(names)} of {every} functions from {folder}: {', '.join(names) or 'none'}; the others: reference"


def written_in(folder):
    """({file: (path, text)}, {file: functions}) of the exercises' functions that are written in a folder.

    Raises Unusable for a file that is not Python.
    """
    student, written = {}, {}
    for file in FILES:
        place = place_of(file, folder)
        if place is None:
            continue
        text = place.read_bytes()
        try:
            nodes = functions_of(text)
        except SyntaxError as error:
            raise Unusable(f"{file}, line {error.lineno}: {error.msg}") from None
        asked = [name for exercise in EXERCISES.values() for name in exercise.targets.get(file, ())]
        names = [name for name in asked if name in nodes and not is_stub(nodes[name])]
        if names:
            student[file], written[file] = (str(place), text), names
    return student, written


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="with a student's files; all flags go to train_glue_mini.py")
    args, flags = parser.parse_known_args(argv)
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}")
    with ending_in_a_line("run.py"):
        try:
            print(mine(args.folder.resolve()), flush=True)
        except Unusable as error:
            parser.error(str(error))
        import train_glue_mini  # only now: it imports what `mine` has put into place

        return train_glue_mini.main(flags)


if __name__ == "__main__":
    main()
