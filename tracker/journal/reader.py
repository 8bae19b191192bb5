"""The journal: the one thing that training writes to.

A journal is a folder of one process: `journal.sqlite` with the records, `files/` with what they
refer to, and the locks of `ownership.py`. Records are only ever appended, and carry the time at
which they were made, so that a record delivered twice is the same record. `journal_writer.py` is
training's side. `Journal` is the side of who delivers (`uploader.py`), in this process or another:
it keeps its place in the same file, so that whoever comes next goes on there.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tracker.errors import StoreError
from tracker.journal.ownership import Writer
from tracker.journal.records import Entry, Record, decode, encode
from tracker.redaction import public_uri

FLUSH_SECONDS = 0.1  # so that all is on disk within 0.2 s
OFFLINE = "offline"
"""A file of this name beside it says that nobody but `tracker sync` is to deliver a journal."""
DONE = ".done"
"""What the name of a journal ends with that is delivered and being removed."""
DAMAGED = "damaged.sqlite"
"""What is left of a database that could be read in parts, beside the one made of these parts."""
_FORMAT = 2  # PRAGMA user_version
_APPLICATION = 0x54524B52  # PRAGMA application_id: "TRKR"
_BUSY_SECONDS = 10.0  # writer and deliverer take turns, each for milliseconds
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
CREATE TABLE records (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, time INTEGER NOT NULL,
    kind TEXT NOT NULL, body TEXT NOT NULL
);
CREATE INDEX records_of_a_run ON records (run, kind);
CREATE TABLE runs (run TEXT PRIMARY KEY, run_id TEXT NOT NULL);
CREATE TABLE notices (id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL);
CREATE TABLE progress (
    delivered INTEGER NOT NULL, sending INTEGER NOT NULL,
    tracking_uri TEXT, problem TEXT, problem_since REAL
);
INSERT INTO progress VALUES (0, 0, NULL, NULL, NULL);
"""

R = TypeVar("R", bound=Record)

logger = logging.getLogger(__name__)


class Problem(NamedTuple):
    """Why nothing is delivered at the moment."""

    text: str
    since: float
    """Seconds since 1970."""


def is_ours(path: Path) -> bool:
    """Whether the header of a file says that it is a journal's database of this format."""
    return _format_of(path) == _FORMAT


def _format_of(path: Path) -> int | None:
    """The format of a journal's database; None for any other file, which is left untouched."""
    # Through SQLite: whoever opens and closes the file drops all locks that this process has on it,
    # and the next process to close it takes the WAL of the living for its own. Only the header is
    # read: `immutable` makes no files beside it, `writable_schema` minds no missing pages.
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            db.execute("PRAGMA writable_schema = ON")
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:
        return None
    return int(version) if application == _APPLICATION else None


