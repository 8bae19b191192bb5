"""Delivered metrics are deleted from a journal, and nothing that is read later is."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.journal.helpers import BEGIN, Recorder
from tracker.delivery.uploader import Uploader
from tracker.errors import GoneError, StoreError
from tracker.journal import database
from tracker.journal.reader import Journal
from tracker.journal.records import End, Epoch, Metrics, Params, Point
from tracker.journal.writer import JournalWriter


class Points(Recorder):
    """A store that keeps the points of each run, and may fail before or after it does."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[str, list[int]] = {}
        self.fails: str = ""
        self.gone: str = ""

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Any = None,
        tags: Any = None,
        in_doubt: bool = False,
    ) -> None:
        if self.gone == run_id:
            raise GoneError(f"{run_id} is deleted")
        if self.fails == "before":
            raise StoreError("the store is away")
        there = self.points.setdefault(run_id, [])
        there += [step for _, _, step, _ in metrics if not (in_doubt and step in there)]
        if self.fails == "after":
            raise StoreError("the answer is lost")

    def begin_run(self, *, tags: Any, **_: Any) -> str:
        return str(tags["tracker.run"])

    def run_problem(self, run_id: str) -> str | None:
        return "it is deleted." if self.gone == run_id else None


def drain(journal: Journal, store: Points) -> None:
    Uploader(journal, store).drain()  # type: ignore[arg-type]


def size(folder: Path) -> int:
    """The bytes of a journal's database with its log."""
    return sum(path.stat().st_size for path in folder.glob("journal.sqlite*"))


def log(writer: JournalWriter, count: int, first: int = 0) -> None:
    writer.append_points("a", [Point("loss", 0.5, first + n, 1_000) for n in range(count)])
    assert writer.flush(60)


def test_a_journal_stays_small_while_its_points_are_delivered(
    writer: JournalWriter, journal: Journal
) -> None:
    store = Points()
    writer.append("a", BEGIN)
    sizes = []
    for turn in range(40):
        log(writer, 5_000, 5_000 * turn)
        drain(journal, store)
        sizes.append(size(writer.folder))
    assert len(store.points["a"]) == 200_000  # 8 MB of records
    assert max(sizes) < 6_000_000
    assert (writer.folder / "journal.sqlite").stat().st_size < 1_500_000
    assert journal.records("a", Metrics) != []  # the last ones, for the time


def test_a_journal_that_grew_while_its_store_was_away_shrinks_again(
    writer: JournalWriter, journal: Journal
) -> None:
    store = Points()
    writer.append("a", BEGIN)
    for turn in range(100):
        log(writer, 5_000, 5_000 * turn)
    database_file = writer.folder / "journal.sqlite"
    with closing(sqlite3.connect(database_file)) as db:
        db.execute("PRAGMA wal_checkpoint")
    assert database_file.stat().st_size > 10_000_000
    drain(journal, store)
    with closing(sqlite3.connect(database_file)) as db:
        db.execute("PRAGMA wal_checkpoint")
    assert database_file.stat().st_size < 6_000_000
    assert len(store.points["a"]) == 500_000


RUNS = st.sampled_from(["a", "b", "c"])
STEPS = st.one_of(
    st.tuples(st.just("log"), RUNS, st.integers(1, 4)),
    st.tuples(st.just("epoch"), RUNS, st.just(0)),
    st.tuples(st.just("params"), RUNS, st.just(0)),
    st.tuples(st.sampled_from(["gone", "back"]), RUNS, st.just(0)),
    st.tuples(st.sampled_from(["deliver", "before", "after"]), RUNS, st.just(0)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, max_size=25))
def test_pruning_loses_and_doubles_nothing(
    steps: list[tuple[str, str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    writer = JournalWriter(tmp_path_factory.mktemp("pruned"))
    store = Points()
    logged: Counter[str] = Counter()
    epochs: Counter[str] = Counter()
    last: dict[str, int] = {}
    now = 1_000
    with closing(Journal(writer.folder)) as journal:
        for run in "abc":
            begin = type(BEGIN)("Default", None, None, {"tracker.run": run})
            writer.append(run, begin, at=now)
        for what, run, count in steps:
            now += 1
            if what == "log":
                for _ in range(count):
                    writer.append_points(run, [Point("loss", 0.5, logged[run], now)])
                    writer.append(run, Metrics([]), at=now)  # keeps the records separate
                    logged[run] += 1
            elif what == "epoch":
                writer.append(run, Epoch({"epoch": epochs[run]}), at=now)
                epochs[run] += 1
            elif what == "params":
                writer.append(run, Params({f"p{now}": "1"}), at=now)
            elif what in ("gone", "back"):
                store.gone = run if what == "gone" else ""
            else:
                store.fails = "" if what == "deliver" else what
                writer.flush(60)
                with suppress(StoreError):
                    drain(journal, store)
            if what in ("log", "epoch", "params"):
                last[run] = now
            writer.flush(60)
            assert {run: journal.last_time(run) for run in last} == last
            assert set(journal.unended()) == set("abc")
        store.fails = store.gone = ""
        drain(journal, store)
        assert {run: points for run, points in store.points.items() if points} == {
            run: list(range(count)) for run, count in logged.items() if count
        }
        assert {run: len(journal.records(run, Epoch)) for run in epochs} == dict(epochs)
        assert all(len(journal.records(run, Metrics)) <= 1 for run in "abc")
    writer.close()


def test_the_runs_without_an_end_are_found_without_reading_their_records(
    writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = 0

    def count() -> None:
        nonlocal work
        work += 1

    def counted(folder: Path) -> sqlite3.Connection:
        db = real(folder)
        db.set_progress_handler(count, 1)  # each instruction of SQLite's
        return db

    real = database.connect
    monkeypatch.setattr(database, "connect", counted)
    works = []
    for _ in range(2):
        for number in range(2_000):
            writer.append("a", Epoch({"number": number}))
            writer.append("b", Metrics([]))
        writer.append("a", BEGIN)
        writer.append("b", BEGIN)
        writer.append("c", End("FINISHED"))
        assert writer.flush(60)
        with closing(Journal(writer.folder)) as journal:
            work = 0
            assert journal.unended() == ["a", "b"]
            works.append(work)
    assert works[1] < 1.5 * works[0] < 1_000
