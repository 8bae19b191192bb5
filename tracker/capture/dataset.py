"""Name, length and digest of a data set, without drawing a sample from it."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

logger = logging.getLogger(__name__)

_SLICE = 1 << 24  # bytes of an array that are read at once
_SLICES = 64  # read of one array: of one above 1 GiB, slices spread over it
_ITEMS = 1 << 16  # of a list that are read at once
_DEPTH = 16  # of nested lists
_SCALARS = {str, bytes, bool, int, float, complex}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dataset_name(dataset: Any) -> str:
    """Return the data set's `name`, else its class; a Subset is named after the whole."""
    if isinstance(dataset, Subset):
        return dataset_name(dataset.dataset)
    name = _said(dataset, "name")
    return name if isinstance(name, str) else type(dataset).__name__


class DatasetInput(NamedTuple):
    """The fields of mlflow.entities.Dataset that describe the content."""

    digest: str
    """Up to 36 hexadecimal digits."""
    profile: dict[str, Any]
    """Class and, if known, number of samples."""

    def fields(self, name: str) -> dict[str, str]:
        """Return the fields of mlflow.entities.Dataset; `name` is cut to what MLflow keeps."""
        source = {"tags": {"mlflow.source.name": sys.argv[0] or "notebook"}}
        return {
            "name": name[:500],
            "digest": self.digest,
            "source_type": "code",
            "source": json.dumps(source),
            "profile": json.dumps(self.profile),
        }


def describe_dataset(dataset: Any, *, content: bool = True) -> DatasetInput:
    """Return a digest of the data set's content, and its class and length.

    No sample is drawn. The digest covers class, length, and the tensors, arrays, and lists of
    numbers and texts that the data set or the data sets that it wraps hold as attributes. If it
    has an attribute `digest_of`, that is hashed instead: a text rather than its codes.

    Args:
        dataset: The data set.
        content: Whether the digest covers more than class and length.
    """
    profile: dict[str, Any] = {"class": type(dataset).__name__}
    if (samples := _length(dataset)) is not None:
        profile["samples"] = samples

    def digest(described: Any) -> str:
        hasher = hashlib.blake2b(type(dataset).__name__.encode(), digest_size=16)
        _hash(hasher, described)
        return hasher.hexdigest()

    if content:
        try:
            return DatasetInput(digest(_content(dataset)), profile)
        except Exception as error:  # noqa: BLE001 - the data set may hold anything
            logger.warning("The data set's digest covers only its class and length: %r.", error)
    return DatasetInput(digest(samples), profile)


@contextmanager
def undisturbed(*owners: Any) -> Iterator[None]:
    """Restore the attributes of data sets and loaders, and of those that they wrap, on exit.

    Even a length may open a file lazily, which the loader's workers must not inherit.
    """
    before = [(held, dict(held)) for owner in owners for held in _wrapped(owner, set())]
    try:
        yield
    finally:
        for held, entries in before:
            same = held.keys() == entries.keys() and all(held[k] is entries[k] for k in entries)
            if not same:
                held.clear()
                held.update(entries)


def _wrapped(owner: Any, seen: set[int]) -> Iterator[dict[str, Any]]:
    """Yield the attributes of `owner`, and of the data sets, loaders and samplers in them."""
    held = _attributes(owner)
    if id(held) in seen or len(seen) > _ITEMS:
        return
    seen.add(id(held))
    yield held
    for value in list(held.values()):
        for part in value if type(value) in (list, tuple) and len(value) < _ITEMS else (value,):
            if isinstance(part, (Dataset, DataLoader, Sampler)):
                yield from _wrapped(part, seen)


def _attributes(owner: Any) -> dict[str, Any]:
    """The instance's own attributes, without calling any of its code."""
    try:
        held = object.__getattribute__(owner, "__dict__")
    except AttributeError:
        return {}
    return held if isinstance(held, dict) else {}


def _said(dataset: Any, name: str) -> Any:
    """An attribute or property, None without it; `__getattr__` might open a file."""
    if inspect.getattr_static(dataset, name, None) is None:
        return None
    with undisturbed(dataset):
        try:
            return getattr(dataset, name)
        except Exception:  # noqa: BLE001 - a property may raise anything
            return None


def _length(dataset: Any) -> int | None:
    with undisturbed(dataset):
        try:
            return len(dataset)
        except Exception:  # noqa: BLE001 - the user's own method may raise anything
            return None


