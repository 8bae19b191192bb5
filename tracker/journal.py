"""The journal: the one thing that training writes to.

A journal is a folder of one process: `journal.sqlite` with the records, `files/` with what they
refer to, and the locks of `ownership.py`. Records are only ever appended, and carry the time at
which they were made, so that a record delivered twice is the same record. `JournalWriter` is
training's side: it appends to memory, and a thread puts that on disk within FLUSH_SECONDS.
`Journal` is the side of who delivers (`uploader.py`), in this process or another: it keeps its
place in the same file, so that whoever comes next goes on there.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import shutil
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tracker.errors import StoreError
from tracker.ownership import BEAT_SECONDS, Lock, Writer

Kind = Literal[
    "begin",
    "params",
    "tags",
    "metrics",
    "epoch",
    "histograms",
    "file",
    "delete",
    "dataset",
    "model",
    "signal",
    "end",
]

FLUSH_SECONDS = 0.2
DAMAGED = "damaged.sqlite"
"""What is left of a database that could be read in parts, beside the one made of these parts."""
_FORMAT = 2  # PRAGMA user_version
_APPLICATION = 0x54524B52  # PRAGMA application_id: "TRKR"
_BUSY_SECONDS = 10.0  # writer and deliverer take turns, each for milliseconds
_HELD = 200_000  # records kept in memory while the disk takes none
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One thing that happened in a run."""

    seq: int
    """Its place in the journal, from 1."""
    run: str
    """The run's key in this journal; MLflow's run id is known once it is delivered."""
    time: int
    """When it happened, in milliseconds since 1970."""
    kind: Kind
    body: Mapping[str, Any]
    """What happened, by kind: see `run.py`, which writes them, and `uploader.py`, which reads."""


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: Any
    """A float, or a tensor of one number that nobody changes: it is read when it is written."""
    step: int
    time: int
    """Milliseconds since 1970."""


class Problem(NamedTuple):
    """Why nothing is delivered at the moment."""

    text: str
    since: float
    """Seconds since 1970."""


def now() -> int:
    """Milliseconds since 1970, the clock of MLflow."""
    return time.time_ns() // 1_000_000


def _plain(value: Any) -> Any:
    """A numpy scalar or a tensor of one number as python's own."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no JSON")


class JournalWriter:
    """A new journal of this process, open for writing."""

    def __init__(self, directory: Path) -> None:
        """Make a journal below `directory`, which is made if need be.

        Raises StoreError where the directory cannot hold it.
        """
        writer = Writer.this_process()
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{writer.host}-{writer.pid}-{uuid.uuid4().hex[:8]}"
        # Absolute: a program may change its directory in the middle of a run.
        self.folder = directory.absolute() / name
        # Under another name until its lock is held: nobody takes it for one left behind.
        hidden = self.folder.with_name(f".{name}")
        try:
            (hidden / "files").mkdir(parents=True)
            self._lock = Lock(hidden, "writer")
            self._lock.take()
            writer.save(hidden)
            new_database(hidden / "journal.sqlite")
            hidden.rename(self.folder)
        except (OSError, sqlite3.Error, StoreError) as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise StoreError(
                f"directory={str(directory)!r} cannot hold the journal ({error}); "
                "it must be a folder that this process may write to."
            ) from error
        self._lock.path = self.folder / self._lock.path.name
        self.lost = 0
        """Records that no disk would take, and values that could not be read."""
        self.on_tick: Callable[[], None] | None = None
        """Called by the writing thread after each of its turns."""
        self._pid = os.getpid()
        self._pending: deque[tuple[str, int, Kind, str | Point]] = deque()
        self._held: list[tuple[str, int, str, str]] = []
        self._requests: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._warned = False
        self._unread = False
        self._closed = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def append(self, run: str, kind: Kind, body: Mapping[str, Any], at: int | None = None) -> None:
        """Add a record of `run`, made now or `at` a time; returns before it is on disk."""
        # As text from here on: what is wrong with a body shows where it was made.
        self._pending.append((run, at or now(), kind, json.dumps(body, default=_plain)))

    def append_points(self, run: str, points: Iterable[Point]) -> None:
        """Add values of metrics; neighbours become one record."""
        for point in points:  # mostly one: a generator would cost more than it
            self._pending.append((run, point.time, "metrics", point))

    def stage(self, name: str) -> Path:
        """A path for a file or folder called `name` that a later record refers to."""
        folder = self.folder / "files" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / name

    def flush(self, timeout: float | None = None) -> bool:
        """Have every record put on disk that was appended before; whether that was done in time.

        Safe in a signal's handler.
        """
        if self._closed or os.getpid() != self._pid:
            return False
        done = threading.Event()
        self._requests.put(done)
        return done.wait(timeout) and not self._held

    def close(self) -> None:
        """Put all on disk, and give the journal up to whoever delivers it."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._requests.put(None)
        self._thread.join()
        if self._held:
            self.lost += len(self._held)
        if self.lost:
            logger.warning("%d records are lost: they could not be read or written.", self.lost)
        self._lock.release()

    def _write(self) -> None:
        db: sqlite3.Connection | None = None
        going_on = True
        while going_on:
            waiting: list[threading.Event] = []
            try:
                request = self._requests.get(timeout=FLUSH_SECONDS)
                while True:
                    if request is None:
                        going_on = False
                    else:
                        waiting.append(request)
                    request = self._requests.get_nowait()
            except queue.Empty:
                pass
            self._held += self._take_pending()
            if self._held:
                db = self._put_on_disk(db)
            for done in waiting:
                done.set()
            if time.monotonic() > self._beat + BEAT_SECONDS:
                self._beat = time.monotonic()
                with _no_error(self.folder):
                    self._lock.beat()
            if self.on_tick is not None and going_on:
                try:
                    self.on_tick()
                except Exception:
                    logger.debug("The uploader cannot be looked after.", exc_info=True)
        if db is not None:
            db.close()

    def _take_pending(self) -> list[tuple[str, int, str, str]]:
        """What is pending as rows of the table, the neighbouring points of a run in one."""
        entries = []
        while self._pending:  # one at a time: training may append meanwhile
            entries.append(self._pending.popleft())
        rows: list[tuple[str, int, str, str]] = []
        for (run, points), group in groupby(entries, lambda e: (e[0], isinstance(e[3], Point))):
            if points:
                several = [list(body) for *_, body in group]
                values = [point[1] for point in several]
                problem = _numbers(values)
                for point, value in zip(several, values, strict=True):
                    point[1] = value
                read = [point for point in several if point[1] is not None]
                rows.append((run, several[0][3], "metrics", json.dumps({"metrics": read})))
                self._count_unread(len(several) - len(read), problem)
            else:
                rows += [(run, at, kind, str(body)) for _, at, kind, body in group]
        return rows

    def _count_unread(self, values: int, problem: str | None) -> None:
        if values and not self._unread:
            self._unread = True
            logger.warning("A metric cannot be read (%s); training goes on.", problem)
        self.lost += values

    def lose(self, what: str, error: Exception) -> None:
        """Count a file that the disk would not take; one warning, whatever else it refuses."""
        self.lost += 1
        if not self._warned:
            self._warned = True
            logger.warning("%s cannot be logged, training goes on: %s.", what, error)

    def _put_on_disk(self, db: sqlite3.Connection | None) -> sqlite3.Connection | None:
        """Write what is held. A disk that is full or gone does not end training: we try again."""
        try:
            if db is None:
                db = _connect(self.folder)
            with db:
                db.executemany(
                    "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)", self._held
                )
            self._held = []
        except sqlite3.Error as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "The journal %s cannot be written (%s); training goes on, and up to %d records "
                    "wait in memory.",
                    *(self.folder, error, _HELD),
                )
            if len(self._held) > _HELD:
                self.lost += len(self._held) - _HELD
                del self._held[_HELD:]
        return db


