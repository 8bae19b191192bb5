"""The journal keeps what training wrote, in order, whatever ends the process."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tracker
from tracker.errors import StoreError
from tracker.journal.reader import FLUSH_SECONDS, Journal
from tracker.journal.records import Point, Record, now
from tracker.journal.writer import JournalWriter

PROJECT = Path(tracker.__file__).parents[1]

patient = settings(deadline=None, max_examples=15)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
BODIES = st.dictionaries(st.text(), JSON, max_size=3)


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    writer = JournalWriter(tmp_path / "journals")
    yield writer
    writer.close()


@pytest.fixture
def journal(writer: JournalWriter) -> Iterator[Journal]:
    with closing(Journal(writer.folder)) as journal:
        yield journal


def written(journal: Journal, writer: JournalWriter) -> list[Record]:
    """All that was appended and not delivered, read back from the disk."""
    assert writer.flush(60)
    return journal.undelivered()


def points(records: list[Record]) -> list[list[Any]]:
    """The points of records of metrics, in order."""
    return [point for record in records for point in record.body["metrics"]]


def alter(folder: Path, *statements: str) -> None:
    """Change the file of a journal behind its back."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        for statement in statements:
            db.execute(statement)


def left_behind(directory: Path) -> Path:
    """The journal of a process that has given it up with a run undelivered."""
    writer = JournalWriter(directory)
    writer.append("a", "begin", {"name": "fox"})
    writer.close()
    return writer.folder


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


def test_records_come_back_in_order_with_their_times(
    journal: Journal, writer: JournalWriter
) -> None:
    before = now()
    writer.append("a", "begin", {"name": "fox"})
    writer.append("b", "begin", {"name": "owl"})
    writer.append("a", "metrics", {"metrics": [["loss", 0.5, 1, 2]]})
    writer.append("a", "end", {"status": "FINISHED"})
    after = now()

    records = written(journal, writer)

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
    writer = JournalWriter(tmp_path_factory.mktemp("journals"))
    for body in bodies:
        writer.append("a", "epoch", body)
    writer.close()

    journal = Journal(writer.folder)
    assert [record.body for record in journal.undelivered()] == bodies
    assert journal.bodies("a", "epoch") == bodies
    journal.remove()


def test_numbers_that_are_not_finite_come_back(journal: Journal, writer: JournalWriter) -> None:
    writer.append("a", "epoch", {"loss": math.nan, "norm": math.inf, "least": -math.inf})
    writer.append_points("a", [Point("loss", math.nan, 0, 1), Point("norm", -math.inf, 0, 1)])

    row, metrics = written(journal, writer)

    assert math.isnan(row.body["loss"])
    assert (row.body["norm"], row.body["least"]) == (math.inf, -math.inf)
    (_, loss, *_), (_, norm, *_) = metrics.body["metrics"]
    assert math.isnan(loss)
    assert norm == -math.inf


def test_numbers_of_numpy_and_torch_become_python_s_own(
    journal: Journal, writer: JournalWriter
) -> None:
    import numpy as np

    writer.append("a", "epoch", {"loss": torch.tensor(0.5), "right": np.int64(3)})

    (record,) = written(journal, writer)

    assert record.body == {"loss": 0.5, "right": 3}


def test_a_record_is_timed_when_it_is_made_not_when_it_is_written(
    journal: Journal, writer: JournalWriter
) -> None:
    writer.append("a", "epoch", {})
    writer.append("a", "epoch", {}, at=12)
    made = now()
    while now() <= made:
        pass

    first, second = written(journal, writer)

    assert first.time <= made
    assert second.time == 12


def test_records_of_one_kind_of_a_run_are_found_delivered_or_not(
    journal: Journal, writer: JournalWriter
) -> None:
    for number in range(4):
        writer.append("a", "epoch", {"number": number})
        writer.append("a", "metrics", {"number": -number})
        writer.append("b", "epoch", {"number": 10 * number})
    writer.flush()
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
def test_threads_that_append_at_once_lose_nothing(journal: Journal, writer: JournalWriter) -> None:
    threads, each = 6, 500
    start = threading.Barrier(threads + 1)

    def append(name: str) -> None:
        start.wait()
        for number in range(each):
            writer.append(name, "epoch", {"number": number})
            writer.append_points(name, [Point("loss", float(number), number, 1)])

    appending = [threading.Thread(target=append, args=(str(n),)) for n in range(threads)]
    for thread in appending:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in appending):
        assert writer.flush(60)
        journal.remaining()

    records = written(journal, writer)
    assert [record.seq for record in records] == list(range(1, len(records) + 1))
    for name in map(str, range(threads)):
        own = [record for record in records if record.run == name]
        rows = [record.body["number"] for record in own if record.kind == "epoch"]
        metrics = points([record for record in own if record.kind == "metrics"])
        assert rows == list(range(each))
        assert [step for _, _, step, _ in metrics] == list(range(each))


