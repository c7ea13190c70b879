"""What a student has handed in: a folder, a zip file, a .py file or a notebook, as learning systems deliver them.

Nothing is unpacked or run here. The files that students write in are found by their names, wherever they lie and
whatever a download has added, as in "hard_concrete (1).py"; functions in files of other names are found by theirs.
Whatever was not where it should be is noted.
"""

import ast
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from course.exercises import EXERCISES, FILES
from course.graft import functions_of

LARGEST = 2**20  # bytes of a file
MOST = 2000  # files in a submission; a handout has about 150
KINDS = (".py", ".ipynb", ".zip")  # of a submission that is not a folder
READ = (".py", ".ipynb", ".md")
PAGE = "answers.md"
MAGIC = re.compile(rb"(?m)^([ \t]*)[%!?].*$")  # what only notebooks understand
SHELL = re.compile(rb"(?m)^([ \t]*)get_ipython\(\).*$")  # the same, once a notebook is exported
KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)  # of a notebook


class Unreadable(Exception):
    """What stands in the way of reading a file, for the student."""


def submissions_in(root, folder):
    """The paths of a class's submissions, sorted by their names.

    Files that lie in root beside those of other students are copied into `folder`, where each student gets a folder.
    """
    places = set()
    for place in sorted(root.iterdir()):
        student, name = _student_and_file(place.name)
        if student and not place.is_symlink() and place.is_file() and place.stat().st_size <= LARGEST:
            (folder / student).mkdir(exist_ok=True)
            shutil.copyfile(place, folder / student / name)
            place = folder / student
        if not place.name.startswith((".", "__")):
            places.add(place)
    return sorted(places, key=lambda place: place.name)


def _student_and_file(name):
    """("name_id", "budget.py") of name_id_budget.py or, by Canvas, name_id_id_budget.py; of others (None, name)."""
    for file in (*FILES, PAGE):
        if _called(name, file):
            start = name.rindex(Path(file).stem)
            numbered = re.fullmatch(r"(.+?_\d+)(_\d+)?_", name[:start])
            if numbered:
                return numbered[1], name[start:]
    return None, name


def collect(place):
    """({file: (name, text)} of the files that students write in, notes for the student)."""
    found, notes = _listed(Path(place))
    student = {}
    for file in FILES:
        names = sorted((name for name in found if _called(name, file)), key=lambda name: _rank(name, file))
        if names:
            _take(student, notes, file, found, names[0])
            if Path(names[0]).name != Path(file).name:
                notes.append(f"{file} is called {printable(names[0])}")
    for name in sorted(found):
        if not name.endswith(".md") and not any(_called(name, file) for file in FILES):
            for file in FILES:
                if file not in student and _defines(found[name], file):
                    _take(student, notes, file, found, name)
                    notes.append(f"{file} is missing: its functions were read from {printable(name)}")
    if not student and not notes:
        notes.append(f"none of {', '.join(FILES)} is here, and no function of theirs")
    return student, list(dict.fromkeys(notes))


def answers_in(place):
    """The text of the page with answers to the questions, or "" without one."""
    found, _ = _listed(Path(place))
    names = sorted((name for name in found if _called(name, PAGE)), key=lambda name: _rank(name, PAGE))
    try:
        return printable(found[names[0]]().decode("utf-8", "replace")) if names else ""
    except Unreadable:
        return ""


def _take(student, notes, file, found, name):
    try:
        student[file] = (file, source_of(name, found[name]()))
    except Unreadable as error:
        notes.append(f"{printable(name)} {error}, and was not read")


def _called(name, file):
    """Whether this is the file, perhaps renamed by a browser or a learning system."""
    stem, kind = re.escape(Path(file).stem), "md" if file.endswith(".md") else "py|ipynb"
    return re.fullmatch(rf"(.*_)?{stem}(\s*\(\d+\)|[ _-]\d+|[ _-]copy)?\.({kind})", Path(name).name) is not None


def _rank(name, file):
    """The file in its own place comes first, then those nearest to the top."""
    return name != file, Path(name).name != Path(file).name, name.count("/"), name


