"""The journal keeps what training wrote, in order, whatever ends the process."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tracker
from tracker.errors import StoreError
from tracker.journal import FLUSH_SECONDS, Journal, Record, now

PROJECT = Path(tracker.__file__).parents[1]

patient = settings(deadline=None, max_examples=30)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
BODIES = st.dictionaries(st.text(), JSON, max_size=3)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal.create(tmp_path / "journals")
    yield journal
    if journal.folder.exists():
        journal.discard()


def written(journal: Journal) -> list[Record]:
    """All that was appended and not delivered, read back from the disk."""
    journal.flush()
    return list(journal.undelivered())


def alter(journal: Journal, *statements: str) -> None:
    """Change the file of a journal behind its back."""
    with closing(sqlite3.connect(journal.folder / "journal.sqlite")) as db, db:
        for statement in statements:
            db.execute(statement)


def left_behind(directory: Path) -> Journal:
    """The journal of a process that has ended with a run undelivered."""
    journal = Journal.create(directory)
    journal.append("a", "begin", {})
    journal.close()
    return journal


def child(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A python process that runs `code` and talks through pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        **options,
    )


# -- writing and reading back --------------------------------------------------------------------


def test_records_come_back_in_order_with_their_times(journal: Journal) -> None:
    before = now()
    journal.append("a", "begin", {"name": "fox"})
    journal.append("b", "begin", {"name": "owl"})
    journal.append("a", "metrics", {"metrics": [["loss", 0.5, 1, 2]]})
    journal.append("a", "end", {"status": "FINISHED"})
    after = now()

    records = written(journal)

    assert [(record.seq, record.run, record.kind, record.body) for record in records] == [
        (1, "a", "begin", {"name": "fox"}),
        (2, "b", "begin", {"name": "owl"}),
        (3, "a", "metrics", {"metrics": [["loss", 0.5, 1, 2]]}),
        (4, "a", "end", {"status": "FINISHED"}),
    ]
    times = [before, *(record.time for record in records), after]
    assert times == sorted(times)


@given(st.lists(BODIES, max_size=5))
@patient
def test_whatever_json_can_say_comes_back(
    tmp_path_factory: pytest.TempPathFactory, bodies: list[dict[str, Any]]
) -> None:
    journal = Journal.create(tmp_path_factory.mktemp("journals"))
    for body in bodies:
        journal.append("a", "epoch", body)

    assert [record.body for record in written(journal)] == bodies
    assert journal.bodies("a", "epoch") == bodies
    journal.discard()


def test_numbers_that_are_not_finite_come_back(journal: Journal) -> None:
    journal.append("a", "epoch", {"loss": math.nan, "norm": math.inf, "least": -math.inf})

    (record,) = written(journal)

    assert math.isnan(record.body["loss"])
    assert (record.body["norm"], record.body["least"]) == (math.inf, -math.inf)


def test_a_record_is_timed_when_it_is_made_not_when_it_is_written(journal: Journal) -> None:
    journal.append("a", "epoch", {})
    made = now()
    while now() <= made:
        pass

    (record,) = written(journal)

    assert record.time <= made


def test_records_of_one_kind_of_a_run_are_found_delivered_or_not(journal: Journal) -> None:
    for number in range(4):
        journal.append("a", "epoch", {"number": number})
        journal.append("a", "metrics", {"number": -number})
        journal.append("b", "epoch", {"number": 10 * number})
    journal.flush()
    journal.mark_delivered(5)

    assert journal.bodies("a", "epoch") == [{"number": number} for number in range(4)]
    assert journal.bodies("b", "epoch")[1] == {"number": 10}
    assert journal.bodies("c", "epoch") == []


@pytest.fixture
def hectic() -> Iterator[None]:
    """Threads take turns as often as python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hectic")
def test_threads_that_append_at_once_lose_nothing(journal: Journal) -> None:
    threads, each = 8, 1000
    start = threading.Barrier(threads + 1)

    def append(name: str) -> None:
        start.wait()
        for number in range(each):
            journal.append(name, "epoch", {"number": number})

    writers = [threading.Thread(target=append, args=(str(n),)) for n in range(threads)]
    for writer in writers:
        writer.start()
    start.wait()
    while any(writer.is_alive() for writer in writers):
        journal.flush()
        journal.remaining()

    records = written(journal)
    assert [record.seq for record in records] == list(range(1, threads * each + 1))
    for name in map(str, range(threads)):
        numbers = [record.body["number"] for record in records if record.run == name]
        assert numbers == list(range(each))


def test_a_record_that_is_no_json_costs_no_other_record(journal: Journal) -> None:
    journal.append("a", "epoch", {"number": 1})
    with suppress(TypeError, ValueError):
        journal.append("a", "epoch", {"number": object()})
    journal.append("a", "epoch", {"number": 3})
    with suppress(TypeError, ValueError):
        journal.flush()

    numbers = [record.body["number"] for record in written(journal)]
    assert (numbers[0], numbers[-1]) == (1, 3)


