"""The SQLite database of a journal."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

FORMAT = 2
"""The version of the schema, kept as PRAGMA user_version."""
_APPLICATION = 0x54524B52  # PRAGMA application_id: "TRKR"
_BUSY_SECONDS = 10.0  # the writer and the deliverer take turns, each for milliseconds
_LOG_BYTES = 4_000_000  # of the log that stays after a large transaction
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

_PRUNE = """
DELETE FROM records WHERE run = ?1 AND kind = 'metrics' AND seq <= ?2
AND seq < (SELECT max(seq) FROM records WHERE run = ?1 AND kind = 'metrics')
"""
_SPARE_PAGES = 1_000
"""Free pages that stay in the file, for the next records."""
_MOST_PAGES = 25_000
"""The most pages that are copied to give back others: the writer waits a second."""


def path_of(folder: Path) -> Path:
    """Return the path of the database of the journal in `folder`."""
    return (folder / "journal.sqlite").absolute()


def create(path: Path) -> None:
    """Create the empty database of a journal, which its owner alone can read."""
    path.touch(mode=0o600)
    path.chmod(0o600)  # whatever the umask; SQLite gives its log the same mode
    with closing(sqlite3.connect(path)) as db:
        db.executescript(_SCHEMA)


def restrict(folder: Path) -> None:
    """Let only the owner read a journal, whatever the umask and the version that made it.

    Staged files keep their modes, which their artifacts have too.
    """
    for path in (folder, *folder.glob("*")):
        if not path.is_symlink():
            with suppress(OSError):  # removed meanwhile, or of another user
                path.chmod(path.stat().st_mode & 0o700)


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


def prune(db: sqlite3.Connection, seq: int) -> None:
    """Delete the delivered metrics of a run, and end the transaction that is open.

    The last ones stay: they tell when the run was active. Records of other kinds are read when the
    run ends, and are few.

    Args:
        db: A journal.
        seq: The place of the last delivered record of the run.
    """
    (run,) = db.execute("SELECT run FROM records WHERE seq = ?", (seq,)).fetchone() or (None,)
    is_pruned = db.execute(_PRUNE, (run, seq)).rowcount > 0
    db.commit()
    if is_pruned:
        _shrink(db)


def _shrink(db: sqlite3.Connection) -> None:
    """Give free pages back to the disk if most of the file is free, as after a long outage."""
    (free,) = db.execute("PRAGMA freelist_count").fetchone()
    (pages,) = db.execute("PRAGMA page_count").fetchone()
    if free > _SPARE_PAGES and 3 * (pages - free) < free and pages - free < _MOST_PAGES:
        with suppress(sqlite3.OperationalError):  # the disk is full
            db.execute("VACUUM")


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
    db.execute(f"PRAGMA journal_size_limit = {_LOG_BYTES}")
    db.text_factory = lambda text: text.decode(errors="replace")  # tolerate undecodable bytes
    return db
