"""The journal: the one thing that training writes to.

A journal is a folder of one process: `journal.sqlite` with the records, `files/` with what they
refer to. Records are only ever appended, and carry the time at which they were made, so that a
record delivered twice is the same record. The training thread appends to memory; a thread of the
journal puts that on disk within FLUSH_SECONDS. Who delivers the records (`uploader.py`) keeps its
place in the same file, and removes the folder when all is delivered.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tracker.errors import StoreError

Kind = Literal[
    "begin", "params", "tags", "metrics", "epoch", "histograms", "file", "dataset", "model", "end"
]

FLUSH_SECONDS = 0.2
_FORMAT = 1  # PRAGMA user_version
_APPLICATION = 0x54524B52  # PRAGMA application_id: "TRKR"
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {_FORMAT};
CREATE TABLE records (
    seq INTEGER PRIMARY KEY, run TEXT NOT NULL, time INTEGER NOT NULL,
    kind TEXT NOT NULL, body TEXT NOT NULL
);
CREATE INDEX records_of_a_run ON records (run, kind);
CREATE TABLE runs (run TEXT PRIMARY KEY, run_id TEXT NOT NULL);
CREATE TABLE writer (
    host TEXT NOT NULL, pid INTEGER NOT NULL, closed INTEGER NOT NULL, tracking_uri TEXT
);
CREATE TABLE delivered (seq INTEGER NOT NULL);
INSERT INTO delivered VALUES (0);
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


def now() -> int:
    """Milliseconds since 1970, the clock of MLflow."""
    return time.time_ns() // 1_000_000


def _plain(value: Any) -> Any:
    """A numpy scalar or a tensor of one number as python's own."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no JSON")


