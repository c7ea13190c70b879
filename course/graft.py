"""A student's functions with the reference behind every other one.

`stubbed` blanks functions in a file's text. `graft` makes the reference's modules, in which the functions of one
exercise are a student's: their file runs as it stands, so breakpoints and line numbers are theirs, but every name in it
that the reference has too is the reference's, except for the functions of the exercise. So neither a stub nor a mistake
elsewhere in the file matters. The reference's own answer to the exercise is blanked before the student's file runs.
"""

import ast
import sys
import zipfile
from pathlib import Path
from types import ModuleType

from course.exercises import COURSE, MODULES, ROOT

PACKED = COURSE / "reference.zip"  # only in a handout: the reference's text, no secret


class Unusable(Exception):
    """A student's file is missing, does not run, or lacks a function. The text is for the student."""


def reference_texts():
    """{file: text} of the reference: packed in a handout, the repository's own files elsewhere."""
    if not PACKED.exists():
        return {file: (ROOT / file).read_text(encoding="utf-8") for file in MODULES}
    with zipfile.ZipFile(PACKED) as packed:
        return {file: packed.read(file).decode() for file in MODULES}


def place_of(file, folder):
    """The path of one of our files in a student's folder, in its place or at the top; None if it is not there."""
    places = [folder / file, folder / Path(file).name]
    return next((place for place in places if place.is_file()), None)


def functions_of(text):
    """{"name" or "Class.name": ast node} of the functions in a file's text."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def stubbed(text, words):
    """The text with the bodies of the functions in words {name: message} replaced; their docstrings stay."""
    nodes, lines = functions_of(text), text.splitlines(keepends=True)
    for name, message in sorted(words.items(), key=lambda item: -nodes[item[0]].lineno):  # from the last line up
        node = nodes[name]
        first = node.body[0]
        start = first.end_lineno if ast.get_docstring(node) is not None else first.lineno - 1
        indent = " " * first.col_offset
        lines[start : node.end_lineno] = [f'{indent}raise NotImplementedError("{message}")\n']
    return "".join(lines)


def is_stub(node):
    """Whether a function does nothing but raise NotImplementedError."""
    last = node.body[-1]
    short = len(node.body) == (1 if ast.get_docstring(node) is None else 2)
    return short and isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last)


def blanked(texts, exercise):
    """{file: text} of the reference without its answer to an exercise."""
    return texts | {
        file: stubbed(texts[file], dict.fromkeys(names, exercise.stub)) for file, names in exercise.targets.items()
    }


def graft(texts, targets, student):
    """Put the modules of the reference texts {file: text} into sys.modules, with functions from a student's files.

    targets: {file: names of functions}. student: {file: (path, bytes)}, where the path is only for messages and
    debuggers. Raises Unusable if a file of these does not run, or one of the functions is missing.
    """
    for file in texts:
        module = ModuleType(file.removesuffix(".py").replace("/", "."))
        module.__file__ = str(ROOT / file)
        sys.modules[module.__name__] = module
        parent, _, name = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], name, module)
        exec(compile(texts[file], f"reference/{file}", "exec"), vars(module))
        if file in targets:
            _insert(module, file, targets[file], student.get(file))


def _insert(module, file, names, source):
    if source is None:
        raise Unusable(f"there is no {file}")
    path, text = source
    theirs = ModuleType(module.__name__)
    theirs.__file__ = path
    try:
        exec(compile(text, path, "exec"), vars(theirs))
    except SyntaxError as error:
        line = "" if error.lineno is None else f", line {error.lineno}"
        raise Unusable(f"{file}{line}: {type(error).__name__}: {error.msg}") from None
    except BaseException as error:
        raise Unusable(f"{file} does not load: {said(error, [path])}") from None
    own = dict(vars(theirs))
    for key, value in vars(module).items():  # their own helpers stay, and the reference stands behind all else
        if not key.startswith("__"):
            setattr(theirs, key, value)
    for name in names:
        kind, _, method = name.rpartition(".")
        holder = own if not kind else vars(own[kind]) if isinstance(own.get(kind), type) else {}
        if not callable(holder.get(method)):
            raise Unusable(f"{file} does not define {name}")
        if not kind:
            setattr(module, name, own[name])
            setattr(theirs, name, own[name])
            continue
        ours = getattr(module, kind)
        for key, value in holder.items():
            if key == method or not hasattr(ours, key):  # and the helpers that they gave the class
                setattr(ours, key, value)


LEFT_OVER = {"EOFError": "an input()", "BdbQuit": "a breakpoint()"}  # what raises these where there is no keyboard


def said(error, paths):
    """One line about an exception: its type, its words, and the last line of the student's files that it passed."""
    if isinstance(error, NotImplementedError) and str(error).startswith("Exercise "):
        return f"not written yet: {error}"
    trace, line = error.__traceback__, None
    while trace:
        if trace.tb_frame.f_code.co_filename in paths:
            line = trace.tb_lineno
        trace = trace.tb_next
    kind, words = type(error).__name__, next(iter(str(error).splitlines()), "")[:300]
    if kind in LEFT_OVER:
        words = f"there is no keyboard here: was {LEFT_OVER[kind]} left in the file?"
    where = "" if line is None else f"line {line}: "
    return f"{where}{kind}{': ' if words else ''}{words}"


def is_written(text, names):
    """Whether a file's text has one of these functions and its body is not the handout's. A broken file counts."""
    try:
        nodes = functions_of(text)
    except SyntaxError:
        return True
    return any(name in nodes and not is_stub(nodes[name]) for name in names)
