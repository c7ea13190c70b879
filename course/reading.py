"""What a teacher should look at: names that an honest solution has no use for, and solutions that are nearly the same.

Nothing runs here; submissions are read as text. A name is a reason to open the file, not a verdict.
"""

import ast
import re
from difflib import SequenceMatcher
from itertools import combinations

from course.exercises import EXERCISES
from course.graft import functions_of

MODULES = """asyncio builtins code codecs concurrent course cProfile ctypes dis faulthandler ftplib gc glob http
importlib inspect io marshal mmap multiprocessing os pathlib pickle pickletools posix pty pytest resource runpy
select shelve shutil signal site smtplib socket sqlite3 ssl subprocess sys tempfile threading tokenize traceback types
urllib zipfile zipimport""".split()
NAMES = """__builtins__ __class__ __closure__ __code__ __defaults__ __dict__ __globals__ __import__ __kwdefaults__
__subclasses__ __loader__ __spec__ _getframe _C compile eval exec from_file fromfile getattr globals load locals modules
open save setattr settrace vars""".split()
ALIKE = 0.9  # share of equal tokens from which two solutions are reported
SHORT = 60  # tokens; a shorter solution is nearly the same whoever writes it


def unusual(text, reference=""):
    """{name: first line} of what an honest solution has no use for. Names that the reference has too do not count."""
    usual = unusual(reference) if reference else {}
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Name):
            names = [node.id]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            names = [word for word in re.findall(r"\w+", node.value) if word.startswith("_")]
        imports = isinstance(node, (ast.Import, ast.ImportFrom))
        for name in names:
            if name in NAMES or (imports and name.split(".")[0] in MODULES):
                found[name] = min(node.lineno, found.get(name, node.lineno))
    return {name: found[name] for name in sorted(found) if name not in usual}


def solution(student, exercise):
    """The functions of one exercise as a list of tokens, in which names of variables and numbers of a student's own
    choice have no say; [] where nothing is written."""
    tokens = []
    for file, names in exercise.targets.items():
        try:
            nodes = functions_of(student[file][1]) if file in student else {}
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            nodes = {}
        for name in names:
            if name in nodes:
                tokens += _tokens(nodes[name])
    return tokens


def _tokens(function):
    """Kinds of syntax and the names of functions and attributes, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    tokens = []
    for statement in body:
        for node in ast.walk(statement):
            tokens.append(type(node).__name__)
            if isinstance(node, ast.Attribute):
                tokens.append(node.attr)
    return tokens


def pairs(solutions):
    """Submissions whose solutions are nearly the same: {(one name, other name): [exercise numbers]}.

    solutions: {name: {exercise number: tokens}}, with the reference among them under a name of its own.
    """
    found = {}
    for number in EXERCISES:
        written = {name: tokens[number] for name, tokens in solutions.items() if len(tokens.get(number, ())) >= SHORT}
        for one, other in combinations(sorted(written), 2):
            matcher = SequenceMatcher(None, written[one], written[other], autojunk=False)
            if matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE and matcher.ratio() >= ALIKE:
                found.setdefault((one, other), []).append(number)
    return found
