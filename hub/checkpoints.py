"""Checkpoint folders as they are published: config.json and tensors by name, whole or in shards."""

import json

import torch


def read_tensors(folder):
    """{published name: tensor} of a checkpoint folder, whole or in shards; safetensors needs that package."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        read = read_safetensors if name.endswith("safetensors") else read_torch
        if (folder / name).is_file():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            return {name: tensor for shard in shards for name, tensor in read(folder / shard).items()}
    raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin, nor an index of their shards, in {folder}")


def read_json(path):
    """The object in a JSON file, a dict; ValueError for a file that is damaged or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return found


def read_safetensors(path):
    """All tensors of a file; ValueError for one that is damaged."""
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
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that mean something else can stop an unpickler anywhere
        foreign = ValueError(f"{path} is damaged or not a PyTorch file of plain tensors")
        raise error if isinstance(error, OSError) else foreign from None
