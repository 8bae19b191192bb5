"""Histograms of all weights and gradients of a network: exact counts in fixed bins.

The bin of a number is read off its bits: sign, exponent and the first three bits of the mantissa,
eight bins an octave. Such bins need no range, so no pass for minimum and maximum and no wait for
the device; they are the same for every tensor and epoch, and counts of several epochs or ranks add.

Bins have numbers. Bin 0 is |x| < 2**-126, zero for short. Bin k > 0 covers
    [2**e * (1 + m/8), 2**e * (1 + (m+1)/8))   with   k - 1 = (e + 126) * 8 + m,   m = 0 … 7,
and bin -k is its mirror image, (-right, -left].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_MANTISSA_BITS = 3
_PER_OCTAVE = 1 << _MANTISSA_BITS
_SMALLEST = -126  # exponent of the smallest normal float32, the first bin that is not zero's
_INFINITE, _NAN = 1 << 15, (1 << 15) + 1  # beyond the 2**14 bins of a float64 on either side
_STRIDE = 1 << 17
_CHUNK = 1 << 17  # elements binned at a time
_CHUNK_ON_DEVICE = 1 << 22  # there a launch costs more than a cache


class _Layout(NamedTuple):
    """How a float type's bits become a cell of its counts."""

    integer: torch.dtype
    shift: int  # drops all but sign, exponent and _MANTISSA_BITS
    cells: int  # with either sign
    bias: int


_LAYOUTS = {
    torch.float32: _Layout(torch.int32, 23 - _MANTISSA_BITS, 2 << (8 + _MANTISSA_BITS), 127),
    torch.float64: _Layout(torch.int64, 52 - _MANTISSA_BITS, 2 << (11 + _MANTISSA_BITS), 1023),
}


class Histogram(NamedTuple):
    """The distribution of one tensor's elements."""

    bins: npt.NDArray[np.int64]
    """Numbers of the bins that are not empty, ascending."""
    counts: npt.NDArray[np.int64]
    """How many elements each of them holds; together all the finite ones."""
    nan: int
    posinf: int
    neginf: int


def histograms(tensors: Sequence[Tensor]) -> list[Histogram]:
    """The histogram of each tensor: any shape, any real dtype, all on one device.

    One transfer to the host for all of them.
    """
    if not tensors:
        return []
    rows = [_values(tensor) for tensor in tensors]
    # Networks of one dtype, nearly all of them, are counted and decoded in one go.
    groups = [(_LAYOUTS[t], list(some)) for t, some in groupby(rows, lambda row: row[0].dtype)]
    counts = [_count(some, layout) for layout, some in groups]
    flat = (torch.cat(counts) if len(counts) > 1 else counts[0]).cpu().numpy()
    found: list[Histogram] = []
    start = 0
    for layout, some in groups:
        end = start + len(some) * layout.cells
        found += _decode(flat[start:end], layout)
        start = end
    return found


