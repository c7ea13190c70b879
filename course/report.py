"""Marks in words: for a terminal, for a student's page, and for Gradescope."""

from course.exercises import EXERCISES, NOT_WRITTEN


def report_of(marks, all_failures=False):
    """The marks in words; of each exercise, the first failed test or all of them."""
    lines = [f"{marks['submission']}: {marks['points']} of {marks['out_of']}, or {marks['percent']} %", *marks["notes"]]
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


def gradescope_of(marks):
    """The marks as Gradescope reads them: a test per exercise, with every failure in the words that students see."""
    tests = []
    for number, result in marks["exercises"].items():
        words = [*result["notes"], *(text for text in result["failed"].values() if text)]
        name = f"Exercise {number}: {EXERCISES[int(number)].title}"
        test = {"name": name, "score": result["points"], "max_score": result["out_of"], "output": "\n\n".join(words)}
        tests.append(test)
    return {"score": marks["points"], "output": "\n".join(marks["notes"]), "tests": tests}
