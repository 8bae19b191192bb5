"""Histograms of all weights and gradients of a network: exact counts in fixed bins.

The bin of a number follows from its bits: sign, exponent and the first three bits of the mantissa,
which makes eight bins per octave. Fixed bins need no minimum and maximum, so nothing waits for the
device, and the counts of several epochs or ranks can be added.

Bin 0 contains |x| < 2**-126. Bin k > 0 covers
    [2**e * (1 + m/8), 2**e * (1 + (m+1)/8))   with   k - 1 = (e + 126) * 8 + m,   m = 0 … 7,
and bin -k covers its mirror image, (-right, -left].
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tracker.capture.every import Every
from tracker.errors import ArgumentError, first_line
from tracker.training.device import unwrap
from tracker.transfers import local_copy

_MANTISSA_BITS = 3
_PER_OCTAVE = 1 << _MANTISSA_BITS
_SMALLEST = -126  # exponent of the smallest normal float32, where bin 1 starts
_INFINITE, _NAN = 1 << 15, (1 << 15) + 1  # outside the 2**14 bins of a float64 on either side
_STRIDE = 1 << 17
_CHUNK = 1 << 17  # elements to bin at a time
_CHUNK_ON_DEVICE = 1 << 22  # a kernel launch costs more than a cache miss

_SUMMED = {
    **dict.fromkeys((torch.float16, torch.bfloat16, torch.float32), torch.float32),
    torch.float64: torch.float64,
}
_WRAPPER = re.compile(r"\b_(orig_mod|checkpoint_wrapped_module|fsdp_wrapped_module)\.")
_NO_GRADIENTS = (
    "All gradients of the network are missing or zero when the epoch ends; to have their "
    "histograms, call zero_grad() before backward(), not after the step."
)

logger = logging.getLogger(__name__)


class _Layout(NamedTuple):
    """How the bits of a float type become an index into its counts."""

    integer: torch.dtype
    shift: int  # leaves sign, exponent and _MANTISSA_BITS
    cells: int  # of both signs together
    bias: int


_FLOAT32 = _Layout(torch.int32, 23 - _MANTISSA_BITS, 2 << (8 + _MANTISSA_BITS), 127)
_FLOAT64 = _Layout(torch.int64, 52 - _MANTISSA_BITS, 2 << (11 + _MANTISSA_BITS), 1023)


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
    if not tensors:
        return []
    return _histograms([_values(tensor) for tensor in tensors])


def _histograms(rows: Sequence[_Row]) -> list[Histogram]:
    # A network of one dtype, the usual case, is counted and decoded in one go.
    groups = [(layout, list(some)) for layout, some in groupby(rows, _layout)]
    counts = [_count(some, layout) for layout, some in groups]
    flat = (torch.cat(counts) if len(counts) > 1 else counts[0]).cpu().numpy()
    result: list[Histogram] = []
    start = 0
    for layout, some in groups:
        end = start + len(some) * layout.cells
        result += _decode(flat[start:end], layout)
        start = end
    return result


class _Row(NamedTuple):
    """The elements of a tensor."""

    values: Tensor
    """Real numbers of any dtype, (elements,)."""
    zeros: int = 0
    """The number of zeros that are left out of them."""


def _layout(row: _Row) -> _Layout:
    """Every value of a shorter float type is a float32; integers are counted as float64."""
    dtype = row.values.dtype
    return _FLOAT32 if dtype.is_floating_point and dtype != torch.float64 else _FLOAT64


def _values(tensor: Tensor) -> _Row:
    """The elements of a tensor as one row, not yet converted: a network would be copied."""
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
    row = _Row(tensor.resolve_neg().reshape(-1), zeros)
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


def _count(rows: Sequence[_Row], layout: _Layout) -> Tensor:
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
def _bins(layout: _Layout) -> npt.NDArray[np.int64]:
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


def _decode(flat: npt.NDArray[np.int64], layout: _Layout) -> list[Histogram]:
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


@dataclass
class HistogramState:
    """What is kept from one call of `network_histograms` to the next."""

    frozen: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Norm and sum of each parameter that requires no gradient."""
    said: set[str] = field(default_factory=set)
    """Tensors whose absence was warned about."""
    weights: int | None = None
    """A hash of the weights' histograms, to see whether they are trained."""


