"""Grade submissions with the checks in course/checks: one point per test.

    python course/grade.py FOLDER               one submission: a folder, or a single .py file
    python course/grade.py FOLDER --json        {"points": 12, "out_of": 81, "exercises": {"1": {"points": 7, ...}}}
    python course/grade.py ROOT --all           a class: every folder and .py file in ROOT, as CSV

Only the four files that students write in are read, and none of them runs in this process: every exercise gets a fresh
process with a time limit (course/judge.py). Exercise 10 is for the teacher to judge.
"""

import argparse
import csv
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from hmac import compare_digest
from multiprocessing import get_context
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.exercises import EXERCISES, FILES, chosen
from course.graft import blanked, reference_texts

LARGEST = 2**20  # bytes of a student's file, and of a report
LIMIT = 60  # seconds per exercise; the slowest takes 2 on an idle core


def grade(submission, exercises=EXERCISES.values(), limit=LIMIT):
    """The marks of a submission, as `--json` prints them. Raises OSError where there is no submission."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        student, notes = _collect(Path(submission), Path(folder))
        for exercise in exercises:
            results[str(exercise.number)] = _grade_one(exercise, student, limit)
    points, out_of = (sum(result[key] for result in results.values()) for key in ("points", "out_of"))
    return {"submission": str(submission), "points": points, "out_of": out_of, "notes": notes, "exercises": results}


def _collect(submission, folder):
    """({file: path} of copies of the files that students write in, notes about them)."""
    if not submission.exists():
        raise FileNotFoundError(f"there is no submission {submission}")
    student, notes = {}, []
    for file in FILES:
        if submission.is_dir():
            places = [submission / file, submission / Path(file).name]
        else:  # a single file: by its name if that is one of ours, and otherwise wherever its functions belong
            named = submission.name in [Path(other).name for other in FILES]
            places = [submission] if not named or submission.name == Path(file).name else []
        for place in places:
            if not os.path.lexists(place):
                continue
            why_not = _why_not(place, submission)
            if why_not:
                notes.append(f"{place.name} {why_not}, and was not read")
                continue
            student[file] = folder / file
            student[file].parent.mkdir(exist_ok=True)
            student[file].write_bytes(place.read_bytes())
            break
    return student, list(dict.fromkeys(notes))


def _why_not(place, submission):
    """Why a student's file is not read, or None."""
    linked = place.is_symlink() or place.resolve() != submission.resolve() / place.relative_to(submission)
    if linked or not place.is_file():
        return "is a link or not a file"
    if place.stat().st_size > LARGEST:
        return f"has more than {LARGEST} bytes"
    if not os.access(place, os.R_OK):
        return "is not readable"


def _grade_one(exercise, student, limit):
    from course.judge import judge

    context = get_context("forkserver")
    context.set_forkserver_preload(["course.judge", "hypothesis"])
    key, started = secrets.token_bytes(32), time.time()
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as results:
        report = Path(results) / "report"
        job = (exercise.number, blanked(reference_texts(), exercise), student, work, report, key)
        process = context.Process(target=judge, args=job)
        process.start()
        process.join(limit)
        late = process.is_alive()
        _end(process)
        facts = _signed(report, key)
    return _marks(exercise, facts, late, limit) | {"seconds": round(time.time() - started, 1)}


def _end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)  # the group that the process opened for itself
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.join()


def _signed(report, key):
    """The facts in a report that this exercise's process has signed."""
    from course.judge import signature

    facts = []
    if report.exists():
        with open(report, "rb") as file:
            lines = file.read(LARGEST).decode(errors="replace").splitlines()
        for line in lines:
            sign, _, text = line.partition(" ")
            if compare_digest(sign.encode(), signature(key, text).encode()):
                facts.append(json.loads(text))
    return facts


def _marks(exercise, facts, late, limit):
    """Points of one exercise: the tests that passed, in a process that ran to its end and left all other code alone."""
    tests = exercise.tests()
    passed = {fact["test"] for fact in facts if fact.get("passed")} & set(tests)
    failed = {fact["test"]: fact["words"] for fact in facts if "words" in fact}
    end = next((fact for fact in facts if "end" in fact), None)
    notes = [fact["unusable"] for fact in facts if "unusable" in fact]
    if late:
        notes.append(f"not finished after {limit} s: an endless loop?")
    elif end is None:
        notes.append("the process ended before the tests were done: an exit, or too much memory?")
    if end is not None:
        notes += [f"refused: {what}" for what in end["refused"]]
        if end["changed"]:
            notes.append(f"changes code outside the submission: {', '.join(end['changed'])}")
    valid = end is not None and not end["changed"]
    return {"points": len(passed) if valid else 0, "out_of": len(tests), "notes": notes, "failed": failed}


def report_of(marks):
    """The marks in words."""
    lines = [f"{marks['submission']}: {marks['points']} of {marks['out_of']}", *marks["notes"]]
    for number, result in marks["exercises"].items():
        title = EXERCISES[int(number)].title
        lines.append(f"exercise {number}: {result['points']} of {result['out_of']}   {title}   ({result['seconds']} s)")
        lines += [f"    {note}" for note in result["notes"]]
        for words in list(result["failed"].values())[:1]:
            lines += [f"    {line}" for line in words.splitlines()]
    return "\n".join(lines)


def write_table(root, exercises, limit, out):
    """One line of CSV per submission in a folder."""
    numbers = [exercise.number for exercise in exercises]
    writer = csv.writer(out)
    writer.writerow(["submission", "points", "out_of", *(f"exercise_{number}" for number in numbers), "notes"])
    for submission in sorted(Path(root).iterdir()):
        if submission.name.startswith((".", "__")) or not (submission.is_dir() or submission.suffix == ".py"):
            continue
        marks = grade(submission, exercises, limit)
        results = marks["exercises"].values()
        notes = marks["notes"] + [f"{n}: {note}" for n, r in marks["exercises"].items() for note in r["notes"]]
        points = [result["points"] for result in results]
        writer.writerow([submission.name, marks["points"], marks["out_of"], *points, "; ".join(notes)])
        out.flush()


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submission", type=Path, help="a folder or a .py file; with --all, a folder of them")
    parser.add_argument("--exercises", type=chosen, default=EXERCISES.values(), metavar="1-4", help="default: all")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="S", help="seconds per exercise (default 60)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the marks as JSON")
    output.add_argument("--all", action="store_true", help="grade every submission in the folder, and print CSV")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.submission.exists():
        parser.error(f"there is no submission {args.submission}")
    if args.all:
        return write_table(args.submission, args.exercises, args.limit, sys.stdout)
    marks = grade(args.submission, args.exercises, args.limit)
    print(json.dumps(marks, indent=1) if args.json else report_of(marks))


if __name__ == "__main__":
    main()