def _numbers(values: list[Any]) -> str | None:
    """Make values floats; tensors are read with one transfer a device, not one each.

    One that cannot be read becomes None; returns why, if there is one.
    """
    problem: str | None = None
    tensors: dict[Any, list[int]] = {}
    for place, value in enumerate(values):
        if not isinstance(value, float):
            tensors.setdefault((value.device, value.dtype), []).append(place)
    for (device, _), places in tensors.items():
        import torch  # whoever made the tensors has it

        read: list[float | None] = [None] * len(places)
        try:
            if device.type == "cuda":  # made on another stream than this thread's, perhaps
                torch.cuda.synchronize(device)
            stacked = torch.stack([values[place].reshape(()) for place in places])
            read = [float(value) for value in stacked.tolist()]
        except RuntimeError as error:  # after an error of CUDA nothing there can be read
            problem = str(error).partition("\n")[0]
        for place, value in zip(places, read, strict=True):
            values[place] = value
    return problem


@contextmanager
def _no_error(folder: Path) -> Iterator[None]:
    """A journal whose folder was taken away ends no training."""
    try:
        yield
    except OSError as error:
        logger.debug("%s: %s", folder, error)


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


def _connect(folder: Path) -> sqlite3.Connection:
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
            self._db = _connect(folder)

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

    def undelivered(self, limit: int = -1) -> list[Record]:
        """The first `limit` records on disk that were not marked delivered, in order."""
        rows = self._read(
            "SELECT seq, run, time, kind, body FROM records"
            " WHERE seq > (SELECT delivered FROM progress) ORDER BY seq LIMIT ?",
            limit,
        )
        with _translated(self.folder):
            return [
                Record(seq, run, at, kind, json.loads(body)) for seq, run, at, kind, body in rows
            ]

    def bodies(self, run: str, kind: Kind) -> list[Mapping[str, Any]]:
        """Every record of one kind of a run, delivered or not, in order."""
        rows = self._read(
            "SELECT body FROM records WHERE run = ? AND kind = ? ORDER BY seq", run, kind
        )
        with _translated(self.folder):
            return [json.loads(body) for (body,) in rows]

    def append(self, run: str, kind: Kind, body: Mapping[str, Any], at: int) -> None:
        """Add a record that the writer did not: a sample of the system, or the end it missed."""
        self._change(
            "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)",
            *(run, at, kind, json.dumps(body)),
        )

    def last(self, run: str | None = None) -> int:
        """The place of the last record on disk, of `run` or at all; 0 if there is none."""
        if run is None:
            (seq,) = self._only("SELECT coalesce(max(seq), 0) FROM records")
        else:
            (seq,) = self._only("SELECT coalesce(max(seq), 0) FROM records WHERE run = ?", run)
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
            *(text, text is not None, time.time()),
        )

    def notice(self, text: str) -> None:
        """Leave a sentence for the user, whom the deliverer may not be able to reach."""
        self._change("INSERT INTO notices (text) VALUES (?)", text)

    def notices(self, after: int = 0) -> list[tuple[int, str]]:
        """The sentences left since number `after`, each with its number."""
        return [
            (int(number), str(text))
            for number, text in self._read(
                "SELECT id, text FROM notices WHERE id > ? ORDER BY id", after
            )
        ]

    def close(self) -> None:
        """Close the file; the journal stays."""
        with self._lock:
            self._db.close()

    def remove(self) -> None:
        """Close the file and remove the folder with all that is in it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _translated(folder: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, ValueError, RecursionError) as error:  # of sqlite, of json
        raise StoreError(f"The journal {folder} cannot be used: {error}.") from error
