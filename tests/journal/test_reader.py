"""A journal tells each process that opens it what is delivered, in doubt or pending."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

import tracker
from tracker.errors import StoreError
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, End, Entry, Epoch, Metrics, Point
from tracker.journal.writer import JournalWriter

PROJECT = Path(tracker.__file__).parents[1]
BEGIN = Begin("Default", None, "fox", {"tracker.run": "a"})
EMPTY = Epoch({})


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A closed journal with one record."""
    writer = JournalWriter(tmp_path / "closed")
    writer.append("a", BEGIN)
    writer.close()
    return writer.folder


# -- records -------------------------------------------------------------------------------------


def test_records_of_one_kind_are_read_delivered_or_not(
    journal: Journal, writer: JournalWriter
) -> None:
    for number in range(4):
        writer.append("a", Epoch({"number": number}))
        writer.append("a", Metrics([]))
        writer.append("b", Epoch({"number": 10 * number}))
    writer.flush()
    journal.mark_delivered(5)

    assert journal.records("a", Epoch) == [Epoch({"number": number}) for number in range(4)]
    assert journal.records("b", Epoch)[1] == Epoch({"number": 10})
    assert journal.records("c", Epoch) == []


def test_runs_without_an_end_are_listed_in_the_order_of_their_beginning(
    writer: JournalWriter, journal: Journal
) -> None:
    assert journal.unended() == []
    for number, run in enumerate(("zebra", "ant", "fox")):
        writer.append(run, BEGIN, at=10 * number + 1)
    writer.append("ant", End("FINISHED"), at=50)
    writer.append("zebra", EMPTY, at=60)
    writer.append("without a beginning", EMPTY, at=70)
    writer.flush()
    journal.mark_delivered(5)

    assert journal.unended() == ["zebra", "fox"]
    assert (journal.begin_time("fox"), journal.last_time("zebra")) == (21, 60)
    assert journal.runs() == 4

    writer.append("zebra", End("FAILED"))
    writer.append("fox", End("FINISHED"))
    writer.flush()
    assert journal.unended() == []


# -- delivery ------------------------------------------------------------------------------------


def test_delivery_continues_where_it_stopped(writer: JournalWriter) -> None:
    for number in range(5):
        writer.append("a", Epoch({"number": number}))
    writer.flush()
    with closing(Journal(writer.folder)) as journal:
        journal.mark_delivered(2)
        assert [entry.seq for entry in journal.undelivered()] == [3, 4, 5]
        assert [entry.seq for entry in journal.undelivered(limit=2)] == [3, 4]
        assert (journal.remaining(), journal.delivered, journal.last()) == (3, 2, 5)

    with closing(Journal(writer.folder)) as again:
        assert [entry.seq for entry in again.undelivered()] == [3, 4, 5]
        writer.append("a", Epoch({"number": 5}))
        assert writer.flush(60)
        assert [entry.seq for entry in again.undelivered()] == [3, 4, 5, 6]
        again.append("b", Epoch({"number": 6}), at=12)
        assert again.undelivered()[-1] == Entry(7, "b", 12, Epoch({"number": 6}))
        assert again.last() == 7
        again.mark_delivered(7)
        assert again.undelivered() == []
        assert again.remaining() == 0


def test_records_that_were_sent_and_not_marked_are_in_doubt(writer: JournalWriter) -> None:
    for _ in range(9):
        writer.append("a", EMPTY)
    writer.flush()

    with closing(Journal(writer.folder)) as journal:
        assert not journal.sending(3)
        journal.mark_delivered(3)
        assert not journal.sending(5)  # the process dies before it marks them

    with closing(Journal(writer.folder)) as again:
        assert again.sending(5)
        again.mark_delivered(5)
        assert not again.sending(9)
        assert again.sending(7)  # refused as one request, sent in parts: both may have arrived
        again.mark_delivered(7)
        assert again.sending(9)
        again.mark_delivered(9)
        assert not again.sending(10)


DELIVERER = """
import json, sys
from pathlib import Path
from tracker.journal.reader import Journal
from tracker.journal.records import End, Metrics

journal = Journal(Path(sys.argv[1]))
print("ready", flush=True)
delivered = []
while not delivered or delivered[-1] != "end":
    for entry in journal.undelivered(50):
        journal.sending(entry.seq)
        if isinstance(entry.record, Metrics):
            delivered += [step for _, _, step, _ in entry.record.metrics]
        elif isinstance(entry.record, End):
            delivered.append("end")
        journal.mark_delivered(entry.seq)
    journal.append("system", Metrics([]), 1)
    journal.problem = "the server sleeps" if len(delivered) % 2 else None
print(json.dumps(delivered))
"""


