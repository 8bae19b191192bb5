"""Ctrl-C and SIGTERM while a study runs: the first one ends the running trials cleanly.

`delivery/signals.py` only records SIGTERM; a study also has to survive it for a while.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tracker.delivery.signals import is_default


@contextmanager
def block_signals(*signals: signal.Signals) -> Iterator[None]:
    """Block `signals`, also in processes that are started here until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupts:
    """Counts the signals that ask a study to end, and raises KeyboardInterrupt for them.

    The first one raises only inside an objective that is not accessing the storage; the second one
    raises anywhere. Signals that the program handles or ignores itself are left alone, and so are
    all signals outside the main thread.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """`say` shows a message to the user."""
        self.count = 0
        self.name = ""
        """The name of the latest signal."""
        self._say = say
        self._previous: dict[signal.Signals, Any] = {}
        self._in_objective = self._shielded = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if is_default(number):
                    self._previous[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
        if self.count == 1:
            self._say("Interrupting the running trials; press Ctrl-C again to stop at once.")
        if self.count > 1 or (self._in_objective and not self._shielded):
            raise KeyboardInterrupt(self.name)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let signals raise in this block, including an earlier one."""
        self._in_objective = True
        try:
            self._raise_pending()
            yield
        finally:
            self._in_objective = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Delay a first signal until the end of this block."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        self._raise_pending()

    def _raise_pending(self) -> None:
        if self.count and self._in_objective:
            raise KeyboardInterrupt(self.name)
