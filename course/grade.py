"""Grade submissions with the checks in course/checks: one point per test.

    python course/grade.py SUBMISSION                  a folder, a zip file, a .py file or a notebook
    python course/grade.py SUBMISSION --json           {"points": 12, "out_of": 90, "exercises": {"1": {...}}}
    python course/grade.py ROOT --all                  a class: everything in ROOT, one line of CSV each
    python course/grade.py ROOT --all --out grades.csv --feedback pages
                                                       the same in a file, and a page for every student; if it was
                                                       interrupted, the same command goes on
    python course/grade.py .                           in a handout: how far you are

The tests run here and ask questions. They are answered by another process, which runs the student's code and returns
plain data (course/answer.py): no student's code runs in this one. Exercise 10 is for the teacher to judge.
"""

import argparse
import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.ending import ending_in_a_line
from course.exercises import EXERCISES, FILES, NOT_WRITTEN, chosen
from course.graft import reference_texts
from course.intake import KINDS, collect, printable
from course.reading import pairs, solution

COLUMNS = ("submission", "points", "out_of")


def report_of(marks, all_failures=False):
    """The marks in words; of each exercise, the first failed test or all of them."""
    lines = [f"{marks['submission']}: {marks['points']} of {marks['out_of']}", *marks["notes"]]
    for number, result in marks["exercises"].items():
        lines.append(f"exercise {number}: {score_of(result):12} {EXERCISES[int(number)].title}")
        lines += [f"    {note}" for note in result["notes"] if note != NOT_WRITTEN]
        failures = [text for text in result["failed"].values() if text]
        for text in failures if all_failures else failures[:1]:
            lines += [f"    {line}" for line in text.splitlines()]
            lines += [""] if all_failures else []
    return "\n".join(lines)


def score_of(result):
    return f"{result['points']} of {result['out_of']}" if result["written"] else NOT_WRITTEN


def write_table(root, exercises, out=None, limit=None, jobs=1, feedback=None):
    """One line of CSV for everything in a folder, and a page for every student in the folder `feedback`.

    out: a path, or None to print. Lines that it has already are not graded again. Raises ValueError if it holds
    another table.
    """
    from course.judge import Respondent

    head = [*COLUMNS, *(f"exercise_{exercise.number}" for exercise in exercises), "notes", "look"]
    places = sorted(place for place in Path(root).iterdir() if not place.name.startswith((".", "__")))
    done = _names_in(out, head)
    waiting = [place for place in places if printable(place.name) not in done]
    alike = _alike(places, exercises)
    if feedback:
        feedback.mkdir(parents=True, exist_ok=True)
    file = open(out, "a", newline="", encoding="utf-8") if out else sys.stdout
    writer = csv.writer(file)
    if not done:
        writer.writerow(head)
    pool = ThreadPoolExecutor(jobs)
    try:
        for marks in pool.map(lambda place: _marks_of(place, exercises, limit), waiting):
            marks["look"] += alike[marks["submission"]]
            if feedback:
                page = feedback / f"{marks['submission']}.txt"
                page.write_text(report_of(marks, all_failures=True) + "\n", encoding="utf-8")
            writer.writerow(_row(marks))
            file.flush()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        Respondent.stop_all()
        raise
    finally:
        pool.shutdown()


def _row(marks):
    results = marks["exercises"].values()
    scores = [result["points"] if result["written"] else NOT_WRITTEN for result in results]
    numbers = {}  # {note: the exercises that have it}
    for number, result in marks["exercises"].items():
        for note in result["notes"]:
            numbers.setdefault(note, []).append(number)
    notes = [f"{','.join(found)}: {note}" for note, found in numbers.items() if note != NOT_WRITTEN]
    notes = "; ".join(marks["notes"] + notes)
    return [*(marks[column] for column in COLUMNS), *scores, notes, "; ".join(marks["look"])]


def _names_in(out, head):
    """The submissions in a table that was begun before."""
    if not out or not out.exists() or out.stat().st_size == 0:
        return set()
    text = out.read_text(encoding="utf-8")
    rows = list(csv.reader(text.splitlines(keepends=True)))
    if rows[0] != head or not text.endswith("\n"):
        raise ValueError(f"{out} holds another table, or its last line is cut off: name a new file, or mend it")
    return {row[0] for row in rows[1:] if row}


def _marks_of(place, exercises, limit):
    from course.judge import grade, nothing

    if not place.is_symlink() and (place.is_dir() or place.suffix in KINDS):
        return grade(place, exercises, limit)
    what = "a link" if place.is_symlink() else "not a folder, a zip file, a .py file or a notebook"
    results = {str(exercise.number): nothing(exercise, NOT_WRITTEN) for exercise in exercises}
    out_of = sum(result["out_of"] for result in results.values())
    marks = {"submission": printable(place.name), "points": 0, "out_of": out_of}
    return marks | {"notes": [what], "exercises": results, "look": []}


def _alike(places, exercises):
    """{submission: notes} on solutions that are nearly those of others, or of the reference."""
    students = {printable(place.name): collect(place)[0] for place in places}
    students["the reference"] = {file: (file, text) for file, text in reference_texts().items() if file in FILES}
    tokens = {name: {e.number: solution(files, e) for e in exercises} for name, files in students.items()}
    notes = {name: [] for name in students}
    for (one, other), numbers in pairs(tokens).items():
        where = ",".join(map(str, numbers))
        notes[one].append(f"like {other} in {where}")
        notes[other].append(f"like {one} in {where}")
    return notes


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("submission", type=Path, help="a folder, zip file, .py file or notebook; with --all, a folder "
                        "of them")  # fmt: skip
    parser.add_argument("--exercises", type=chosen, default=EXERCISES.values(), metavar="1-4", help="default: all")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds of computing per question (default 10, as in "
                        "`pytest --exercise`)")  # fmt: skip
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the marks as JSON")
    output.add_argument("--all", action="store_true", help="grade everything in the folder, and print CSV")
    parser.add_argument("--out", type=Path, metavar="CSV", help="with --all: write to this file; lines that it has "
                        "already are kept, and not graded again")  # fmt: skip
    parser.add_argument("--feedback", type=Path, metavar="DIR", help="with --all: a page of text for every student")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="with --all: submissions at the "
                        "same time (default: one per core)")  # fmt: skip
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if not os.path.lexists(args.submission):
        parser.error(f"there is no submission {args.submission}")
    if not args.submission.is_dir() and args.submission.suffix not in KINDS:
        parser.error(f"{args.submission} is not a folder, a zip file, a .py file or a notebook")
    if args.all and not args.submission.is_dir():
        parser.error(f"--all takes a folder of submissions, got {args.submission}")
    if args.limit is not None and not 0 < args.limit <= 3600:
        parser.error(f"--limit must be above 0 and at most 3600 seconds, got {args.limit:g}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if (args.out or args.feedback) and not args.all:
        parser.error("--out and --feedback go with --all")
    for path in filter(None, (args.out, args.feedback)):
        if path.resolve().is_relative_to(args.submission.resolve()):
            parser.error(f"{path} lies among the submissions: name a place outside {args.submission}")
    hint = "the same command goes on" if args.out else "nothing is left behind"
    with ending_in_a_line("grade.py", hint):
        from course import judge  # only here: the processes that answer import this file, and nothing of the judge's

        judge.prepare()
        if args.all:
            return write_table(args.submission, args.exercises, args.out, args.limit, args.jobs, args.feedback)
        marks = judge.grade(args.submission, args.exercises, args.limit)
        print(json.dumps(marks, indent=1) if args.json else report_of(marks))


if __name__ == "__main__":
    main()
