"""The exercises: what students write, where it is in the paper, and what would give the answer away.

Functions have the names that they have in their file: "prob_open", or "SaLoRALinear.forward" for a method. MODULES are
the files that import each other, and so see a student's functions, in the order of their imports. To change the course,
change this table, the checks in course/checks/exercise_N.py and the text in exercises.md.
"""

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parent
FILES = ("hard_concrete.py", "salora.py", "budget.py", "course/bare_loop.py")  # that students write in
MODULES = ("hard_concrete.py", "salora.py", "budget.py", "guard.py", "rank_allocator.py", "course/bare_loop.py",
           "course/questions.py")  # fmt: skip
NOT_WRITTEN = "not written"  # an exercise that is as it was in the handout


@dataclass(frozen=True)
class Exercise:
    number: int
    minutes: int  # with reading and the question; the weight of the exercise
    title: str
    place: str  # in the paper
    targets: dict  # {file: functions that the student writes}
    gives_away: dict = field(default_factory=dict)  # {file: functions whose bodies would show the answer}

    @property
    def stub(self):
        """What a function of the handout says when it is called before it is written."""
        return f"Exercise {self.number}: {self.place}"

    @property
    def checks(self):
        """The file with the tests."""
        return COURSE / "checks" / f"exercise_{self.number}.py"

    def tests(self):
        """The names of the tests, in order."""
        tree = ast.parse(self.checks.read_text(encoding="utf-8"))
        return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


EXERCISES = {
    exercise.number: exercise
    for exercise in (
        Exercise(1, 15, "How likely is a gate to be open?", "Eq. (8)",
                 {"hard_concrete.py": ("prob_open",)}, {"hard_concrete.py": ("prob_above",)}),
        Exercise(2, 20, "Sample a gate", "Eq. (7)",
                 {"hard_concrete.py": ("sample_gate",)}, {"hard_concrete.py": ("median_gate",)}),
        Exercise(3, 40, "The median and the mean", "Section 3.5",
                 {"hard_concrete.py": ("median_gate", "mean_gate")}),
        Exercise(4, 40, "The gated layer", "Eq. (5)",
                 {"salora.py": ("SaLoRALinear.forward", "SaLoRALinear.delta")}),
        Exercise(5, 60, "Independent triplets", "Eq. (9)",
                 {"salora.py": ("orthogonality", "canonicalize")}),
        Exercise(6, 40, "Count the parameters", "Eq. (11)",
                 {"budget.py": ("total_parameters", "expected_density", "kept_density")}),
        Exercise(7, 40, "Which triplets stay", "Section 3.5, the budget rule",
                 {"budget.py": ("best_within_budget",)}),
        Exercise(8, 60, "Two ways to reach the target", "Eq. (12) and the projection",
                 {"budget.py": ("Lagrangian.forward", "Lagrangian.ascend", "project")}),
        Exercise(9, 80, "Algorithm 1 in a bare loop", "Algorithm 1",
                 {"course/bare_loop.py": ("before_step", "after_backward", "after_step", "finish")},
                 {"rank_allocator.py": ("RankAllocator.before_step", "RankAllocator.penalty",
                                        "RankAllocator.after_backward", "RankAllocator.after_step",
                                        "RankAllocator._enter_phase", "RankAllocator._release",
                                        "RankAllocator._decide")}),
    )
}  # fmt: skip


def chosen(text):
    """The exercises that "1-4" or "1,3,7-9" means, in order. Raises ValueError for anything else."""
    numbers = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not found or not set(found) <= EXERCISES.keys():
            raise ValueError(f"exercises are numbers and ranges from 1 to {max(EXERCISES)}, as in 1-4,7; got {text!r}")
        numbers.update(found)
    return [EXERCISES[number] for number in sorted(numbers)]
