"""Grade submissions with the checks in course/checks: one point per test.

    python course/grade.py SUBMISSION                  a folder, a zip file, a .py file or a notebook
    python course/grade.py SUBMISSION --json           {"points": 12, "out_of": 93, "exercises": {"1": {...}}}
    python course/grade.py ROOT --all                  a class: everything in ROOT, one line of CSV each
    python course/grade.py ROOT --all --out grades.csv --feedback pages
                                                       the same in a file, and a page for every student; if it was
                                                       interrupted, the same command goes on
    python course/grade.py .                           in a handout: how far you are

The tests run here and ask questions. They are answered by another process, which runs the student's code and returns
plain data (course/answer.py): no student's code runs in this one. Exercise 10 is for the teacher to judge.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from course.checking import LIMIT
from course.ending import Parser, ending_in_a_line
from course.exercises import COURSE, EXERCISES, chosen
from course.fence import version
from course.intake import KINDS
from course.report import gradescope_of, report_of


def build_parser():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("submission", type=Path, help="a folder, zip file, .py file or notebook; with --all, a folder of them")
    add("--exercises", type=chosen, default=EXERCISES.values(), metavar="1-4", help="default: all")
    add("--limit", type=float, default=LIMIT, metavar="S", help="seconds of computing per question (default: 10)")
    if (COURSE / "hidden.py").exists():  # the teacher's
        add("--hidden", metavar="SEED", help="more tests, with other numbers and shapes; SEED is any word")
        add("--variant", metavar="SEED", help="the SEED of make_handout.py --variant, if the handout was made with one")
    else:
        parser.set_defaults(hidden=None, variant=None)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the marks as JSON")
    output.add_argument("--gradescope", action="store_true", help="print them as Gradescope's results.json")
    output.add_argument("--all", action="store_true", help="grade everything in the folder, and print CSV")
    group = parser.add_argument_group("with --all")
    add = group.add_argument
    add("--out", type=Path, metavar="CSV", help="write to this file; lines that it has already are kept")
    add("--feedback", type=Path, metavar="DIR", help="write a page of text for every student")
    add("--join", type=Path, metavar="CSV", nargs="+", default=[], help="add the columns of these tables, by their "
        "column `submission`: names, late days, other points")  # fmt: skip
    add("--jobs", type=int, default=os.cpu_count(), metavar="N", help="submissions at a time (default: one per core)")
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
    if not 0 < args.limit <= 3600:
        parser.error(f"--limit must be above 0 and at most 3600 seconds, got {args.limit:g}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if (args.out or args.feedback or args.join) and not args.all:
        parser.error("--out, --feedback and --join go with --all")
    for path in filter(None, (args.out, args.feedback)):
        if path.resolve().is_relative_to(args.submission.resolve()):
            parser.error(f"{path} lies among the submissions: name a place outside {args.submission}")
    if args.variant is not None:
        from course import variant  # a handout has none

        return variant.run(args.variant, "grade.py", argv)
    hint = "the same command goes on" if args.out else "nothing is left behind"
    with ending_in_a_line("grade.py", hint):
        from course import judge  # only here: the processes that answer import this file, and nothing of the judge's

        judge.prepare()
        if not version():
            print("grade.py: no Landlock here: a submission could read and write your files", file=sys.stderr)
        if args.all:
            from course.table import write_table

            where = dict(out=args.out, jobs=args.jobs, feedback=args.feedback, joined=args.join)
            return write_table(args.submission, args.exercises, **where, limit=args.limit, hidden=args.hidden)
        marks = judge.grade(args.submission, args.exercises, args.limit, args.hidden)
        if args.json or args.gradescope:
            print(json.dumps(gradescope_of(marks) if args.gradescope else marks, indent=1))
        else:
            print(report_of(marks))


if __name__ == "__main__":
    main()
