"""Numbers on a device are recorded as they were, without waiting, and from one thread only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.devices import Stream, a_device, away
from tests.helpers import Store
from tests.programs import wait_for
from tracker import ArgumentError, RunManager, start_run
from tracker.journal.reader import Journal
from tracker.journal.records import End, Epoch, Metrics, Point, Record
from tracker.journal.writer import JournalWriter
from tracker.training.accuracy import num_correct
from tracker.transfers import read_later, to_device


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    with a_device(monkeypatch) as stream:
        stream.refuses_waits = True
        yield stream


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    writer = JournalWriter(tmp_path / "journals")
    yield writer
    writer.close()


def on_disk(writer: JournalWriter) -> list[Record]:
    """The records of the run `a` that are written."""
    with closing(Journal(writer.folder)) as journal:
        return [entry.record for entry in journal.undelivered() if isinstance(entry.record, Record)]


def values(writer: JournalWriter) -> list[float]:
    records = [record for record in on_disk(writer) if isinstance(record, Metrics)]
    return [point[1] for record in records for point in record.metrics]


# -- metrics --------------------------------------------------------------------------------------


def test_a_number_on_a_device_is_recorded_when_it_is_computed_and_holds_up_no_record(
    stream: Stream, writer: JournalWriter
) -> None:
    writer.append_points("a", [Point("x", read_later(away(0.5)), 7, 1000)])
    writer.append_points("a", [Point("y", 0.25, 7, 1000)])
    writer.append("a", Epoch({"step": 1}))
    wait_for(lambda: Epoch({"step": 1}) in on_disk(writer), "a record after the number")

    assert values(writer) == [0.25]
    stream.compute()
    assert writer.flush(60)
    assert on_disk(writer)[-1] == Metrics([("x", 0.5, 7, 1000)])
    assert writer.lost == 0


def test_a_run_ends_after_its_numbers_have_arrived(stream: Stream, writer: JournalWriter) -> None:
    writer.append_points("a", [Point("x", read_later(away(0.5)), 7, 1000)])
    writer.append("a", End("FINISHED"))
    writer.append("b", End("FINISHED"))
    wait_for(lambda: len(on_disk(writer)) == 1, "the end of the other run")

    stream.compute()
    assert writer.flush(60)
    assert [record.kind for record in on_disk(writer)] == ["end", "metrics", "end"]


def test_a_device_that_never_answers_costs_its_numbers_but_no_status(
    stream: Stream,
    writer: JournalWriter,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("tracker.journal.writer._PATIENCE_SECONDS", 0.01)
    for step in range(3):
        writer.append_points("a", [Point("x", read_later(away(0.5)), step, 1000)])
    assert not writer.flush(60)  # the run has not ended, so they may still arrive
    assert writer.lost == 0

    writer.append("a", End("FAILED"))
    assert writer.flush(60)
    assert on_disk(writer) == [End("FAILED")]
    assert writer.lost == 3
    assert "A metric cannot be read (its device does not answer); training" in caplog.text


def test_closing_a_journal_waits_for_a_device_with_patience(
    stream: Stream, writer: JournalWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.journal.writer._PATIENCE_SECONDS", 0.01)
    writer.append_points("a", [Point("x", read_later(away(0.5)), 1, 1000)])
    writer.close()

    assert writer.lost == 1


@given(
    st.lists(st.floats(width=32) | st.just(-0.0), max_size=40), st.randoms(use_true_random=False)
)
@settings(deadline=None, max_examples=25)
def test_the_numbers_are_those_of_the_calls_in_any_order_of_arrival(
    numbers: list[float], dice: Any
) -> None:
    """A slot of memory is used again once it was read."""
    with pytest.MonkeyPatch.context() as patch, a_device(patch) as stream:
        arriving = [(number, read_later(away(number, torch.float32))) for number in numbers]
        while arriving:
            stream.copies, later = stream.copies[: dice.randint(0, 9)], stream.copies
            del later[: len(stream.copies)]
            stream.compute()
            stream.copies = later
            for expected, coming in list(arriving):
                assert not isinstance(coming, float)
                if (number := coming.read_arrived()) is not None:
                    assert (number, math.copysign(1, number)) == pytest.approx(
                        (expected, math.copysign(1, expected)), rel=0, abs=0, nan_ok=True
                    )
                    arriving.remove((expected, coming))
                    if dice.random() < 0.5:
                        arriving.append((number, read_later(away(number, torch.float32))))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        *((0.1, torch.float64), (0.5, torch.float16), (0.5, torch.bfloat16)),
        *((2**53, torch.int64), (-(2**31), torch.int32), (255, torch.uint8), (True, torch.bool)),
    ],
    ids=str,
)
def test_numbers_of_every_dtype_are_exact(value: Any, dtype: torch.dtype, stream: Stream) -> None:
    coming = read_later(away(value, dtype))
    assert not isinstance(coming, float)
    assert coming.read_arrived() is None
    stream.compute()

    assert coming.read_arrived() == float(value)


def test_without_memory_to_pin_the_loop_waits_for_its_numbers(
    stream: Stream, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    stream.refuses_waits = False
    with start_run() as run:
        run.log_metrics({"loss": away(0.5)})

    assert store.run().data.metrics == {"loss": 0.5}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_metric_on_a_device_has_the_value_of_the_call(
    shape: tuple[int, ...], stream: Stream, store: Store
) -> None:
    value = away(torch.full(shape, 1.0).tolist()).requires_grad_()
    with start_run() as run, torch.inference_mode(shape == ()):
        run.log_metrics({"loss": value})
        run.log_points([Point("late", value, 3, 1000)])
        value.data.fill_(2.0)
        stream.compute()

    assert store.run().data.metrics == {"loss": 1.0, "late": 1.0}


def test_a_batch_s_loss_on_a_device_is_recorded_without_waiting(
    stream: Stream, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with RunManager(batch_loss=True, model=False, histograms=False) as manager:
        manager.begin_run({}, nn.Linear(2, 1), [])
        manager.begin_epoch()
        for loss in (0.5, math.nan, 0.25):
            manager.track_loss(away(loss), 2)
        manager.track_loss(1.0, 2)
        stream.compute()
        stream.refuses_waits = False
        manager.end_epoch()
        manager.end_run()

    history = dict(store.history(store.run(), "batch_loss"))
    assert history == pytest.approx({1: 0.5, 2: math.nan, 3: 0.25, 4: 1.0}, nan_ok=True)
    assert "batch_loss is nan at step 2." in caplog.messages


# -- captured graphs ------------------------------------------------------------------------------


def test_a_value_that_is_only_captured_is_refused(
    stream: Stream, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = r"is captured in a graph on cuda:0 and has no value .* call %s\(\) after it"
    with RunManager(model=False, histograms=False) as manager:
        run = manager.begin_run({}, nn.Linear(2, 1), [])
        manager.begin_epoch()
        with pytest.raises(ArgumentError, match=f"^loss {message % 'track_loss'}"):
            manager.track_loss(away(0.5), 2)
        with pytest.raises(ArgumentError, match=f"^preds {message % 'track_num_correct'}"):
            manager.track_num_correct(away([[0.0, 1.0]]), torch.tensor([1]))
        with pytest.raises(ArgumentError, match=f"^a metric {message % 'log_metrics'}"):
            run.log_metrics({"x": away(0.5)})
        manager.track_loss(0.5, 2)
        manager.end_epoch()
        manager.end_run()

    assert store.run().data.metrics["loss"] == 0.5
    assert "x" not in store.run().data.metrics


# -- batches --------------------------------------------------------------------------------------


class Batch:
    """Notes how it is moved."""

    def to(self, device: torch.device, non_blocking: bool = False) -> tuple[str, bool]:
        return device.type, non_blocking


@pytest.mark.parametrize(
    ("device", "without_waiting"),
    [("cpu", False), ("mps", False), ("meta", False), ("cuda:1", True), ("xpu", True)],
)
def test_only_copies_to_cuda_and_xpu_are_not_waited_for(device: str, without_waiting: bool) -> None:
    batch: Any = Batch()
    target = torch.device(device)

    assert to_device(batch, target) == (target.type, without_waiting)


# -- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.cuda
def test_labels_on_a_gpu_may_be_compared_with_predictions_on_the_cpu() -> None:
    """A copy to the host that is not waited for may be read before it is done."""
    labels = torch.zeros(1_000_000, dtype=torch.int64, device="cuda")
    torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
    labels.fill_(1)

    assert num_correct(torch.eye(2)[torch.ones(1_000_000).long()], labels).item() == 1_000_000


@pytest.mark.cuda
def test_numbers_that_arrive_meanwhile_do_not_break_a_stream_capture(
    writer: JournalWriter,
) -> None:
    number = torch.zeros((), device="cuda")
    read_later(number)  # pins memory, which a capture forbids
    torch.cuda.synchronize()
    torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
    for step in range(300):
        writer.append_points("a", [Point("x", read_later(number + step), step, 1000)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        number += 1
        wait_for(lambda: len(values(writer)) == 300, "the numbers")
    graph.replay()

    assert number.item() == 1
    assert values(writer) == list(range(300))


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_waits_for_the_gpu_while_each_loss_is_logged(store: Store) -> None:
    losses = list(torch.arange(3000.0, device="cuda"))
    with RunManager(batch_loss=True, model=False, histograms=False) as manager:
        manager.begin_run({}, nn.Linear(2, 1), [])
        manager.begin_epoch()
        manager.track_loss(losses[0], 2)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            for loss in losses[1:]:
                manager.track_loss(loss, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        manager.end_epoch()
        manager.end_run()

    history = store.history(store.run(), "batch_loss")
    assert history == [(step + 1, float(step)) for step in range(3000)]


@pytest.mark.cuda
def test_a_number_of_another_stream_is_copied_by_that_stream(writer: JournalWriter) -> None:
    stream = torch.cuda.Stream()
    for step in range(50):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)  # type: ignore[no-untyped-call]
            number = torch.full((), float(step), device="cuda")
            writer.append_points("a", [Point("x", read_later(number), step, 1000)])
            number.fill_(-1.0)
            del number  # its memory is used again
    assert writer.flush(60)

    assert values(writer) == list(range(50))


@pytest.mark.cuda
def test_a_loss_inside_a_capture_is_refused(store: Store) -> None:
    loss = torch.zeros((), device="cuda")
    with start_run() as run:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            captured = loss + 1
            with pytest.raises(ArgumentError, match="is captured in a graph"):
                run.log_metrics({"loss": captured})
        run.log_metrics({"loss": loss})

    assert store.run().data.metrics == {"loss": 0.0}
