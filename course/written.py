"""The questions in exercises.md: a page for answers, and what students wrote on it beside what earns points."""

import re

from course.exercises import COURSE

HERE = "**Your answer.**"
HEAD = """# Your answers

Write below each question, in a few sentences; numbers count, and so do reasons. Leave the headings as they are.
"""


def page(exercises):
    """The page that students fill in."""
    questions = sections(COURSE / "exercises.md", "**Question.**")
    parts = [f"\n\n## {e.number}. {e.title}\n\n{questions[e.number]}\n\n{HERE}\n" for e in exercises]
    return HEAD + "".join(parts)


def sections(path, start):
    """{exercise number: text} of a page, from a word in each section to the section's end."""
    return _sections(path.read_text(encoding="utf-8"), start)


def _sections(text, start):
    found = {}
    for part in re.split(r"(?m)^## (?=\d+\.)", text)[1:]:
        number, _, body = part.partition(".")
        _, there, words = body.partition(start)
        found[int(number)] = words.strip() if there else ""
    return found


def beside_rubric(text, exercises):
    """What a student answered to each question, or that nothing is there, and what earns points: for the feedback."""
    rubric = sections(COURSE / "answers.md", "**Points.**") if (COURSE / "answers.md").exists() else {}
    answers, lines = _sections(text, HERE), []
    for exercise in exercises:
        lines += ["", f"question {exercise.number}: {answers.get(exercise.number) or 'no answer'}"]
        lines += [f"    points: {rubric[exercise.number]}"] if exercise.number in rubric else []
    return "\n".join(lines)