def network_histograms(
    network: nn.Module,
    step: int,
    state: HistogramState | None = None,
    every: Every | None = None,
) -> dict[str, Any]:
    """Return the histograms of all parameters and gradients, as a journal record.

    Names are those inside `torch.compile` and DistributedDataParallel. Uninitialised parameters are
    skipped; a tensor that cannot be counted is left out with a warning.

    Args:
        network: Its parameters and gradients may be on several devices.
        step: The step of the record.
        state: Updated in place. Frozen parameters whose norm and sum have not changed are skipped.
        every: Which tensors to take; default all.
    """
    state = HistogramState() if state is None else state
    parameters = {
        _WRAPPER.sub("", name): parameter
        for name, parameter in unwrap(network).named_parameters()
        if not nn.parameter.is_lazy(parameter)
    }
    unchanged = _unchanged(parameters, state.frozen)
    rows: dict[tuple[str, str], _Row] = {}
    problems: dict[str, Exception] = {}
    for name, parameter in parameters.items():
        if name in unchanged:
            continue
        for kind, tensor in (("weight", parameter), ("gradient", parameter.grad)):
            if tensor is not None and (every is None or every.takes(name, kind)):
                try:
                    rows[name, kind] = _values(tensor)
                except Exception as error:  # noqa: BLE001 - there are many kinds of tensors
                    problems[f"{name} ({kind})"] = error
    counted: dict[tuple[str, str], Histogram] = {}
    for device in {row.values.device for row in rows.values()}:
        there = {key: row for key, row in rows.items() if row.values.device == device}
        try:
            counted.update(zip(there, _histograms(list(there.values())), strict=True))
        except Exception as error:  # noqa: BLE001 - such as too little memory
            problems[f"the device {device}"] = error
    _say_left_out(problems, state.said)
    gradients = [histogram for (_, kind), histogram in counted.items() if kind == "gradient"]
    trained = [one for one in parameters.values() if one.requires_grad and one.numel()]
    no_gradients = (every is None or every == Every()) and (
        all(one.grad is None for one in trained)
        or (len(gradients) > 0 and not any(map(_any, gradients)))
    )
    shapes = [
        (one.bins.tobytes(), one.counts.tobytes())
        for key, one in counted.items()
        if key[1] == "weight"
    ]
    weights = hash(tuple(shapes))
    has_trained = state.weights is not None and state.weights != weights
    state.weights = weights
    if has_trained and trained and no_gradients and _NO_GRADIENTS not in state.said:
        state.said.add(_NO_GRADIENTS)
        logger.warning(_NO_GRADIENTS)
    return {
        "step": step,
        "histograms": [
            _fields(name, kind, histogram)
            for name, kind in rows
            if (histogram := counted.get((name, kind))) is not None
        ],
    }


def _fields(name: str, kind: str, histogram: Histogram) -> dict[str, Any]:
    """The histogram of a tensor, as in a journal record."""
    return {
        "tensor": name,
        "kind": kind,
        "bins": histogram.bins.tolist(),
        "counts": histogram.counts.tolist(),
        "nan": histogram.nan,
        "posinf": histogram.posinf,
        "neginf": histogram.neginf,
    }


def value_histogram(name: str, values: Any) -> dict[str, Any]:
    """Return the histogram of a tensor, an array or numbers in lists, as in a journal record.

    Raises:
        ArgumentError: `values`, the argument `tensor`, cannot be counted.
    """
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
        (histogram,) = histograms([tensor])
    except Exception as error:
        raise ArgumentError(
            f"tensor is a {type(values).__name__} that cannot be counted ({first_line(error)}); it "
            "must be a tensor, an array or a list of numbers."
        ) from error
    return _fields(name, "value", histogram)


def _say_left_out(problems: Mapping[str, Exception], said: set[str]) -> None:
    if new := [what for what in problems if what not in said]:
        others = f" and {len(new) - 1} more" if len(new) > 1 else ""
        logger.warning(
            "The histograms of %s%s are left out: %s.",
            new[0],
            others,
            first_line(problems[new[0]]),
        )
        said.update(new)


def _any(histogram: Histogram) -> bool:
    """Whether some number is not zero."""
    return bool(histogram.bins.any() or any(histogram[2:]))


@torch.no_grad()
def _unchanged(parameters: Mapping[str, Tensor], frozen: dict[str, tuple[float, ...]]) -> set[str]:
    """Names of the frozen parameters with the norm and sum in `frozen`, which is updated."""
    current = {
        name: parameter.detach()
        for name, parameter in parameters.items()
        if not (parameter.requires_grad or parameter.is_meta or parameter.is_nested)
        and parameter.dtype in _SUMMED
        and type(parameter.data) is Tensor
        and parameter.layout == torch.strided
    }
    for name in frozen.keys() - current:  # may be frozen again later
        del frozen[name]
    if not current:
        return set()
    # Two passes over memory: a fifth of the cost of a histogram.
    summaries = {
        name: torch.stack(
            [torch.linalg.vector_norm(tensor, dtype=dtype), tensor.sum(dtype=dtype)]
        ).float()
        for name, tensor in current.items()
        if (dtype := _SUMMED[tensor.dtype])  # a sum of float16 would overflow
    }
    before = dict(frozen)
    for device in {summary.device for summary in summaries.values()}:
        names = [name for name, summary in summaries.items() if summary.device == device]
        values = torch.stack([summaries[name] for name in names]).tolist()  # waits once per device
        frozen.update(zip(names, map(tuple, values), strict=True))
    return {name for name, summary in frozen.items() if before.get(name) == summary}


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
