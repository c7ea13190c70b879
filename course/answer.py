"""The process that runs a student's code while it is graded. It answers questions, and knows no right answer.

It holds the student's file, the reference without its solution of the exercise, and course/questions.py. It reads
questions from a socket and writes what came out, as lines of JSON (course/plain.py). Answers are compared in the
grader's own process, which no student's code ever enters (course/judge.py). So a submission may do to Python, torch or
this file what it likes: all that leaves this process are answers, and they are right or wrong.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import course.checking  # noqa: F401  the questions need it, and later nothing of the repository can be read
from course.exercises import EXERCISES, ROOT
from course.fence import limit_computing, limit_memory, restrict
from course.graft import Unusable, graft, said
from course.plain import dumps, loads

# torch loads more of itself on first use, which must not be charged to a student.
torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1).step()
torch.linalg.svd(torch.eye(2))
torch.empty(1, device="meta").clone()


def answer(line, number, texts, student, folder, limit):
    """Answers questions until there are no more.

    line: a socket. texts: the reference {file: text} without its answer to the exercise. student: {file: (name, text)}.
    folder: where the student's code may write. limit: seconds of computing per question.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _be_alone(line.fileno())
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    limit_memory()
    limit_computing(limit)
    restrict(_readable(), [folder, os.devnull])

    def reply(**what):
        line.sendall(dumps(what) + b"\n")

    try:
        graft(texts, EXERCISES[number].targets, student)
    except Unusable as error:
        return reply(unusable=str(error))
    reply(ready=True)
    questions, names = sys.modules["course.questions"], [name for name, _ in student.values()]
    for text in line.makefile("rb"):
        name, args, kwargs = loads(text)
        limit_computing(limit)
        try:
            reply(answer=getattr(questions, name).__wrapped__(*args, **kwargs))
        except BaseException as error:
            reply(raised=said(error, names))


def _be_alone(line):
    """No input, no output, no open file but the socket, and a process group that can be ended as one."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.closerange(3, line)
    os.closerange(line + 1, 1024)
    sys.stdin = open(0, closefd=False)  # multiprocessing's own is closed by now


def _readable():
    """Where Python and its packages are. Nothing of the repository is among them."""
    packages = [path for path in sys.path if path and not Path(path).resolve().is_relative_to(ROOT)]
    return [sys.prefix, sys.base_prefix, "/usr", "/lib", "/lib64", os.devnull, "/dev/urandom", *packages]
