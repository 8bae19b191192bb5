"""Histograms of a network's weights and gradients, and of the user's tensors, as records."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tracker.capture.every import Every
from tracker.capture.histograms import Histogram, Row, count_rows, histograms, row_of
from tracker.errors import ArgumentError, first_line
from tracker.training.device import unwrap

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
        plain_name(name): parameter
        for name, parameter in unwrap(network).named_parameters()
        if not nn.parameter.is_lazy(parameter)
    }
    unchanged = _unchanged(parameters, state.frozen)
    rows: dict[tuple[str, str], Row] = {}
    problems: dict[str, Exception] = {}
    for name, parameter in parameters.items():
        if name in unchanged:
            continue
        kinds: dict[Literal["weight", "gradient"], Tensor | None] = {
            "weight": parameter,
            "gradient": parameter.grad,
        }
        for kind, tensor in kinds.items():
            if tensor is not None and (every is None or every.takes(name, kind)):
                try:
                    rows[name, kind] = row_of(tensor)
                except Exception as error:  # noqa: BLE001 - there are many kinds of tensors
                    problems[f"{name} ({kind})"] = error
    counted: dict[tuple[str, str], Histogram] = {}
    for device in {row.values.device for row in rows.values()}:
        there = {key: row for key, row in rows.items() if row.values.device == device}
        try:
            counted.update(zip(there, count_rows(list(there.values())), strict=True))
        except Exception as error:  # noqa: BLE001 - such as too little memory
            problems[f"the device {device}"] = error
    say_left_out(problems, state.said)
    gradients = [histogram for (_, kind), histogram in counted.items() if kind == "gradient"]
    trained = [one for one in parameters.values() if one.requires_grad and one.numel()]
    no_gradients = (every is None or (every.gradients and every.only == "*")) and (
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
            histogram_fields(name, kind, histogram)
            for name, kind in rows
            if (histogram := counted.get((name, kind))) is not None
        ],
    }


def plain_name(path: str) -> str:
    """Return the path of a module or tensor without the wrappers that it leads through."""
    return _WRAPPER.sub("", path + ".").removesuffix(".")


def histogram_fields(name: str, kind: str, histogram: Histogram) -> dict[str, Any]:
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
    return histogram_fields(name, "value", histogram)


def say_left_out(problems: Mapping[str, Exception], said: set[str]) -> None:
    """Name the problem of the first of these tensors in one warning, unless it is in `said`."""
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
