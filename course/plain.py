"""Plain data as bytes, for two processes that do not trust each other: JSON, in which nothing can be executed.

Plain are None, bool, int, float, str, tensors, and lists and dicts of them. Anything else becomes the name of its type.
"""

import json
from dataclasses import dataclass

import torch
from torch import nn

DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.int64, torch.bool)}


@dataclass(frozen=True)
class Other:
    """What has no plain form; all that is known of it is its type."""

    type: str


def dumps(value):
    return json.dumps(_encoded(value)).encode()


def loads(text):
    """Raises ValueError for bytes that `dumps` does not write."""
    try:
        return _decoded(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"not plain data: {error}") from None


def _encoded(value):
    kind = type(value)  # not isinstance: a subclass could answer as it likes
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in (list, tuple, torch.Size):
        return [_encoded(item) for item in value]
    if kind is dict:
        return {"dict": {str(key): _encoded(item) for key, item in value.items()}}
    if kind in (torch.Tensor, nn.Parameter) and str(value.dtype) in DTYPES:
        return {"dtype": str(value.dtype), "shape": list(value.shape), "values": value.detach().flatten().tolist()}
    return {"other": kind.__name__}


def _decoded(value):
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {key: _decoded(item) for key, item in value["dict"].items()}
    if "other" in value:
        return Other(str(value["other"]))
    return torch.tensor(value["values"], dtype=DTYPES[value["dtype"]]).reshape(value["shape"])
