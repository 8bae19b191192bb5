"""Whatever training appends is on disk in order, however the process ends."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

import tracker
from tracker.errors import StoreError
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, End, Entry, Epoch, Metrics, Point, Signal, now
from tracker.journal.writer import FLUSH_SECONDS, JournalWriter

PROJECT = Path(tracker.__file__).parents[1]


def written(journal: Journal, writer: JournalWriter) -> list[Entry]:
    """The entries on disk that are not delivered, after everything pending is written."""
    assert writer.flush(60)
    return journal.undelivered()


def points(entries: Sequence[Entry]) -> list[tuple[str, float, int, int]]:
    """The points of all metrics among the entries, in order."""
    records = [entry.record for entry in entries]
    return [point for record in records if isinstance(record, Metrics) for point in record.metrics]


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A Python process that runs `code` and talks through pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )


# -- records -------------------------------------------------------------------------------------


def test_records_come_back_in_order_with_their_times(
    journal: Journal, writer: JournalWriter
) -> None:
    records = [
        ("a", Begin("Default", None, "fox", {"tracker.run": "a"})),
        ("b", Begin("Default", None, "owl", {"tracker.run": "b"})),
        ("a", Metrics([("loss", 0.5, 1, 2)])),
        ("a", End("FINISHED")),
    ]
    before = now()
    for run, record in records:
        writer.append(run, record)
    after = now()

    entries = written(journal, writer)

    assert [(entry.run, entry.record) for entry in entries] == records
    assert [entry.seq for entry in entries] == [1, 2, 3, 4]
    times = [before, *(entry.time for entry in entries), after]
    assert times == sorted(times)


def test_a_record_carries_the_time_of_the_call(journal: Journal, writer: JournalWriter) -> None:
    writer.append("a", Epoch({}))
    writer.append("a", Epoch({}), at=12)
    appended = now()
    while now() <= appended:
        pass

    first, second = written(journal, writer)

    assert first.time <= appended
    assert second.time == 12


def test_a_record_is_stored_as_it_was_when_it_was_appended(
    journal: Journal, writer: JournalWriter
) -> None:
    row = {"bins": [1, 2]}
    writer.append("a", Epoch(row))
    row["bins"].append(3)

    (entry,) = written(journal, writer)

    assert entry.record == Epoch({"bins": [1, 2]})


def test_a_value_that_is_not_json_raises_at_the_call_and_costs_no_other_record(
    journal: Journal, writer: JournalWriter
) -> None:
    writer.append("a", Epoch({"number": 1}))
    with pytest.raises(TypeError, match="a object cannot be written as JSON"):
        writer.append("a", Epoch({"number": object()}))
    writer.append("a", Epoch({"number": 3}))

    records = [entry.record for entry in written(journal, writer)]
    assert records == [Epoch({"number": 1}), Epoch({"number": 3})]


@pytest.fixture
def hectic() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
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
            writer.append(name, Epoch({"number": number}))
            writer.append_points(name, [Point("loss", float(number), number, 1)])

    appending = [threading.Thread(target=append, args=(str(n),)) for n in range(threads)]
    for thread in appending:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in appending):
        assert writer.flush(60)
        journal.remaining()

    entries = written(journal, writer)
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    for name in map(str, range(threads)):
        own = [entry for entry in entries if entry.run == name]
        rows = [entry.record.row for entry in own if isinstance(entry.record, Epoch)]
        assert rows == [{"number": number} for number in range(each)]
        assert [step for _, _, step, _ in points(own)] == list(range(each))


def test_staged_files_lie_in_the_journals_folder_under_their_own_names(
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
    """Stop the thread after its current turn, until the returned event is set."""
    held, resume = threading.Event(), threading.Event()

    def hold() -> None:
        writer.on_tick = None
        held.set()
        assert resume.wait(60)

    writer.on_tick = hold
    assert held.wait(60)
    return resume


def test_neighbouring_points_of_a_run_become_one_record(
    journal: Journal, writer: JournalWriter
) -> None:
    resume = hold_the_writing_thread(writer)
    writer.append_points("a", [Point("loss", 0.5, 0, 7), Point("norm", 2.0, 0, 7)])
    writer.append_points("a", [Point("loss", 0.25, 1, 8)])
    writer.append_points("b", [Point("loss", 1.0, 0, 9)])
    writer.append_points("a", [Point("loss", 0.125, 2, 10)])
    writer.append("a", Epoch({}), at=11)
    writer.append_points("a", [Point("loss", 0.0625, 3, 12)])
    resume.set()

    entries = written(journal, writer)

    assert [(entry.run, entry.record.kind, entry.time) for entry in entries] == [
        ("a", "metrics", 7),
        ("b", "metrics", 9),
        ("a", "metrics", 10),
        ("a", "epoch", 11),
        ("a", "metrics", 12),
    ]
    assert points(entries[:1]) == [("loss", 0.5, 0, 7), ("norm", 2.0, 0, 7), ("loss", 0.25, 1, 8)]


def test_a_record_holds_a_limited_number_of_points(journal: Journal, writer: JournalWriter) -> None:
    writer.append_points("a", [Point("loss", 1.0, step, 1) for step in range(25_000)])
    entries = written(journal, writer)
    assert len(points(entries)) == 25_000
    assert max(len(points([entry])) for entry in entries) <= 10_000


def test_a_tensor_that_cannot_be_read_costs_no_other_value_and_is_counted(
    journal: Journal,
    writer: JournalWriter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    unreadable = torch.empty((), device="meta")
    for step in range(2):
        writer.append_points("a", [Point("loss", 0.5, step, 1), Point("loss", unreadable, 9, 1)])
        writer.append("a", Epoch({"step": step}))
        assert writer.flush(60)

    assert points(journal.undelivered()) == [("loss", 0.5, 0, 1), ("loss", 0.5, 1, 1)]
    assert journal.records("a", Epoch) == [Epoch({"step": 0}), Epoch({"step": 1})]
    assert writer.lost == 2
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert message.startswith("A metric cannot be read (")


# -- the end of a process ------------------------------------------------------------------------

STEPS = """
import sys
from pathlib import Path
from tracker.journal.records import Begin, Point
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
writer.append("a", Begin("Default", None, None, {}))
print(writer.folder, flush=True)
for number, _ in enumerate(sys.stdin):
    sum(range(10_000))  # a step takes its time
    writer.append_points("a", [Point("loss", 0.5, number, 1)])
    print(number, flush=True)
