"""Ending a search before its budget is used, as with Optuna: `stop()` and `timeout`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import optuna

from tracker.errors import ArgumentError


class StopFlag:
    """Whether a search starts no more trials."""

    def __init__(self, timeout: float | None = None) -> None:
        """Start the clock.

        Args:
            timeout: Seconds after which the flag sets itself; None for never.

        Raises:
            ArgumentError: The timeout is not a number above 0.
        """
        is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and timeout > 0):
            raise ArgumentError(f"timeout={timeout!r} is not allowed; it must be above 0.")
        self._until = None if timeout is None else time.monotonic() + timeout
        self._is_set = False

    def set(self) -> None:
        """Let no more trials start; those that run end as usual."""
        self._is_set = True

    @property
    def is_set(self) -> bool:
        """Whether `set` was called or the time is over."""
        return self._is_set or (self._until is not None and time.monotonic() >= self._until)


class RunningStudy(optuna.Study):
    """The study as samplers and callbacks see it: `stop` ends the search in this process."""

    def __init__(self, name: str, storage: Any, stop: Callable[[], None], **more: Any) -> None:
        super().__init__(name, storage, **more)
        self._stop = stop

    def stop(self) -> None:
        """Start no more trials."""
        self._stop()
