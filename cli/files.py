"""Folders that one run has to itself, and digests of what they hold."""

import hashlib
import os
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile

import torch

from cli.workers import worker

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

RUN_FILES = {  # of a run that is not finished
    "settings.json", "adapter.pt", "log.csv", "training.png", "trace.csv", "trace.png", "ranks.png",
}  # fmt: skip


@contextmanager
def made(folder):
    """A folder, made if need be, that files can be written into; it is removed again if it stays empty.

    Raises OSError where there can be none.
    """
    check_place(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()  # refused now, and not after an hour
        except OSError as error:
            raise OSError(f"nothing can be written in {folder} ({error.strerror}): choose another --out") from None
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # where there is something in it
                path.rmdir()


def check_place(folder):
    """Raises NotADirectoryError where a file is in the way of a folder."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():  # a link that leads nowhere, too
            raise NotADirectoryError(f"{path} is a file: choose another --out")


def check_free(folder, runs=()):
    """Raises FileExistsError for a folder that holds more than what a run leaves before its first checkpoint.

    runs: names of folders in it, for several runs, which must be free.
    """
    check_place(folder)
    if not folder.exists():
        return
    for name in runs:
        check_free(folder / name)
    found = {path.name.removesuffix(".part") for path in folder.iterdir() if path.name != "checkpoint.pt.part"}
    found -= set(runs)
    if "checkpoint.pt" in found and "summary.json" not in found:
        raise FileExistsError(f"{folder} holds a run that is not finished: --resume it, or choose another --out")
    if found and not {"settings.json"} <= found <= RUN_FILES:
        raise FileExistsError(f"{folder} is not empty: choose another --out")


@contextmanager
def claimed(folder, new):
    """Have a folder to oneself, made if need be, and removed again if it stays empty. `new`: it must be free.

    Raises OSError where another process has it. An interruption says how to go on. A run that diverges loses its
    checkpoint, since it would diverge again from there: the same command can start anew.
    """
    if worker() > 0:  # the first process has it for all
        yield
        return
    with made(folder), locked(folder):
        if new:
            check_free(folder)
        try:
            yield
        except FloatingPointError:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            raise
        except KeyboardInterrupt:
            if (folder / "checkpoint.pt").is_file():
                raise KeyboardInterrupt(f"go on from the last whole epoch with --resume {folder}") from None
            raise KeyboardInterrupt("no epoch was finished") from None


@contextmanager
def locked(folder):
    """Raises OSError where another process has locked the folder; its lock dies with it."""
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"another run is at work in {folder}: choose another --out, or wait for it") from None
        yield
    finally:
        os.close(handle)


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
