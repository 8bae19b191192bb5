"""Ctrl-C and SIGTERM while a study runs: the first ends the running trials cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from tracker.delivery.signals import is_default


@contextmanager
def block_signals(*signals: signal.Signals) -> Iterator[None]:
    """A process that is started within it is not told of `signals`, before it can say so itself.

    It inherits that they are blocked. Here they wait until it is started.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Interrupts:
    """Counts the signals that ask a study to end, and raises KeyboardInterrupt where it may.

    That is within an objective, and not while it talks to the storage. The second signal raises
    wherever it finds the program. Outside the main thread, and for signals that the program
    handles or ignores itself, nothing is done.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.count = 0
        self.name = ""
        self._say = say
        self._before: dict[signal.Signals, Any] = {}
        self._open = self._shielded = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if is_default(number):
                    self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.name = signal.Signals(number).name
        if self.count == 1:
            self._say("Stopping: running trials end first; once more to stop at once.")
        if self.count > 1 or (self._open and not self._shielded):
            raise KeyboardInterrupt(self.name)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within it the signals raise, and one that came before does at once."""
        self._open = True
        try:
            self.check()
            yield
        finally:
            self._open = False

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Within it they wait."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        self.check()

    def check(self) -> None:
        """Raise for a signal that came meanwhile."""
        if self.count and self._open:
            raise KeyboardInterrupt(self.name)