def _content(dataset: Any) -> Any:
    """The values that identify a data set."""
    if (source := _said(dataset, "digest_of")) is not None:
        return source
    held = _attributes(dataset)
    if isinstance(dataset, TensorDataset):
        return held.get("tensors")
    if isinstance(dataset, Subset):
        indices = held.get("indices")
        return held.get("dataset"), list(indices) if type(indices) is range else indices
    data, targets = held.get("data"), held.get("targets")
    if isinstance(data, (Tensor, np.ndarray)) and targets is not None:  # torchvision
        return data, targets
    if type(dataset) in (list, tuple, dict):
        return dataset
    return _length(dataset), {name: held[name] for name in sorted(held) if _is_content(held[name])}


def _is_content(value: Any) -> bool:
    """Whether an attribute is data; other objects, and lists of them, may be caches."""
    if type(value) in (list, tuple):
        return bool(value) and (_is_plain(value) or all(isinstance(v, Dataset) for v in value))
    return isinstance(value, (Tensor, np.ndarray, Dataset))


def _is_plain(value: Any, numpy: bool = True, depth: int = 0) -> bool:
    """Whether a list holds numbers and texts only, in lists or not."""
    kinds = set(map(type, value)) - _SCALARS
    if kinds - {list, tuple} and not (
        numpy and all(issubclass(kind, np.generic) for kind in kinds - {list, tuple})
    ):
        return False
    nested = (item for item in value if type(item) in (list, tuple)) if kinds else ()
    return depth < _DEPTH and all(_is_plain(item, numpy, depth + 1) for item in nested)


def _is_picture(value: Any) -> bool:
    """Whether it is a picture in memory; Pillow's other classes read files when used."""
    pillow = sys.modules.get("PIL.Image")  # imported already if the picture is Pillow's
    return pillow is not None and type(value) is pillow.Image


def _hash(hasher: Any, value: Any, depth: int = 0) -> None:
    """Add the content and the type of `value` to the digest, without calling its own code."""
    if depth > _DEPTH:
        hasher.update(b"deeper;")
    elif isinstance(value, Tensor):
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        _hash_tensor(hasher, value.detach())
    elif isinstance(value, np.ndarray) and value.dtype == object:
        _hash(hasher, [value.shape, value.tolist()], depth + 1)
    elif isinstance(value, (np.ndarray, np.generic)):
        hasher.update(f"array {value.dtype} {value.shape};".encode())
        _hash_array(hasher, np.asarray(value))
    elif _is_picture(value):
        hasher.update(f"image {value.mode} {value.size} {value.getpalette()};".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, dict):
        _hash(hasher, list(dict.items(value)), depth + 1)
    elif isinstance(value, (list, tuple)):
        items = list(list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value))
        hasher.update(f"{len(items)} items;".encode())
        for start in range(0, len(items), _ITEMS):
            some = items[start : start + _ITEMS]
            if _is_plain(some, numpy=False):  # ten times faster
                hasher.update(repr(some).encode())
                continue
            for item in some:
                _hash(hasher, item, depth + 1)
    elif value is None or type(value) in _SCALARS:
        hasher.update(f"{type(value).__name__} {value!r};".encode())
    else:  # its repr may contain an address
        hasher.update(f"{type(value).__qualname__};".encode())
        if isinstance(value, Dataset):
            _hash(hasher, _content(value), depth + 1)


def _hash_tensor(hasher: Any, tensor: Tensor) -> None:
    if tensor.is_meta:
        return
    if tensor.layout != torch.strided:
        sparse = tensor.to_sparse().coalesce()
        _hash_tensor(hasher, sparse.indices())
        tensor = sparse.values()
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    tensor = tensor.view(_INTEGERS[tensor.itemsize])  # NumPy lacks bfloat16 and others
    if tensor.is_cpu:
        _hash_array(hasher, tensor.numpy())
        return
    flat = tensor.reshape(-1)
    for part in _slices(flat.numel(), flat.itemsize):
        hasher.update(flat[part].cpu().numpy().tobytes())


def _hash_array(hasher: Any, array: np.ndarray[Any, Any]) -> None:
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flat
    for part in _slices(array.size, array.itemsize):
        hasher.update(flat[part].tobytes())


def _slices(size: int, itemsize: int) -> Iterator[slice]:
    """Slices of a flat array of `size` elements: all of it, or some if it is very large."""
    step = max(1, _SLICE // max(1, itemsize))
    starts = range(0, size, step)
    for start in starts[:: max(1, -(-len(starts) // _SLICES))]:
        yield slice(start, start + step)
