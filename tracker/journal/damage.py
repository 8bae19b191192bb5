"""Damaged journals: what precedes the damage is read, and the damaged file is kept."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
from contextlib import closing
from pathlib import Path

from tracker.errors import StoreError
from tracker.journal import database

DAMAGED = "damaged.sqlite"
"""The name of a damaged database, kept next to its replacement."""

_MISSING = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ)  # a table, a page

logger = logging.getLogger(__name__)


def set_damage_aside(folder: Path) -> str | None:
    """Replace the database of a damaged journal by a new one with its readable records.

    The damaged file is kept next to it, under the name DAMAGED.

    Args:
        folder: A journal that no other process writes or delivers.

    Returns:
        A sentence for the user, now and whenever the journal is synchronised again; None if it
        was never damaged.

    Raises:
        StoreError: The journal is damaged and cannot be replaced.
    """
    path, damaged = database.path_of(folder), folder / DAMAGED
    # Once only: the copy may hold records that are not JSON, and must not replace the original.
    if not damaged.exists() and (problem := damage_of(folder)):
        readable = folder / "readable.sqlite"
        try:
            readable.unlink(missing_ok=True)
            database.create(readable)
            _copy_readable(folder, readable)
            os.replace(path, damaged)
            for suffix in ("-wal", "-shm"):  # they belong to the damaged file
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            os.replace(readable, path)
        except (OSError, sqlite3.Error) as error:  # a full or read-only disk
            raise StoreError(f"{folder} is damaged and cannot be repaired: {error}.") from error
        logger.warning("%s is damaged (%s).", path, problem)
    if damaged.exists():
        return f"{folder} was damaged; the damaged file is kept there as {DAMAGED}."
    return None


def damage_of(folder: Path) -> str | None:
    """Return what is damaged in the journal in `folder`; None if it can be read, or is not one."""
    if database.format_of(folder) != database.FORMAT:
        return None
    try:
        with closing(database.connect(folder)) as db:
            (result,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if result != "ok":
                return " ".join(str(result).split())
            db.execute("SELECT 1 FROM runs, notices, progress")
            for seq, body in db.execute("SELECT seq, CAST(body AS BLOB) FROM records"):
                try:
                    json.loads(body)
                except (TypeError, ValueError, RecursionError):
                    return f"record {seq} is not JSON"
    except sqlite3.OperationalError as error:  # locked or read-only is not damaged
        return str(error) if error.sqlite_errorcode in _MISSING else None
    except sqlite3.DatabaseError as error:
        return str(error)
    return None


def _copy_readable(folder: Path, readable: Path) -> None:
    with (
        closing(database.connect(folder, is_damaged=True)) as old,
        closing(sqlite3.connect(readable)) as new,
    ):
        new.execute("DELETE FROM progress")
        records = "records", "seq, run, time, kind, CAST(body AS BLOB)"  # damaged letters too
        new.execute(database.HELD)
        for table, columns in (
            records,
            *((t, "*") for t in ("runs", "notices", "progress", "held")),
        ):
            try:
                for row in old.execute(f"SELECT {columns} FROM {table} ORDER BY rowid"):
                    marks = ", ".join("?" * len(row))
                    new.execute(f"INSERT INTO {table} VALUES ({marks})", row)
            except sqlite3.DatabaseError as error:
                logger.debug("%s of %s: %s", table, folder, error)
        (last,) = new.execute("SELECT coalesce(max(seq), 0) FROM records").fetchone()
        # Records that are added now follow the last one; without its place, all may have been sent.
        new.execute("UPDATE progress SET delivered = min(delivered, ?1)", (last,))
        new.execute("UPDATE progress SET sending = min(sending, ?1)", (last,))
        new.execute(
            "INSERT INTO progress SELECT 0, ?, NULL, NULL, NULL"
            " WHERE NOT EXISTS (SELECT 1 FROM progress)",
            (last,),
        )
        new.commit()