"""


def test_points_logged_half_a_second_before_a_kill_are_on_disk(tmp_path: Path) -> None:
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
        assert begin.record.kind == "begin"
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
from tracker.journal.records import Epoch
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
writer.append("a", Epoch({"by": "parent", "number": 1}))  # in memory when the child is made
child = os.fork()
if child == 0:
    writer.append("a", Epoch({"by": "child"}))
    flushed = writer.flush()
    writer.close()
    os._exit(int(flushed))
writer.append("a", Epoch({"by": "parent", "number": 2}))
_, status = os.waitpid(child, 0)
assert status == 0
assert writer.flush()
writer.append("a", Epoch({"by": "parent", "number": 3}))
print(writer.folder)
writer.close()
"""


def test_a_fork_neither_writes_to_its_parents_journal_nor_closes_it(tmp_path: Path) -> None:
    with child(FORKS, str(tmp_path)) as training:
        out, _ = training.communicate(timeout=60)
    assert training.returncode == 0

    with closing(Journal(Path(out.strip()))) as journal:
        assert journal.records("a", Epoch) == [
            Epoch({"by": "parent", "number": number}) for number in (1, 2, 3)
        ]


SIGNALLED = """
import os, signal, sys, threading, time
from pathlib import Path
from tracker.journal.records import Epoch, Signal
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
handled = 0

def handle(*_):
    global handled
    writer.append("a", Signal(str(handled)))
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
while sender.is_alive():  # busy in append and flush itself when the signals come
    writer.append("a", Epoch({"number": flushed}))
    assert writer.flush(60)
    flushed += 1
sender.join()
writer.close()
print(handled, flushed, flush=True)
"""


def test_flush_is_safe_in_a_signal_handler_that_interrupts_flush(tmp_path: Path) -> None:
    with child(SIGNALLED, str(tmp_path)) as training:
        out, _ = training.communicate(timeout=120)
    assert training.returncode == 0
    folder, handled, flushed = out.split()
    assert handled == "200"

    with closing(Journal(Path(folder))) as journal:
        assert journal.records("a", Signal) == [Signal(str(n)) for n in range(200)]
        assert len(journal.records("a", Epoch)) == int(flushed)


