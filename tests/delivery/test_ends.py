"""What is delivered when a program ends before its uploader is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.programs import ForkServer
from tracker import RunManager, start_run
from tracker.errors import ArgumentError


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_all_processes_while_the_uploader_starts_leaves_nothing_undelivered(
    name: str, store: Store, tmp_path: Path, trainers: ForkServer
) -> None:
    program = trainers.start(
        "import os, psutil, signal, time\n"
        "from tracker import start_run\n"
        "run = start_run()\n"
        "run.log_metrics({'loss': 1.0}, 1)\n"
        "while not psutil.Process().children(): time.sleep(0.001)\n"
        f"os.killpg(0, signal.{name})\n"
        "time.sleep(60)\n",
        TRACKER_INLINE="0",
    )
    program.wait_for_all()
    run = store.run()
    assert run.info.status == "KILLED", program.output()
    assert f"was stopped by {name}" in run.data.tags["tracker.failure"]
    assert store.history(run, "loss") == [(1, 1.0)]
    assert list((tmp_path / ".tracker").iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "variable"), [("None", "0"), ("0", "1000")], ids=["variable", "argument"]
)
def test_a_healthy_upload_continues_after_the_program_has_ended(
    argument: str, variable: str, store: Store, tmp_path: Path, trainers: ForkServer
) -> None:
    program = trainers.start(
        "import psutil, time\n"
        "from tracker import start_run\n"
        f"with start_run(exit_timeout={argument}) as run:\n"
        "    run.log_metrics({'loss': 1.0}, 1)\n"
        "    while not psutil.Process().children(): time.sleep(0.001)\n",
        TRACKER_INLINE="0",
        TRACKER_EXIT_TIMEOUT=variable,
    )
    program.wait_for_all()
    assert program.code == 0
    assert store.run().info.status == "FINISHED", program.output()
    assert "are still being uploaded, which continues in the background" in program.stderr
    assert "tracker status" in program.stderr
    assert list((tmp_path / ".tracker").iterdir()) == []


@pytest.mark.parametrize("begin", [start_run, RunManager])
def test_the_patience_as_an_argument_is_a_number_of_seconds(
    begin: Callable[..., object], tracking_uri: str
) -> None:
    with pytest.raises(ArgumentError, match="exit_timeout=-1 is not allowed"):
        begin(exit_timeout=-1)


@pytest.mark.parametrize("seconds", ["soon", "-1", "nan", "inf"])
def test_the_patience_is_a_number_of_seconds(
    seconds: str, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKER_EXIT_TIMEOUT", seconds)
    with pytest.raises(ArgumentError, match=f"TRACKER_EXIT_TIMEOUT='{seconds}' is not allowed"):
        start_run(inline=False)
