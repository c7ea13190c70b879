"""How tools/fuzz.py changes valid files: bytes, values inside of JSON, pickles and tensors, or the kind of file."""

import copy
import io
import json
import os
import zipfile

import torch

ODD = [None, True, False, 0, -1, 1, 2, 10**6, 10**9, 10**20, 0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "",
       "x", "5", "../x", "/dev/zero", "\0", "a" * 10_000, "(a+)+$", ".*", "auto", [], [1], ["x"], [[]], {}, {"a": 1},
       {"": None}]  # fmt: skip


def odd_tensor(value, rng):
    """The tensor, changed in kind, shape or contents."""
    if value.numel() > 10_000:  # changed before, into one that only pretends to be large
        return value[:1]
    changes = [
        lambda: value.to(rng.choice([torch.int8, torch.bool, torch.complex64, torch.float64, torch.bfloat16])),
        lambda: value.reshape(-1),
        lambda: value[None],
        lambda: value[:0],
        lambda: value[:1],
        lambda: value.T.contiguous(),
        lambda: torch.full_like(value, rng.choice([float("nan"), float("inf"), -1e38])),
        lambda: value.to_sparse(),
        lambda: torch.zeros(1).expand(rng.choice([value.shape, (10**6, 10**6), (2**40,)])),
        lambda: torch.empty(rng.choice([value.shape, (10**9, 10**9)]), device="meta"),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda: value.tolist(),
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError, TypeError, NotImplementedError):  # not every tensor bears every change
        return torch.zeros(2, 3, 4)


def change_tree(tree, rng):
    """Change one node of nested dicts and lists, in place; returns the tree."""
    node = tree
    while isinstance(node, (dict, list)) and len(node):
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        deeper = isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7
        if deeper:
            node = node[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del node[key]
        elif kind < 0.25 and isinstance(node, dict):
            node[rng.choice(["", "x", 7, str(key) + "x", str(key)[1:]])] = node.pop(key)
        elif kind < 0.3 and isinstance(node, dict):
            node[rng.choice(["extra", "lm_head.decoder.weight", "use_dora", 3])] = copy.deepcopy(node[key])
        elif isinstance(node[key], torch.Tensor) and kind < 0.85:
            node[key] = odd_tensor(node[key], rng)
        elif isinstance(node[key], (int, float)) and kind < 0.5:
            node[key] = node[key] * rng.choice([-1, 2, 0.5, 10**6]) + rng.choice([0, 1, -1])
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
        return tree
    return copy.deepcopy(rng.choice(ODD))


def change_bytes(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64, 1000])
        change = rng.randrange(6)
        if change == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif change == 1:
            data[at : at + size] = rng.randbytes(size)
        elif change == 2:
            del data[at : at + size]
        elif change == 3:
            data[at:at] = data[at : at + size]
        elif change == 4:
            data[at : at + 8] = rng.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little")
        elif change == 5 and rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def change_zip(data, rng):
    """Change one member of a zip archive, with right checksums: torch.save's pickle, say."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in members if name.endswith(".pkl")] * 9 + list(members))
    members[name] = change_bytes(members[name], rng)
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return packed.getvalue()


def save_torch(value):
    torch.save(value, packed := io.BytesIO())
    return packed.getvalue()


def load_safetensors(data):
    from safetensors.torch import load

    return load(data)


def save_safetensors(value):
    from safetensors.torch import save

    return save(value)


FORMATS = {  # ending: (bytes -> tree, tree -> bytes)
    ".json": (json.loads, lambda tree: json.dumps(tree).encode()),
    ".safetensors": (load_safetensors, save_safetensors),
    ".bin": (lambda data: torch.load(io.BytesIO(data), weights_only=True), save_torch),
    ".pt": (lambda data: torch.load(io.BytesIO(data), weights_only=True), save_torch),
}
RARE = [b"", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"null", b"1", b'"x"', b"PK\x03\x04"]


def changed(data, ending, rng):
    """The bytes of a valid file, changed."""
    kind = rng.random()
    if kind < 0.02:
        return rng.choice(RARE)
    if kind < 0.6 and ending in FORMATS:
        parse, dump = FORMATS[ending]
        tree = parse(data)
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            tree = change_tree(tree, rng)
        try:
            return dump(tree)
        except Exception:  # what cannot be written in this format cannot come in either
            pass
    if ending in (".bin", ".pt") and kind < 0.85:
        return change_zip(data, rng)
    return change_bytes(data, rng)


def replaced(path, rng):
    """Something that is no file in the place of one."""
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(rng.choice(["/dev/zero", path.name, "nowhere"]))
