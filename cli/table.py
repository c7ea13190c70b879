"""A table that grows by rows, a CSV file: what a study keeps, and what several processes may add to at a time.

A row is a line. A line without its end was cut off, by a kill or by a full disk: nobody sees it, and the next row takes
its place. Whatever else is wrong with a file is refused with its line.
"""

import csv
import io

from hub.checkpoints import check_regular

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


def append(path, *rows):
    """Add rows, dicts with the same keys; a new file gets a header line first. It is all of them or none.

    Raises ValueError for a file with other columns, OSError for one that cannot be written.
    """
    with open(path, "ab+", buffering=0) as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0)
        whole = whole_lines(file.read())
        lines = list(parsed(whole, path))
        columns = lines[0][1] if lines else list(rows[0])
        if set(columns) != set(rows[0]):
            raise ValueError(f"{path} has other columns than {', '.join(rows[0])}: choose another --out")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns)
        if not lines:
            writer.writeheader()
        writer.writerows(rows)
        file.truncate(len(whole))
        try:
            write_all(file, text.getvalue().encode())
        except BaseException as error:  # an interruption as well
            file.truncate(len(whole))
            if isinstance(error, OSError):
                raise OSError(f"{path} cannot be written: {error.strerror}") from None
            raise


def write_all(file, data):
    while data:
        data = data[file.write(data) :]  # on a full disk a first part of it


def whole_lines(data):
    """The bytes of a file without those after the end of its last line."""
    return data[: data.rfind(b"\n") + 1]


def parsed(data, path):
    """Yields (line number, cells) for every line with something in it. Raises ValueError for what is no CSV file."""
    try:
        lines = csv.reader(io.StringIO(data.decode(), newline=""), strict=True)
        for cells in lines:
            if cells:
                yield lines.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged, or no CSV file: {error}") from None


def read_table(path, columns=None, check=lambda row: None):
    """The rows of a table, dicts of texts; none if the file is not there.

    columns: those that it must have. check(row) raises ValueError where a row is wrong. Raises ValueError for a file
    that is not a table, is damaged, or is another table; its message names file and line.
    """
    if not path.exists():
        return []
    check_regular(path)
    lines = list(parsed(whole_lines(path.read_bytes()), path))
    header = lines[0][1] if lines else []
    if len(set(header)) < len(header):
        raise ValueError(f"{path} has two columns of one name: {', '.join(header)}")
    if header and set(header) != set(columns or header):
        raise ValueError(f"{path} has other columns than this version of the program writes: choose another --out")
    rows = []
    for number, cells in lines[1:]:
        row = dict(zip(header, cells))
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells, expected {len(header)}")
            if cells == header:
                raise ValueError("the header once more")
            check(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; mend it, or choose another --out") from None
        rows.append(row)
    return rows


def rows_with(path, **values):
    """The rows of a table that have these values."""
    wanted = {name: str(value) for name, value in values.items()}
    return [row for row in read_table(path) if wanted.items() <= row.items()]


def has_row(path, **values):
    """Whether a table has a row with these values: such a run has been done."""
    return bool(rows_with(path, **values))
