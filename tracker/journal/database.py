"""The SQLite database of a journal."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

FORMAT = 2
"""The version of the schema, kept as PRAGMA user_version."""
_APPLICATION = 0x54524B52  # PRAGMA application_id: "TRKR"
_BUSY_SECONDS = 10.0  # the writer and the deliverer take turns, each for milliseconds
_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION};
PRAGMA user_version = {FORMAT};
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
HELD = """
CREATE TABLE IF NOT EXISTS held (
    run TEXT PRIMARY KEY, delivered INTEGER NOT NULL, sending INTEGER NOT NULL, reason TEXT NOT NULL
)
"""
"""The runs that cannot be delivered, each with its own progress; later than the format."""


def path_of(folder: Path) -> Path:
    """Return the path of the database of the journal in `folder`."""
    return (folder / "journal.sqlite").absolute()


def create(path: Path) -> None:
    """Create the empty database of a journal."""
    with closing(sqlite3.connect(path)) as db:
        db.executescript(_SCHEMA)


def format_of(folder: Path) -> int | None:
    """Return the format of the journal in `folder`; None if it is not a journal."""
    # Read by SQLite: if this process opened and closed the file itself, it would drop all of its
    # locks on it, and the next process could discard the log of a living writer. Only the header
    # is read: `immutable` creates no files, `writable_schema` ignores missing pages.
    uri = f"{path_of(folder).as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            db.execute("PRAGMA writable_schema = ON")
            (application,) = db.execute("PRAGMA application_id").fetchone()
            (version,) = db.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:
        return None
    return int(version) if application == _APPLICATION else None


def connect(folder: Path, *, is_damaged: bool = False) -> sqlite3.Connection:
    """Open the database of the journal in `folder`.

    Args:
        folder: The folder of the journal.
        is_damaged: Open the file though parts of it are missing.

    Raises:
        sqlite3.Error: It does not exist, or cannot be opened.
    """
    db = sqlite3.connect(
        f"{path_of(folder).as_uri()}?mode=rw",  # never creates it
        uri=True,
        timeout=_BUSY_SECONDS,
        check_same_thread=False,
    )
    if is_damaged:
        db.execute("PRAGMA writable_schema = ON")  # must be first
    db.execute("PRAGMA synchronous = NORMAL")  # in WAL mode, safe when a process dies
    db.text_factory = lambda text: text.decode(errors="replace")  # tolerate undecodable bytes
    return db