def test_a_record_is_what_it_was_when_it_was_appended(journal: Journal) -> None:
    body = {"bins": [1, 2]}
    journal.append("a", "histograms", body)
    body["bins"].append(3)

    (record,) = written(journal)

    assert record.body == {"bins": [1, 2]}


def test_the_files_of_a_journal_lie_in_its_folder_under_their_own_names(journal: Journal) -> None:
    one, other = journal.stage("model.pt"), journal.stage("model.pt")
    one.write_text("one")
    other.write_text("other")

    assert one.name == other.name == "model.pt"
    assert one.read_text() == "one"
    assert one.is_relative_to(journal.folder / "files")
    assert other.is_relative_to(journal.folder / "files")


# -- what ends a process -------------------------------------------------------------------------

STEPS = """
import sys
from pathlib import Path
from tracker.journal import Journal

journal = Journal.create(Path(sys.argv[1]))
print(journal.folder, flush=True)
for number, _ in enumerate(sys.stdin):
    sum(range(10_000))  # a step takes its time
    journal.append("a", "metrics", {"number": number})
    print(number, flush=True)
"""


def test_what_was_logged_half_a_second_before_a_kill_is_on_disk(tmp_path: Path) -> None:
    with child(STEPS, str(tmp_path)) as training:
        assert training.stdin
        assert training.stdout
        folder = Path(training.stdout.readline().strip())
        logged: list[float] = []
        while not logged or logged[-1] < logged[0] + 1.2:
            training.stdin.write("step\n")
            training.stdin.flush()
            assert training.stdout.readline() == f"{len(logged)}\n"
            logged.append(time.monotonic())
        training.kill()
        killed = time.monotonic()
        training.wait()

    assert training.returncode == -signal.SIGKILL
    journal = Journal(folder)
    found = [record.body["number"] for record in journal.undelivered()]
    due = sum(at <= killed - 0.5 for at in logged)
    assert FLUSH_SECONDS < 0.5
    assert due > 0
    assert found == list(range(len(found)))
    assert len(found) >= due
    assert not journal.writer_lives()
    assert journal.unended() == ["a"]
    journal.discard()


