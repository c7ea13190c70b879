"""A class in one table, and a page for every student."""

import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from course.exercises import FILES, NOT_WRITTEN
from course.graft import reference_texts
from course.intake import KINDS, answers_in, collect, printable, submissions_in
from course.judge import Respondent, grade, nothing, tests_of, totals
from course.reading import pairs, solution
from course.report import report_of
from course.written import beside_rubric

COLUMNS = ("submission", "points", "out_of", "percent")


def write_table(root, exercises, out=None, jobs=1, feedback=None, joined=(), **how):
    """One line of CSV for everything in a folder, and a page for every student in the folder `feedback`.

    out: a path, or None to print. Lines that it has already are not graded again. joined: paths of tables whose
    columns are added by the name of the submission; names that only they have get a line, too. how: limit and hidden,
    as for `grade`.
    Raises ValueError if `out` holds another table, or one that is joined has no column `submission`.
    """
    columns, known = _joined(joined)
    head = [*COLUMNS, *columns, *(f"exercise_{exercise.number}" for exercise in exercises), "notes", "look"]
    done = _names_in(out, head)
    if feedback:
        feedback.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="class-") as folder:
        places = submissions_in(Path(root), Path(folder))
        waiting = [place for place in places if printable(place.name) not in done]
        alike = _alike(places, exercises)
        with open(out, "a", newline="", encoding="utf-8") if out else nullcontext(sys.stdout) as file:
            writer = csv.writer(file, lineterminator="\n")
            if not done:
                writer.writerow(head)
            for marks in _in_threads(lambda place: _marks_of(place, exercises, how), waiting, jobs):
                marks["look"] += alike[marks["submission"]]
                if feedback:
                    text = report_of(marks, all_failures=True) + "\n" + beside_rubric(marks["answers"], exercises)
                    (feedback / f"{marks['submission']}.txt").write_text(text + "\n", encoding="utf-8")
                writer.writerow(_row(marks, known, columns))
                file.flush()
            there = {name for place in places for name in (printable(place.name), Path(printable(place.name)).stem)}
            for name in known.keys() - there - done:
                marks = _blank(name, "nothing was handed in", exercises, how)
                writer.writerow(_row(marks, known, columns))


def _in_threads(function, items, jobs):
    """Yields function(item) for all items, in order. An interruption ends everything that is still at work."""
    Respondent.stopped = False  # by an earlier interruption
    pool = ThreadPoolExecutor(jobs)
    try:
        yield from pool.map(function, items)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        Respondent.stop_all()
        raise
    finally:
        pool.shutdown()


def _joined(paths):
    """([columns], {submission: {column: value}}) of the tables at these paths."""
    columns, known = [], {}
    for path in paths:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if "submission" not in (rows.fieldnames or []):
                raise ValueError(f"{path} has no column submission: it has {', '.join(rows.fieldnames or ['none'])}")
            columns += [name for name in rows.fieldnames if name not in ("submission", *columns)]
            for row in rows:
                known.setdefault(row["submission"], {}).update(row)
    return columns, known


def _row(marks, known, columns):
    results = marks["exercises"].values()
    scores = [result["points"] if result["written"] else NOT_WRITTEN for result in results]
    numbers = {}  # {note: the exercises that have it}
    for number, result in marks["exercises"].items():
        for note in result["notes"]:
            numbers.setdefault(note, []).append(number)
    notes = [f"{','.join(found)}: {note}" for note, found in numbers.items() if note != NOT_WRITTEN]
    notes = "; ".join(marks["notes"] + notes)
    name = marks["submission"]
    theirs = known.get(name, known.get(Path(name).stem, {}))
    more = [theirs.get(column, "") for column in columns]
    return [*(marks[column] for column in COLUMNS), *more, *scores, notes, "; ".join(marks["look"])]


def _names_in(out, head):
    """The submissions in a table that was begun before. A last line that is cut off is taken away."""
    if not out or not out.exists():
        return set()
    text = out.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = list(csv.reader(whole.splitlines()))
    if rows and rows[0] != head:
        raise ValueError(f"{out} holds another table: name a new file")
    if whole != text:
        out.write_text(whole, encoding="utf-8")
    return {row[0] for row in rows}


def _marks_of(place, exercises, how):
    if not place.is_symlink() and (place.is_dir() or place.suffix in KINDS):
        marks = grade(place, exercises, **how)
        return marks | {"answers": answers_in(place)}
    what = "a link" if place.is_symlink() else "not a folder, a zip file, a .py file or a notebook"
    return _blank(printable(place.name), what, exercises, how)


def _blank(name, note, exercises, how):
    """The marks of what is not a submission."""
    sizes = {exercise.number: len(tests_of(exercise.number, how.get("hidden"))) for exercise in exercises}
    results = {str(number): nothing(size, NOT_WRITTEN) for number, size in sizes.items()}
    marks = {"submission": name, **totals(results), "answers": ""}
    return marks | {"notes": [note], "exercises": results, "look": []}


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
