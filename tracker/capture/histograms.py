"""Histograms of tensors: exact counts in fixed bins.

The bin of a number follows from its bits: sign, exponent and the first three bits of the mantissa,
which makes eight bins per octave. Fixed bins need no minimum and maximum, so nothing waits for the
device, and the counts of several epochs or ranks can be added.

Bin 0 contains |x| < 2**-126. Bin k > 0 covers
    [2**e * (1 + m/8), 2**e * (1 + (m+1)/8))   with   k - 1 = (e + 126) * 8 + m,   m = 0 … 7,
and bin -k covers its mirror image, (-right, -left].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracker.transfers import local_copy

_MANTISSA_BITS = 3
_PER_OCTAVE = 1 << _MANTISSA_BITS
_SMALLEST = -126  # exponent of the smallest normal float32, where bin 1 starts
_INFINITE, _NAN = 1 << 15, (1 << 15) + 1  # outside the 2**14 bins of a float64 on either side
_STRIDE = 1 << 17
_CHUNK = 1 << 17  # elements to bin at a time
_CHUNK_ON_DEVICE = 1 << 22  # a kernel launch costs more than a cache miss


class Layout(NamedTuple):
    """How the bits of a float type become an index into its counts."""

    integer: torch.dtype
    shift: int  # leaves sign, exponent and _MANTISSA_BITS
    cells: int  # of both signs together
    bias: int


_FLOAT32 = Layout(torch.int32, 23 - _MANTISSA_BITS, 2 << (8 + _MANTISSA_BITS), 127)
_FLOAT64 = Layout(torch.int64, 52 - _MANTISSA_BITS, 2 << (11 + _MANTISSA_BITS), 1023)


class Histogram(NamedTuple):
    """The distribution of one tensor's elements; a complex one counts as two."""

    bins: npt.NDArray[np.int64]
    """Numbers of the bins that are not empty, ascending, shape (bins,)."""
    counts: npt.NDArray[np.int64]
    """Finite elements in each of these bins, shape (bins,)."""
    nan: int
    """Number of NaNs."""
    posinf: int
    """Number of positive infinities."""
    neginf: int
    """Number of negative infinities."""


def histograms(tensors: Sequence[Tensor]) -> list[Histogram]:
    """Return the histogram of each tensor, with a single transfer to the host.

    Args:
        tensors: Any shape and dtype, dense or sparse, all on one device.
    """
    return count_rows([row_of(tensor) for tensor in tensors])


def count_rows(rows: Sequence[Row]) -> list[Histogram]:
    """Return the histogram of each row, with a single transfer; all are on one device."""
    # A network of one dtype, the usual case, is counted and decoded in one go.
    groups = ((layout, list(some)) for layout, some in groupby(rows, _layout))
    return decoded([Counts(_count(some, layout), layout) for layout, some in groups])


class Counts(NamedTuple):
    """Numbers that a device has counted, or will have when it gets there; see `count`."""

    cells: Tensor
    """By sign, exponent and mantissa bits, negative numbers first, (tensors * layout.cells,)."""
    layout: Layout
    """The float type as which they were counted."""


def count(tensor: Tensor) -> Counts:
    """Count the elements of a tensor, without waiting for its device.

    The counts of several tensors can be added if their devices and layouts are equal.
    """
    row = row_of(tensor)
    return Counts(_count([row], _layout(row)), _layout(row))


def decoded(counts: Sequence[Counts]) -> list[Histogram]:
    """Return the histogram of each counted tensor, with a single transfer from their device."""
    result: list[Histogram] = []
    if not counts:
        return result
    cells = [one.cells for one in counts]
    flat = (torch.cat(cells) if len(cells) > 1 else cells[0]).cpu().numpy()
    start = 0
    for layout, some in groupby(counts, lambda one: one.layout):
        end = start + sum(len(one.cells) for one in some)
        result += _decode(flat[start:end], layout)
        start = end
    return result


def added(parts: Sequence[Histogram]) -> Histogram:
    """Return one histogram of the elements of several."""
    if len(parts) == 1:
        return parts[0]
    bins, places = np.unique(np.concatenate([one.bins for one in parts]), return_inverse=True)
    counts = np.zeros(len(bins), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([one.counts for one in parts]))
    return Histogram(bins, counts, *np.sum([one[2:] for one in parts], axis=0).tolist())


class Row(NamedTuple):
    """The elements of a tensor; see `row_of`."""

    values: Tensor
    """Real numbers of any dtype, (elements,)."""
    zeros: int = 0
    """The number of zeros that are left out of them."""


def _layout(row: Row) -> Layout:
    """Every value of a shorter float type is a float32; integers are counted as float64."""
    dtype = row.values.dtype
    return _FLOAT32 if dtype.is_floating_point and dtype != torch.float64 else _FLOAT64


