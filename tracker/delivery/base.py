"""How the journal of this process reaches MLflow: by a second process, inline, or later.

In the background, a process has one journal per folder, store and mode; inline, one per manager.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.inline import InlineDelivery
from tracker.errors import ArgumentError
from tracker.journal.writer import JournalWriter, NoJournal
from tracker.store.uri import check_uri, resolve
from tracker.validation import flag

Mode = Literal["process", "inline", "offline"]


class Delivery(Protocol):
    """Delivers the records of a journal to MLflow."""

    journal: JournalWriter

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""

    def begin(self, run: str, abandon: Callable[[], None]) -> None:
        """Start delivering a run.

        Args:
            run: The run's key.
            abandon: Called if the program ends before the run does.
        """

    def deliver(self) -> None:
        """Deliver now if the training thread delivers; called after each epoch."""

    def flush(self, timeout: float, run: str | None = None) -> bool:
        """Wait until everything appended so far is delivered; return False after `timeout` s.

        Args:
            timeout: How long to wait, in seconds.
            run: The key of the run that matters, if others cannot be delivered; None for all.
        """

    def end(self, run: str, *, wait: bool = True) -> None:
        """Stop delivering a run, after its end was appended.

        Args:
            run: The run's key.
            wait: Wait for the delivery, up to a deadline.
        """

    def run_id(self, run: str) -> str | None:
        """Return MLflow's id of `run`; None while it is not known."""

    def close(self) -> None:
        """Called when the owner no longer needs this delivery."""


def open_delivery(
    directory: Path,
    tracking_uri: str | None,
    mode: Mode,
    exit_timeout: float | None = None,
    *,
    writes: bool = True,
) -> Delivery:
    """Return the delivery of this process to a store.

    Args:
        directory: The folder of the journals.
        tracking_uri: By default the one that MLflow itself would use.
        mode: Deliver by a second process, in the training thread, or only by `tracker sync`.
        exit_timeout: How many seconds ends wait for the second process, see `checked_timeout`; the
            latest call counts.
        writes: Whether this process writes; under torchrun only rank 0 does.

    Raises:
        StoreError: The URI or the folder cannot be used.
    """
    if not writes:
        return NoDelivery()
    if mode == "inline":
        return InlineDelivery(directory, tracking_uri)
    uri = resolve(tracking_uri)
    check_uri(uri)
    key = (os.getpid(), directory.absolute(), uri, mode)
    with _opening:
        if key not in _open:
            _open[key] = BackgroundDelivery(directory, uri, uploader=mode == "process")
            if len(_open) == 1:
                atexit.register(_close_all, BackgroundDelivery.shut_down)
        if exit_timeout is not None:
            _open[key].deadline = exit_timeout
        return _open[key]


_open: dict[tuple[int, Path, str, Mode], BackgroundDelivery] = {}
_opening = threading.Lock()


def _close_all(close: Callable[[BackgroundDelivery], None]) -> None:
    for (pid, *_), delivery in list(_open.items()):
        if pid == os.getpid():  # a fork does not end its parent's runs
            close(delivery)
    _open.clear()


def leave_all() -> None:
    """Close the deliveries of this process without waiting; the uploaders deliver the rest."""
    _close_all(BackgroundDelivery.leave)


def mode_of(*, inline: bool | None, offline: bool | None) -> Mode:
    """Return how to deliver, from the arguments and the environment.

    Args:
        inline: Deliver from the training thread; None reads TRACKER_INLINE.
        offline: Leave delivery to `tracker sync`; None reads TRACKER_OFFLINE. An argument takes
            precedence over the variable of the other one.

    Raises:
        ArgumentError: Both arguments are true, or a variable is neither true nor false.
    """
    if inline and offline:
        raise ArgumentError("inline=True and offline=True exclude each other.")
    if offline is None:
        offline = not inline and bool(flag("TRACKER_OFFLINE"))
    if inline is None:
        inline = not offline and bool(flag("TRACKER_INLINE"))
    return "offline" if offline else "inline" if inline else "process"


class NoDelivery:
    """Delivery of the ranks that do not write: what they log is dropped."""

    tracking_uri = "none"

    def __init__(self) -> None:
        self.journal: JournalWriter = NoJournal()

    def begin(self, run: str, abandon: Callable[[], None]) -> None:
        """Do nothing."""

    def deliver(self) -> None:
        """Do nothing."""

    def flush(self, timeout: float, run: str | None = None) -> bool:
        """Return True: nothing is left to deliver."""
        return True

    def end(self, run: str, *, wait: bool = True) -> None:
        """Do nothing."""

    def run_id(self, run: str) -> str | None:
        """Return None: another rank has the run."""
        return None

    def close(self) -> None:
        """Do nothing."""
