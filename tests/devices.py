"""A device for tests on machines without one: its numbers are computed only when the test says."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


class Away(Tensor):
    """A tensor that claims to be on `cuda:0`, and that only the main thread may use.

    `Stream.compute` performs the asynchronous copies to the host.
    """

    stream: Stream | None = None

    @property
    def is_cpu(self) -> bool:
        return False

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert threading.current_thread() is threading.main_thread(), "a second thread"
        assert cls.stream is not None, "the device must not be used now"
        kwargs = kwargs or {}
        if func is Tensor.copy_ and not isinstance(args[0], Away):
            assert kwargs.get("non_blocking"), "the loop waits"
            # In the order of the stream: before the loop changes the number in place.
            cls.stream.copies.append((args[0], _plain(args[1]).clone()))
            return args[0]
        if func is torch.stack:
            assert all(isinstance(tensor, Away) for tensor in args[0]), "tensors on two devices"
        if func in (Tensor.cpu, Tensor.item, Tensor.__float__):
            assert not cls.stream.refuses_waits, "the loop waits"
            return func(_plain(args[0]))
        return super().__torch_function__(func, types, args, kwargs)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


class Stream:
    """What the device has not done yet."""

    def __init__(self) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.refuses_waits = False

    def compute(self) -> None:
        """Do everything that was begun."""
        for memory, number in self.copies:
            memory.copy_(number)
        self.copies.clear()


def away(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device."""
    return torch.tensor(value, dtype=dtype).as_subclass(Away)


@contextmanager
def a_device(patch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """Let tensors of `away` be used, and yield their stream."""
    stream = Stream()
    empty = torch.empty

    def pageable(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return empty(*size, **options)

    with patch.context() as context:
        context.setattr(Away, "stream", stream)
        context.setattr(torch, "empty", pageable)
        context.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        unpinned = {torch.float32: deque[Any](), torch.float64: deque[Any]()}
        context.setattr("tracker.transfers._free", unpinned)
        yield stream
