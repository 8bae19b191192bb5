"""Journals that were left behind: what they hold, and delivering them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tracker.delivery.uploader import Uploader, close_unended, never
from tracker.errors import StoreError, TrackerError
from tracker.journal.damage import set_damage_aside
from tracker.journal.ownership import Writer, delivery_lock, writer_lives
from tracker.journal.reader import DONE, OFFLINE, Journal
from tracker.redaction import MASK, public_uri

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

_SETTLE_SECONDS = 60.0

State = Literal["in use", "being delivered", "left behind", "unreadable"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JournalStatus:
    """How a journal stands."""

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
    """What was lost on the way, a sentence each."""


def journals(path: Path) -> list[Path]:
    """The journals in `path`, oldest first: it is one itself, or the folder where they lie.

    Raises StoreError where there is no such folder.
    """
    if not path.is_dir():
        raise StoreError(f"path={str(path)!r} is not a folder.")
    if (path / "writer.json").exists() or (path / "journal.sqlite").exists():
        return [path]
    return sorted(file.parent for file in path.glob("[!.]*/journal.sqlite"))


def sweep(directory: Path) -> None:
    """Remove what is left of delivered journals where a process was killed as it removed them."""
    for folder in directory.glob(f".*{DONE}"):
        shutil.rmtree(folder, ignore_errors=True)


def journal_status(folder: Path) -> JournalStatus:
    """How the journal in `folder` stands; changes nothing."""
    try:
        alive = writer_lives(folder)
        if alive and Writer.of(folder).host != Writer.this_process().host:
            # Its database must not be opened by two hosts.
            return JournalStatus(
                folder, "in use", problem=f"by a process on {Writer.of(folder).host}"
            )
        with delivery_lock(folder).hold() as taken:
            delivering = not taken
        with closing(Journal(folder)) as journal:
            state: State = "left behind"
            if alive or delivering:
                state = "in use" if alive else "being delivered"
            problem = journal.problem
            return JournalStatus(
                folder,
                state,
                journal.runs(),
                journal.remaining(),
                journal.tracking_uri,
                problem.text if problem else None,
            )
    except StoreError as error:
        return JournalStatus(folder, "unreadable", problem=str(error))


def sync(
    folder: Path,
    tracking_uri: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SyncResult:
    """Deliver the journal in `folder`, of a process that has ended, and remove it.

    It goes where the process would have delivered it, or to `tracking_uri`: needed where that has
    a password, which a journal does not keep. A run that the process did not live to end becomes
    FAILED, or KILLED where it was stopped by a signal. It may be stopped at any point, and called
    again. Raises StoreError where the folder is no journal, its process still runs, somebody else
    delivers it, or the store cannot be used; what was delivered until then stays delivered.
    """
    if writer_lives(folder):
        writer = Writer.of(folder)
        raise StoreError(
            f"path={str(folder)!r} is still written to by process {writer.pid} on {writer.host}."
        )
    with _delivering(folder):
        damage = set_damage_aside(folder)
        with closing(Journal(folder)) as journal:
            from tracker.store.client import MlflowStore  # importing mlflow takes seconds

            known = journal.tracking_uri
            if tracking_uri is None and known is None and damage is not None:
                raise StoreError(f"{folder} lost where it goes; give --tracking-uri.")
            if tracking_uri is None and known is not None and MASK in known:
                raise StoreError(f"{folder} goes to {known}; give --tracking-uri with its secret.")
            store = MlflowStore(tracking_uri or known)
            runs = journal.runs()
            close_unended(journal)
            records = Uploader(journal, store, on_progress).drain()
            notices = tuple(text for _, text in journal.notices())
            if damage is None:
                journal.remove()
            else:
                notices += (damage,)
    return SyncResult(runs, records, notices)


def deliver_left_behind(
    directory: Path, store: MlflowStore, stop: Callable[[], bool] = never
) -> bool:
    """Deliver the journals in `directory` that dead processes meant for `store`.

    Offline runs are left to `tracker sync`. Returns False where `stop` ended it.
    """
    sweep(directory)
    ours = public_uri(store.tracking_uri)
    for folder in journals(directory):
        if stop():
            return False
        try:
            if (folder / OFFLINE).exists() or writer_lives(folder):
                continue
            with _delivering(folder), closing(Journal(folder)) as journal:
                if journal.tracking_uri == ours:
                    close_unended(journal)
                    Uploader(journal, store).drain(stop)
                    for _, notice in journal.notices():
                        logger.warning("%s: %s", folder, notice)
                    if not journal.pending():
                        journal.remove()
        except TrackerError as error:  # `tracker sync` says what is wrong with it
            logger.debug("%s: %s", folder, error)
            if store.unreachable_reason() is not None:
                return False
    return True


def settle_run(run_id: str, tracking_uri: str | None, directory: Path) -> None:
    """Have what a dead process left of the run delivered, by us or by its uploader if that lives.

    Other journals in `directory` are none of its concern. Raises StoreError where a living process
    still tracks the run.
    """
    if not directory.is_dir():
        return
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    store = MlflowStore(tracking_uri)
    until = time.monotonic() + _SETTLE_SECONDS
    while True:
        deliver_left_behind(directory, store)
        left = [folder for folder in journals(directory) if _is_left(folder, run_id)]
        if not left:
            return
        if time.monotonic() > until:
            raise StoreError(f"{left[0]} holds what is left of run_id={run_id!r}: tracker sync.")
        time.sleep(0.2)


def _is_left(folder: Path, run_id: str) -> bool:
    """Whether a dead process left records of the run; StoreError where a living one tracks it."""
    try:
        writer, lives = Writer.of(folder), writer_lives(folder)
        if lives and writer.host != Writer.this_process().host:
            return False  # not to be opened by two hosts; MLflow says whether the run is RUNNING
        with closing(Journal(folder)) as journal:
            if not lives:
                return journal.holds(run_id)
            tracked = journal.holds(run_id, unended=True)
    except StoreError as error:  # gone by now, or for `tracker sync` to say what is wrong with it
        logger.debug("%s", error)
        return False
    if tracked:
        raise StoreError(f"run_id={run_id!r} still goes on, in process {writer.pid}.")
    return False


@contextmanager
def _delivering(folder: Path) -> Iterator[None]:
    with delivery_lock(folder).hold() as taken:
        if not taken:
            raise StoreError(f"path={str(folder)!r} is being delivered by another process.")
        yield