def test_a_record_that_is_no_json_is_said_where_it_is_made_and_costs_no_other(
    journal: Journal, writer: JournalWriter
) -> None:
    writer.append("a", "epoch", {"number": 1})
    with pytest.raises(TypeError, match="a object is no JSON"):
        writer.append("a", "epoch", {"number": object()})
    writer.append("a", "epoch", {"number": 3})

    assert [record.body["number"] for record in written(journal, writer)] == [1, 3]


def test_a_record_is_what_it_was_when_it_was_appended(
    journal: Journal, writer: JournalWriter
) -> None:
    body = {"bins": [1, 2]}
    writer.append("a", "histograms", body)
    body["bins"].append(3)

    (record,) = written(journal, writer)

    assert record.body == {"bins": [1, 2]}


def test_the_files_of_a_journal_lie_in_its_folder_under_their_own_names(
    writer: JournalWriter,
) -> None:
    one, other = writer.stage("model.pt"), writer.stage("model.pt")
    one.write_text("one")
    other.write_text("other")

    assert one.name == other.name == "model.pt"
    assert one.read_text() == "one"
    assert one.is_relative_to(writer.folder / "files")
    assert other.is_relative_to(writer.folder / "files")


# -- points --------------------------------------------------------------------------------------


def hold_the_writing_thread(writer: JournalWriter) -> threading.Event:
    """Keep it from its next turn until the event that is returned is set."""
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        writer.on_tick = None
        held.set()
        assert go_on.wait(60)

    writer.on_tick = hold
    assert held.wait(60)
    return go_on


def test_neighbouring_points_of_a_run_become_one_record(
    journal: Journal, writer: JournalWriter
) -> None:
    go_on = hold_the_writing_thread(writer)
    writer.append_points("a", [Point("loss", 0.5, 0, 7), Point("norm", 2.0, 0, 7)])
    writer.append_points("a", [Point("loss", 0.25, 1, 8)])
    writer.append_points("b", [Point("loss", 1.0, 0, 9)])
    writer.append_points("a", [Point("loss", 0.125, 2, 10)])
    writer.append("a", "epoch", {})
    writer.append_points("a", [Point("loss", 0.0625, 3, 11)])
    go_on.set()

    records = written(journal, writer)

    assert [(record.run, record.kind, record.time) for record in records] == [
        ("a", "metrics", 7),
        ("b", "metrics", 9),
        ("a", "metrics", 10),
        ("a", "epoch", records[3].time),
        ("a", "metrics", 11),
    ]
    assert points(records[:1]) == [["loss", 0.5, 0, 7], ["norm", 2.0, 0, 7], ["loss", 0.25, 1, 8]]


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)


def test_points_may_be_tensors_of_any_type_which_the_writing_thread_reads(
    journal: Journal, writer: JournalWriter
) -> None:
    go_on = hold_the_writing_thread(writer)
    values: list[Any] = [torch.tensor(1, dtype=dtype) for dtype in DTYPES]
    values += [0.5, torch.tensor(0.25), torch.tensor([0.75]), torch.tensor(math.nan)]
    values += [torch.tensor(1.5, requires_grad=True)]
    writer.append_points("a", (Point(f"m{i}", value, i, 1) for i, value in enumerate(values)))
    values[0].fill_(-1)  # it was not read yet
    go_on.set()

    found = points(written(journal, writer))

    read = [value for _, value, _, _ in found]
    assert [(name, step) for name, _, step, _ in found] == [
        (f"m{i}", i) for i in range(len(values))
    ]
    assert read[: len(DTYPES)] == [-1.0, *[1.0] * (len(DTYPES) - 1)]
    assert read[len(DTYPES) : -2] == [0.5, 0.25, 0.75]
    assert math.isnan(read[-2])
    assert read[-1] == 1.5
    assert all(isinstance(value, float) for value in read)


