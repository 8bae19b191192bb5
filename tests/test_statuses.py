"""The final status of runs of real programs that end in different ways."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.programs import ForkServer, wait_for

BEGIN = """
import os, signal, sys, threading
# A process in the background ignores Ctrl-C by default.
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch
from torch.utils.data import DataLoader, TensorDataset
from tracker import RunManager, start_run
network = torch.nn.Linear(2, 2)
loader = DataLoader(TensorDataset(torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)))
manager = RunManager(model=False)
manager.begin_run({"lr": 0.1}, network, loader)
manager.begin_epoch()
manager.track_loss(torch.tensor(1.0), 4)
manager.end_epoch()
"""


@pytest.mark.parametrize(
    ("ending", "status", "reason"),
    [
        ("manager.end_run()", "FINISHED", None),
        ("raise ValueError('lost')", "FAILED", "ValueError: lost"),
        ("raise KeyboardInterrupt", "KILLED", "KeyboardInterrupt"),
        (
            "pass",
            "FAILED",
            "The run was abandoned when the program ended",
        ),
        (
            "manager.close()",
            "FAILED",
            "The run was abandoned when the manager was closed: ",
        ),
        (
            "try:\n    raise ValueError('caught')\nexcept ValueError:\n    manager.end_run()",
            "FINISHED",
            None,
        ),
        (
            "os.kill(os.getpid(), signal.SIGINT); threading.Event().wait(60)",
            "KILLED",
            "KeyboardInterrupt",
        ),
        ("if os.fork() == 0: sys.exit(3)\nos.wait(); manager.end_run()", "FINISHED", None),
    ],
    ids=["ended", "exception", "ctrl-c", "never ended", "closed", "caught", "SIGINT", "a fork"],
)
def test_the_status_follows_from_how_the_program_ends(
    store: Store, deliverers: ForkServer, ending: str, status: str, reason: str | None
) -> None:
    deliverers.run(BEGIN + ending)
    run = store.run()
    assert run.info.status == status
    failure = run.data.tags.get("tracker.failure")
    assert failure is None if reason is None else failure.startswith(reason)
    assert store.history(run, "loss") == [(1, 1.0)]
    assert "epochs.csv" in store.artifacts(run)


def test_a_run_that_is_never_ended_has_the_uncaught_exception_as_its_reason(
    store: Store, deliverers: ForkServer
) -> None:
    program = "from tracker import start_run\nrun = start_run()\nraise RuntimeError('lost')"
    deliverers.run(program)
    assert store.run().info.status == "FAILED"
    assert store.run().data.tags["tracker.failure"].startswith("RuntimeError: lost")


def test_sigterm_ends_a_training_as_killed(store: Store, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "studies.train", "--dataset", "digits", "--epochs", "1000"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "TRACKER_INLINE": "0"},
        stderr=subprocess.PIPE,
    )

    def has_logged() -> bool:
        assert process.poll() is None, process.stderr and process.stderr.read()
        return any(run.data.metrics for run in store.runs())

    wait_for(has_logged, "the first metrics")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGTERM
    wait_for(lambda: not list((tmp_path / ".tracker").iterdir()), "the delivery of everything")
    assert store.run().info.status == "KILLED"
    assert "was stopped by SIGTERM" in store.run().data.tags["tracker.failure"]
    assert b"Traceback" not in error
