"""From the journal to MLflow: what each record becomes there, in order, once."""

from __future__ import annotations

import posixpath
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.errors import ArgumentError, RefusedError, StoreError
from tracker.journal.reader import Journal
from tracker.journal.records import Kind, Record, validation_error
from tracker.validation import RUN_TAG, checked_path
from tracker.views.files import csv_text, json_text
from tracker.views.histogram_page import histogram_page

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

PAGE_SECONDS = 60.0
"""While a run goes on, its histogram page is drawn anew at most this often …"""
PAGE_SHARE = 0.01
"""… and takes at most this share of the time."""

LATE_SECONDS = 30.0
"""A trial's run that begins to be delivered after this may have been made by the mirror."""

_CHUNK = 1_000  # records read at a time
_NOTICES = 100  # of records lost, a run
_BATCH = ("metrics", "params", "tags")  # what one request takes
_TOGETHER = 200  # records in a request; one of metrics holds what was logged in 0.2 s


def never() -> bool:
    """Goes on until all is delivered."""
    return False


class Uploader:
    """Delivers one journal to one store."""

    def __init__(
        self,
        journal: Journal,
        store: MlflowStore,
        on_progress: Callable[[int], object] | None = None,
    ) -> None:
        """`on_progress` is told how many records were delivered, after each few of them."""
        self._journal = journal
        self._store = store
        self._on_progress = on_progress
        self._page_due: dict[str, float] = {}
        self._runs_without_begin: set[str] = set()
        self._parents: dict[str, str] = {}  # found by their keys
        self._experiments: dict[tuple[str, str | None], str] = {}  # of one drain
        self._lost: Counter[str] = Counter()

    def drain(self, stop: Callable[[], bool] = never) -> int:
        """Deliver all that is on disk, unless `stop` says so; returns how many records.

        Raises StoreError at the first record that cannot be delivered now. A record that the store
        will never take is dropped, and a notice left in the journal.
        """
        delivered = 0
        self._experiments.clear()
        while records := self._journal.undelivered(_CHUNK):
            for group in _groups(records):
                if stop():
                    return delivered
                self._send(group)
                delivered += len(group)
                if self._on_progress is not None:
                    self._on_progress(len(group))
        return delivered

    def _send(self, group: list[Record]) -> None:
        in_doubt = self._journal.sending(group[-1].seq)
        problems = [validation_error(record.kind, record.body, record.time) for record in group]
        try:
            if problem := next(filter(None, problems), None):
                raise RefusedError(f"{problem}.")
            self._deliver(group, in_doubt)
        except RefusedError as error:
            if group[0].kind == "begin" and not problem:
                raise  # all that comes after it would be lost with it
            if len(group) > 1 or not in_doubt:
                for record in group:  # again, looking first at what is there: a param of others
                    self._send([record])
                return
            # Trying again would change nothing, and all that comes after it would wait.
            self._lose(group[0], error)
        self._journal.mark_delivered(group[-1].seq)
        for record in group:
            if record.kind in ("file", "model") and (path := self._staged(record)) is not None:
                shutil.rmtree(path.parent, ignore_errors=True)
        if group[0].kind == "end":
            self._journal.forget(group[0].run)

    def _lose(self, record: Record, error: RefusedError) -> None:
        """Leave a notice, but not one for each record of a run that was deleted, say."""
        self._lost[record.run] += 1
        if self._lost[record.run] <= _NOTICES:
            more = " So may be others of its run." if self._lost[record.run] == _NOTICES else ""
            kind = repr(record.kind)[1:20].rstrip("'")
            self._journal.notice(f"A record ({kind}) is lost: {error}{more}")

    def _deliver(self, group: list[Record], in_doubt: bool) -> None:
        first = group[0]
        body, store = first.body, self._store
        if first.kind == "begin":
            self._journal.bind(first.run, self._begin(first, in_doubt))
            return
        bound = self._journal.run_id(first.run)
        if bound is None:
            if first.run not in self._runs_without_begin:
                self._runs_without_begin.add(first.run)
                self._journal.notice("The beginning of a run is lost, and what was logged to it.")
            return
        match first.kind:
            case "metrics" | "params" | "tags":
                points: list[Any] = []
                pairs: dict[str, dict[str, str]] = {"params": {}, "tags": {}}
                for record in group:
                    if record.kind == "metrics":
                        points += map(tuple, record.body["metrics"])
                    else:
                        pairs[record.kind] |= record.body[record.kind]
                store.log_batch(bound, metrics=points, **pairs, in_doubt=in_doubt)
            case "file" | "model":
                self._deliver_files(first, bound, in_doubt)
            case "delete":
                store.delete_artifact(bound, _inside(body["path"]))
            case "dataset":
                store.log_dataset(bound, body["dataset"], body["context"])
            case "histograms":
                if not body.get("there"):
                    shown = {key: body[key] for key in ("step", "histograms")}
                    store.log_text(bound, json_text(shown), f"histograms/{body['step']:06d}.json")
                if time.monotonic() > self._page_due.setdefault(
                    first.run, time.monotonic() + PAGE_SECONDS
                ):
                    self._draw_page(first.run, bound)
            case "epoch" | "signal":
                pass  # kept in the journal for the end
            case "end":
                try:
                    self._log_tables(first.run, bound)
                except RefusedError as error:  # the status must not depend on them
                    self._journal.notice(f"The tables of a run are lost: {error}")
                store.end_run(bound, body["status"], first.time)

    def _begin(self, record: Record, in_doubt: bool) -> str:
        body, store, tags = record.body, self._store, dict(record.body["tags"])
        if (resumed := body.get("resume")) is not None:
            del tags[RUN_TAG]  # it stays what it was
            store.reopen(resumed, tags)
            return str(resumed)
        if (parent := body.get("parent")) is not None:
            # A run's id in MLflow, or its key: of a run of this journal, or of another process.
            tags["mlflow.parentRunId"] = parent.get("run_id") or self._parent(parent["key"])
        experiment = body["experiment"], body["experiment_id"]
        if (experiment_id := self._experiments.get(experiment)) is None:
            experiment_id = self._experiments[experiment] = store.experiment_id(*experiment)
        # A study's mirror makes the runs of trials that wait, or are long ended and not there.
        is_late = time.time() * 1000 - record.time > LATE_SECONDS * 1000
        there = None
        if body.get("queued") or (body.get("keyed") and is_late):
            there = store.find_run(tags[RUN_TAG], experiment_id)
        if there is not None:
            store.reopen(there, tags)
            return there
        return store.begin_run(
            experiment_id=experiment_id,
            name=body["name"],
            start_time=record.time,
            tags=tags,
            adopt=body["adopt"],
            in_doubt=in_doubt,
        )

    def _parent(self, key: str) -> str:
        known = self._journal.run_id(key) or self._parents.get(key) or self._store.find_run(key)
        if known is None:
            raise StoreError("the parent of a run is not delivered yet")
        self._parents[key] = known
        return known

    def _deliver_files(self, record: Record, run_id: str, in_doubt: bool) -> None:
        body, store = record.body, self._store
        if (path := self._staged(record)) is None:
            raise RefusedError(f"{body['staged']!r} is no file of this journal")
        if not path.exists():  # a checkpoint that was superseded before it was delivered
            if not in_doubt and not body.get("passing"):
                self._journal.notice(f"The artifact {path.name} is lost: its file is gone.")
            return
        if record.kind == "file":
            folder = None if body["folder"] is None else _inside(body["folder"])
            store.log_artifact(run_id, path, folder)
        else:
            key = f"{record.run}-{record.seq}"
            store.models.log(run_id, path, body["name"], body["step"], key, in_doubt=in_doubt)

    def _staged(self, record: Record) -> Path | None:
        """The file or folder that `record` refers to; None if that is not within the journal's."""
        if validation_error(record.kind, record.body) is not None:
            return None
        files = self._journal.folder.resolve() / "files"  # itself no link
        path = self._journal.folder / record.body["staged"]
        try:
            if ".." in path.parts or path.parent.parent.resolve() != files:
                return None
            places = [path.parent, path, *path.rglob("*")] if path.exists() else [path.parent, path]
            return None if any(map(_is_unsafe_path, places)) else path
        except FileNotFoundError:  # a checkpoint that is being superseded: look again
            return self._staged(record)
        except OSError:  # a name that no file can have
            return None

    def _log_tables(self, run: str, run_id: str) -> None:
        """Log what is made of a whole run."""
        self._draw_page(run, run_id)
        if rows := [record["row"] for record in _valid_records(self._journal, run, "epoch")]:
            self._store.log_text(run_id, csv_text(rows), "epochs.csv")
            self._store.log_text(run_id, json_text(rows), "epochs.json")

    def _draw_page(self, run: str, run_id: str) -> None:
        started = time.monotonic()
        if records := _valid_records(self._journal, run, "histograms"):
            page = histogram_page(records, self._store.run_name(run_id))
            self._store.log_text(run_id, page, "histograms.html")
        took = time.monotonic() - started
        self._page_due[run] = started + max(PAGE_SECONDS, took / PAGE_SHARE)


