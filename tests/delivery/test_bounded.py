"""Requests and the uploader's memory are bounded, and `tracker sync` waits for an uploader."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.journal.helpers import BEGIN, Recorder, left_behind
from tracker.cli import main
from tracker.delivery.uploader import Uploader
from tracker.errors import StoreError
from tracker.journal.ownership import delivery_lock
from tracker.journal.reader import Journal
from tracker.journal.records import End, Histograms, Metrics
from tracker.journal.writer import JournalWriter


class Batches(Recorder):
    """A store that remembers how many points each request had."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.pages = 0

    def log_batch(self, run_id: str, metrics: Any = (), *_: Any, **__: Any) -> None:
        self.sizes.append(len(metrics))

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.pages += name == "histograms.html"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    writer = JournalWriter(tmp_path / "journals")
    writer.append("a", BEGIN)
    yield writer
    writer.close()


def test_a_request_is_limited_in_points(writer: JournalWriter) -> None:
    for size in (25_000, 6_000, 6_000):
        writer.append("a", Metrics([("loss", 1.0, step, 1) for step in range(size)]))
    writer.append("a", End("FINISHED"))
    writer.flush()
    store = Batches()
    looks: list[int] = []
    with closing(Journal(writer.folder)) as journal:
        Uploader(journal, store, looks.append).drain()  # type: ignore[arg-type]
    assert store.sizes == [10_000, 10_000, 5_000, 6_000, 6_000]
    assert looks == [1, 0, 0, 1, 1, 1, 1]


def test_a_delivery_stops_within_a_large_record_and_sends_it_again(writer: JournalWriter) -> None:
    writer.append("a", Metrics([("loss", 1.0, step, 1) for step in range(25_000)]))
    writer.flush()
    store = Batches()
    with closing(Journal(writer.folder)) as journal:
        with pytest.raises(StoreError, match="was stopped"):
            Uploader(journal, store).drain(lambda: bool(store.sizes))  # type: ignore[arg-type]
        assert journal.remaining() == 1
        assert journal.sending(2)
        Uploader(journal, store).drain()  # type: ignore[arg-type]
        assert journal.remaining() == 0


def test_histograms_are_read_one_at_a_time(writer: JournalWriter) -> None:
    bins = list(range(400))
    layer: dict[str, Any] = {"kind": "weight", "bins": bins, "counts": bins}
    layer |= {"nan": 0, "posinf": 0, "neginf": 0}
    for step in range(100):
        layers: list[Any] = [{"tensor": f"layer{n}", **layer} for n in range(50)]
        writer.append("a", Histograms(step, layers))
    writer.append("a", End("FINISHED"))
    writer.flush()
    store = Batches()
    with closing(Journal(writer.folder)) as journal:
        tracemalloc.start()
        Uploader(journal, store).drain()  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert store.pages == 1
    assert peak < 60_000_000, peak


def test_unended_runs_are_those_of_all_records(writer: JournalWriter) -> None:
    for run, ended in (("b", True), ("c", False), ("B", False)):
        writer.append(run, BEGIN)
        writer.append(run, Metrics([("loss", 1.0, 1, 1)]))
        if ended:
            writer.append(run, End("FINISHED"))
    writer.flush()
    with closing(Journal(writer.folder)) as journal:
        assert journal.unended() == ["a", "c", "B"]


@pytest.mark.parametrize("delivers", [True, False])
def test_sync_waits_for_the_process_that_delivers_and_takes_over_if_it_dies(
    delivers: bool,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = left_behind(tmp_path / ".tracker", tracking_uri, points=3)
    waiting = threading.Event()
    lock = delivery_lock(folder)
    assert lock.take()

    def deliver() -> None:
        waiting.wait()
        if delivers:
            with suppress(StoreError), closing(Journal(folder)) as journal:
                journal.remove()
        lock.release()

    real = Journal.remaining

    def remaining(journal: Journal) -> int:
        waiting.set()
        return real(journal)

    monkeypatch.setattr(Journal, "remaining", remaining)
    other = threading.Thread(target=deliver)
    monkeypatch.setattr("tracker.delivery.leftovers._WAIT_SECONDS", 0.01)
    other.start()
    assert main(["sync", str(folder)]) == 0
    other.join()
    assert not folder.exists()
    said = capsys.readouterr()
    assert said.out == f"Uploaded {0 if delivers else 9} records of {0 if delivers else 1} run" + (
        "s.\n" if delivers else ".\n"
    )
    assert "Traceback" not in said.err
