"""When the uploader works: metrics wait for more of them, the journal never waits for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tracker.delivery import background, process
from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.process import UploaderProcess
from tracker.run import Run


@pytest.fixture
def delivery(tracking_uri: str, tmp_path: Path) -> Iterator[BackgroundDelivery]:
    delivery = BackgroundDelivery(tmp_path / "journals", tracking_uri, uploader=False)
    yield delivery
    delivery.leave()


@pytest.fixture
def run(delivery: BackgroundDelivery) -> Run:
    return Run(delivery)


@pytest.fixture
def uploader(
    run: Run, delivery: BackgroundDelivery, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[UploaderProcess]:
    """An uploader that has delivered the beginning of `run`, and waits forever for metrics."""
    monkeypatch.setattr(process, "NICENESS", 0)
    monkeypatch.setattr(process, "LONGEST_PACE_SECONDS", 1e6)
    monkeypatch.setattr(process, "CPU_SHARE", 1e-12)
    run.log_params({"lr": 0.1})
    delivery.journal.flush()
    uploader = UploaderProcess(delivery.journal.folder, tracking_uri)
    assert uploader.deliver() > 0
    yield uploader
    uploader.close()


def test_metrics_wait_for_more_of_them(
    run: Run, uploader: UploaderProcess, delivery: BackgroundDelivery
) -> None:
    run.log_metrics({"loss": 1.0}, 1)
    delivery.journal.flush()
    assert uploader.deliver() == 0
    run.log_metrics({"loss": 0.5}, 2)
    run.log_params({"epochs": 3})
    delivery.journal.flush()
    assert uploader.deliver() > 1


def test_metrics_that_somebody_waits_for_are_sent_at_once(
    run: Run,
    uploader: UploaderProcess,
    delivery: BackgroundDelivery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run.log_metrics({"loss": 1.0}, 1)
    delivery.journal.flush()
    monkeypatch.setattr(delivery, "_wants_uploader", True)  # the uploader is the one above
    assert not delivery.flush(timeout=1.0)
    assert uploader.deliver() > 0


def test_metrics_are_sent_at_once_when_the_uploader_must_stop(
    run: Run, uploader: UploaderProcess, delivery: BackgroundDelivery
) -> None:
    run.log_metrics({"loss": 1.0}, 1)
    delivery.journal.flush()
    uploader.stop()
    assert uploader.deliver() > 0


def test_records_reach_the_disk_while_the_uploader_cannot_start(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starting, released = threading.Event(), threading.Event()

    def blocked(*_: object, **__: object) -> None:
        starting.set()
        released.wait()
        raise OSError("no process could be started")

    monkeypatch.setattr(background.subprocess, "Popen", blocked)
    delivery = BackgroundDelivery(tmp_path / "journals", tracking_uri, uploader=True)
    run = Run(delivery, environment={})  # it would start git
    try:
        assert starting.wait(60)
        run.log_metrics({"loss": 1.0}, 1)
        assert delivery.journal.flush(60)
    finally:
        released.set()
        delivery.leave()
