"""The folder and the database of a journal, opened by a process that does not write it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracker.errors import StoreError
from tracker.journal import database
from tracker.journal.ownership import Writer

DONE = ".done"
"""The end of the name of a delivered journal while it is removed."""
_MOST_BYTES = 1_000_000  # of records read at a time; as objects they take twenty times as much


class OpenedJournal:
    """Reads and changes the tables of a journal; raises StoreError if they cannot be used."""

    def __init__(self, folder: Path) -> None:
        """Open the journal in `folder`.

        Raises:
            StoreError: The folder is not a journal, or this version cannot read it.
        """
        self.folder = folder
        self.writer = Writer.of(folder)
        self._lock = threading.Lock()
        version = database.format_of(folder)
        if self.is_gone():
            raise StoreError(f"{folder} has lost its journal.sqlite, and with it its records.")
        if version is None:
            raise StoreError(f"{folder} is not a tracker journal.")
        if version != database.FORMAT:
            raise StoreError(
                f"{folder} is a journal of format {version}; this version reads {database.FORMAT}."
            )
        with self._translated():
            database.restrict(folder)
            self._db = database.connect(folder)
            self._db.execute(database.HELD)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"The journal {self.folder} cannot be used: {error}.") from error

    def _read(self, query: str, *values: Any) -> list[Any]:
        with self._lock, self._translated():
            return self._db.execute(query, values).fetchall()

    def _read_some(self, query: str, *values: Any) -> list[Any]:
        """Read rows that end with a body, up to _MOST_BYTES of bodies, and one row at least."""
        rows: list[Any] = []
        size = 0
        with self._lock, self._translated():
            for row in self._db.execute(query, values):
                rows.append(row)
                size += len(row[-1])
                if size > _MOST_BYTES:
                    break
        return rows

    def _read_one(self, query: str, *values: Any) -> Any:
        rows = self._read(query, *values)
        if len(rows) != 1:
            raise StoreError(f"The journal {self.folder} cannot be used: its progress is lost.")
        return rows[0]

    def _read_integer(self, query: str, *values: Any) -> int:
        (number,) = self._read_one(query, *values)
        try:
            return int(number)
        except (TypeError, ValueError) as error:
            raise StoreError(f"The journal {self.folder} cannot be used: {error}.") from error

    def _change(self, query: str, *values: Any) -> None:
        with self._lock, self._translated(), self._db:
            self._db.execute(query, values)

    def is_gone(self) -> bool:
        """Return whether the file was deleted, which connections of this process do not notice."""
        return not os.path.lexists(database.path_of(self.folder))

    def close(self) -> None:
        """Close the database; the journal stays."""
        with self._lock:
            self._db.close()

    def remove(self) -> None:
        """Close the database and remove the folder."""
        self.close()
        folder = self.folder.resolve()
        done = folder.with_name(f".{folder.name}{DONE}")
        try:
            folder.rename(done)  # if this process is killed now, `leftovers.sweep` removes the rest
        except OSError:  # removed by another process, or not ours to rename
            done = folder
        shutil.rmtree(done, ignore_errors=True)
