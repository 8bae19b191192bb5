"""Uploads the records of one journal to MLflow, in order and once each."""

from __future__ import annotations

import posixpath
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from tracker.errors import ArgumentError, GoneError, RefusedError, StoreError
from tracker.journal import records
from tracker.journal.reader import Journal
from tracker.journal.records import Entry, Invalid
from tracker.journal.refused import set_aside
from tracker.statuses import Status
from tracker.validation import RUN_TAG, checked_path
from tracker.views.files import csv_text, json_text
from tracker.views.histogram_page import histogram_page

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

PAGE_SECONDS = 60.0
"""The shortest time between two drawings of an active run's histogram page …"""
PAGE_SHARE = 0.01
"""… which takes at most this share of the time."""

_CHUNK = 1_000  # records read at a time
_MAX_NOTICES = 100  # about lost records, per run
_MAX_BATCH = 200  # records in a request; one of metrics holds what was logged in 0.2 s
_MAX_POINTS = 10_000  # of metrics in a request, which MLflow's client sends by the thousand
_BATCHED = records.Metrics | records.Params | records.Tags
_UPLOADED = records.File | records.Model


class Uploader:
    """Delivers one journal to one store."""

    def __init__(
        self,
        journal: Journal,
        store: MlflowStore,
        on_progress: Callable[[int], object] | None = None,
    ) -> None:
        """Create an uploader.

        Args:
            journal: The journal to deliver.
            store: The store that it is delivered to.
            on_progress: Called after each request, with its number of records.
        """
        self._journal = journal
        self._store = store
        self._on_progress = on_progress
        self._page_due: dict[str, float] = {}
        self._runs_without_begin: set[str] = set()
        self._placeholders: set[str] = set()
        self._parents: dict[str, str] = {}  # ids by key
        self._experiments: dict[tuple[str, str | None], str] = {}  # ids, during one drain
        self._lost: Counter[str] = Counter()
        self._stop: Callable[[], bool] = lambda: False
        self.delivered = 0
        """How many records the last drain delivered, though it may have failed."""

    def drain(self, stop: Callable[[], bool] = lambda: False, *, retry_held: bool = True) -> int:
        """Deliver every record on disk.

        A record that the store will never accept is set aside, and a run that it does not accept
        is held; both leave a notice in the journal.

        Args:
            stop: Called before each request; True stops the delivery.
            retry_held: Try the held runs again.

        Returns:
            How many records were delivered.

        Raises:
            StoreError: A record cannot be delivered now.
        """
        self.delivered = 0
        self._stop = stop
        self._experiments.clear()
        if self._drain():
            self._journal.pass_over_held()
            for run in self._journal.held() if retry_held else ():
                if self._drain(run):
                    self._journal.release(run)
        return self.delivered

    def _drain(self, held: str | None = None) -> bool:
        """Deliver the records of a held run, or of all others; return whether all are."""
        while entries := self._journal.undelivered(_CHUNK, held):
            stopped_runs: set[str] = set()
            for group in _groups(entries):
                if self._stop():
                    return False
                if group[0].run in stopped_runs:
                    continue
                if not self._send(group, held):
                    if held is not None:
                        return False
                    stopped_runs.add(group[0].run)
                    continue
                self.delivered += len(group)
                if self._on_progress is not None:
                    self._on_progress(len(group))
        return True

    def _send(self, group: list[Entry], held: str | None) -> bool:
        """Deliver records of a run; return False if the run cannot be delivered."""
        first = group[0]
        in_doubt = self._journal.sending(group[-1].seq, held)
        try:
            self._deliver(group, in_doubt)
        except (RefusedError, GoneError) as error:
            is_begin = isinstance(first.record, records.Begin)
            is_rebound = not is_begin and self._rebind(first.run)
            if not is_rebound and (reason := self._obstacle(first, error)):
                self._hold(group, reason)
                return False
            if is_rebound or len(group) > 1 or not in_doubt:
                # In doubt now: records that the store already has are left out.
                return all(self._send([entry], held) for entry in group)
            self._send_parts(first, error)  # or it would hold up every later record
        self._journal.mark_delivered(group[-1].seq, held)
        for entry in group:
            if isinstance(entry.record, _UPLOADED) and (
                path := self._journal.staged(entry.record.staged)
            ):
                shutil.rmtree(path.parent, ignore_errors=True)
        if isinstance(first.record, records.End):
            self._journal.forget(first.run)
        return True

    def _obstacle(self, entry: Entry, error: StoreError) -> str | None:
        """Return why a run cannot be delivered at all; None if only this record cannot."""
        if isinstance(entry.record, records.Begin | records.End):
            return str(error)
        run_id = self._journal.run_id(entry.run)
        if isinstance(entry.record, Invalid) or run_id is None:
            return None
        return self._store.run_problem(run_id)

    def _hold(self, group: list[Entry], reason: str) -> None:
        run = group[0].run
        if self._journal.hold(run, group[0].seq, group[-1].seq, reason):
            name = next((b.name for b in self._journal.records(run, records.Begin)), None) or run
            self._journal.notice(
                f"The run {name} cannot be delivered: {reason} What is undelivered stays in "
                f"{self._journal.folder}. When this program has ended, deliver them with `tracker "
                f"sync --experiment NAME`, or give them up with `tracker sync --drop {run}`."
            )

    def _send_parts(self, entry: Entry, error: StoreError) -> None:
        """Deliver what the store takes of a record that it refuses as a whole."""
        if len(parts := _parts(entry)) == 1:
            self._lose(entry, error)
            return
        for part in parts:
            try:
                self._deliver([part], in_doubt=True)
            except (RefusedError, GoneError) as refusal:
                self._lose(part, refusal)

    def _lose(self, entry: Entry, error: StoreError) -> None:
        self._lost[entry.run] += 1
        kept = set_aside(self._journal, entry, str(error))
        if (count := self._lost[entry.run]) <= _MAX_NOTICES:
            more = " Other records of the run may be refused too." if count == _MAX_NOTICES else ""
            kind = repr(entry.record.kind)[1:20].rstrip("'")
            what = f"A record ({kind}) is " + (f"set aside in {kept}" if kept else "lost")
            self._journal.notice(f"{what}: {error}{more}")

    def _deliver(self, group: list[Entry], in_doubt: bool) -> None:
        first = group[0]
        record, store = first.record, self._store
        if isinstance(record, Invalid):
            raise RefusedError(f"{record.problem}.")
        if isinstance(record, records.Begin):
            if record.placeholder:
                self._placeholders.add(first.run)
            self._journal.bind(first.run, self._begin(record, first.time, in_doubt))
            return
        run_id = self._journal.run_id(first.run)
        if run_id is None:
            if first.run not in self._runs_without_begin:
                self._runs_without_begin.add(first.run)
                self._journal.notice("A run is lost: the journal does not hold its beginning.")
            return
        if first.run in self._placeholders and not store.is_placeholder(run_id):
            # It gave way to a run whose own process logs its metrics and its end.
            theirs = records.Metrics | records.End
            group = [entry for entry in group if not isinstance(entry.record, theirs)]
            if not group:
                return
        match record:
            case records.Metrics() | records.Params() | records.Tags():
                self._log_batch(run_id, group, in_doubt)
            case records.File() | records.Model():
                self._upload(first, record, run_id, in_doubt)
            case records.Delete(path):
                store.delete_artifact(run_id, _artifact_path(path))
            case records.Dataset(dataset, context):
                store.log_dataset(run_id, dataset, context)
            case records.Histograms(step, histograms, there, unit, part):
                if not there:
                    fields = {"step": step, "unit": unit, "histograms": histograms}
                    name = ("step-" if unit == "step" else "") + f"{step:06d}"
                    name += f"-{part}" if part else ""
                    store.log_text(run_id, json_text(fields), f"histograms/{name}.json")
                due = self._page_due.setdefault(first.run, time.monotonic() + PAGE_SECONDS)
                if time.monotonic() > due:
                    self._draw_page(first.run, run_id)
            case records.Epoch() | records.Signal():
                pass  # read when the run ends
            case records.End(status):
                try:
                    self._log_tables(first.run, run_id)
                except (RefusedError, GoneError) as error:  # the run needs its status all the same
                    self._journal.notice(f"The tables of a run are lost: {error}")
                store.end_run(run_id, status, first.time)

    def _begin(self, begin: records.Begin, start_time: int, in_doubt: bool) -> str:
        tags = dict(begin.tags)
        if begin.resume is not None:
            del tags[RUN_TAG]  # the run keeps the key that it was created under
            self._store.reopen(begin.resume, tags)
            return begin.resume
        if begin.parent is not None:
            parent = begin.parent
            tags["mlflow.parentRunId"] = parent.get("run_id") or self._parent_id(parent["key"])
        named = begin.experiment if begin.named else None
        if begin.adopt is not None and self._store.adopt_run(
            begin.adopt, tags, named, begin.experiment_id, keyed=begin.keyed
        ):
            return begin.adopt
        experiment = begin.experiment, begin.experiment_id
        if experiment not in self._experiments:
            if named is not None and begin.experiment_id is not None:
                self._store.check_experiment(named, begin.experiment_id)
            self._experiments[experiment] = self._store.experiment_id(*experiment)
        return self._store.begin_run(
            experiment_id=self._experiments[experiment],
            name=begin.name,
            start_time=start_time,
            tags=tags,
            in_doubt=in_doubt,
            keyed=begin.keyed,
            placeholder=begin.placeholder,
        )

    def _parent_id(self, key: str) -> str:
        run_id = self._journal.run_id(key) or self._parents.get(key) or self._store.find_run(key)
        if run_id is None:
            raise StoreError("the parent of a run is not delivered yet")
        self._parents[key] = run_id
        return run_id

    def _rebind(self, run: str) -> bool:
        """Follow a run that another process deleted, keeping its own run with the same key."""
        begins = self._journal.records(run, records.Begin)
        if not begins or not begins[0].keyed:
            return False
        run_id = self._store.find_run(run)
        if run_id is None or run_id == self._journal.run_id(run):
            return False
        self._journal.bind(run, run_id)
        return True

    def _log_batch(self, run_id: str, group: list[Entry], in_doubt: bool) -> None:
        points: list[tuple[str, float, int, int]] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for entry in group:
            match entry.record:
                case records.Metrics(metrics):
                    points += metrics
                case records.Params(pairs):
                    params |= pairs
                case records.Tags(pairs):
                    tags |= pairs
        if in_doubt and len(points) > _MAX_POINTS:  # sent in parts, each of which may be there
            points = list(self._store.without_logged(run_id, points))
        for at in range(0, max(1, len(points)), _MAX_POINTS):
            if at and self._on_progress is not None:
                self._on_progress(0)  # the training process is looked at
            if at and self._stop():
                raise StoreError("the delivery was stopped between two requests")
            some = points[at : at + _MAX_POINTS]
            self._store.log_batch(run_id, some, params, tags, in_doubt=in_doubt)
            params, tags = {}, {}

    def _upload(
        self, entry: Entry, record: records.File | records.Model, run_id: str, in_doubt: bool
    ) -> None:
        if (path := self._journal.staged(record.staged)) is None:
            raise RefusedError(f"{record.staged!r} is not a file of this journal")
        if not path.exists():
            if not in_doubt and not (isinstance(record, records.File) and record.passing):
                self._journal.notice(f"The artifact {path.name} is lost: its file is gone.")
        elif isinstance(record, records.File):
            folder = None if record.folder is None else _artifact_path(record.folder)
            self._store.log_artifact(run_id, path, folder)
        else:
            key = f"{entry.run}-{entry.seq}"
            self._store.models.log(run_id, path, record.name, record.step, key, in_doubt=in_doubt)

    def _log_tables(self, run: str, run_id: str) -> None:
        self._draw_page(run, run_id)
        if rows := [epoch.row for epoch in self._journal.records(run, records.Epoch)]:
            self._store.log_text(run_id, csv_text(rows), "epochs.csv")
            self._store.log_text(run_id, json_text(rows), "epochs.json")

    def _draw_page(self, run: str, run_id: str) -> None:
        started = time.monotonic()
        histograms = self._journal.each(run, records.Histograms)
        if (first := next(histograms, None)) is not None:
            all_of_them = map(vars, chain([first], histograms))
            page = histogram_page(all_of_them, self._store.run_name(run_id))
            self._store.log_text(run_id, page, "histograms.html")
        seconds = time.monotonic() - started
        self._page_due[run] = started + max(PAGE_SECONDS, seconds / PAGE_SHARE)


