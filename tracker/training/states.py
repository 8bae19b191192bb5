"""A codec for states of optimizers, schedulers and the like: JSON and tensors, never pickle."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracker.errors import ArgumentError

# A type that JSON lacks becomes an object with one key that begins with "!".
_SEQUENCES = {"!tuple": tuple, "!set": set, "!frozenset": frozenset, "!Size": torch.Size}
_MAPPINGS = {"!dict": dict, "!OrderedDict": OrderedDict, "!Counter": Counter}
_SCALARS: dict[str, Callable[[Any], Any]] = {
    "!float": lambda bits: struct.unpack(">d", bytes.fromhex(bits))[0],
    "!scalar": lambda parts: np.frombuffer(bytes.fromhex(parts[1]), parts[0])[0],
    "!dtype": lambda name: _dtype(name),
    "!device": torch.device,
    "!bytes": bytes.fromhex,
}


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON data, and move its tensors and arrays to `tensors`.

    Args:
        value: Tensors, arrays, numbers, strings, bytes, None, dtypes, devices, and lists, tuples,
            sets and dicts of these.
        path: Where the value comes from, for tensor names and errors.
        tensors: Receives each tensor, on the CPU, under the path to it.

    Raises:
        ArgumentError: The value contains another type.
    """
    kind = type(value)
    tag = f"!{kind.__name__}"
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:  # not finite: as bits, because there are many NaNs
        return value if math.isfinite(value) else {tag: struct.pack(">d", value).hex()}
    if kind in (Tensor, nn.Parameter):
        return {"!tensor": _put(value.detach().cpu(), path, tensors)}
    if kind is np.ndarray and _is_plain(value.dtype):
        return {"!array": _put(torch.from_numpy(value.copy()), path, tensors)}
    if isinstance(value, np.generic) and _is_plain(value.dtype):
        return {"!scalar": [value.dtype.str, value.tobytes().hex()]}
    if kind in (torch.dtype, torch.device):
        return {tag: str(value).removeprefix("torch.")}
    if kind is bytes:
        return {tag: value.hex()}
    if kind is list:
        return [encode(item, f"{path}[{i}]", tensors) for i, item in enumerate(value)]
    if kind in _SEQUENCES.values():
        return {tag: encode(list(value), path, tensors)}
    if kind is dict and all(type(key) is str and key[:1] != "!" for key in value):
        return {key: encode(item, f"{path}[{key!r}]", tensors) for key, item in value.items()}
    if kind in _MAPPINGS.values():
        pairs = [
            [encode(key, f"{path} key", tensors), encode(item, f"{path}[{key!r}]", tensors)]
            for key, item in value.items()
        ]
        return {tag: pairs}
    raise ArgumentError(
        f"{path} has the type {kind.__name__}; a checkpoint can hold tensors, arrays, numbers, "
        "strings, bytes, None, and lists, tuples, sets and dicts of these."
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Invert `encode`; the tensors are copied, because training changes them.

    Args:
        value: What `encode` returned.
        tensors: The tensors that `encode` collected.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    for tag, body in value.items():
        if tag in ("!tensor", "!array"):
            tensor = tensors[body].clone()
            return tensor if tag == "!tensor" else tensor.numpy()
        if tag in _SCALARS:
            return _SCALARS[tag](body)
        if tag in _SEQUENCES:
            return _SEQUENCES[tag](decode(body, tensors))
        if tag in _MAPPINGS:
            return _MAPPINGS[tag]({decode(k, tensors): decode(item, tensors) for k, item in body})
    return {key: decode(item, tensors) for key, item in value.items()}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):  # a checkpoint may come from anybody
        raise ValueError(f"{name} is not a dtype")
    return dtype


def _is_plain(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufc" and dtype.isnative and dtype.char not in "gG"  # long doubles


def _put(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    if tensor.layout is torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.clone()  # torch.save would save everything that a view shares
    while path in tensors:  # two keys may look the same: NaN
        path += "'"
    tensors[path] = tensor
    return path
