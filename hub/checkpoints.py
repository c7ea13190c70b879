"""Checkpoint folders as they are published: config.json and tensors by name, whole or in shards.

The files come from anywhere, so nothing in them is believed: whatever is wrong with one ends in an OSError or in a
ValueError that names the file, never in a hang, a crash elsewhere or code that the file brought along.
"""

import json
import os
import stat
from contextlib import suppress
from pathlib import Path

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(folder):
    """{published name: (tensor, its file)} of a checkpoint folder, whole or in shards.

    Raises FileNotFoundError where there are no weights, or where safetensors files lack the package of that name, and
    ValueError for files that are damaged. What the tensors hold is for `check_weight` to say.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.exists() or index.exists():
            paths = [path] if path.exists() else [folder / shard for shard in read_index(index)]
            return {name: (tensor, file) for file in paths for name, tensor in read_named_tensors(file).items()}
    raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin, nor an index of their shards, in {folder}")


def read_index(path):
    """The shards' file names in an index, sorted. Raises ValueError for one that leads out of its folder."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ValueError(f"{path} is damaged: weight_map should give the file of every tensor, by name")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(f"{path} names the file {shard!r}, but shards must lie in the folder of their index")
    return shards


def read_named_tensors(path):
    """{name: tensor} of one file: safetensors by its ending, else what torch.save writes."""
    tensors = read_safetensors(path) if path.name.endswith(".safetensors") else read_torch(path)
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"the weights in {path} have no names: expected a dictionary of tensors by name")
    return tensors


def check_tensors(stored, shapes, folder):
    """Raises ValueError unless the tensors hold what a model needs.

    stored: what `read_tensors` returned; shapes: {name: the shape that config.json asks for}
    """
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise ValueError(f"the checkpoint in {folder} lacks {len(missing)} tensors: {', '.join(missing[:4])}")
    for name, expected in shapes.items():
        tensor, path = stored[name]
        check_weight(tensor, f"{name} in {path}")
        if tensor.shape != expected:
            found = tuple(tensor.shape)
            raise ValueError(f"{name} in {path} has shape {found}, but config.json asks for {expected}")


def check_weight(value, where):
    """Raises ValueError unless a value from a file is a dense tensor of floating-point numbers, finite in float32.

    where: the tensor's name and file, for the message
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{where} is a {type(value).__name__}, expected a tensor")
    if value.dtype not in FLOATS or value.layout != torch.strided or value.is_meta or value.is_nested:
        found = f"{value.dtype}, {value.layout}, {value.device}"
        raise ValueError(f"{where} is a tensor of another kind ({found}), expected dense float32 or float16, in memory")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{where} holds fewer numbers than its shape {tuple(value.shape)} says")
    if not value.float().isfinite().all():
        raise ValueError(f"{where} has entries that are not finite: the run that wrote it diverged, or it is damaged")


def check_regular(path):
    """Raises FileNotFoundError where there is no file, ValueError for a folder, a pipe, a device or a pointer."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer, perhaps forever
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise ValueError(f"{path} only points to a file that Git LFS has: git lfs pull brings it")


def read_json(path):
    """The object in a JSON file, a dict; ValueError for a file that is damaged or holds something else."""
    check_regular(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))  # Windows programs write a mark in front
    except (ValueError, RecursionError):  # the latter for brackets nested without end
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found


def read_json_if_there(path):
    """`read_json`, but an empty dict if there is no such file."""
    return read_json(path) if path.exists() else {}


def read_safetensors(path):
    """All tensors of a file; ValueError for one that is damaged."""
    check_regular(path)
    try:
        import safetensors.torch
    except ImportError:
        raise FileNotFoundError(f"{path} needs a package: pip install safetensors") from None
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def read_torch(path):
    """torch.load of tensors and plain values to the CPU; ValueError for a file that is damaged or holds more."""
    check_regular(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that mean something else can stop an unpickler anywhere
        foreign = ValueError(f"{path} is damaged or not a PyTorch file of plain tensors")
        raise error if isinstance(error, OSError) else foreign from None


def write_tensors(tensors, folder, safetensors, other, prefer=True):
    """Write {name: tensor} to a file of the folder: the one called `safetensors` where its package is installed and it
    is preferred, else by torch.save the one called `other`. The file under the other name goes: it is an older one."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        prefer = False

    def save(path):
        try:
            save_file(tensors, path, {"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from None

    if prefer:
        write_atomically(folder / safetensors, save)
        (folder / other).unlink(missing_ok=True)
    else:
        write_atomically(folder / other, lambda path: torch.save(tensors, path))
        (folder / safetensors).unlink(missing_ok=True)


def write_atomically(path, write):
    """Call write(path of a temporary file), then put the file in place: readers see all of it or nothing.

    Raises OSError where that fails, and leaves the file as it was.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    except RuntimeError as error:  # of torch.save, which says little
        raise OSError(f"{path} cannot be written: {error}; is the disk full?") from None
    finally:
        with suppress(OSError):
            part.unlink()