def test_a_tensor_that_cannot_be_read_costs_no_other_value_and_is_counted(
    journal: Journal, writer: JournalWriter, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an error of CUDA, from which on no tensor there can be read."""
    unreadable = torch.empty((), device="meta")
    for step in range(2):
        writer.append_points("a", [Point("loss", 0.5, step, 1), Point("loss", unreadable, 9, 1)])
        writer.append("a", "epoch", {"step": step})
        assert writer.flush(60)

    records = journal.undelivered()
    assert points([record for record in records if record.kind == "metrics"]) == [
        ["loss", 0.5, 0, 1],
        ["loss", 0.5, 1, 1],
    ]
    assert journal.bodies("a", "epoch") == [{"step": 0}, {"step": 1}]
    assert writer.lost == 2
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert message.startswith("A metric cannot be read ")


# -- what ends a process -------------------------------------------------------------------------

STEPS = """
import sys
from pathlib import Path
from tracker.journal.records import Point
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
writer.append("a", "begin", {})
print(writer.folder, flush=True)
for number, _ in enumerate(sys.stdin):
    sum(range(10_000))  # a step takes its time
    writer.append_points("a", [Point("loss", 0.5, number, 1)])
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
    with closing(Journal(folder)) as journal:
        begin, *metrics = journal.undelivered()
        steps = [step for _, _, step, _ in points(metrics)]
        assert begin.kind == "begin"
        assert journal.unended() == ["a"]
    due = sum(at <= killed - 0.5 for at in logged)
    assert FLUSH_SECONDS < 0.5
    assert due > 0
    assert steps == list(range(len(steps)))
    assert len(steps) >= due
    assert len(metrics) < len(steps)


FORKS = """
import os, sys
from pathlib import Path
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
writer.append("a", "epoch", {"by": "parent", "number": 1})  # in memory when the child is made
child = os.fork()
if child == 0:
    writer.append("a", "epoch", {"by": "child"})
    flushed = writer.flush()
    writer.close()
    os._exit(int(flushed))
writer.append("a", "epoch", {"by": "parent", "number": 2})
_, status = os.waitpid(child, 0)
assert status == 0
assert writer.flush()
writer.append("a", "epoch", {"by": "parent", "number": 3})
print(writer.folder)
writer.close()
"""


def test_a_fork_neither_writes_to_its_parent_s_journal_nor_closes_it(tmp_path: Path) -> None:
    with child(FORKS, str(tmp_path)) as training:
        out, _ = training.communicate(timeout=60)
    assert training.returncode == 0

    with closing(Journal(Path(out.strip()))) as journal:
        assert journal.bodies("a", "epoch") == [
            {"by": "parent", "number": number} for number in (1, 2, 3)
        ]


SIGNALLED = """
import os, signal, sys, threading, time
from pathlib import Path
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
handled = 0

def handle(*_):
    global handled
    writer.append("a", "signal", {"number": handled})
    assert writer.flush(60)
    handled += 1

signal.signal(signal.SIGUSR1, handle)
print(writer.folder, flush=True)

def signal_again_and_again():
    for _ in range(200):
        before = handled
        os.kill(os.getpid(), signal.SIGUSR1)
        while handled == before and running:
            time.sleep(0.0001)

running = True
sender = threading.Thread(target=signal_again_and_again)
sender.start()
flushed = 0
while sender.is_alive():  # busy in append and flush themselves when the signals come
    writer.append("a", "epoch", {"number": flushed})
    assert writer.flush(60)
    flushed += 1
sender.join()
writer.close()
print(handled, flushed, flush=True)
"""


def test_flush_is_safe_in_the_handler_of_a_signal_that_interrupts_flush(tmp_path: Path) -> None:
    with child(SIGNALLED, str(tmp_path)) as training:
        out, _ = training.communicate(timeout=120)
    assert training.returncode == 0
    folder, handled, flushed = out.split()
    assert handled == "200"

    with closing(Journal(Path(folder))) as journal:
        for kind, count in (("signal", int(handled)), ("epoch", int(flushed))):
            assert journal.bodies("a", kind) == [{"number": number} for number in range(count)]


# -- writing ends --------------------------------------------------------------------------------


def test_flushing_with_nothing_to_write_is_done_at_once(writer: JournalWriter) -> None:
    assert writer.flush(60)
    assert writer.flush()


def test_closing_writes_what_is_still_in_memory(tmp_path: Path) -> None:
    with closing(Journal(left_behind(tmp_path))) as journal:
        assert [record.body for record in journal.undelivered()] == [{"name": "fox"}]


def test_a_journal_that_is_closed_flushes_no_more_and_may_be_closed_again(
    writer: JournalWriter,
) -> None:
    writer.close()
    writer.append("a", "epoch", {})

    assert not writer.flush()
    writer.close()
    assert [thread.name for thread in threading.enumerate() if thread.name == "journal"] == []


def test_a_journal_whose_folder_is_taken_away_stops_nothing(
    writer: JournalWriter, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(writer.folder)
    for number in range(3):
        writer.append("a", "epoch", {"number": number})
        assert not writer.flush(60)
    writer.close()

    assert writer.lost == 3
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" (")[0] for message in messages] == [
        f"The journal {writer.folder} cannot be written",
        "3 records are lost: they could not be read or written.",
    ]
    assert not writer.folder.exists()