def row_of(tensor: Tensor) -> Row:
    """Return the elements of a tensor, not yet converted: a network would be copied."""
    tensor, zeros = _whole(tensor.detach()), 0
    if tensor.is_nested:
        tensor = torch.cat([part.reshape(-1) for part in tensor.unbind()])
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:  # such as the gradient of nn.Embedding(sparse=True)
        tensor = tensor if tensor.layout == torch.sparse_coo else tensor.to_dense().to_sparse()
        size, tensor = tensor.numel(), tensor.coalesce().values()
        zeros = (size - tensor.numel()) * (2 if tensor.is_complex() else 1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    row = Row(tensor.resolve_neg().reshape(-1), zeros)
    _converted(row.values[:1])  # raises if the dtype cannot be counted
    return row


def _whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or the local copy of a DTensor that every rank has whole."""
    if tensor.is_meta:
        raise ValueError("it is on the device meta, without values")
    if getattr(tensor, "_is_flat_param", False):
        raise ValueError("FSDP keeps a part of it on each rank")
    if (local := local_copy(tensor)) is None:
        raise ValueError("each rank has a part of it")
    return local


def _converted(values: Tensor) -> Tensor:
    """Convert a piece of a row to the float type of its layout."""
    if values.dtype in (torch.float32, torch.float64):
        return values
    floats = values.float() if values.is_floating_point() else values.double()
    return floats.add_(0.0)  # makes NaNs of float8 quiet


def _count(rows: Sequence[Row], layout: Layout) -> Tensor:
    """Counts by sign, exponent and mantissa bits, (rows * cells,); negative numbers first."""
    half = layout.cells // 2
    counts: list[Tensor | None] = [None] * len(rows)
    for numbers, pieces in _packs([values for values, _ in rows]):
        floats = [_converted(piece) for piece in pieces]
        values = torch.cat(floats) if len(floats) > 1 else floats[0]
        index = (values.view(layout.integer) >> layout.shift).add_(half)
        parts = index.split([len(piece) for piece in pieces])
        for number, part in zip(numbers, parts, strict=True):
            counted, before = _bincount(part, layout.cells), counts[number]
            counts[number] = counted if before is None else before + counted
    for (_, zeros), count in zip(rows, counts, strict=True):
        if zeros and count is not None:
            count[half] += zeros
    return torch.cat([count for count in counts if count is not None])


def _packs(rows: Sequence[Tensor]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yield the rows in packs of limited size: numbers of the rows, and a piece of each.

    Small tensors are packed together because an operation costs more than their elements. Large
    ones are split into pieces that fit the cache and limit the memory of the indices.
    """
    numbers: list[int] = []
    pieces: list[Tensor] = []
    size, most = 0, _CHUNK if rows[0].device.type == "cpu" else _CHUNK_ON_DEVICE
    for number, row in enumerate(rows):
        for piece in row.split(most) if len(row) > most else (row,):
            if pieces and size + len(piece) > most:
                yield numbers, pieces
                numbers, pieces, size = [], [], 0
            numbers.append(number)
            pieces.append(piece)
            size += len(piece)
    yield numbers, pieces


def _bincount(index: Tensor, cells: int) -> Tensor:
    if index.device.type == "cpu":
        return torch.bincount(index, minlength=cells)
    # On a GPU, torch.bincount waits for the largest index.
    counts = torch.zeros(cells, dtype=torch.int64, device=index.device)
    one = torch.ones((), dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.long(), one.expand_as(index))


@cache
def _bins(layout: Layout) -> npt.NDArray[np.int64]:
    """The bin of each cell; +-_INFINITE and _NAN for values that are not finite."""
    half = layout.cells // 2
    magnitude = np.arange(half)
    first = (_SMALLEST + layout.bias) * _PER_OCTAVE
    bins = np.maximum(magnitude - first + 1, 0)
    infinite = (2 * layout.bias + 1) * _PER_OCTAVE
    bins[infinite] = _INFINITE  # an infinity has mantissa 0
    bins[infinite + 1 :] = _NAN  # a NaN has another, with its first bit set
    # A float with the sign bit set is negative as an integer too: cell 0 is that of -0.0.
    return np.concatenate([np.where(bins == _NAN, bins, -bins), bins])


def _decode(flat: npt.NDArray[np.int64], layout: Layout) -> list[Histogram]:
    """Turn the counts of all cells, (rows * cells,), into one histogram per row."""
    used = np.flatnonzero(flat != 0)  # twice as fast on bools
    row, cell = np.divmod(used, layout.cells)
    counts = flat[used]
    # One key for tensor and bin: a single sort orders the cells and joins those of a bin.
    key = row * _STRIDE + _bins(layout)[cell] + _STRIDE // 2
    order = np.argsort(key, kind="stable")
    key, counts = key[order], counts[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    counts = np.add.reduceat(counts, starts) if len(starts) else counts
    row, bins = np.divmod(key[starts], _STRIDE)
    bins -= _STRIDE // 2
    ends = np.searchsorted(row, np.arange(len(flat) // layout.cells + 1))
    pairs = pairwise(ends.tolist())
    if len(bins) == 0 or (bins.max() < _INFINITE and bins.min() > -_INFINITE):
        return [Histogram(bins[i:j], counts[i:j], 0, 0, 0) for i, j in pairs]
    return [_split(bins[i:j], counts[i:j]) for i, j in pairs]


def _split(bins: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Histogram:
    """Separate the values that are not finite, at either end of the ascending bins."""
    special = {_NAN: 0, _INFINITE: 0, -_INFINITE: 0}
    start, end = 0, len(bins)
    while end > start and (last := int(bins[end - 1])) in special:
        end -= 1
        special[last] = int(counts[end])
    if end > start and (first := int(bins[start])) in special:
        special[first] = int(counts[start])
        start += 1
    return Histogram(bins[start:end], counts[start:end], *special.values())


def bin_edges(bins: Iterable[int]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the left and right edges of the bins with these numbers, shape (bins,) each."""
    number = np.asarray(list(bins), dtype=np.int64)

    def lower(k: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        exponent, eighth = np.divmod(k - 1, _PER_OCTAVE)
        with np.errstate(over="ignore"):  # the last bin of a float64 ends at infinity
            edges: npt.NDArray[np.float64] = np.ldexp(
                1 + eighth / _PER_OCTAVE, exponent + _SMALLEST
            )
        return edges

    size = np.abs(number)
    near = np.where(size == 0, 0.0, lower(np.maximum(size, 1)))
    far = lower(size + 1)
    left = np.where(number > 0, near, -far)
    return left, np.where(number < 0, -near, far)
