"""The number of samples in a batch, whatever a loader yields.

A batch is a tensor (N, …), samples that were not joined (a list of pictures), or fields: a mapping,
or a sequence such as (inputs, labels). Fields that contradict each other are decided by the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Number
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tracker.errors import ArgumentError

_LABELS = ("labels", "label", "targets", "target", "y")
_CHANNELS = (1, 3, 4)
_SMALLEST_PICTURE = 8  # pixels; a shorter side is rather a feature than a width
_MOST_FIELDS = 3  # more tensors of one shape are taken for samples


def batch_size(
    batch: Any, on_guess: Callable[[int], object] | None = None, *, is_collated: bool = False
) -> int:
    """Return the number of samples in a batch.

    Args:
        batch: The number itself, a tensor or array (N, …), a packed sequence, a list of samples,
            or a list, tuple or mapping of such fields.
        on_guess: Called with the result if the batch can be read in several ways.
        is_collated: Whether torch's `default_collate` made it, which joins all samples.

    Raises:
        ArgumentError: The batch is something else.
    """
    if isinstance(batch, Integral) and not isinstance(batch, bool) and int(batch) > 0:
        return int(batch)
    if (size := _size(batch)) is not None:
        if size.is_guess and is_collated and isinstance(batch, (list, tuple)):
            size = _agreed_size(batch) or size
        if size.is_guess and on_guess is not None:
            on_guess(size.samples)
        return size.samples
    shown = batch if isinstance(batch, Number) else type(batch).__name__
    raise ArgumentError(
        f"batch={shown} has no size; allowed: a tensor, a list of samples, a tuple, list or "
        "mapping of these, or the number of samples."
    )


class _Size(NamedTuple):
    """The size of a batch."""

    samples: int
    is_guess: bool = False
    """Whether the batch can be read in several ways."""
    other: int | None = None
    """The size in the other of two ways."""


def _size(batch: Any) -> _Size | None:
    if isinstance(batch, PackedSequence):
        return _Size(int(batch.batch_sizes[0]))
    if isinstance(batch, Tensor):
        return _Size(batch.size(0)) if batch.dim() else None
    if isinstance(batch, np.ndarray):
        return _Size(len(batch)) if batch.ndim else None
    if isinstance(batch, Mapping):
        return _mapping_size(batch)
    if isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)) and batch:
        return _sequence_size(batch)
    return None


def _mapping_size(batch: Mapping[Any, Any]) -> _Size | None:
    """The size of the labels, else of the first tensor, else of the first field that has one."""
    labels = [batch[name] for name in _LABELS if name in batch]
    tensors = [value for value in batch.values() if _kind(value) == "array"]
    sizes = map(_field_size, (*labels, *tensors, *batch.values()))
    return next((size for size in sizes if size is not None), None)


def _sequence_size(batch: Sequence[Any]) -> _Size | None:
    kinds = {_kind(member) for member in batch}
    if kinds == {"array"}:
        return _size_of_arrays(batch)
    if (len(kinds) == 1 and kinds <= {"scalar", "mapping"}) or all(map(_is_sample, batch)):
        return _Size(len(batch))
    return _size_of_fields(batch)


def _kind(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return "array" if value.ndim else "scalar"
    if isinstance(value, PackedSequence):
        return "array"
    if isinstance(value, Mapping):
        return "mapping"
    return "sequence" if isinstance(value, (list, tuple)) else "scalar"


def _is_sample(member: Any) -> bool:
    """Whether it is one sample of a batch that was not joined, such as (picture, class)."""
    return isinstance(member, (list, tuple)) and (
        len({_kind(part) for part in member if _kind(part) != "sequence"}) > 1
    )


def _size_of_arrays(batch: Sequence[Any]) -> _Size | None:
    """The size of a sequence of tensors: each one is a sample, or a field (N, …)."""
    if any(isinstance(array, PackedSequence) or _is_nested(array) for array in batch):
        return _size_of_fields(batch)  # they have no shape
    shapes = [tuple(array.shape) for array in batch]
    first = shapes[0]
    are_pictures = all(
        len(shape) == 3 and shape[0] in _CHANNELS and min(shape[1:]) >= _SMALLEST_PICTURE
        for shape in shapes
    )
    if are_pictures:
        samples = len(batch)
        if samples > _MOST_FIELDS or any(shape[0] != first[0] for shape in shapes):
            return _Size(samples)
        # Pictures of first[0] channels, or sequences of first[0] samples, as fields.
        if isinstance(batch, tuple) and all(shape[1] == first[1] for shape in shapes):
            return _Size(first[0], is_guess=first[0] != samples, other=samples)
        return _Size(samples, is_guess=first[0] != samples, other=first[0])
    if any(len(shape) != len(first) for shape in shapes):
        return _size_of_fields(batch)
    if any(shape[0] != first[0] for shape in shapes):
        if all(shape[1:] == first[1:] for shape in shapes):  # sequences of different lengths
            return _Size(len(batch), is_guess=len(batch) == 2 and len(first) > 1)
        return _size_of_fields(batch)
    if len(batch) > _MOST_FIELDS and len(set(shapes)) == 1 and len(first) < 4:
        return _Size(len(batch), is_guess=True)
    return _Size(first[0])


def _agreed_size(fields: Sequence[Any]) -> _Size | None:
    """The size of fields if they agree on one."""
    size = _size_of_fields(fields)
    return None if size is None or size.is_guess else size


def _is_nested(array: Any) -> bool:
    return isinstance(array, Tensor) and array.is_nested


def _field_size(field: Any) -> _Size | None:
    if isinstance(field, (list, tuple)) and {_kind(member) for member in field} == {"sequence"}:
        return _Size(len(field))  # the words of each sample
    return _size(field)


def _size_of_fields(fields: Sequence[Any]) -> _Size | None:
    """The size that all fields agree on; else that of pictures, of labels (N,), or of the last."""
    known = [(field, size) for field in fields if (size := _field_size(field)) is not None]
    if not known:
        return None
    sizes = {size.samples for _, size in known}
    if len(sizes) > 1 and (sure := {size.samples for _, size in known if not size.is_guess}):
        readings = [{size.samples, size.other} for _, size in known if size.is_guess]
        sizes = sure if all(sure <= reading for reading in readings) else sizes
    if len(sizes) == 1:
        return _Size(sizes.pop())
    for dimensions in (4, 1):
        for field, size in reversed(known):
            if getattr(field, "ndim", 0) == dimensions:
                return _Size(size.samples, is_guess=True)
    return _Size(known[-1][1].samples, is_guess=True)