# -- closing -------------------------------------------------------------------------------------


def test_flush_with_nothing_pending_succeeds(writer: JournalWriter) -> None:
    assert writer.flush(60)
    assert writer.flush()


def test_close_writes_what_is_pending_and_may_be_called_again(
    journal: Journal, writer: JournalWriter
) -> None:
    writer.append("a", Epoch({"number": 1}))
    writer.close()
    assert journal.records("a", Epoch) == [Epoch({"number": 1})]

    writer.append("a", Epoch({"number": 2}))
    assert not writer.flush()
    writer.close()
    assert journal.records("a", Epoch) == [Epoch({"number": 1})]
    assert not writer._thread.is_alive()


def test_a_journal_whose_folder_was_removed_does_not_stop_training(
    writer: JournalWriter, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(writer.folder)
    for number in range(3):
        writer.append("a", Epoch({"number": number}))
        assert not writer.flush(60)
    writer.close()

    assert writer.lost == 3
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" (")[0] for message in messages] == [
        f"The journal {writer.folder} cannot be written",
        "3 records are lost: they could not be read or written.",
    ]
    assert not writer.folder.exists()


# -- creating ------------------------------------------------------------------------------------


def test_each_journal_of_a_process_has_its_own_folder(tmp_path: Path) -> None:
    writers = [JournalWriter(tmp_path / "made" / "below") for _ in range(3)]

    assert len({writer.folder for writer in writers}) == 3
    assert {writer.folder.parent for writer in writers} == {tmp_path / "made" / "below"}
    for writer in writers:
        writer.close()


def test_a_journal_stays_in_place_when_the_program_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JournalWriter(Path("journals"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    writer.append("a", Epoch({}))
    writer.stage("x.txt").write_text("x")
    writer.close()

    assert writer.folder.parent == tmp_path / "journals"
    with closing(Journal(writer.folder)) as journal:
        assert journal.remaining() == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("a note")

    with pytest.raises(StoreError, match=r"^directory='.*notes' cannot hold the journal .*\.$"):
        JournalWriter(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "a note"


def test_a_journal_that_cannot_be_created_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "journals").mkdir()
    monkeypatch.setattr("tracker.journal.database._SCHEMA", "CREATE TABLE records (")

    with pytest.raises(StoreError, match=r"cannot hold the journal \(incomplete input\)"):
        JournalWriter(tmp_path / "journals")
    assert list((tmp_path / "journals").iterdir()) == []


# -- what cannot be written ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        Point("x", object(), 1, 1),
        Point("x", 1.0, object(), 1),  # type: ignore[arg-type]
        Point("x", 1.0, 1, 2**70),
        Point("x", 1.0, 1, None),  # type: ignore[arg-type]
    ],
    ids=["value", "step", "huge time", "no time"],
)
def test_a_point_that_cannot_be_written_costs_itself_alone(
    wrong: Point, journal: Journal, writer: JournalWriter, caplog: pytest.LogCaptureFixture
) -> None:
    writer.append_points("a", [Point("x", 1.0, 1, 1)])
    writer.append_points("b", [wrong])
    writer.append_points("c", [Point("x", 2.0, 2, 2)])

    assert points(written(journal, writer)) == [("x", 1.0, 1, 1), ("x", 2.0, 2, 2)]
    assert writer.lost == 1
    assert "training continues" in caplog.text


@pytest.mark.parametrize("value", [object(), torch.ones(2)], ids=["object", "two numbers"])
def test_a_point_that_cannot_be_read_costs_no_other_of_its_record(
    value: Any, journal: Journal, writer: JournalWriter
) -> None:
    writer.append_points(
        "a", [Point("x", number, 1, 1) for number in (1.0, value, torch.tensor(2.0))]
    )

    assert [point[1] for point in points(written(journal, writer))] == [1.0, 2.0]
    assert writer.lost == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_noticed_and_what_follows_is_counted(
    writer: JournalWriter, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_thread(record: object) -> str:
        raise SystemExit

    monkeypatch.setattr("tracker.journal.writer.encode", end_thread)
    writer.append_points("a", [Point("x", 1.0, 1, 1)])
    assert not writer.flush()

    writer.append_points("a", [Point("x", 2.0, 2, 2)])
    writer.close()

    assert writer.lost == 1
    assert "The journal's thread has ended; nothing more is recorded." in caplog.messages