def test_a_writer_and_a_deliverer_in_two_processes_lose_nothing(
    writer: JournalWriter, journal: Journal
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DELIVERER, str(writer.folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    ) as deliverer:
        assert deliverer.stdout
        assert deliverer.stdout.readline() == "ready\n"
        for step in range(20_000):
            writer.append_points("a", [Point("loss", 0.5, step, 1)])
            if step % 50 == 0:
                assert writer.flush(60)
        writer.append("a", End("FINISHED"))
        assert writer.flush(60)
        out, _ = deliverer.communicate(timeout=120)
    assert deliverer.returncode == 0

    assert json.loads(out) == [*range(20_000), "end"]
    assert writer.lost == 0
    assert {entry.run for entry in journal.undelivered()} <= {"system"}


def test_forgetting_a_run_removes_its_delivered_records_and_numbers_continue(
    writer: JournalWriter, journal: Journal
) -> None:
    for _ in range(2):
        writer.append("a", EMPTY)
        writer.append("b", EMPTY)
    writer.flush()
    journal.mark_delivered(2)

    journal.forget("a")

    assert journal.records("a", Epoch) == [EMPTY]  # the undelivered one
    assert journal.records("b", Epoch) == [EMPTY, EMPTY]
    assert [entry.seq for entry in journal.undelivered()] == [3, 4]
    journal.mark_delivered(4)
    journal.forget("a")
    journal.forget("b")
    assert (journal.last(), journal.remaining(), journal.runs()) == (0, 0, 0)
    writer.append("c", EMPTY)
    writer.flush()
    assert [entry.seq for entry in journal.undelivered()] == [5]


# -- what a journal remembers --------------------------------------------------------------------


def test_the_ids_of_runs_and_the_tracking_uri_are_remembered(closed: Path) -> None:
    with closing(Journal(closed)) as journal:
        assert journal.run_id("a") is None
        assert journal.tracking_uri is None
        journal.bind("a", "0123")
        journal.bind("b", "4567")
        journal.bind("b", "89ab")
        journal.tracking_uri = "sqlite:///a.db"

    with closing(Journal(closed)) as again:
        assert [again.run_id(run) for run in ("a", "b", "c")] == ["0123", "89ab", None]
        assert again.tracking_uri == "sqlite:///a.db"


def test_a_problem_keeps_the_time_at_which_it_began(journal: Journal) -> None:
    assert journal.problem is None
    before = time.time()

    journal.problem = "the server is not there"
    first = journal.problem
    assert first is not None
    assert first.text == "the server is not there"
    assert before <= first.since <= time.time()

    journal.problem = "the server answers 503"
    second = journal.problem
    assert second is not None
    assert (second.text, second.since) == ("the server answers 503", first.since)

    journal.problem = None
    assert journal.problem is None
    between = time.time()
    journal.problem = "the server is gone again"
    third = journal.problem
    assert third is not None
    assert third.since >= between


def test_notices_are_kept_in_order_and_read_from_any_number(closed: Path) -> None:
    with closing(Journal(closed)) as journal:
        assert journal.notices() == []
        for text in ("one", "two", "two"):
            journal.notice(text)

    with closing(Journal(closed)) as again:
        assert again.notices() == [(1, "one"), (2, "two"), (3, "two")]
        assert again.notices(after=2) == [(3, "two")]
        assert again.notices(after=3) == []


# -- opening and removing ------------------------------------------------------------------------


def test_a_removed_journal_leaves_no_files(closed: Path) -> None:
    (closed / "files" / "picture.png").write_bytes(b"picture")

    Journal(closed).remove()

    assert list(closed.parent.iterdir()) == []


def test_opening_a_folder_that_is_not_a_journal_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes").write_text("a note")

    for name in ("photos", "notes", "nowhere"):
        with pytest.raises(StoreError, match=rf"^\S*{name} is not a tracker journal\.$"):
            Journal(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes", "photos"]


def test_a_journal_of_another_format_is_refused_with_its_number(closed: Path) -> None:
    with closing(sqlite3.connect(closed / "journal.sqlite")) as db, db:
        db.execute("PRAGMA user_version = 99")

    with pytest.raises(StoreError, match=r"^\S+ is a journal of format 99; this version reads \d"):
        Journal(closed)
