"""How the journal of this process gets to MLflow: by a second process, in-line, or later.

A process has one journal and one uploader for each folder and store, whatever runs it tracks.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.inline import InlineDelivery
from tracker.errors import ArgumentError
from tracker.journal.writer import JournalWriter
from tracker.store.uri import check, resolve

Mode = Literal["process", "inline", "offline"]


class Delivery(Protocol):
    """Takes the records of a journal to MLflow."""

    journal: JournalWriter

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """`run` begins; `abandon` is called at the program's end, unless it was ended before."""

    def deliver(self) -> None:
        """An epoch has ended: a good moment for who delivers in the training thread."""

    def flush(self, timeout: float) -> bool:
        """Whether everything appended so far is delivered, at the latest after `timeout` s."""

    def release(self, run: str, *, wait: bool = True) -> None:
        """`run` has ended, and its end is appended; `wait` for its delivery up to a deadline."""

    def run_id(self, run: str) -> str | None:
        """MLflow's id of `run`, None while it is not known."""

    def close(self) -> None:
        """Whoever made this delivery needs it no more."""


def delivery(directory: Path, tracking_uri: str | None, mode: Mode) -> Delivery:
    """The delivery of this process to a store; StoreError where the URI or folder cannot be."""
    if mode == "inline":
        return InlineDelivery(directory, tracking_uri)
    uri = resolve(tracking_uri)
    check(uri)
    key = (os.getpid(), directory.absolute(), uri, mode)
    with _opening:
        if key not in _open:
            _open[key] = BackgroundDelivery(directory, uri, uploader=mode == "process")
            if len(_open) == 1:
                atexit.register(_close_all)
        return _open[key]


_open: dict[tuple[int, Path, str, Mode], BackgroundDelivery] = {}
_opening = threading.Lock()


def _close_all() -> None:
    for (pid, *_), opened in list(_open.items()):
        if pid == os.getpid():  # a fork has nothing to say about its parent's runs
            opened.shut_down()
    _open.clear()


def mode_of(*, inline: bool | None, offline: bool | None) -> Mode:
    """How to deliver: as the arguments say, else TRACKER_OFFLINE and TRACKER_INLINE.

    Raises ArgumentError for both at once, or a variable that is neither true nor false.
    """
    if inline and offline:
        raise ArgumentError("inline=True and offline=True exclude each other.")
    if offline or (offline is None and not inline and _flag("TRACKER_OFFLINE")):
        return "offline"
    if inline or (inline is None and not offline and _flag("TRACKER_INLINE")):
        return "inline"
    return "process"


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ArgumentError(f"{name}={value!r} is not allowed; it must be 1, 0, true or false.")
    return value in ("1", "true")


def leave_all() -> None:
    """End this process's part, without waiting; the uploaders deliver what is left."""
    for (pid, *_), opened in list(_open.items()):
        if pid == os.getpid():
            opened.leave()
    _open.clear()


class NoDelivery:
    """For the ranks that do not write: what they log goes nowhere."""

    tracking_uri = "none"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tracker-rank-")
        self.journal = JournalWriter(Path(self._folder.name))

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """Nothing."""

    def deliver(self) -> None:
        """Nothing."""

    def flush(self, timeout: float) -> bool:
        """Nothing; that is done."""
        return True

    def release(self, run: str, *, wait: bool = True) -> None:
        """Nothing."""

    def run_id(self, run: str) -> str | None:
        """None: the run is that of another rank."""
        return None

    def close(self) -> None:
        """Remove what was written."""
        self.journal.close()
        self._folder.cleanup()
