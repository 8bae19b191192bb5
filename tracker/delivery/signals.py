"""SIGTERM: said in the journals before the process dies of it, as it would have without us."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

from tracker.journal.records import Signal

if TYPE_CHECKING:
    from tracker.journal.writer import JournalWriter

_listeners: list[Callable[[str], None]] = []


def on_termination(listener: Callable[[str], None]) -> Callable[[], None] | None:
    """Have `listener` called with the signal's name when this process is told to end.

    Nothing is done where the program has a handler of its own, or outside the main thread: what
    becomes of the signal is then the program's to say. Returns what takes the listener back, None
    where nothing was done.
    """
    if signal.getsignal(signal.SIGTERM) is not _terminated:
        elsewhere = threading.current_thread() is not threading.main_thread()
        if elsewhere or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return None
        signal.signal(signal.SIGTERM, _terminated)
    _listeners.append(listener)

    def forget() -> None:
        if listener in _listeners:
            _listeners.remove(listener)
        main = threading.current_thread() is threading.main_thread()
        if main and not _listeners and signal.getsignal(signal.SIGTERM) is _terminated:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return forget


def is_default(number: signal.Signals) -> bool:
    """Whether nothing but python or this module handles a signal."""
    ours = (signal.SIG_DFL, signal.default_int_handler, _terminated)
    return signal.getsignal(number) in ours


def _terminated(number: int, frame: FrameType | None) -> None:
    for listener in list(_listeners):
        listener(signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class ActiveRuns:
    """The runs of a journal that go on: it is told of each when SIGTERM comes."""

    def __init__(self, journal: JournalWriter) -> None:
        self._journal = journal
        self.runs: dict[str, Callable[[], None]] = {}
        self._forget: Callable[[], None] | None = None

    def begin(self, run: str, abandon: Callable[[], None]) -> None:
        """A run goes on; `abandon` is called at the program's end, unless it was ended before."""
        self.runs[run] = abandon
        if self._forget is None:  # perhaps tried before, in a thread
            self._forget = on_termination(self._tell)

    def forget(self) -> None:
        """Nothing is to be told any more."""
        if self._forget is not None:
            self._forget()
            self._forget = None

    def _tell(self, name: str) -> None:
        for run in list(self.runs):
            self._journal.append(run, Signal(name))
        self._journal.flush(timeout=1.0)
