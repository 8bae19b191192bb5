"""SIGTERM and SIGHUP: recorded in the journals before they end the process as usual."""

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

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_listeners: list[Callable[[str], None]] = []


def on_termination(listener: Callable[[str], None]) -> Callable[[], None] | None:
    """Call `listener` with the signal's name when this process receives SIGTERM or SIGHUP.

    A handler of the program itself is left alone, and handlers can only be set in the main thread.

    Returns:
        A function that removes the listener; None if it could not be added.
    """
    if _in_main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _terminated)
    if not any(signal.getsignal(number) is _terminated for number in _SIGNALS):
        return None
    _listeners.append(listener)

    def forget() -> None:
        if listener in _listeners:
            _listeners.remove(listener)
        for number in _SIGNALS if _in_main_thread() and not _listeners else ():
            if signal.getsignal(number) is _terminated:
                signal.signal(number, signal.SIG_DFL)

    return forget


def is_default(number: signal.Signals) -> bool:
    """Return whether a signal has no handler but Python's or this module's."""
    ours = (signal.SIG_DFL, signal.default_int_handler, _terminated)
    return signal.getsignal(number) in ours


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _terminated(number: int, frame: FrameType | None) -> None:
    for listener in list(_listeners):
        listener(signal.Signals(number).name)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class ActiveRuns:
    """The active runs of a journal, in each of which a signal that ends it is recorded."""

    def __init__(self, journal: JournalWriter) -> None:
        self._journal = journal
        self.runs: dict[str, Callable[[], None]] = {}
        """Called for each run that is open when the program ends, by run key."""
        self._forget: Callable[[], None] | None = None

    def begin(self, run: str, abandon: Callable[[], None]) -> None:
        """Add a run; `abandon` ends it if the program ends first."""
        self.runs[run] = abandon
        if self._forget is None:  # an earlier attempt in a thread may have failed
            self._forget = on_termination(self._tell)

    def forget(self) -> None:
        """Stop listening for signals."""
        if self._forget is not None:
            self._forget()
            self._forget = None

    def _tell(self, name: str) -> None:
        for run in list(self.runs):
            self._journal.append(run, Signal(name))
        self._journal.flush(timeout=1.0)
