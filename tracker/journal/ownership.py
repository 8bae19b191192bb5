"""Which process writes a journal, and whether it is alive.

A journal's writer holds `writer.lock`, and the process that delivers it holds `delivery.lock`. A
lock that is held on another host may be invisible here, so a writer also touches its lock every
BEAT_SECONDS; a writer on another host counts as dead once it has been silent for LOST_SECONDS, by
the clock of the file system. `writer.json` names the writer outside the database, which two hosts
must not open at the same time.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tracker.errors import StoreError
from tracker.locks import Lock

BEAT_SECONDS = 15.0
LOST_SECONDS = 600.0
NAME = r"\d{8}T\d{6}-.+-\d+-[0-9a-f]{8}"
"""The name of a journal's folder: when, where and by which process it was made."""


@dataclass(frozen=True)
class Writer:
    """The process that created a journal."""

    host: str
    pid: int
    started: int
    """When it created the journal, in milliseconds since 1970."""

    @classmethod
    def this_process(cls) -> Writer:
        """Return the current process as a writer."""
        return cls(socket.gethostname(), os.getpid(), time.time_ns() // 1_000_000)

    def save(self, folder: Path) -> None:
        """Write it to the journal in `folder`."""
        (folder / "writer.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def of(cls, folder: Path) -> Writer:
        """Return the writer of the journal in `folder`.

        Raises:
            StoreError: The folder does not name a writer.
        """
        try:
            return cls(**json.loads((folder / "writer.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise StoreError(f"{folder} is not a tracker journal.") from error


def writer_lock(folder: Path) -> Lock:
    """Return the lock that the writer of the journal in `folder` holds."""
    return Lock(folder / "writer.lock")


def delivery_lock(folder: Path) -> Lock:
    """Return the lock to hold while delivering the journal in `folder`."""
    return Lock(folder / "delivery.lock")


def writer_lives(folder: Path) -> bool:
    """Return whether the writer of the journal in `folder` is alive, or may be on another host.

    Raises:
        StoreError: The folder is not a journal, or cannot be written.
    """
    writer, lock = Writer.of(folder), writer_lock(folder)
    with lock.hold() as taken:
        if not taken:
            return True
        if writer.host == socket.gethostname():
            return False
        try:
            last = lock.path.stat().st_mtime
            with tempfile.NamedTemporaryFile(dir=folder) as probe:  # tells the file server's clock
                return os.stat(probe.name).st_mtime - last < LOST_SECONDS
        except OSError as error:
            raise StoreError(f"{folder} cannot be written: {error.strerror}.") from error
