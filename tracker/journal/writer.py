"""Training's side of the journal: appends to memory, and a thread puts that on disk."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from tracker.errors import StoreError
from tracker.journal.ownership import BEAT_SECONDS, Writer, writer_lock
from tracker.journal.reader import FLUSH_SECONDS, connect, new_database
from tracker.journal.records import Metrics, Point, Record, encode, now

_HELD = 200_000  # records kept in memory while the disk takes none

logger = logging.getLogger(__name__)


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
            self._lock = writer_lock(hidden)
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
        self._pending: deque[tuple[str, int, str, str | Point]] = deque()
        self._held: list[tuple[str, int, str, str]] = []
        self._requests: queue.SimpleQueue[threading.Event | None] = queue.SimpleQueue()
        self._warned = False
        self._unread = False
        self._closed = False
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
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
        if self._closed or os.getpid() != self._pid or self._is_writing():
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
        if self._is_writing():
            return  # it goes on until all is on disk; the kernel releases the lock
        self._thread.join()
        if self._held:
            self.lost += len(self._held)
        if self.lost:
            logger.warning("%d records are lost: they could not be read or written.", self.lost)
        self._lock.release()

    def _is_writing(self) -> bool:
        """Whether the thread asks itself: python may collect a dropped manager in any thread."""
        return threading.current_thread() is self._thread

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
                    self._lock.touch()
            if self.on_tick is not None and going_on:
                try:
                    self.on_tick()
                except Exception:  # whatever it is, the journal must be written
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
                several = [body for *_, body in group if isinstance(body, Point)]
                values = [point.value for point in several]
                problem = _numbers(values)
                read = [
                    (point.name, value, point.step, point.time)
                    for point, value in zip(several, values, strict=True)
                    if value is not None
                ]
                rows.append((run, several[0].time, Metrics.kind, encode(Metrics(read))))
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
                db = connect(self.folder)
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
