"""From the journal to MLflow."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.environment import public_uri
from tracker.errors import RefusedError, StoreError
from tracker.journal import Journal, Record
from tracker.views.files import csv_text, json_text
from tracker.views.histogram_page import histogram_page

if TYPE_CHECKING:
    from tracker.mlflow_store import MlflowStore

PAGE_SECONDS = 60.0
"""While a run goes on, its histogram page is drawn anew at most this often …"""
PAGE_SHARE = 0.01
"""… and takes at most this share of the time."""

logger = logging.getLogger(__name__)


class Uploader:
    """Delivers one journal to one store, in order."""

    def __init__(self, journal: Journal, store: MlflowStore) -> None:
        self._journal = journal
        self._store = store
        self._page_due: dict[str, float] = {}

    def drain(self) -> None:
        """Deliver all that is on disk; StoreError at the first record that cannot be."""
        for group in _groups(self._journal.undelivered()):
            try:
                self._deliver(group)
            except RefusedError as error:
                if group[0].kind == "begin":
                    raise
                # Trying again would change nothing, and all that comes after it would wait.
                logger.warning("A record (%s) is lost: %s", group[0].kind, error)
            self._journal.mark_delivered(group[-1].seq)
            for record in group:
                if staged := record.body.get("staged"):
                    shutil.rmtree((self._journal.folder / staged).parent, ignore_errors=True)

    def _deliver(self, group: list[Record]) -> None:
        first = group[0]
        body, store = first.body, self._store
        if first.kind == "begin":
            run_id = store.begin_run(
                experiment=body["experiment"],
                name=body["name"],
                start_time=first.time,
                tags=body["tags"],
                adopt=body["adopt"],
            )
            self._journal.bind(first.run, run_id)
            return
        bound = self._journal.run_id(first.run)
        if bound is None:
            raise StoreError(f"{self._journal.folder} lost the beginning of a run.")
        match first.kind:
            case "metrics":
                points = [tuple(point) for record in group for point in record.body["metrics"]]
                store.log_batch(bound, metrics=points)
            case "params":
                store.log_params(bound, body["params"])
            case "tags":
                store.log_batch(bound, tags=body["tags"])
            case "file":
                store.log_artifact(bound, self._journal.folder / body["staged"], body["folder"])
            case "dataset":
                store.log_dataset(bound, body["dataset"], body["context"])
            case "model":
                staged = self._journal.folder / body["staged"]
                store.log_model(bound, staged, body["name"], body["step"])
            case "histograms":
                store.log_text(bound, json_text(body), f"histograms/{body['step']:06d}.json")
                if time.monotonic() > self._page_due.setdefault(
                    first.run, time.monotonic() + PAGE_SECONDS
                ):
                    self._draw_page(first.run, bound)
            case "epoch":
                pass  # kept in the journal for the table at the end
            case "end":
                self._draw_page(first.run, bound)
                if rows := [record["row"] for record in self._journal.bodies(first.run, "epoch")]:
                    store.log_text(bound, csv_text(rows), "epochs.csv")
                    store.log_text(bound, json_text(rows), "epochs.json")
                store.end_run(bound, body["status"], first.time)

    def _draw_page(self, run: str, run_id: str) -> None:
        started = time.monotonic()
        if records := self._journal.bodies(run, "histograms"):
            page = histogram_page(records, self._store.run_name(run_id))
            self._store.log_text(run_id, page, "histograms.html")
        took = time.monotonic() - started
        self._page_due[run] = started + max(PAGE_SECONDS, took / PAGE_SHARE)


def _groups(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Neighbouring metrics of a run together, for one request; all else one by one."""
    group: list[Record] = []
    for record in records:
        together = record.kind == "metrics" and group and group[0].kind == "metrics"
        if group and not (together and group[0].run == record.run):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


class InlineDelivery:
    """Delivers the journal of this process from the training thread, when asked to.

    The user's mistakes show when the first run begins. After that a store that cannot be reached
    never stops training: one warning, and what is undelivered stays in the journal.
    """

    def __init__(self, directory: Path, tracking_uri: str | None) -> None:
        self._given_uri = tracking_uri
        self.journal = Journal.create(directory)
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._began = False
        self._warned = False

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""
        return self._open().tracking_uri

    def _open(self) -> MlflowStore:
        if self._store is None:
            from tracker.mlflow_store import MlflowStore  # importing mlflow takes a second

            self._store = MlflowStore(self._given_uri)
            self.journal.tracking_uri = public_uri(self._store.tracking_uri)
            self._uploader = Uploader(self.journal, self._store)
        return self._store

    def begin(self, run: str) -> None:
        """Deliver the beginning of `run`, so that its id is known.

        Raises StoreError where the store cannot be used, as long as nothing was delivered to it.
        """
        try:
            self._drain()
        except StoreError as error:
            if not self._began and self.journal.run_id(run) is None:
                raise
            self._warn(error)
        self._began = True

    def drain(self) -> None:
        """Deliver what there is; a failure is a warning."""
        try:
            self._drain()
        except StoreError as error:
            self._warn(error)

    def _drain(self) -> None:
        self.journal.flush()
        store = self._open()
        if not store.answers():  # MLflow's client would try for minutes
            raise StoreError("the server does not answer")
        if self._uploader is not None:
            with _own_randomness():
                self._uploader.drain()

    def _warn(self, error: StoreError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Training goes on, its records wait in the journal: %s", error)

    def close(self) -> None:
        """Deliver the rest and close the journal; say what is left and how to deliver it."""
        if not self._began:
            self.journal.discard()
            return
        self.drain()
        folder = self.journal.folder
        if left := self.journal.close():
            logger.warning(
                "%d records are not delivered; deliver them: tracker sync %s", left, folder
            )


@contextmanager
def _own_randomness() -> Iterator[None]:
    """MLflow draws its run names from python's generator, which belongs to the training."""
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)


def sync(folder: Path, tracking_uri: str | None = None) -> int:
    """Deliver the journal in `folder`, of a process that has ended; returns how many records.

    They go where the process delivered them, or to `tracking_uri`: needed where that has a
    password, which a journal does not keep. A run that the process did not live to end becomes
    FAILED. Raises StoreError where the folder is no journal, its process still runs, or the store
    cannot be used.
    """
    journal = Journal(folder)
    if journal.writer_lives():
        raise StoreError(f"path={str(folder)!r} is still written to by process {journal.pid}.")
    for run in journal.unended():
        reason = f"Process {journal.pid} on {journal.host} ended without saying how."
        last = journal.last_time(run)
        journal.append(run, "tags", {"tags": {"tracker.failure": reason}}, last)
        journal.append(run, "end", {"status": "FAILED"}, last)
    journal.flush()
    left = journal.remaining()
    try:
        from tracker.mlflow_store import MlflowStore  # importing mlflow takes a second

        known = journal.tracking_uri
        if tracking_uri is None and known is not None and public_uri(known) != known:
            raise StoreError(f"{folder} goes to {known}; give --tracking-uri with its password.")
        Uploader(journal, MlflowStore(tracking_uri or known)).drain()
        left -= journal.remaining()
    finally:
        journal.close()
    return left
