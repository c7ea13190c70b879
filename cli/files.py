"""Tables that grow by a row, folders that one run has to itself, and digests of what they hold."""

import csv
import hashlib
import os
from contextlib import contextmanager, suppress

import torch

from cli.workers import worker

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

RUN_FILES = {  # of a run that is not finished
    "settings.json", "adapter.pt", "log.csv", "training.png", "trace.csv", "trace.png", "ranks.png",
}  # fmt: skip


def append(path, row):
    """Add a row, {column: value}, to a CSV file, with a header line if the file is new."""
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def make_folder(path):
    """For the rows of a study. Raises NotADirectoryError where a file is in its way."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path} is a file, or inside of one: choose another --out") from None


def read_table(path):
    """The rows of a CSV file, dicts of texts; none if the file is not there."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rows_with(path, **values):
    """The rows of a CSV file that have these values."""
    wanted = {name: str(value) for name, value in values.items()}
    return [row for row in read_table(path) if wanted.items() <= row.items()]


def has_row(path, **values):
    """Whether a CSV file has a row with these values: such a run has been done."""
    return bool(rows_with(path, **values))


def check_free(folder):
    """Raises FileExistsError for a folder that holds more than what a run leaves before its first checkpoint."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: choose another --out")
    found = {path.name.removesuffix(".part") for path in folder.iterdir() if path.name != "checkpoint.pt.part"}
    if "checkpoint.pt" in found and "summary.json" not in found:
        raise FileExistsError(f"{folder} holds an interrupted run: --resume it, or choose another --out")
    if found and not {"settings.json"} <= found <= RUN_FILES:
        raise FileExistsError(f"{folder} is not empty: choose another --out")


@contextmanager
def claimed(folder, new):
    """Have a folder to oneself, made if need be, and removed again if it stays empty. `new`: it must be free.

    Raises OSError where another process has it; the lock dies with its process. An interruption says how to go on. A
    run that diverges loses its checkpoint, since it would diverge again from there: the same command can start anew.
    """
    if worker() > 0:  # the first process has it for all
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if new:
            check_free(folder)
        yield
    except BlockingIOError:
        raise OSError(f"another run is at work in {folder}: choose another --out, or wait for it") from None
    except FloatingPointError:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        raise
    except KeyboardInterrupt:
        if not (folder / "checkpoint.pt").is_file():
            raise
        raise KeyboardInterrupt(f"go on from the last whole epoch with --resume {folder}") from None
    finally:
        if fcntl:
            os.close(handle)
        for path in missing:
            with suppress(OSError):  # where there is something in it
                path.rmdir()


def digest_of(value):
    """SHA-256 of nested dicts and lists of tensors and plain values: 16 hex digits."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()[:16]


def _feed(sha, value):
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta or value.is_quantized or 0 in value.stride():
            raise ValueError("a tensor of a kind that this program never writes")
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, (dict, list, tuple)):
        sha.update(f"{type(value).__name__} {len(value)}".encode())
        for item in value.items() if isinstance(value, dict) else value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())
