"""The write side of a journal: appends to memory, and a thread writes that to disk."""

from __future__ import annotations

import logging
import math
import os
import queue
import shutil
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

from tracker.errors import StoreError, first_line
from tracker.journal import database
from tracker.journal.ownership import BEAT_SECONDS, Writer, writer_lock
from tracker.journal.records import End, Metrics, Point, Record, encode, now

FLUSH_SECONDS = 0.1  # everything is on disk within 0.2 s
_ALIVE_SECONDS = 1.0  # how often a waiting caller looks whether the thread lives
_ARRIVAL_SECONDS = 0.002  # how often the thread looks for a device's number that is waited for
_PATIENCE_SECONDS = 10.0  # for such a number: its device may hang or have failed
_MOST_POINTS = 10_000  # in a record: the uploader reads each one whole
_MAX_HELD = 200_000  # records kept in memory while the disk fails
_INSERT = "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)"
_BAD_ROW = (  # raised for a row's values, not for the disk
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    OverflowError,
    UnicodeError,
    TypeError,
    ValueError,
)

_Row: TypeAlias = tuple[str, int, str, str]  # run, time, kind and body
_Pending: TypeAlias = _Row | tuple[str, int, str, Point]

logger = logging.getLogger(__name__)


class JournalWriter:
    """A new journal of this process, open for writing."""

    is_kept = True
    """Whether anything is recorded, so that it is worth computing."""

    def __init__(self, directory: Path) -> None:
        """Create a journal below `directory`, which is created if it does not exist.

        Raises:
            StoreError: The directory cannot hold the journal.
        """
        writer = Writer.this_process()
        name = f"{time.strftime('%Y%m%dT%H%M%S')}-{writer.host}-{writer.pid}-{uuid.uuid4().hex[:8]}"
        # Absolute, because the program may change its directory during a run.
        self.folder = directory.absolute() / name
        # Hidden until its lock is held, so that no process takes it for an abandoned journal.
        hidden = self.folder.with_name(f".{name}")
        try:
            (hidden / "files").mkdir(parents=True)
            self._lock = writer_lock(hidden)
            self._lock.take()
            writer.save(hidden)
            database.create(database.path_of(hidden))
            database.restrict(hidden)
            hidden.rename(self.folder)
        except (OSError, sqlite3.Error, StoreError) as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise StoreError(
                f"directory={str(directory)!r} cannot hold the journal ({error}); "
                "it must be a folder that this process may write to."
            ) from error
        self._lock.path = self.folder / self._lock.path.name
        self.lost = 0
        """Number of records and values that could not be read or written."""
        self.on_tick: Callable[[], None] | None = None
        """Called by the writing thread after each of its turns."""
        self._pid = os.getpid()
        self._pending: deque[_Pending] = deque()
        self._late: list[_Pending] = []  # numbers that a device computes, and ends of their runs
        self._held: list[_Row] = []  # encoded, and not on disk yet
        self._requests: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._warned: set[str] = set()
        self._nonfinite: set[tuple[str, str]] = set()  # run and metric, already warned about
        self._closed = False
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def append(self, run: str, record: Record, at: int | None = None) -> None:
        """Add a record; return before it is on disk.

        Args:
            run: The run's key.
            record: What happened.
            at: When, in milliseconds since 1970; now by default.

        Raises:
            TypeError: A value of the record cannot be written as JSON.
        """
        self._pending.append((run, at or now(), record.kind, encode(record)))

    def append_points(self, run: str, points: Iterable[Point]) -> None:
        """Add values of metrics; neighbouring points of a run become one record."""
        for point in points:  # mostly one, so that a generator would double the cost
            self._pending.append((run, point.time, "metrics", point))

    def stage(self, name: str) -> Path:
        """Return a new path for a file or folder called `name`, for a record to refer to."""
        folder = self.folder / "files" / uuid.uuid4().hex
        folder.mkdir()  # not its parents: the journal may have been deleted
        return folder / name

    def lose(self, what: str, error: Exception) -> None:
        """Count a file that could not be written, with a warning for the first one."""
        self.lost += 1
        self._warn_once("disk", "%s cannot be logged, training continues: %s.", what, error)

    def flush(self, timeout: float | None = None) -> bool:
        """Write every record that was appended before; safe in a signal handler.

        Returns:
            Whether all of them are on disk, within `timeout` seconds.
        """
        if self._closed or os.getpid() != self._pid or self._in_thread():
            return False
        done = threading.Event()
        self._requests.put(done)
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not done.wait(max(0.0, min(_ALIVE_SECONDS, until - time.monotonic()))):
            if time.monotonic() >= until or self._has_died():
                return False
        return not self._held and not self._late

    def _has_died(self) -> bool:
        """Whether the thread has ended by itself, with a warning."""
        if self._thread.is_alive():
            return False
        self._warn_once("thread", "The journal's thread has ended; nothing more is recorded.")
        return True

    def close(self) -> None:
        """Write every record, and release the journal to the process that delivers it."""
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self._requests.put(None)
        if self._in_thread():
            return  # the thread still writes everything; the kernel releases the lock
        self._thread.join()
        self.lost += len(self._held) + len(self._pending) + len(self._late)
        if self.lost:
            logger.warning("%d records are lost: they could not be read or written.", self.lost)
        self._lock.release()

    def _in_thread(self) -> bool:
        """Whether this is the writing thread: Python may collect a manager in any thread."""
        return threading.current_thread() is self._thread

    def _warn_once(self, topic: str, message: str, *values: object) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning(message, *values)

    def _run(self) -> None:
        db: sqlite3.Connection | None = None
        closing = False
        flushes: list[threading.Event] = []
        until: float | None = None  # the end of the wait for numbers on a device
        while not closing or self._late:
            with suppress(queue.Empty):
                turn = FLUSH_SECONDS
                if until is not None:  # the longer it takes, the less often it is looked for
                    waited = time.monotonic() - (until - _PATIENCE_SECONDS)
                    turn = min(FLUSH_SECONDS, max(_ARRIVAL_SECONDS, waited / 10))
                request = self._requests.get(timeout=turn)
                while True:
                    if request is None:
                        closing = True
                    else:
                        flushes.append(request)
                    request = self._requests.get_nowait()
            is_overdue = until is not None and time.monotonic() > until
            try:
                self._held += self._take_pending(is_overdue, closing)
                if self._held:
                    db = self._write_held(db)
            except Exception as error:  # noqa: BLE001 - without this thread all is lost
                self._warn_once("turn", "Records cannot be written: %s.", first_line(error))
            is_waiting = bool(self._late) and (closing or bool(flushes) or bool(_ended(self._late)))
            if is_overdue or not is_waiting:
                until = None
                for done in flushes:
                    done.set()
                flushes = []
            elif until is None:
                until = time.monotonic() + _PATIENCE_SECONDS
            if time.monotonic() > self._last_beat + BEAT_SECONDS:
                self._last_beat = time.monotonic()
                with suppress(OSError):  # the folder was removed, which does not end training
                    self._lock.touch()
            if self.on_tick is not None and not closing:
                try:
                    self.on_tick()
                except Exception:  # records must be written whatever it raises
                    logger.debug("The uploader could not be checked.", exc_info=True)
        if db is not None:
            db.close()

    def _take_pending(self, is_overdue: bool, closing: bool) -> list[_Row]:
        """Encode the pending rows, neighbouring points of a run as one."""
        rows: list[_Row] = []
        for (run, are_points), group in groupby(
            self._take_arrived(is_overdue, closing), lambda row: (row[0], isinstance(row[3], Point))
        ):
            if are_points:
                points = [body for *_, body in group if isinstance(body, Point)]
                for at in range(0, len(points), _MOST_POINTS):
                    rows += self._encode_points(run, points[at : at + _MOST_POINTS])
            else:
                rows += [(run, at, kind, str(body)) for _, at, kind, body in group]
        return rows

    def _take_arrived(self, is_overdue: bool, closing: bool) -> list[_Pending]:
        """Take the pending rows, but leave what a device still computes, and the ends of its runs.

        Args:
            is_overdue: Whether to count the numbers of ended runs as lost instead, as the device
                does not answer.
            closing: Whether all runs have ended.
        """
        pending, self._late = self._late, []
        while self._pending:  # one at a time: training may append meanwhile
            pending.append(self._pending.popleft())
        ended = _ended(pending) if is_overdue else set()
        taken: list[_Pending] = []
        late: set[str] = set()
        for row in pending:
            run, at, kind, body = row
            if isinstance(body, Point) and _is_arriving(body.value):
                if (number := body.value.read_arrived()) is not None:
                    taken.append((run, at, kind, body._replace(value=number)))
                elif is_overdue and (closing or run in ended):
                    self._lose_value("its device does not answer")
                else:
                    late.add(run)
                    self._late.append(row)
            elif kind == End.kind and run in late:
                self._late.append(row)
            else:
                taken.append(row)
        return taken

    def _encode_points(self, run: str, points: list[Point]) -> list[_Row]:
        """Encode points as one record; if that fails, each of them, and count what is lost."""
        try:
            metrics = Metrics(self._read_points(run, points))
            return [(run, points[0].time, metrics.kind, encode(metrics))]
        except Exception as error:  # noqa: BLE001 - one point must not cost the others
            if len(points) > 1:
                return [row for point in points for row in self._encode_points(run, [point])]
            self._lose_record(error)
            return []

    def _lose_record(self, error: Exception) -> None:
        self.lost += 1
        self._warn_once("record", "A record is lost (%s); training continues.", first_line(error))

    def _read_points(self, run: str, points: list[Point]) -> list[tuple[str, float, int, int]]:
        """Read the values of points; those that cannot be read are counted as lost."""
        read = []
        for name, value, step, time_ in points:
            try:
                read.append((name, float(value), step, time_))
            except Exception as error:  # noqa: BLE001 - any object may be in the place of a value
                self._lose_value(first_line(error))
        self._warn_nonfinite(run, read)
        return read

    def _lose_value(self, reason: str) -> None:
        self.lost += 1
        self._warn_once("value", "A metric cannot be read (%s); training continues.", reason)

    def _warn_nonfinite(self, run: str, points: Iterable[tuple[str, float, int, int]]) -> None:
        """Warn about NaN and infinity once per name: here, as values on a device are read here."""
        for name, value, step, _ in points:
            if not math.isfinite(value) and (run, name) not in self._nonfinite:
                self._nonfinite.add((run, name))
                stored = "" if math.isnan(value) else " (MLflow shows infinity as 1.797e+308)"
                logger.warning("%s is %s at step %d%s.", name, value, step, stored)

    def _write_held(self, db: sqlite3.Connection | None) -> sqlite3.Connection | None:
        """Write the held rows; a disk that is full or gone is tried again at the next turn."""
        try:
            if db is None:
                db = database.connect(self.folder)
            try:
                with db:
                    db.executemany(_INSERT, self._held)
            except _BAD_ROW:
                with db:
                    self._insert_each(db)
            self._held = []
        except sqlite3.Error as error:
            self._warn_once(
                "disk",
                "The journal %s cannot be written (%s); training continues, with up to %d records "
                "in memory.",
                self.folder,
                error,
                _MAX_HELD,
            )
            self.lost += len(self._held[_MAX_HELD:])
            del self._held[_MAX_HELD:]
        return db

    def _insert_each(self, db: sqlite3.Connection) -> None:
        """Insert the held rows but those that SQLite cannot hold, which are counted as lost."""
        for row in self._held:
            try:
                db.execute(_INSERT, row)
            except _BAD_ROW as error:
                self._lose_record(error)


class NoJournal(JournalWriter):
    """The journal of a rank that another one writes for: what is appended is dropped."""

    is_kept = False

    def __init__(self) -> None:
        self.lost = 0

    def append(self, run: str, record: Record, at: int | None = None) -> None:
        """Do nothing."""

    def append_points(self, run: str, points: Iterable[Point]) -> None:
        """Do nothing."""

    def flush(self, timeout: float | None = None) -> bool:
        """Return True: nothing is left to write."""
        return True

    def close(self) -> None:
        """Do nothing."""


def _is_arriving(value: Any) -> bool:
    return type(value) is not float and hasattr(value, "read_arrived")  # without importing torch


def _ended(rows: Iterable[_Pending]) -> set[str]:
    """The runs that end in these rows."""
    return {run for run, _, kind, _ in rows if kind == End.kind}