class Journal:
    """A journal open for writing (by training) and for delivering."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "journal.sqlite").is_file():
            raise StoreError(f"{folder} is not a journal of this program.")
        self.folder = folder
        try:
            self._db = sqlite3.connect(folder / "journal.sqlite", check_same_thread=False)
            self._db.execute("PRAGMA synchronous = NORMAL")  # safe in WAL mode when a process dies
            self._check_format()
            self.host, self.pid = self._db.execute("SELECT host, pid FROM writer").fetchone()
        except sqlite3.Error as error:
            raise StoreError(f"{folder} is not a journal of this program: {error}.") from error
        self._db_lock = threading.Lock()
        self._pending: deque[tuple[str, int, Kind, str]] = deque()
        self._closing = threading.Event()
        self._warned = False
        self._writer: threading.Thread | None = None

    @classmethod
    def create(cls, directory: Path) -> Journal:
        """A new journal of this process below `directory`, which is made if need be."""
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
        # Absolute: a program may change its directory in the middle of a run.
        folder = directory.absolute() / f"{name}-{uuid.uuid4().hex[:8]}"
        try:
            (folder / "files").mkdir(parents=True)
            with closing(sqlite3.connect(folder / "journal.sqlite")) as db:
                db.executescript(_SCHEMA)
                with db:
                    db.execute(
                        "INSERT INTO writer VALUES (?, ?, 0, NULL)",
                        (socket.gethostname(), os.getpid()),
                    )
        except (OSError, sqlite3.Error) as error:
            raise StoreError(
                f"directory={str(directory)!r} cannot hold the journal ({error}); "
                "it must be a folder that this process may write to."
            ) from error
        return cls(folder)

    def _check_format(self) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise StoreError(f"{self.folder} is not a journal of this program.")
        if version != _FORMAT:
            raise StoreError(
                f"{self.folder} is a journal of format {version}; this version reads {_FORMAT}."
            )

    def append(self, run: str, kind: Kind, body: Mapping[str, Any], at: int | None = None) -> None:
        """Add a record of `run`, made now or `at` a time; returns before it is on disk."""
        # As text from here on: what is wrong with a body shows where it was made.
        self._pending.append((run, at or now(), kind, json.dumps(body, default=_plain)))
        if self._writer is None:
            with self._db_lock:
                self._start_writer()

    def stage(self, name: str) -> Path:
        """A path for a file or folder called `name` that a later record refers to."""
        folder = self.folder / "files" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder / name

    def flush(self) -> None:
        """Put every record that was appended on disk.

        A disk that is full or gone does not end training: the records stay in memory, one warning
        is given, and the next flush tries again.
        """
        with self._db_lock:
            rows = []
            while self._pending:  # one at a time: training may append meanwhile
                rows.append(self._pending.popleft())
            if not rows:
                return
            try:
                with self._db:
                    self._db.executemany(
                        "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)",
                        rows,
                    )
            except sqlite3.Error as error:
                self._pending.extendleft(reversed(rows))
                if not self._warned:
                    self._warned = True
                    logger.warning("The journal %s cannot be written: %s.", self.folder, error)

    def _start_writer(self) -> None:
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="journal", daemon=True)
            self._writer.start()

    def _write(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self.flush()

    def undelivered(self) -> Iterator[Record]:
        """The records on disk that were not marked delivered, in order."""
        with self._db_lock:
            rows = self._db.execute(
                "SELECT seq, run, time, kind, body FROM records"
                " WHERE seq > (SELECT seq FROM delivered) ORDER BY seq"
            ).fetchall()
        for seq, run, at, kind, body in rows:
            yield Record(seq, run, at, kind, json.loads(body))

    def bodies(self, run: str, kind: Kind) -> list[Mapping[str, Any]]:
        """Every record of one kind of a run, delivered or not, in order."""
        with self._db_lock:
            rows = self._db.execute(
                "SELECT body FROM records WHERE run = ? AND kind = ? ORDER BY seq", (run, kind)
            ).fetchall()
        return [json.loads(body) for (body,) in rows]

    def mark_delivered(self, seq: int) -> None:
        """Remember that all records up to `seq` are delivered."""
        with self._db_lock, self._db:
            self._db.execute("UPDATE delivered SET seq = ?", (seq,))

    def bind(self, run: str, run_id: str) -> None:
        """Remember which MLflow run a run of this journal is."""
        with self._db_lock, self._db:
            self._db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?)", (run, run_id))

    def run_id(self, run: str) -> str | None:
        """The MLflow run that `run` was bound to, None before that."""
        with self._db_lock:
            row = self._db.execute("SELECT run_id FROM runs WHERE run = ?", (run,)).fetchone()
        return row[0] if row else None

    @property
    def tracking_uri(self) -> str | None:
        """Where this journal is delivered to, without a password; None before it first was."""
        with self._db_lock:
            (uri,) = self._db.execute("SELECT tracking_uri FROM writer").fetchone()
        return None if uri is None else str(uri)

    @tracking_uri.setter
    def tracking_uri(self, uri: str) -> None:
        with self._db_lock, self._db:
            self._db.execute("UPDATE writer SET tracking_uri = ?", (uri,))

    def remaining(self) -> int:
        """How many records are not delivered, those still in memory included."""
        with self._db_lock:
            (count,) = self._db.execute(
                "SELECT count(*) FROM records WHERE seq > (SELECT seq FROM delivered)"
            ).fetchone()
        return int(count) + len(self._pending)

    def writer_lives(self) -> bool:
        """Whether the process that made this journal still runs, as far as this host can tell."""
        (closed,) = self._db.execute("SELECT closed FROM writer").fetchone()
        if closed or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # somebody else's process
            return True
        return True

    def last_time(self, run: str) -> int | None:
        """When the last record of `run` was made."""
        with self._db_lock:
            query = "SELECT max(time) FROM records WHERE run = ?"
            (last,) = self._db.execute(query, (run,)).fetchone()
        return None if last is None else int(last)

    def unended(self) -> list[str]:
        """The runs that have no end yet."""
        with self._db_lock:
            rows = self._db.execute(
                "SELECT run FROM records GROUP BY run"
                " HAVING NOT max(kind = 'end') ORDER BY min(seq)"
            ).fetchall()
        return [run for (run,) in rows]

    def close(self) -> int:
        """Flush and close; returns how many records are not delivered.

        The folder goes when there are none, and stays for `tracker sync` when there are.
        """
        self._stop()
        remaining = self.remaining()
        try:
            with self._db:
                self._db.execute("UPDATE writer SET closed = 1")
        except sqlite3.Error as error:  # gone, locked or full: the records say enough
            logger.warning("The journal %s cannot be closed: %s.", self.folder, error)
        self._db.close()
        if not remaining:
            shutil.rmtree(self.folder, ignore_errors=True)
        return remaining

    def discard(self) -> None:
        """Close and remove the folder with all that is in it."""
        self._stop()
        self._db.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stop(self) -> None:
        self._closing.set()
        if self._writer is not None:
            self._writer.join()
        self.flush()