def _valid_records(journal: Journal, run: str, kind: Kind) -> list[Mapping[str, Any]]:
    """The bodies of one kind of a run that are what they must be."""
    return [body for body in journal.bodies(run, kind) if validation_error(kind, body) is None]


def _is_unsafe_path(place: Path) -> bool:
    """Whether it is a link, or anything but a file or folder: reading a pipe would not end."""
    return place.is_symlink() or (place.exists() and not (place.is_file() or place.is_dir()))


def _inside(path: str) -> str:
    """`path`, if it is one within the run's artifacts; RefusedError where it is not."""
    try:
        return checked_path(posixpath.normpath(path), "artifact")
    except ArgumentError as error:
        raise RefusedError(str(error)) from error


def _groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Neighbouring metrics, params and tags of a run together; all else one by one."""
    group: list[Record] = []
    for record in records:
        together = record.kind in _BATCH and group and group[0].kind in _BATCH
        if group and not (together and group[0].run == record.run and len(group) < _TOGETHER):
            yield group
            group = []
        group.append(record)
    if group:
        yield group


def close_unended(journal: Journal) -> None:
    """Give every run that its process did not live to end the status that it truly has."""
    who = f"Process {journal.writer.pid} on {journal.writer.host}"
    for run in journal.unended():
        at = journal.last_time(run)
        if signals := _valid_records(journal, run, "signal"):
            status, reason = "KILLED", f"{who} was stopped by {signals[-1]['signal']}."
        else:
            status = "FAILED"
            reason = f"{who} ended without saying how: killed, crashed, or out of memory or power."
        journal.append(run, "tags", {"tags": {"tracker.failure": reason}}, at)
        journal.append(run, "end", {"status": status}, at)