def _artifact_path(path: str) -> str:
    """`path` in plain form; RefusedError if it leaves the run's artifacts."""
    try:
        return checked_path(posixpath.normpath(path), "artifact")
    except ArgumentError as error:
        raise RefusedError(str(error)) from error


def _parts(entry: Entry) -> list[Entry]:
    """Split a record into one for each name in it."""
    match entry.record:
        case records.Metrics(points):
            names = dict.fromkeys(name for name, *_ in points)
            parts: list[records.Record] = [
                records.Metrics([point for point in points if point[0] == name]) for name in names
            ]
        case records.Params(pairs):
            parts = [records.Params({name: value}) for name, value in pairs.items()]
        case records.Tags(pairs):
            parts = [records.Tags({name: value}) for name, value in pairs.items()]
        case _:
            return [entry]
    return [entry._replace(record=part) for part in parts]


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Group neighbouring metrics, params and tags of one run, which fit in one request."""
    group: list[Entry] = []
    points = 0
    for entry in entries:
        more = len(entry.record.metrics) if isinstance(entry.record, records.Metrics) else 0
        fits = group and all(isinstance(one.record, _BATCHED) for one in (group[0], entry))
        fits = fits and group[0].run == entry.run and len(group) < _MAX_BATCH
        if group and not (fits and points + more <= _MAX_POINTS):
            yield group
            group, points = [], 0
        group.append(entry)
        points += more
    if group:
        yield group


def close_unended(journal: Journal) -> None:
    """End each run that its process did not end: as KILLED after a signal, else as FAILED."""
    process = f"Process {journal.writer.pid} on {journal.writer.host}"
    for run in journal.unended():
        at = journal.last_time(run)
        if signals := journal.records(run, records.Signal):
            status: Status = "KILLED"
            reason = f"{process} was stopped by {signals[-1].signal}."
        else:
            status = "FAILED"
            reason = f"{process} ended without reporting why: it crashed, was killed or lost power."
        journal.append(run, records.Tags({"tracker.failure": reason}), at)
        journal.append(run, records.End(status), at)
