"""The read side of a journal, which delivers it and reports its state.

A journal is a folder that one process writes: `journal.sqlite` with the records, `files/` with the
files that they refer to, and the locks of `ownership.py`. Records carry the time at which they were
made: a record that is delivered twice is the same record. The progress of the delivery is kept in
the database too, so that any process can continue it. Delivered metrics are deleted; all other
records stay until their run has ended, because its tables and pages are made from them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tracker.journal import database
from tracker.journal.opened import OpenedJournal
from tracker.journal.records import Begin, Entry, Record, decode, encode
from tracker.redaction import public_uri

OFFLINE = "offline"
"""A file of this name in a journal reserves its delivery for `tracker sync`."""
_HURRY = "hurry"  # a file of this name says that somebody waits for the delivery

R = TypeVar("R", bound=Record)


class Problem(NamedTuple):
    """Why nothing is delivered at the moment."""

    text: str
    since: float
    """Seconds since 1970."""


class Journal(OpenedJournal):
    """A journal on disk, opened to deliver it or to report its state.

    Every method raises StoreError if the database cannot be used.
    """

    # -- records ---------------------------------------------------------------------------

    def undelivered(self, limit: int = -1, held: str | None = None) -> list[Entry]:
        """Return the first entries that are not marked delivered, in order.

        With a limit they take a few megabytes at most, or are one.

        Args:
            limit: The largest number of entries.
            held: A held run, for its entries alone; None for those of all runs that are not held.
        """
        query = "SELECT seq, run, time, kind, CAST(body AS BLOB) FROM records WHERE "
        if held is None:
            query += "seq > ? AND run NOT IN (SELECT run FROM held) ORDER BY seq LIMIT ?"
            values: tuple[Any, ...] = (self.delivered, limit)
        else:  # what comes later is not passed over yet
            query += (
                "run = ?1 AND seq > (SELECT delivered FROM held WHERE run = ?1)"
                " AND seq <= (SELECT delivered FROM progress) ORDER BY seq LIMIT ?2"
            )
            values = (held, limit)
        rows = (self._read_some if limit >= 0 else self._read)(query, *values)
        return [Entry(seq, run, at, decode(kind, body, at)) for seq, run, at, kind, body in rows]

    def records(self, run: str, kind: type[R]) -> list[R]:
        """Return the valid records of one kind of a run, delivered or not, in order.

        Args:
            run: The run's key.
            kind: The class of the records.
        """
        query = "SELECT CAST(body AS BLOB) FROM records WHERE run = ? AND kind = ? ORDER BY seq"
        rows = self._read(query, run, kind.kind)
        records = (decode(kind.kind, body) for (body,) in rows)
        return [record for record in records if isinstance(record, kind)]

    def each(self, run: str, kind: type[R]) -> Iterator[R]:
        """Yield what `records` returns, with one record at a time in memory."""
        seq = 0
        while rows := self._read(
            "SELECT seq, CAST(body AS BLOB) FROM records WHERE run = ? AND kind = ? AND seq > ?"
            " ORDER BY seq LIMIT 1",
            run,
            kind.kind,
            seq,
        ):
            ((seq, body),) = rows
            record = decode(kind.kind, body)
            if isinstance(record, kind):
                yield record

    def append(self, run: str, record: Record, at: int) -> None:
        """Add a record that the writer did not: a sample of the system, or a missing end.

        Args:
            run: The run's key.
            record: What happened.
            at: When, in milliseconds since 1970.
        """
        query = "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)"
        self._change(query, run, at, record.kind, encode(record))

    def last(self) -> int:
        """Return the place of the last record; 0 if there is none."""
        return self._read_integer("SELECT coalesce(max(seq), 0) FROM records")

    def has(self, run: str) -> bool:
        """Return whether the journal has records of a run."""
        return bool(self._read("SELECT 1 FROM records WHERE run = ? LIMIT 1", run))

    def begin_time(self, run: str) -> int:
        """Return when a run began, in milliseconds since 1970."""
        return self._read_integer(
            "SELECT min(CAST(time AS INTEGER)) FROM records WHERE run = ? AND kind = 'begin'", run
        )

    def last_time(self, run: str) -> int:
        """Return when the last record of a run was made, in milliseconds since 1970."""
        return self._read_integer(
            "SELECT max(CAST(time AS INTEGER)) FROM records WHERE run = ?", run
        )

    def unended(self) -> list[str]:
        """Return the runs that have begun and not ended, in the order of their beginning."""
        rows = self._read(
            # From run to run through the index, however many records each has.
            "WITH RECURSIVE each (run) AS (SELECT min(run) FROM records UNION ALL"
            " SELECT (SELECT min(run) FROM records WHERE run > each.run) FROM each"
            " WHERE run IS NOT NULL)"
            " SELECT run, (SELECT min(seq) FROM records r WHERE r.run = each.run"
            " AND kind = 'begin') AS first FROM each WHERE first IS NOT NULL AND NOT EXISTS"
            " (SELECT 1 FROM records r WHERE r.run = each.run AND kind = 'end') ORDER BY first"
        )
        return [run for run, _ in rows]

    def runs(self) -> int:
        """Return how many runs have records."""
        return self._read_integer("SELECT count(DISTINCT run) FROM records")

    def forget(self, run: str) -> None:
        """Remove the delivered records of an ended run: a process may track thousands."""
        self._change(
            "DELETE FROM records WHERE run = ? AND seq <= (SELECT delivered FROM progress)", run
        )

    def staged(self, relative: str) -> Path | None:
        """Return the path of a record's file or folder; None if it is not one of the journal's."""
        path = self.folder / relative
        try:
            # Only two folders below `files`, which is itself not a link.
            if (
                ".." in path.parts
                or path.parent.parent.resolve() != self.folder.resolve() / "files"
            ):
                return None
            paths = [path.parent, path, *path.rglob("*")] if path.exists() else [path.parent, path]
            return None if any(map(_is_unsafe, paths)) else path
        except FileNotFoundError:  # training removes a superseded checkpoint: look again
            return self.staged(relative)
        except OSError:  # a name that no file can have
            return None

    # -- delivery --------------------------------------------------------------------------

    @property
    def delivered(self) -> int:
        """The place of the last record that is delivered."""
        return self._read_integer("SELECT delivered FROM progress")

    def pending(self) -> bool:
        """Return whether any record is not delivered, apart from those of held runs."""
        return self.last() > self.delivered

    def urgent(self) -> bool:
        """Return whether more than metrics is undelivered, or somebody waits for the delivery."""
        if (self.folder / _HURRY).exists():
            return True
        query = (
            "SELECT count(*) FROM (SELECT 1 FROM records WHERE kind <> 'metrics'"
            " AND seq > (SELECT delivered FROM progress) LIMIT 1)"
        )
        return bool(self._read_integer(query))

    def hurry(self) -> None:
        """Say that somebody waits for the delivery of what is on disk."""
        with suppress(OSError):  # a full disk: the delivery is only slower
            (self.folder / _HURRY).touch()

    def take_hurry(self) -> None:
        """Forget `hurry`, before the delivery that it asked for."""
        with suppress(OSError):
            (self.folder / _HURRY).unlink(missing_ok=True)

    def remaining(self) -> int:
        """Return how many records are not delivered."""
        return self._read_integer(
            "SELECT count(*) FROM records LEFT JOIN held USING (run)"
            " WHERE seq > coalesce(held.delivered, (SELECT delivered FROM progress))"
        )

    def sending(self, seq: int, held: str | None = None) -> bool:
        """Remember that the records up to `seq` are being sent.

        Args:
            seq: The place of the last record.
            held: The held run that they belong to.

        Returns:
            Whether some of them are in doubt: sent by a process that did not live to mark them.
        """
        table, where = ("progress", "TRUE") if held is None else ("held", "run = ?")
        of = () if held is None else (held,)
        query = f"SELECT sending > delivered FROM {table} WHERE {where}"
        in_doubt = self._read_integer(query, *of)
        self._change(f"UPDATE {table} SET sending = max(sending, ?) WHERE {where}", seq, *of)
        return bool(in_doubt)

    def mark_delivered(self, seq: int, held: str | None = None) -> None:
        """Remember that all records up to `seq` are delivered, or those of a held run.

        The delivered metrics of the run are deleted, which are most of a journal.
        """
        with self._lock, self._translated(), self._db:
            if held is None:
                query = "UPDATE progress SET delivered = ?1, sending = max(sending, ?1)"
                self._db.execute(query, (seq,))
            else:
                self._db.execute("UPDATE held SET delivered = ? WHERE run = ?", (seq, held))
            database.prune(self._db, seq)

    # -- runs that cannot be delivered, while the others are -----------------------------------

    def hold(self, run: str, first: int, last: int, reason: str) -> bool:
        """Leave a run out of the delivery from now on.

        Args:
            run: The run's key.
            first: The place of its first record that is not delivered.
            last: The place of its last record that was sent, and may have arrived.
            reason: Why it cannot be delivered.

        Returns:
            Whether this is the first time.
        """
        is_new = run not in self.held()
        self._change(
            "INSERT INTO held VALUES (?, ?, ?, ?)"
            " ON CONFLICT (run) DO UPDATE SET reason = excluded.reason",
            run,
            first - 1,
            last,
            public_uri(reason),
        )
        return is_new

    def held(self) -> dict[str, str]:
        """Return the held runs, in the order of their beginning, with the reason of each."""
        rows = self._read("SELECT run, reason FROM held ORDER BY delivered")
        return {str(run): str(reason) for run, reason in rows}

    def is_held(self, run: str | None) -> bool:
        """Return whether a run is held, or any run for None."""
        held = self.held()
        return run in held if run is not None else bool(held)

    def pass_over_held(self) -> None:
        """Count the records of held runs as passed, if nothing else is undelivered."""
        self._change(
            "UPDATE progress SET delivered ="
            " max(delivered, coalesce((SELECT max(seq) FROM records), 0))"
            " WHERE EXISTS (SELECT 1 FROM held) AND NOT EXISTS (SELECT 1 FROM records"
            " WHERE seq > progress.delivered AND run NOT IN (SELECT run FROM held))"
        )

    def release(self, run: str) -> None:
        """Deliver a held run with the others again, after all that was passed over is delivered."""
        self._change("DELETE FROM held WHERE run = ?", run)

    def redirect(self, run: str, experiment: str) -> None:
        """Let a held run begin again in another experiment; repeated, it changes nothing.

        Args:
            run: The run's key.
            experiment: The experiment's name.
        """
        begins = self.records(run, Begin)
        fields: dict[str, Any] = {"experiment_id": None, "adopt": None, "resume": None}
        if not begins or begins[0] == (
            fresh := replace(begins[0], experiment=experiment, **fields)
        ):
            return
        if (run_id := self.run_id(run)) is not None:
            self.notice(
                f"The metrics that were delivered to the run {run_id} stay there; the new run in "
                f"experiment={experiment!r} has the later ones."
            )
        with self._lock, self._translated(), self._db:
            self._db.execute(
                "UPDATE records SET body = ? WHERE run = ? AND kind = 'begin'", (encode(fresh), run)
            )
            self._db.execute("DELETE FROM runs WHERE run = ?", (run,))
            self._db.execute("UPDATE held SET delivered = 0, sending = 0 WHERE run = ?", (run,))

    def drop(self, run: str) -> int:
        """Remove a run with all of its records; return how many there were."""
        with self._lock, self._translated(), self._db:
            for table in ("held", "runs"):
                self._db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))
            return self._db.execute("DELETE FROM records WHERE run = ?", (run,)).rowcount

    def bind(self, run: str, run_id: str) -> None:
        """Remember the MLflow id of a run."""
        self._change("INSERT OR REPLACE INTO runs VALUES (?, ?)", run, run_id)

    def run_id(self, run: str) -> str | None:
        """Return the MLflow id of a run; None while it is not known."""
        rows = self._read("SELECT run_id FROM runs WHERE run = ?", run)
        return str(rows[0][0]) if rows else None

    def holds(self, run_id: str, *, unended: bool = False) -> bool:
        """Return whether an MLflow run is tracked here.

        Args:
            run_id: MLflow's id of the run.
            unended: Count it only if it has not ended.
        """
        runs = {run for (run,) in self._read("SELECT run FROM runs WHERE run_id = ?", run_id)}
        return bool(runs & set(self.unended()) if unended else runs)

    @property
    def tracking_uri(self) -> str | None:
        """The store that the journal is meant for, without a password; None if it is not known."""
        (uri,) = self._read_one("SELECT tracking_uri FROM progress")
        return None if uri is None else str(uri)

    @tracking_uri.setter
    def tracking_uri(self, uri: str) -> None:
        self._change("UPDATE progress SET tracking_uri = ?", uri)

    @property
    def problem(self) -> Problem | None:
        """Why nothing is delivered at the moment; None while delivery works."""
        text, since = self._read_one("SELECT problem, CAST(problem_since AS REAL) FROM progress")
        return None if text is None else Problem(str(text), since or 0.0)

    @problem.setter
    def problem(self, text: str | None) -> None:
        since = "CASE WHEN ? THEN coalesce(problem_since, ?) END"
        query = f"UPDATE progress SET problem = ?, problem_since = {since}"
        self._change(query, text and public_uri(text), text is not None, time.time())

    def notice(self, text: str) -> None:
        """Leave a sentence for the user, whom the delivering process may not be able to reach."""
        self._change("INSERT INTO notices (text) VALUES (?)", public_uri(text))

    def notices(self, after: int = 0) -> list[tuple[int, str]]:
        """Return the number and text of each notice with a number above `after`."""
        rows = self._read("SELECT id, text FROM notices WHERE id > ? ORDER BY id", after)
        return [(int(number), str(text)) for number, text in rows]

    def obstacle(self) -> str | None:
        """Return why something is not delivered; None if no reason is known."""
        return self.problem.text if self.problem else next(iter(self.held().values()), None)

    def undelivered_summary(self) -> str | None:
        """Return a message that says what is undelivered and how to deliver it; None if all is."""
        if not (records := self.remaining()):
            return None
        what = f"{records} record{'' if records == 1 else 's'}"
        if self.is_gone():
            return f"{what} lost: {self.folder} was deleted before the upload."
        why = self.obstacle()
        reason = f": {why.rstrip('.')}" if why else ""
        options = "".join(f" --drop {run} (or --experiment NAME)" for run in list(self.held())[:1])
        return (
            f"Saved on disk; upload unfinished ({what}{reason}). "
            f"Finish it with: tracker sync {self.folder}{options}"
        )


def _is_unsafe(path: Path) -> bool:
    """Whether it is a link, or a special file such as a pipe, which blocks its reader."""
    return path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir()))