def test_a_removed_journal_leaves_nothing(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    writer.stage("picture.png").write_bytes(b"picture")
    writer.append("a", "begin", {})
    writer.close()

    Journal(writer.folder).remove()

    assert list(tmp_path.iterdir()) == []


# -- what is delivered ---------------------------------------------------------------------------


def test_a_run_is_bound_to_one_of_mlflow_s(tmp_path: Path) -> None:
    folder = left_behind(tmp_path)
    with closing(Journal(folder)) as journal:
        assert journal.run_id("a") is None
        journal.bind("a", "0123")
        journal.bind("b", "4567")
        journal.bind("b", "89ab")
        assert (journal.run_id("a"), journal.run_id("b")) == ("0123", "89ab")

    with closing(Journal(folder)) as again:
        assert (again.run_id("a"), again.run_id("b"), again.run_id("c")) == ("0123", "89ab", None)


def test_delivery_goes_on_where_it_stopped(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    for number in range(5):
        writer.append("a", "epoch", {"number": number})
    writer.flush()
    with closing(Journal(writer.folder)) as journal:
        journal.mark_delivered(2)
        assert [record.seq for record in journal.undelivered()] == [3, 4, 5]
        assert [record.seq for record in journal.undelivered(limit=2)] == [3, 4]
        assert (journal.remaining(), journal.delivered, journal.last()) == (3, 2, 5)

    with closing(Journal(writer.folder)) as again:
        assert [record.seq for record in again.undelivered()] == [3, 4, 5]
        writer.append("a", "epoch", {"number": 5})
        assert [record.body["number"] for record in written(again, writer)] == [2, 3, 4, 5]
        again.append("b", "epoch", {"number": 6}, at=12)
        assert again.undelivered()[-1] == Record(7, "b", 12, "epoch", {"number": 6})
        assert again.last() == 7
        again.mark_delivered(7)
        assert again.undelivered() == []
        assert again.remaining() == 0
    writer.close()


def test_what_was_sent_and_not_marked_is_in_doubt_and_nothing_else(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    for _ in range(9):
        writer.append("a", "epoch", {})
    writer.close()

    with closing(Journal(writer.folder)) as journal:
        assert not journal.sending(3)
        journal.mark_delivered(3)
        assert not journal.sending(5)  # nobody lives to mark it

    with closing(Journal(writer.folder)) as again:
        assert again.sending(5)
        again.mark_delivered(5)
        assert not again.sending(9)
        assert again.sending(7)  # refused as one request, sent in parts: both may be there
        again.mark_delivered(7)
        assert again.sending(9)
        again.mark_delivered(9)
        assert not again.sending(10)


DELIVERER = """
import json, sys
from pathlib import Path
from tracker.journal.reader import Journal

journal = Journal(Path(sys.argv[1]))
print("ready", flush=True)
delivered = []
while not delivered or delivered[-1] != "end":
    for record in journal.undelivered(50):
        journal.sending(record.seq)
        delivered += [step for _, _, step, _ in record.body.get("metrics", [])]
        delivered += ["end"] if record.kind == "end" else []
        journal.mark_delivered(record.seq)
    journal.append("system", "metrics", {"metrics": []}, 1)
    journal.problem = "the server sleeps" if len(delivered) % 2 else None
print(json.dumps(delivered))
"""


def test_a_writer_and_a_deliverer_in_two_processes_at_once_lose_nothing(
    writer: JournalWriter, journal: Journal
) -> None:
    with child(DELIVERER, str(writer.folder)) as deliverer:
        assert deliverer.stdout
        assert deliverer.stdout.readline() == "ready\n"
        for step in range(20_000):
            writer.append_points("a", [Point("loss", 0.5, step, 1)])
            if step % 50 == 0:
                assert writer.flush(60)
        writer.append("a", "end", {})
        assert writer.flush(60)
        out, _ = deliverer.communicate(timeout=120)
    assert deliverer.returncode == 0

    assert json.loads(out) == [*range(20_000), "end"]
    assert writer.lost == 0
    assert {record.run for record in journal.undelivered()} <= {"system"}


def test_forgetting_a_run_removes_what_is_delivered_of_it_and_numbers_go_on(
    writer: JournalWriter, journal: Journal
) -> None:
    for _ in range(2):
        writer.append("a", "epoch", {})
        writer.append("b", "epoch", {})
    writer.flush()
    journal.mark_delivered(2)

    journal.forget("a")

    assert journal.bodies("a", "epoch") == [{}]  # the one that is not delivered
    assert journal.bodies("b", "epoch") == [{}, {}]
    assert [record.seq for record in journal.undelivered()] == [3, 4]
    journal.mark_delivered(4)
    journal.forget("a")
    journal.forget("b")
    assert (journal.last(), journal.remaining(), journal.runs()) == (0, 0, 0)
    writer.append("c", "epoch", {})
    assert [record.seq for record in written(journal, writer)] == [5]


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
    journal.problem = "it is gone again"
    third = journal.problem
    assert third is not None
    assert third.since >= between


def test_notices_are_kept_in_order_and_read_from_any_of_them_on(tmp_path: Path) -> None:
    folder = left_behind(tmp_path)
    with closing(Journal(folder)) as journal:
        assert journal.notices() == []
        for text in ("one", "two", "two"):
            journal.notice(text)

    with closing(Journal(folder)) as again:
        assert again.notices() == [(1, "one"), (2, "two"), (3, "two")]
        assert again.notices(after=2) == [(3, "two")]
        assert again.notices(after=3) == []


def test_where_it_goes_is_known_to_who_comes_later(tmp_path: Path) -> None:
    folder = left_behind(tmp_path)
    with closing(Journal(folder)) as journal:
        assert journal.tracking_uri is None
        journal.tracking_uri = "sqlite:///a.db"

    with closing(Journal(folder)) as again:
        assert again.tracking_uri == "sqlite:///a.db"


def test_runs_without_an_end_are_named_in_the_order_of_their_beginning(
    writer: JournalWriter, journal: Journal
) -> None:
    assert journal.unended() == []
    for number, run in enumerate(("zebra", "ant", "fox")):
        writer.append(run, "begin", {}, at=10 * number + 1)
    writer.append("ant", "end", {"status": "FINISHED"}, at=50)
    writer.append("zebra", "metrics", {}, at=60)
    writer.append("headless", "metrics", {}, at=70)
    writer.flush()
    journal.mark_delivered(5)

    assert journal.unended() == ["zebra", "fox"]
    assert (journal.begin_time("fox"), journal.last_time("zebra")) == (21, 60)
    assert journal.runs() == 4

    writer.append("zebra", "end", {})
    writer.append("fox", "end", {})
    writer.flush()
    assert journal.unended() == []


# -- what cannot be a journal --------------------------------------------------------------------


def test_journals_of_one_process_are_folders_of_their_own(tmp_path: Path) -> None:
    writers = [JournalWriter(tmp_path / "made" / "below") for _ in range(3)]

    assert len({writer.folder for writer in writers}) == 3
    assert {writer.folder.parent for writer in writers} == {tmp_path / "made" / "below"}
    for writer in writers:
        writer.close()


def test_a_journal_stays_where_it_is_when_the_program_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JournalWriter(Path("journals"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    writer.append("a", "begin", {})
    writer.stage("x.txt").write_text("x")
    writer.close()

    assert writer.folder.parent == tmp_path / "journals"
    with closing(Journal(writer.folder)) as journal:
        assert journal.remaining() == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_that_is_a_file_cannot_hold_journals(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a note")

    with pytest.raises(StoreError, match=r"^directory='.*notes' cannot hold the journal .*\.$"):
        JournalWriter(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "a note"


def test_a_journal_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "journals").mkdir()
    monkeypatch.setattr("tracker.journal.reader._SCHEMA", "CREATE TABLE records (")

    with pytest.raises(StoreError, match=r"cannot hold the journal \(incomplete input\)"):
        JournalWriter(tmp_path / "journals")
    assert list((tmp_path / "journals").iterdir()) == []


def test_looking_for_a_journal_makes_none(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "notes").write_text("a note")

    for name in ("photos", "notes", "nowhere"):
        with pytest.raises(StoreError, match=rf"^\S*{name} is not a journal of this program\.$"):
            Journal(tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes", "photos"]


def test_a_journal_of_another_format_is_refused_by_number(tmp_path: Path) -> None:
    folder = left_behind(tmp_path)
    alter(folder, "PRAGMA user_version = 99")

    with pytest.raises(StoreError, match=r"^\S+ is a journal of format 99; this version reads \d"):
        Journal(folder)
