"""Delivery by the training thread, when an epoch or a run ends: for tests and short scripts."""

from __future__ import annotations

import atexit
import logging
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Delivers from the training thread, when an epoch or a run ends: tests and short scripts.

    The user's mistakes show when the first run begins. After that a store that cannot be reached
    never stops training: one warning, and what is undelivered stays in the journal.
    """

    def __init__(self, directory: Path, tracking_uri: str | None) -> None:
        self._given_uri = tracking_uri
        self._pid = os.getpid()
        self.journal = JournalWriter(directory)
        self._reader = Journal(self.journal.folder)
        self._active_runs = ActiveRuns(self.journal)
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._began = False
        self._warned = False
        self._noticed = 0

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""
        return self._open().tracking_uri

    def _open(self) -> MlflowStore:
        if self._store is None:
            from tracker.store.client import MlflowStore  # importing mlflow takes a second

            self._store = MlflowStore(self._given_uri)
            self._reader.tracking_uri = public_uri(self._store.tracking_uri)
            self._uploader = Uploader(self._reader, self._store)
        return self._store

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """Deliver the beginning of `run`, so that its id is known.

        Raises StoreError where the store cannot be used, as long as nothing was delivered to it.
        """
        try:
            self._drain()
        except StoreError as error:
            if not self._began and self._reader.run_id(run) is None:
                raise
            self._warn(error)
        self._began = True
        self._active_runs.begin(run, abandon)
        atexit.register(abandon)

    def deliver(self) -> None:
        """Deliver what there is; a failure is a warning."""
        try:
            self._drain()
        except StoreError as error:
            self._warn(error)

    def flush(self, timeout: float) -> bool:
        """Deliver what there is; whether that worked. The store decides how long it takes."""
        self.deliver()
        return not self._reader.pending()

    def _drain(self) -> None:
        if os.getpid() != self._pid:  # nor is a fork to deliver its parent's run
            return
        self.journal.flush()
        store = self._open()
        if (
            problem := store.unreachable_reason()
        ) is not None:  # MLflow's client would try for minutes
            raise StoreError(f"the server does not answer: {problem}")
        if self._uploader is not None:
            with _own_randomness():
                self._uploader.drain()
        for number, text in self._reader.notices(self._noticed):
            self._noticed = number
            logger.warning("%s", text)

    def _warn(self, error: StoreError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Training goes on, its records wait in the journal: %s", error)

    def release(self, run: str, *, wait: bool = True) -> None:
        """Deliver the run's end."""
        if (abandon := self._active_runs.runs.pop(run, None)) is not None:
            atexit.unregister(abandon)
        self.deliver()

    def run_id(self, run: str) -> str | None:
        """MLflow's id of `run`."""
        return self._reader.run_id(run)

    def close(self) -> None:
        """Deliver the rest and close the journal; say what is left and how to deliver it."""
        self._active_runs.forget()
        if self._began:
            self.deliver()
        self.journal.close()
        if self._began and (left := self._reader.undelivered_summary()) is not None:
            logger.warning("%s", left)
            self._reader.close()
        elif self.journal.lost:
            self._reader.close()
        else:
            self._reader.remove()


@contextmanager
def _own_randomness() -> Iterator[None]:
    """MLflow draws its run names from python's generator, which belongs to the training."""
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)
