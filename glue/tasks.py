"""The tasks: what each is scored by, what its labels are called, and how to read its official files.

Official GLUE files are UTF-8 with one row per line, tab-separated, without quoting. Columns are found by name in the
header line; CoLA's train and dev files alone have no header. A byte-order mark and Windows line ends are accepted.
"""

from dataclasses import dataclass
from pathlib import Path

from glue import mini

BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")


@dataclass
class Task:
    folder: str
    sentences: tuple  # names of the columns with the one or two sentences
    label: str  # name of the label's column
    labels: tuple  # the labels as they stand in the file, in the order of their class indices; empty for a score 0 to 5
    metric: str  # what `score` reports
    also: str = ""  # a second metric that GLUE reports
    dev: str = "dev.tsv"
    more_dev: str = ""  # a second file of that kind, from other sources
    tests: tuple = ()  # (test file, GLUE's name for its predictions) of each; empty: test.tsv and the folder's name
    header: tuple = ()  # the columns of a file without a header line
    broken_lines: bool = False  # the official file has a few, which are counted and left out

    @property
    def num_labels(self):
        return len(self.labels) or 1

    def predictions_of(self, file):
        """The name of the file with predictions for an official file: GLUE's for a test file, of another its own."""
        tests = dict(self.tests) or {"test.tsv": f"{self.folder}.tsv"}
        return tests.get(file, f"{self.folder}.{Path(file).stem}.tsv")


TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", BINARY, "matthews", header=("source", "label", "star", "sentence")),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, "accuracy"),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, "accuracy", "f1"),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, "accuracy", "f1", broken_lines=True),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), "pearson", "spearman"),
    "mnli": Task(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
        dev="dev_matched.tsv",
        more_dev="dev_mismatched.tsv",
        tests=(
            ("test_matched.tsv", "MNLI-m.tsv"),
            ("test_mismatched.tsv", "MNLI-mm.tsv"),
            ("diagnostic.tsv", "AX.tsv"),
        ),
    ),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, "accuracy"),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, "accuracy"),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", BINARY, "accuracy"),
}
NAMES = [*mini.TASKS, *TASKS]
TRAIN_ROWS, DEV_ROWS = 4000, 1000  # of a generated task


def task_of(name):
    """The Task of a name; a generated task shares everything but its files with the official one."""
    return TASKS[name.removeprefix("mini-")]


def load_task(name, folder=None):
    """(train rows, dev rows) of a task, each row (sentence, sentence or None, label); no row is in both.

    label is a class index, or a float for a score. An official task is read from `folder`, which holds GLUE's
    folders ("CoLA", "SST-2" ...) or is one of them. Raises FileNotFoundError or ValueError with the file's line.
    """
    if name in mini.TASKS:
        if folder is not None:
            raise ValueError(f"task {name} is generated and reads no --data: drop it, or take --task {name[5:]}")
        rows = mini.examples(name, TRAIN_ROWS + DEV_ROWS)
        return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]
    task = TASKS[name]
    if folder is None:
        raise ValueError(f"task {name} needs --data DIR, the folder that holds {task.folder}/train.tsv")
    where = folder_of(task, folder)
    return read_rows(where / "train.tsv", task), read_rows(where / task.dev, task)


def folder_of(task, folder):
    """The folder of a task's files: inside of the one that holds GLUE's folders, or that one itself."""
    inner = Path(folder) / task.folder
    return inner if inner.is_dir() else Path(folder)


def has_labels(path, task):
    """Whether an official file has a column of labels, by its first line."""
    if not path.is_file():
        return False
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        first = next((line.rstrip("\r\n").split("\t") for line in file if line.strip()), [])
    if task.sentences[0] in first:
        return task.label in first
    return bool(task.header) and len(first) == len(task.header)  # a file without a header line has labels


def read_rows(path, task, labeled=True):
    """The rows of one official file; `labeled=False` reads a test file, which has a header and no labels."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected GLUE's {task.folder} in its official layout")
    try:
        # Neither read_text nor splitlines: sentences hold odd line separators, a lone carriage return among them
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte {error.object[error.start]:#x} is not UTF-8") from None
    table = [(i, line.rstrip("\r").split("\t")) for i, line in enumerate(lines, 1) if line.strip()]
    header = list(task.header) if labeled else []
    header = header or (table.pop(0)[1] if table else [])
    wanted = [*task.sentences, *([task.label] if labeled else [])]
    absent = [column for column in wanted if column not in header]
    if absent:
        there = ", ".join(map(repr, header)) or "empty"
        raise ValueError(f"{path} has no column {', '.join(absent)}; its header is {there}")
    if task.broken_lines and labeled:
        whole = [(i, cells) for i, cells in table if len(cells) == len(header)]
        if len(whole) < len(table):
            print(f"{path}: {len(table) - len(whole)} broken lines left out, {len(whole)} rows read")
        table = whole
    columns, rows = [header.index(column) for column in wanted], []
    for i, cells in table:
        if len(cells) != len(header):
            raise ValueError(f"{path}, line {i}: {len(cells)} columns, expected {len(header)} ({', '.join(header)})")
        texts = [cells[column] for column in columns]
        label = parse_label(texts.pop(), task, f"{path}, line {i}") if labeled else 0
        rows.append((texts[0], texts[1] if len(texts) == 2 else None, label))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def parse_label(text, task, where):
    if task.labels:
        if text not in task.labels:
            raise ValueError(f"{where}: label {text!r}, expected one of {', '.join(task.labels)}")
        return task.labels.index(text)
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 5:
        raise ValueError(f"{where}: score {text!r}, expected a number from 0 to 5")
    return score
