"""Tensors on their way between a device and the host.

Only the thread that computes uses its device. Metal (MPS) crashes if a second thread does, and
while a CUDA graph is captured, even the query of an event by another thread breaks the capture
(https://github.com/pytorch/pytorch/pull/104555). So the journal's thread cannot wait for an event.
Instead, a number on a device is copied to pinned memory at once, by the stream that produced it,
and the thread looks at that memory, without a call of the driver, until the number is there.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracker.errors import ArgumentError

_STREAMED = ("cuda", "xpu")  # their streams copy to and from pinned memory by themselves
_SLOTS = 1024  # numbers for which memory is pinned at a time, which waits for the device
_BITS: dict[torch.dtype, np.signedinteger] = {
    # NaNs that no computation yields: what the memory holds until the number is there.
    torch.float32: np.int32(0x7FED_CBA9),
    torch.float64: np.int64(0x7FFD_CBA9_8765_4321),
}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`, without waiting if that is safe.

    A copy to the host must be waited for, and MPS may read the source after it was freed
    (https://github.com/pytorch/pytorch/issues/189690).
    """
    return tensor.to(device, non_blocking=device.type in _STREAMED)


def local_copy(tensor: Tensor) -> Tensor | None:
    """Return a DTensor that this rank has whole as a plain tensor, and other tensors as they are.

    None if ranks have parts of it, or parts of a sum: only a collective yields its value.
    """
    if type(tensor) is Tensor or (placements := getattr(tensor, "placements", None)) is None:
        return tensor
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    if all(part.is_replicate() or mesh.size(dim) == 1 for dim, part in enumerate(placements)):
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return local
    return None


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor as a plain tensor, and other tensors as they are.

    A collective of the ranks that have parts of it, if there are any.
    """
    if (local := local_copy(tensor)) is not None:
        return local
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def is_capturing(device: torch.device) -> bool:
    """Return whether the current stream is being captured: nothing is computed before a replay."""
    if device.type not in _STREAMED:
        return False
    ask = getattr(getattr(torch, device.type), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def check_computed(tensor: Tensor, argument: str, verb: str) -> None:
    """Raise ArgumentError if `tensor`, the `argument` of `verb`, is only being captured."""
    if is_capturing(tensor.device):
        raise ArgumentError(
            f"{argument} is captured in a graph on {tensor.device} and has no value before the "
            f"graph's replay; call {verb}() after it, outside the capture."
        )


class Arriving:
    """A number that a device copies to pinned memory."""

    def __init__(self, memory: Tensor, free: deque[Arriving]) -> None:
        """Wait for nothing yet.

        Args:
            memory: One float, which only this object uses, shape (1,).
            free: Where this object goes when its number was read.
        """
        self._memory, self._free = memory, free
        self._absent = _BITS[memory.dtype]
        self._bits = memory.numpy().view(self._absent.dtype)
        self._dtype = memory.numpy().dtype
        self._bits[0] = self._absent

    def copy(self, number: Tensor) -> Arriving:
        """Start to copy a number, on the current stream of its device; return this object."""
        self._memory.copy_(number, non_blocking=True)
        return self

    def read_arrived(self) -> float | None:
        """Return the number, at most once; None while it is on its way."""
        bits = self._bits[0]  # one aligned word, which is written as a whole
        if bits == self._absent:
            return None
        self._bits[0] = self._absent
        self._free.append(self)
        return float(bits.view(self._dtype))


# Kept until the process ends: freeing pinned memory asks the streams that used it.
_free: dict[torch.dtype, deque[Arriving]] = {dtype: deque() for dtype in _BITS}


def read_later(number: Tensor) -> float | Arriving:
    """Return the present value of a plain tensor of one number, without waiting for its device.

    On devices other than CUDA and XPU this waits: no other thread may read the number later.

    Raises:
        ArgumentError: A graph is being captured, so that there is no value.
    """
    check_computed(number, "a metric", "log_metrics")
    number = number.detach().reshape(1)
    is_wrapped = type(number).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_wrapped or number.device.type not in _STREAMED:
        return float(number.item())
    is_short = number.is_floating_point() and number.dtype != torch.float64
    try:
        return _slot(torch.float32 if is_short else torch.float64).copy(number)
    except RuntimeError:  # no memory can be pinned, or an XPU has no float64
        return float(number.item())


def _slot(dtype: torch.dtype) -> Arriving:
    free = _free[dtype]
    try:
        return free.popleft()
    except IndexError:
        with torch.inference_mode(False):  # or it could be written in inference mode only
            memory = torch.empty(_SLOTS, dtype=dtype, device="cpu", pin_memory=True)
            slots = [Arriving(memory[place : place + 1], free) for place in range(_SLOTS)]
        free.extend(slots[1:])
        return slots[0]