def new_database(path: Path) -> None:
    """Make the empty database of a journal."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(_SCHEMA)


def connect(folder: Path) -> sqlite3.Connection:
    """Open the database of the journal in `folder`; sqlite3.Error where there is none."""
    path = (folder / "journal.sqlite").absolute()
    # Not made anew where it is gone: mode=rw.
    db = sqlite3.connect(
        f"{path.as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS, check_same_thread=False
    )
    db.execute("PRAGMA synchronous = NORMAL")  # safe in WAL mode when a process dies
    return db


class Journal:
    """A journal on disk, for who delivers it or tells how it stands."""

    def __init__(self, folder: Path) -> None:
        """Open the journal in `folder`; StoreError where there is none that we can read."""
        self.folder = folder
        self.writer = Writer.of(folder)
        self._lock = threading.Lock()
        found = _format_of(folder / "journal.sqlite")
        if found is None:
            raise StoreError(f"{folder} is not a journal of this program.")
        if found != _FORMAT:
            raise StoreError(
                f"{folder} is a journal of format {found}; this version reads {_FORMAT}."
            )
        with _translated(folder):
            self._db = connect(folder)

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._lock, _translated(self.folder):
            return self._db.execute(query, values).fetchall()

    def _only(self, query: str, *values: Any) -> Any:
        rows = self._read(query, *values)
        if len(rows) != 1:
            raise StoreError(f"The journal {self.folder} cannot be used: it lost its place.")
        return rows[0]

    def _change(self, query: str, *values: Any) -> None:
        with self._lock, _translated(self.folder), self._db:
            self._db.execute(query, values)

    # -- records ---------------------------------------------------------------------------

    def undelivered(self, limit: int = -1) -> list[Entry]:
        """Return the first `limit` entries that are not marked delivered, in order."""
        rows = self._read(
            "SELECT seq, run, time, kind, CAST(body AS BLOB) FROM records"
            " WHERE seq > (SELECT delivered FROM progress) ORDER BY seq LIMIT ?",
            limit,
        )
        return [Entry(seq, run, at, decode(kind, body, at)) for seq, run, at, kind, body in rows]

    def records(self, run: str, kind: type[R]) -> list[R]:
        """Return the valid records of one kind of a run, delivered or not, in order."""
        rows = self._read(
            "SELECT CAST(body AS BLOB) FROM records WHERE run = ? AND kind = ? ORDER BY seq",
            *(run, kind.kind),
        )
        records = (decode(kind.kind, body) for (body,) in rows)
        return [record for record in records if isinstance(record, kind)]

    def append(self, run: str, record: Record, at: int) -> None:
        """Add a record that the writer did not: a sample of the system, or a missing end.

        Args:
            run: The run's key.
            record: What happened.
            at: When, in milliseconds since 1970.
        """
        self._change(
            "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)",
            *(run, at, record.kind, encode(record)),
        )

    def last(self) -> int:
        """The place of the last record on disk; 0 if there is none."""
        (seq,) = self._only("SELECT coalesce(max(seq), 0) FROM records")
        return int(seq)

    def begin_time(self, run: str) -> int:
        """When `run` began."""
        query = "SELECT min(CAST(time AS INTEGER)) FROM records WHERE run = ? AND kind = 'begin'"
        (at,) = self._only(query, run)
        return int(at)

    def last_time(self, run: str) -> int:
        """When the last record of `run` was made."""
        (at,) = self._only("SELECT max(CAST(time AS INTEGER)) FROM records WHERE run = ?", run)
        return int(at)

    def unended(self) -> list[str]:
        """The runs that have begun and have no end yet."""
        rows = self._read(
            "SELECT run FROM records GROUP BY run"
            " HAVING max(kind = 'begin') AND NOT max(kind = 'end') ORDER BY min(seq)"
        )
        return [run for (run,) in rows]

    def runs(self) -> int:
        """How many runs have records here."""
        (count,) = self._only("SELECT count(DISTINCT run) FROM records")
        return int(count)

    def forget(self, run: str) -> None:
        """Remove the delivered records of a run that has ended: a grid of runs can be long."""
        self._change(
            "DELETE FROM records WHERE run = ? AND seq <= (SELECT delivered FROM progress)", run
        )

    # -- delivery --------------------------------------------------------------------------

    def pending(self) -> bool:
        """Whether anything on disk is not delivered."""
        (more,) = self._only(
            "SELECT coalesce(max(seq), 0) > (SELECT delivered FROM progress) FROM records"
        )
        return bool(more)

    def remaining(self) -> int:
        """How many records on disk are not delivered."""
        (count,) = self._only(
            "SELECT count(*) FROM records WHERE seq > (SELECT delivered FROM progress)"
        )
        return int(count)

    @property
    def delivered(self) -> int:
        """The place of the last record that is delivered."""
        (seq,) = self._only("SELECT delivered FROM progress")
        return int(seq)

    def sending(self, seq: int) -> bool:
        """Remember that the records up to `seq` are being sent.

        Returns whether the first of them may have been sent before, by one who did not live to
        mark it.
        """
        (in_doubt,) = self._only("SELECT sending > delivered FROM progress")
        self._change("UPDATE progress SET sending = max(sending, ?)", seq)
        return bool(in_doubt)

    def mark_delivered(self, seq: int) -> None:
        """Remember that all records up to `seq` are delivered."""
        self._change("UPDATE progress SET delivered = ?, sending = max(sending, ?)", seq, seq)

    def bind(self, run: str, run_id: str) -> None:
        """Remember which MLflow run a run of this journal is."""
        self._change("INSERT OR REPLACE INTO runs VALUES (?, ?)", run, run_id)

    def holds(self, run_id: str, *, unended: bool = False) -> bool:
        """Whether a run of this journal is the MLflow run `run_id`, or is it and goes on."""
        runs = [run for (run,) in self._read("SELECT run FROM runs WHERE run_id = ?", run_id)]
        return bool(set(runs) & set(self.unended()) if unended else runs)

    def run_ids(self) -> list[str]:
        """The MLflow runs that the runs of this journal were bound to."""
        return [run_id for (run_id,) in self._read("SELECT run_id FROM runs") if run_id]

    def run_id(self, run: str) -> str | None:
        """The MLflow run that `run` was bound to, None before that."""
        rows = self._read("SELECT run_id FROM runs WHERE run = ?", run)
        return str(rows[0][0]) if rows else None

    @property
    def tracking_uri(self) -> str | None:
        """Where this journal is delivered to, without a password; None where nobody said."""
        (uri,) = self._only("SELECT tracking_uri FROM progress")
        return None if uri is None else str(uri)

    @tracking_uri.setter
    def tracking_uri(self, uri: str) -> None:
        self._change("UPDATE progress SET tracking_uri = ?", uri)

    @property
    def problem(self) -> Problem | None:
        """Why delivery does not go on; None while it does."""
        text, since = self._only("SELECT problem, CAST(problem_since AS REAL) FROM progress")
        return None if text is None else Problem(str(text), since or 0.0)

    @problem.setter
    def problem(self, text: str | None) -> None:
        self._change(
            "UPDATE progress SET problem = ?,"
            " problem_since = CASE WHEN ? THEN coalesce(problem_since, ?) END",
            *(text and public_uri(text), text is not None, time.time()),
        )

    def notice(self, text: str) -> None:
        """Leave a sentence for the user, whom the deliverer may not be able to reach."""
        self._change("INSERT INTO notices (text) VALUES (?)", public_uri(text))

    def notices(self, after: int = 0) -> list[tuple[int, str]]:
        """The sentences left since number `after`, each with its number."""
        return [
            (int(number), str(text))
            for number, text in self._read(
                "SELECT id, text FROM notices WHERE id > ? ORDER BY id", after
            )
        ]

    def undelivered_summary(self) -> str | None:
        """A sentence that says what is not delivered, and how to deliver it; None if all is."""
        if not (records := self.remaining()):
            return None
        why = f" ({self.problem.text.rstrip('.')})" if self.problem else ""
        what = f"{records} record{'s are' if records > 1 else ' is'} not delivered"
        return f"{what}; deliver them: tracker sync {self.folder}{why}"

    def close(self) -> None:
        """Close the file; the journal stays."""
        with self._lock:
            self._db.close()

    def remove(self) -> None:
        """Close the file and remove the folder with all that is in it."""
        self.close()
        folder = self.folder.resolve()
        done = folder.with_name(f".{folder.name}{DONE}")
        try:
            folder.rename(done)  # all at once: who is killed later leaves what `sync.sweep` removes
        except OSError:  # it is gone, or nobody may rename it
            done = folder
        shutil.rmtree(done, ignore_errors=True)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, RecursionError) as error:  # of sqlite, of json
        raise StoreError(f"The journal {folder} cannot be used: {error}.") from error