def _values(tensor: Tensor) -> tuple[Tensor, int]:
    """The elements as one row of float32 or float64, and how many zeros stand beside them."""
    tensor, zeros = tensor.detach(), 0
    if tensor.layout == torch.strided and tensor.dtype in _LAYOUTS:
        return tensor.resolve_neg().reshape(-1), 0
    if tensor.layout != torch.strided:  # the gradient of nn.Embedding(sparse=True), for one
        tensor = tensor if tensor.layout == torch.sparse_coo else tensor.to_dense().to_sparse()
        size, tensor = tensor.numel(), tensor.coalesce().values()
        zeros = (size - tensor.numel()) * (2 if tensor.is_complex() else 1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype not in _LAYOUTS:  # half, bfloat16 and float8 are float32s with fewer bits
        tensor = tensor.float() if tensor.is_floating_point() else tensor.double()
        tensor.add_(0.0)  # makes a NaN of float8 a quiet one
    return tensor.resolve_neg().reshape(-1), zeros


def _count(rows: Sequence[tuple[Tensor, int]], layout: _Layout) -> Tensor:
    """Counts by sign, exponent and mantissa bits, those of negative numbers first, row by row."""
    half = layout.cells // 2
    counts: list[Tensor | None] = [None] * len(rows)
    for numbers, pieces in _packs([values for values, _ in rows]):
        values = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
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
    """The rows, by number and piece, in packs of so many elements at most.

    Small tensors together, for an operation on each costs more than its elements; large ones in
    pieces that stay in the cache and bound the memory that indices take.
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
    # torch.bincount asks a GPU for the largest index, and waits for the answer.
    counts = torch.zeros(cells, dtype=torch.int64, device=index.device)
    one = torch.ones((), dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index.long(), one.expand_as(index))


@cache
def _bins(layout: _Layout) -> npt.NDArray[np.int64]:
    """The bin of each cell; beyond the finite bins +-_INFINITE and _NAN."""
    half = layout.cells // 2
    magnitude = np.arange(half)
    first = (_SMALLEST + layout.bias) * _PER_OCTAVE
    bins = np.maximum(magnitude - first + 1, 0)
    infinite = (2 * layout.bias + 1) * _PER_OCTAVE
    bins[infinite] = _INFINITE  # an infinity has no mantissa
    bins[infinite + 1 :] = _NAN  # a NaN has, its first bit set
    # As an integer a number with the sign bit set is negative: cell 0 is that of -0.0.
    return np.concatenate([np.where(bins == _NAN, bins, -bins), bins])


def _decode(flat: npt.NDArray[np.int64], layout: _Layout) -> list[Histogram]:
    used = np.flatnonzero(flat != 0)  # of bools: twice as fast
    row, cell = np.divmod(used, layout.cells)
    found = flat[used]
    # One number for tensor and bin, so that one sort orders, and joins, the cells of a bin.
    key = row * _STRIDE + _bins(layout)[cell] + _STRIDE // 2
    order = np.argsort(key, kind="stable")
    key, found = key[order], found[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    counts = np.add.reduceat(found, starts) if len(starts) else found
    row, bins = np.divmod(key[starts], _STRIDE)
    bins -= _STRIDE // 2
    ends = np.searchsorted(row, np.arange(len(flat) // layout.cells + 1))
    pairs = pairwise(ends.tolist())
    if len(bins) == 0 or (bins.max() < _INFINITE and bins.min() > -_INFINITE):
        return [Histogram(bins[i:j], counts[i:j], 0, 0, 0) for i, j in pairs]
    return [_split(bins[i:j], counts[i:j]) for i, j in pairs]


def _split(bins: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> Histogram:
    """Set what is not finite, at either end of the ascending bins, apart."""
    special = {_NAN: 0, _INFINITE: 0, -_INFINITE: 0}
    start, end = 0, len(bins)
    while end > start and (last := int(bins[end - 1])) in special:
        end -= 1
        special[last] = int(counts[end])
    if end > start and (first := int(bins[start])) in special:
        special[first] = int(counts[start])
        start += 1
    return Histogram(bins[start:end], counts[start:end], *special.values())


def network_histograms(
    network: nn.Module, step: int, frozen: dict[str, tuple[float, ...]] | None = None
) -> dict[str, Any]:
    """The histograms of every parameter and gradient of `network`, as a record of the journal.

    A parameter without a gradient, or not initialised yet, has none to show. `frozen` is kept from
    one call to the next: norm and sum of the parameters that need no gradient. One that has the
    same as before is left out.
    """
    tensors: list[tuple[str, str, Tensor]] = []
    known = _unchanged(network, {} if frozen is None else frozen)
    for name, parameter in network.named_parameters():
        if nn.parameter.is_lazy(parameter) or name in known:
            continue
        tensors.append((name, "weight", parameter))
        if parameter.grad is not None:
            tensors.append((name, "gradient", parameter.grad))
    found = histograms([tensor for _, _, tensor in tensors])
    return {
        "step": step,
        "histograms": [
            {
                "tensor": name,
                "kind": kind,
                "bins": histogram.bins.tolist(),
                "counts": histogram.counts.tolist(),
                "nan": histogram.nan,
                "posinf": histogram.posinf,
                "neginf": histogram.neginf,
            }
            for (name, kind, _), histogram in zip(tensors, found, strict=True)
        ],
    }


@torch.no_grad()
def _unchanged(network: nn.Module, frozen: dict[str, tuple[float, ...]]) -> set[str]:
    """The parameters that are frozen, and as they were; writes what they are into `frozen`."""
    still = {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if not (parameter.requires_grad or nn.parameter.is_lazy(parameter))
        and parameter.is_floating_point()
        and type(parameter.data) is Tensor
        and parameter.layout == torch.strided
    }
    for name in frozen.keys() - still:  # it may be frozen again, elsewhere
        del frozen[name]
    if not still:
        return set()
    # Two passes over memory, a fifth of what a histogram costs.
    found = {
        name: torch.stack([torch.linalg.vector_norm(tensor), tensor.sum()]).float()
        for name, tensor in still.items()
    }
    before = dict(frozen)
    for device in {each.device for each in found.values()}:
        here = [name for name, each in found.items() if each.device == device]
        values = torch.stack([found[name] for name in here]).tolist()  # waits once for a device
        frozen.update(zip(here, map(tuple, values), strict=True))
    return {name for name, each in frozen.items() if before.get(name) == each}


def bin_edges(
    bins: Iterable[int],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Left and right edge of each bin, by its number."""
    number = np.asarray(list(bins), dtype=np.int64)

    def lower(k: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        exponent, eighth = np.divmod(k - 1, _PER_OCTAVE)
        with np.errstate(over="ignore"):  # the last bin of float64 ends at infinity
            edges: npt.NDArray[np.float64] = np.ldexp(
                1 + eighth / _PER_OCTAVE, exponent + _SMALLEST
            )
        return edges

    size = np.abs(number)
    near = np.where(size == 0, 0.0, lower(np.maximum(size, 1)))
    far = lower(size + 1)
    left = np.where(number > 0, near, -far)
    return left, np.where(number < 0, -near, far)