FULL_DISK = """
import json, logging, resource, sys
from pathlib import Path
from tracker.journal import Journal

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
journal = Journal.create(Path(sys.argv[1]))
journal.append("a", "begin", {})
journal.flush()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, hard))
for number in range(5):
    journal.append("a", "epoch", {"number": number, "text": "x" * 50_000})
    journal.flush()
waiting = journal.remaining()
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
journal.append("a", "end", {})
written = len(journal.bodies("a", "epoch"))
print(json.dumps([waiting, written, journal.close(), str(journal.folder)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size as Linux does")
def test_a_full_disk_is_warned_of_once_and_what_it_kept_waiting_is_written_later(
    tmp_path: Path,
) -> None:
    with child(FULL_DISK, str(tmp_path)) as training:
        assert training.stdout
        *warned, last = training.stdout.read().splitlines()
    assert training.returncode == 0

    waiting, written_meanwhile, undelivered, folder = json.loads(last)
    assert len(warned) == 1
    assert warned[0].startswith(f"WARNING The journal {folder} cannot be written: ")
    assert waiting == 6
    assert written_meanwhile < 5
    assert undelivered == 7
    journal = Journal(Path(folder))
    kinds = [record.kind for record in journal.undelivered()]
    assert kinds == ["begin", *["epoch"] * 5, "end"]
    assert [body["number"] for body in journal.bodies("a", "epoch")] == list(range(5))
    journal.discard()


def test_the_process_that_made_a_journal_lives(journal: Journal) -> None:
    assert (journal.host, journal.pid) == (socket.gethostname(), os.getpid())
    assert journal.writer_lives()


def test_a_process_may_live_on_and_have_closed_its_journal(tmp_path: Path) -> None:
    journal = Journal(left_behind(tmp_path).folder)

    assert journal.pid == os.getpid()
    assert not journal.writer_lives()
    journal.discard()


def test_of_a_process_on_another_host_nothing_is_known(journal: Journal) -> None:
    journal.append("a", "begin", {})
    alter(journal, "UPDATE writer SET host = 'elsewhere.example'")

    there = Journal(journal.folder)

    assert there.host == "elsewhere.example"
    assert not there.writer_lives()
    assert journal.writer_lives()
    journal.flush()
    there.close()


# -- what is delivered ---------------------------------------------------------------------------


def test_a_run_is_bound_to_one_of_mlflow_s(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.append("a", "begin", {})
    assert journal.run_id("a") is None

    journal.bind("a", "0123")
    journal.bind("b", "4567")
    journal.bind("b", "89ab")

    assert (journal.run_id("a"), journal.run_id("b")) == ("0123", "89ab")
    journal.close()
    again = Journal(journal.folder)
    assert (again.run_id("a"), again.run_id("b"), again.run_id("c")) == ("0123", "89ab", None)
    again.discard()


def test_delivery_goes_on_where_it_stopped(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    for number in range(5):
        journal.append("a", "epoch", {"number": number})
    journal.flush()
    journal.mark_delivered(2)

    assert [record.seq for record in journal.undelivered()] == [3, 4, 5]
    assert journal.remaining() == 3
    assert journal.close() == 3

    again = Journal(journal.folder)
    assert [record.seq for record in again.undelivered()] == [3, 4, 5]
    again.append("a", "epoch", {"number": 5})
    assert again.remaining() == 4
    assert [record.body["number"] for record in written(again)] == [2, 3, 4, 5]
    again.mark_delivered(6)
    assert list(again.undelivered()) == []
    assert again.close() == 0
    assert not journal.folder.exists()


def test_records_still_in_memory_remain_too(journal: Journal) -> None:
    for number in range(1, 4):
        journal.append("a", "epoch", {})
        assert journal.remaining() == number
    journal.flush()
    assert journal.remaining() == 3


def test_closing_writes_what_is_still_in_memory(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.append("a", "begin", {"name": "fox"})

    assert journal.close() == 1

    again = Journal(journal.folder)
    assert [record.body for record in again.undelivered()] == [{"name": "fox"}]
    again.discard()


def test_a_folder_goes_when_all_is_delivered_and_stays_otherwise(tmp_path: Path) -> None:
    for delivered, left in ((2, 0), (1, 1), (0, 2)):
        journal = Journal.create(tmp_path)
        (journal.stage("picture.png")).write_bytes(b"picture")
        journal.append("a", "begin", {})
        journal.append("a", "end", {})
        journal.flush()
        journal.mark_delivered(delivered)

        assert journal.close() == left
        assert journal.folder.exists() == bool(left)


def test_a_journal_without_records_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journals")

    assert journal.close() == 0

    assert list((tmp_path / "journals").iterdir()) == []


def test_a_discarded_journal_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.stage("picture.png").write_bytes(b"picture")
    journal.append("a", "begin", {})

    journal.discard()

    assert list(tmp_path.iterdir()) == []


def test_runs_without_an_end_are_named_in_the_order_of_their_beginning(journal: Journal) -> None:
    assert journal.unended() == []
    for run in ("zebra", "ant", "fox"):
        journal.append(run, "begin", {})
    journal.append("ant", "end", {"status": "FINISHED"})
    journal.append("zebra", "metrics", {})
    journal.flush()
    journal.mark_delivered(5)

    assert journal.unended() == ["zebra", "fox"]

    journal.append("zebra", "end", {})
    journal.append("fox", "end", {})
    journal.flush()
    assert journal.unended() == []


# -- what cannot be a journal --------------------------------------------------------------------


def test_journals_of_one_process_are_folders_of_their_own(tmp_path: Path) -> None:
    journals = [Journal.create(tmp_path / "made" / "below") for _ in range(3)]

    assert len({journal.folder for journal in journals}) == 3
    assert {journal.folder.parent for journal in journals} == {tmp_path / "made" / "below"}
    for journal in journals:
        journal.discard()


def test_a_folder_that_is_a_file_cannot_hold_journals(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a note")

    with pytest.raises(StoreError, match=r"^directory='.*notes' cannot hold the journal .*\.$"):
        Journal.create(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "a note"


def test_a_folder_that_is_not_there_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^\S*nowhere is not a journal of this program.*\.$"):
        Journal(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a note")

    with pytest.raises(StoreError, match=r"^\S*notes is not a journal of this program.*\.$"):
        Journal(tmp_path / "notes")


@pytest.mark.parametrize("content", [b"", b"a note", b"\0" * 5000], ids=["empty", "text", "zeros"])
def test_a_file_in_the_place_of_a_journal_s_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.sqlite").write_bytes(content)

    with pytest.raises(StoreError, match=r"^\S* is not a journal of this program.*\.$"):
        Journal(tmp_path)
    assert (tmp_path / "journal.sqlite").read_bytes() == content


def test_looking_for_a_journal_makes_none(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()

    with pytest.raises(StoreError, match=r"photos is not a journal of this program.*\.$"):
        Journal(tmp_path / "photos")
    assert list((tmp_path / "photos").iterdir()) == []


def test_the_database_of_another_program_is_no_journal(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as db:
        db.execute("CREATE TABLE records (x)")

    with pytest.raises(StoreError, match=r"^\S* is not a journal of this program\.$"):
        Journal(tmp_path)


def test_a_journal_of_another_format_is_refused_by_number(tmp_path: Path) -> None:
    closed = left_behind(tmp_path)
    alter(closed, "PRAGMA user_version = 99")

    with pytest.raises(StoreError, match=r"^\S+ is a journal of format 99; this version reads \d"):
        Journal(closed.folder)
