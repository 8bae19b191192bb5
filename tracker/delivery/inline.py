"""Delivery by the training thread, when an epoch or a run ends: for tests and short scripts."""

from __future__ import annotations

import atexit
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.delivery.signals import ActiveRuns
from tracker.delivery.uploader import Uploader
from tracker.errors import StoreError
from tracker.journal.reader import Journal
from tracker.journal.writer import JournalWriter
from tracker.redaction import public_uri

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

logger = logging.getLogger(__name__)


class InlineDelivery:
    """Delivers from the training thread, when an epoch or a run ends.

    A wrong tracking URI or experiment is an error when the first run begins. Later a store that
    cannot be reached never stops training: it causes one warning, and the journal keeps the rest.
    """

    def __init__(self, directory: Path, tracking_uri: str | None) -> None:
        self._given_uri = tracking_uri
        self._pid = os.getpid()
        self.journal = JournalWriter(directory)
        self._reader = Journal(self.journal.folder)
        self._active_runs = ActiveRuns(self.journal)
        self._draining = threading.RLock()  # trials in threads share a delivery
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._has_begun = False
        self._warned = False
        self._last_notice = 0

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""
        return self._open().tracking_uri

    def _open(self) -> MlflowStore:
        if self._store is None:
            from tracker.store.client import MlflowStore  # importing mlflow takes seconds

            self._store = MlflowStore(self._given_uri)
            self._reader.tracking_uri = public_uri(self._store.tracking_uri)
            self._uploader = Uploader(self._reader, self._store)
        return self._store

    def begin(self, run: str, abandon: Callable[[], None]) -> None:
        """Deliver the beginning of `run`, so that its id is known.

        Raises:
            StoreError: The store cannot be used, and nothing was delivered to it before.
        """
        try:
            self._drain()
        except StoreError as error:
            if not self._has_begun and self._reader.run_id(run) is None:
                raise
            self._warn(error)
        reason = self._reader.held().get(run)
        if reason is not None and not self._has_begun:
            raise StoreError(reason)
        self._pass_on_notices()
        self._has_begun = True
        self._active_runs.begin(run, abandon)
        atexit.register(abandon)

    def deliver(self) -> None:
        """Deliver what is pending; a failure is a warning."""
        try:
            self._drain()
        except StoreError as error:
            self._warn(error)
        with suppress(StoreError):  # the journal is unreadable, of which the line above warned
            self._pass_on_notices()

    def flush(self, timeout: float, run: str | None = None) -> bool:
        """Deliver what is pending, without a time limit; return whether it worked."""
        self.deliver()
        return not self._reader.pending() and not self._reader.is_held(run)

    def _drain(self) -> None:
        if os.getpid() != self._pid:  # a fork does not deliver its parent's run
            return
        self.journal.flush()
        reason = self._open().unreachable_reason()
        if reason is not None:  # MLflow's client would try for minutes
            raise StoreError(f"the server does not answer: {reason}.")
        if self._uploader is not None:
            with self._draining, _own_randomness():
                self._uploader.drain()

    def _pass_on_notices(self) -> None:
        for number, text in self._reader.notices(self._last_notice):
            self._last_notice = number
            logger.warning("%s", text)

    def _warn(self, error: StoreError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Saved on disk; upload failed and will be tried again: %s", error)

    def end(self, run: str, *, wait: bool = True) -> None:
        """Deliver the run's end."""
        if (abandon := self._active_runs.runs.pop(run, None)) is not None:
            atexit.unregister(abandon)
        self.deliver()

    def run_id(self, run: str) -> str | None:
        """Return MLflow's id of `run`."""
        return self._reader.run_id(run)

    def close(self) -> None:
        """Deliver the rest and close the journal; warn of what could not be delivered."""
        self._active_runs.forget()
        if self._has_begun:
            self.deliver()
        self.journal.close()
        try:
            summary = self._reader.undelivered_summary() if self._has_begun else None
        except StoreError as error:  # the journal's file is unreadable
            summary = str(error)
        if summary is not None:
            logger.warning("%s", summary)
        if summary is not None or self.journal.lost:
            self._reader.close()
        else:
            self._reader.remove()


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep MLflow, which draws run names, from changing Python's generator of the training."""
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)