def _defines(read, file):
    try:
        names = functions_of(source_of(read.name, read()))
    except (Unreadable, SyntaxError, ValueError, RecursionError):
        return False
    return any(name in names for exercise in EXERCISES.values() for name in exercise.targets.get(file, ()))


class Reader:
    """A file that is read when this is called. Raises Unreadable."""

    def __init__(self, name, size, read, why_not=None):
        self.name, self.size, self.read, self.why_not = name, size, read, why_not

    def __call__(self):
        if self.why_not:
            raise Unreadable(self.why_not)
        if self.size > LARGEST:
            raise Unreadable(f"has more than {LARGEST} bytes")
        try:
            return self.read()
        except (OSError, RuntimeError, zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            raise Unreadable(f"cannot be read ({error})") from None


def _listed(place):
    """({name: Reader} of the Python files and notebooks in a submission, notes)."""
    if not os.path.lexists(place):
        raise FileNotFoundError(f"there is no submission {printable(place)}")
    if place.is_symlink():
        return {}, [f"{printable(place.name)} is a link, and was not followed"]
    if place.is_dir():
        return _listed_folder(place)
    if place.suffix == ".zip":
        return _listed_zip(place)
    why_not = None if place.is_file() else "is not a file"
    return {place.name: Reader(place.name, place.stat().st_size, place.read_bytes, why_not)}, []


def _listed_folder(root):
    found, notes, others, seen = {}, [], [], 0
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith((".", "__")))
        for name in sorted(files):
            seen += 1
            path = Path(folder, name)
            if seen > MOST:
                return found, [*notes, f"more than {MOST} files: the rest was not looked at"]
            if path.suffix == ".zip" and path.name != "reference.zip" and not path.is_symlink():
                inside, more = _listed_zip(path)
                found |= {f"{path.name}/{key}": reader for key, reader in inside.items()}
                notes += more
            if path.suffix in READ:
                why_not = None if path.is_file() and not path.is_symlink() else "is a link or not a file"
                size = path.lstat().st_size
                found[path.relative_to(root).as_posix()] = Reader(name, size, path.read_bytes, why_not)
            others.append(name)
    return found, notes if found else [*notes, _only(others)]


def _listed_zip(path):
    try:
        packed = zipfile.ZipFile(path)
        infos = [info for info in packed.infolist() if info.filename.endswith(READ)][:MOST]
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        return {}, [f"{printable(path.name)} is not a zip file that can be read ({error})"]
    found = {}
    for info in infos:
        if not info.filename.startswith(("__", ".")):
            read = lambda info=info: packed.open(info).read(LARGEST + 1)[:LARGEST]  # noqa: E731
            found[info.filename] = Reader(info.filename, info.file_size, read)
    return found, [] if found else [_only(packed.namelist())]


def _only(names):
    """What is said about a submission in which there is nothing to read."""
    named = ", ".join(printable(name) for name in names[:5])
    return f"there is nothing here but {named}{' ...' if len(names) > 5 else ''}" if names else "it is empty"


def source_of(name, text):
    """The Python in a file. Of a notebook: its imports, definitions and assignments, not what tries them out."""
    if not name.endswith(".ipynb"):
        return _python(text)
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        code = b"\n\n".join(_python("".join(cell["source"]).encode()) for cell in cells)
        tree = ast.parse(code)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError) as error:
        raise Unreadable(f"is not a notebook that can be read ({type(error).__name__}: {error})") from None
    tree.body = [node for node in tree.body if isinstance(node, KEPT)]
    return ast.unparse(tree).encode()


def _python(text):
    """Without the commands to a notebook, if there are any."""
    text = SHELL.sub(rb"\1pass", text)
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return MAGIC.sub(rb"\1pass", text)
    return text


def printable(text):
    """One text for a terminal, a table or a page: valid UTF-8, without control characters but line breaks."""
    text = os.fsencode(str(text)) if isinstance(text, Path) else str(text).encode("utf-8", "replace")
    return "".join(c for c in text.decode("utf-8", "replace") if c == "\n" or c.isprintable())
