"""Who writes a journal, who delivers it, and whether they still live.

A process that writes holds `writer.lock`, one that delivers holds `delivery.lock`: the kernel
releases them at its death, whatever killed it and whoever gets its pid. A lock that another host
holds may be invisible here, so a writer also touches its lock every BEAT_SECONDS, and one of
another host counts as gone only when it was silent for LOST_SECONDS of the folder's own clock.
`writer.json` says who it is, apart from the database: two hosts must not open that together.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tracker.errors import StoreError

BEAT_SECONDS = 15.0
LOST_SECONDS = 600.0


@dataclass(frozen=True)
class Writer:
    """The process that made a journal."""

    host: str
    pid: int
    started: int
    """When it made the journal, in milliseconds since 1970."""

    @classmethod
    def this_process(cls) -> Writer:
        """The one that asks."""
        return cls(socket.gethostname(), os.getpid(), time.time_ns() // 1_000_000)

    def save(self, folder: Path) -> None:
        """Write it to the journal in `folder`."""
        (folder / "writer.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def of(cls, folder: Path) -> Writer:
        """Who made the journal in `folder`; StoreError where it does not say."""
        try:
            return cls(**json.loads((folder / "writer.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StoreError(f"{folder} is not a journal of this program.") from error


class Lock:
    """The right to write or to deliver a journal, held until released or dead."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.lock"
        # Never a soft one, which nobody releases when its holder dies.
        self._lock = FileLock(self.path, thread_local=False, fallback_to_soft=False)

    def take(self) -> bool:
        """Take the lock, if nobody else holds it; StoreError where the folder is gone."""
        if not self.path.parent.is_dir():  # it would be made anew
            raise StoreError(f"{self.path.parent} is not a journal of this program.")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        except OSError as error:
            raise StoreError(f"{self.path.parent} cannot be written: {error.strerror}.") from error
        return True

    def release(self) -> None:
        """Give it back; it may be taken again."""
        self._lock.release()

    def beat(self) -> None:
        """Show other hosts that the holder lives."""
        os.utime(self.path)


def writer_lives(folder: Path) -> bool:
    """Whether the process that writes the journal in `folder` lives, or may live elsewhere."""
    writer, lock = Writer.of(folder), Lock(folder, "writer")
    if not lock.take():
        return True
    try:
        if writer.host == socket.gethostname():
            return False
        last = lock.path.stat().st_mtime
        with tempfile.NamedTemporaryFile(dir=folder) as probe:  # the file server's clock, not ours
            return os.stat(probe.name).st_mtime - last < LOST_SECONDS
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror}.") from error
    finally:
        lock.release()
