"""Journals that dead processes left behind: their state, and their delivery."""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tracker.delivery.uploader import Uploader, close_unended
from tracker.errors import StoreError, TrackerError
from tracker.journal.damage import DAMAGED, damage_of, set_damage_aside
from tracker.journal.opened import DONE
from tracker.journal.ownership import NAME, Writer, delivery_lock, writer_lives
from tracker.journal.reader import OFFLINE, Journal
from tracker.redaction import MASK, public_uri
from tracker.store.uri import wait_for_answer

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

_SETTLE_SECONDS = 60.0
_WAIT_SECONDS = 0.5  # between two looks at another process that delivers
_PATIENCE_SECONDS = 600.0  # that `tracker sync` waits for a store that is too busy

State = Literal["in use", "uploading", "unfinished", "unreadable"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JournalStatus:
    """The state of a journal."""

    folder: Path
    state: State
    runs: int = 0
    undelivered: int = 0
    """Records on disk that are not delivered."""
    tracking_uri: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class SyncResult:
    """What was delivered of a journal."""

    runs: int
    records: int
    notices: tuple[str, ...]
    """What was lost in delivery: a sentence for each loss."""
    held: tuple[str, ...] = ()
    """Which runs cannot be delivered, and why: a sentence for each."""


def journals(path: Path) -> list[Path]:
    """Return the journals in a folder, oldest first, or the folder itself if it is a journal.

    Raises:
        StoreError: `path` is not a folder.
    """
    if re.fullmatch(NAME, path.name) and not path.exists():
        raise StoreError(f"{path} is gone: its records are uploaded, or lost if it was deleted.")
    if not path.is_dir():
        raise StoreError(f"{path} is not a folder.")
    if (path / "writer.json").exists() or (path / "journal.sqlite").exists():
        return [path]
    return sorted(file.parent for file in path.glob("[!.]*/journal.sqlite"))


def sweep(directory: Path) -> None:
    """Remove journals whose creation, or whose removal after delivery, was interrupted."""
    for folder in directory.glob(".*"):
        if re.fullmatch(rf"\.{NAME}", folder.name):
            try:
                if writer_lives(folder):
                    continue
            except StoreError:  # its process is just about to take its lock, or cannot be asked for
                continue
        elif not folder.name.endswith(DONE):
            continue
        shutil.rmtree(folder, ignore_errors=True)


def journal_status(folder: Path) -> JournalStatus:
    """Return the state of the journal in `folder`; changes nothing."""
    try:
        is_alive, writer = writer_lives(folder), Writer.of(folder)
        if is_alive and writer.host != Writer.this_process().host:
            # Two hosts must not open one database.
            return JournalStatus(folder, "in use", problem=f"by a process on {writer.host}")
        with delivery_lock(folder).hold() as is_free:
            pass
        with closing(Journal(folder)) as journal:
            return JournalStatus(
                folder,
                "in use" if is_alive else "unfinished" if is_free else "uploading",
                journal.runs(),
                journal.remaining(),
                journal.tracking_uri,
                journal.obstacle(),
            )
    except StoreError as error:
        return JournalStatus(folder, "unreadable", problem=str(error))


def deliver_only() -> None:
    """Prepare a process that does nothing but deliver; see `tracker.store.guards.note_answers`."""
    from tracker.store.guards import note_answers  # importing mlflow takes seconds

    note_answers()


def sync(
    folder: Path,
    tracking_uri: str | None = None,
    on_progress: Callable[[int], object] | None = None,
    experiment: str | None = None,
    on_wait: Callable[[int], object] | None = None,
) -> SyncResult:
    """Deliver the journal of a process that has ended, and remove it.

    A run that the process did not end becomes FAILED, or KILLED if a signal stopped it. `sync` may
    be interrupted at any point and repeated.

    Args:
        folder: The journal.
        tracking_uri: By default the one that the process had; needed if that has a password, which
            a journal does not store.
        on_progress: Called after each request, with its number of records.
        experiment: Where the runs that cannot be delivered as they are begin anew.
        on_wait: Called with the number of pending records, again and again, while another process
            delivers the journal; None does not wait for it.

    Raises:
        StoreError: `folder` is not a journal, its process still runs, another process delivers it,
            or the store cannot be used. What was delivered before stays delivered.
    """
    try:
        is_alive = writer_lives(folder)
    except StoreError:
        if folder.exists():
            raise
        return SyncResult(0, 0, ())  # its uploader has just delivered it
    if is_alive:
        writer = Writer.of(folder)
        raise StoreError(f"{folder} is still in use by process {writer.pid} on {writer.host}.")
    if on_wait is not None and not _wait_for_uploader(folder, on_wait):
        return SyncResult(0, 0, ())
    with _delivering(folder):
        damage = set_damage_aside(folder)
        with closing(Journal(folder)) as journal:
            from tracker.store.client import MlflowStore  # importing mlflow takes seconds

            stored_uri = journal.tracking_uri
            if tracking_uri is None and stored_uri is None and damage is not None:
                raise StoreError(
                    f"{folder} is damaged and does not name its store; add --tracking-uri URI."
                )
            if tracking_uri is None and stored_uri is not None and MASK in stored_uri:
                raise StoreError(
                    f"{folder} belongs to {stored_uri}, whose secret is not stored; "
                    "add --tracking-uri URI with the secret."
                )
            if uri := tracking_uri or stored_uri:
                wait_for_answer(uri)
            store = MlflowStore(uri)
            runs = journal.runs()
            close_unended(journal)
            uploader = Uploader(journal, store, on_progress)
            records = _drain_patiently(uploader)
            if experiment is not None and journal.held():
                for run in journal.held():
                    journal.redirect(run, experiment)
                records += _drain_patiently(uploader)
            reasons = journal.held()
            held = tuple(
                f"{folder} keeps the run {run}, which cannot be delivered: {reason} Deliver it with"
                f" --experiment NAME, or give it up with --drop {run}."
                for run, reason in reasons.items()
            )
            said = [text for _, text in journal.notices()]
            notices = tuple(t for t in said if not any(why in t for why in reasons.values()))
            if damage is not None and not held:
                notices += (damage,)
            elif not held:
                journal.remove()
    return SyncResult(runs, records, notices, held)


def _wait_for_uploader(folder: Path, on_wait: Callable[[int], object]) -> bool:
    """Wait for the process that delivers a journal; return False if it has delivered all."""
    lock = delivery_lock(folder)
    try:
        while not lock.take(_WAIT_SECONDS):
            with closing(Journal(folder)) as journal:
                on_wait(journal.remaining())
    except StoreError:
        if folder.exists():
            raise
    else:
        lock.release()
    return folder.exists()


def drop(folder: Path, run: str) -> int:
    """Give up a run: remove it from a journal, and the journal if nothing else is in it.

    Args:
        folder: The journal of a process that has ended.
        run: The run's key.

    Returns:
        How many records are lost by it; 0 if the journal does not have the run.

    Raises:
        StoreError: The journal has the run, and is in use.
    """
    with closing(Journal(folder)) as journal:
        if not journal.has(run):
            return 0
    if writer_lives(folder):
        writer = Writer.of(folder)
        raise StoreError(f"{folder} is still in use by process {writer.pid} on {writer.host}.")
    with _delivering(folder), closing(Journal(folder)) as journal:
        dropped = journal.drop(run)
        if dropped and not journal.remaining():
            journal.remove()
        return dropped


def _drain_patiently(uploader: Uploader) -> int:
    """Deliver every record, and wait as long as the store asks for; return their number."""
    delivered = 0
    until = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return delivered + uploader.drain()
        except StoreError as error:
            if not error.retry_after or time.monotonic() + error.retry_after > until:
                raise
            delivered += uploader.delivered
            time.sleep(error.retry_after)


def deliver_left_behind(
    directory: Path, store: MlflowStore, stop: Callable[[], bool] = lambda: False
) -> bool:
    """Deliver the journals of dead processes for one store, except offline and damaged ones.

    Args:
        directory: The folder of the journals.
        store: The store to deliver to; journals for other stores are left.
        stop: Called before each request; True stops the delivery.

    Returns:
        Whether all were tried: False if `stop` or a dead server ended it.
    """
    sweep(directory)
    our_uri = public_uri(store.tracking_uri)
    for folder in journals(directory):
        if stop():
            return False
        try:
            if (folder / OFFLINE).exists() or writer_lives(folder):
                continue
            with _delivering(folder), closing(Journal(folder)) as journal:
                is_ours = journal.tracking_uri == our_uri and not (folder / DAMAGED).exists()
                if is_ours and damage_of(folder) is None:
                    close_unended(journal)
                    Uploader(journal, store).drain(stop)
                    for _, notice in journal.notices():
                        logger.warning("%s: %s", folder, notice)
                    if not journal.pending() and not journal.held():
                        journal.remove()
        except TrackerError as error:  # `tracker sync` will report it
            logger.debug("%s: %s", folder, error)
            if store.unreachable_reason() is not None:
                return False
    return True


def settle_run(run_id: str, tracking_uri: str | None, directory: Path) -> None:
    """Wait until the journals of dead processes hold nothing of a run, and deliver them.

    Args:
        run_id: MLflow's id of the run.
        tracking_uri: By default the one that MLflow itself would use.
        directory: The folder of the journals.

    Raises:
        StoreError: A living process still tracks the run, or its rest cannot be delivered.
    """
    if not directory.is_dir():
        return
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    store = MlflowStore(tracking_uri)
    until = time.monotonic() + _SETTLE_SECONDS
    while True:
        deliver_left_behind(directory, store)
        left = [folder for folder in journals(directory) if _holds_rest_of(folder, run_id)]
        if not left:
            return
        if time.monotonic() > until:
            raise StoreError(
                f"The upload of run_id={run_id!r} is unfinished. "
                f"Finish it with: tracker sync {left[0]}"
            )
        time.sleep(0.2)


def _holds_rest_of(folder: Path, run_id: str) -> bool:
    """Return whether a dead process left records of the run; StoreError if it is alive."""
    try:
        writer, is_alive = Writer.of(folder), writer_lives(folder)
        if is_alive and writer.host != Writer.this_process().host:
            return False  # two hosts must not open it; MLflow knows whether the run is RUNNING
        with closing(Journal(folder)) as journal:
            if not is_alive:
                is_kept = (folder / DAMAGED).exists() and not journal.pending()
                return journal.holds(run_id) and not is_kept
            is_tracked = journal.holds(run_id, unended=True)
    except StoreError as error:  # removed meanwhile, or unreadable, which `tracker sync` reports
        logger.debug("%s", error)
        return False
    if is_tracked:
        raise StoreError(f"run_id={run_id!r} is still running, in process {writer.pid}.")
    return False


@contextmanager
def _delivering(folder: Path) -> Iterator[None]:
    with delivery_lock(folder).hold() as taken:
        if not taken:
            raise StoreError(f"{folder} is being uploaded by another process.")
        yield
