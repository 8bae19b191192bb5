"""Measures delivery on a busy machine: a training beside one busy loop per core.

Printed are the time until the run exists in the store, the lag of a point, and how long `end_run`
waits, as medians of a few trainings on a new SQLite store each.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from bench.measuring import machine, table

TRAINING = """
import sys, time
from tracker import start_run
run = start_run()
print("begun", flush=True)
until, step = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < until:
    run.log_metrics({"loss": 1.0}, step)
    step += 1
    time.sleep(0.05)
started = time.monotonic()
run.end()
print(time.monotonic() - started, flush=True)
"""
ROOT = Path(__file__).parents[1]


class Figures(NamedTuple):
    """Seconds of one training."""

    exists: float
    """From `start_run` until the run is in the store; infinite if it was not when it ended."""
    lag: float
    """The median age of the newest point in the store."""
    end: float
    """What `end_run` waited."""


def measure(seconds: float, niceness: int | None) -> Figures:
    """Measure one training.

    Args:
        seconds: How long it logs.
        niceness: What its uploader has from its start; None leaves the tracker's choice.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "mlflow.db"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{store}",
            "TRACKER_INLINE": "0",
        }
        training = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(seconds)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert training.stdout is not None
        with training, training.stdout as said:
            assert said.readline() == "begun\n"
            begun = time.monotonic()
            exists, lags = float("inf"), []
            while time.monotonic() < begun + seconds:
                if niceness is not None:
                    _renice(training.pid, niceness)
                newest = _newest_point(store)
                if newest is not None:
                    exists = min(exists, time.monotonic() - begun)
                    lags.append(time.time() - newest / 1000)
                time.sleep(0.1)
            end = float(said.readline())
        _wait_for_uploader(Path(folder))
    return Figures(exists, median(lags) if lags else float("inf"), end)


def _renice(pid: int, niceness: int) -> None:
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            if child.nice() < niceness:
                child.nice(niceness)


def _newest_point(store: Path) -> int | None:
    """Return the time of the newest point in milliseconds; None if the run is not there."""
    try:
        with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as db:
            (newest,) = db.execute(
                "SELECT max(timestamp) FROM metrics WHERE key = 'loss'"
            ).fetchone()
            return None if newest is None else int(newest)
    except sqlite3.Error:
        return None


def _wait_for_uploader(folder: Path) -> None:
    until = time.monotonic() + 60
    while list(folder.glob(".tracker/2*")) and time.monotonic() < until:
        time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="trainings per row")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of a training")
    parser.add_argument("--loops", type=int, default=os.cpu_count(), help="busy loops beside it")
    given = parser.parse_args(arguments)
    loops = [subprocess.Popen([sys.executable, "-c", "while 1: 1"]) for _ in range(given.loops)]
    rows = []
    try:
        for name, niceness in (("niceness 19 from the start", 19), ("today", None)):
            figures = [measure(given.seconds, niceness) for _ in range(given.rounds)]
            medians = [median(column) for column in zip(*figures, strict=True)]
            rows.append([name, *(f"{value:.1f}" for value in medians)])
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    print(machine("mlflow"))
    columns = [f"{given.loops} busy loops, s", "run exists", "lag of a point", "end_run"]
    table("Delivery on a busy machine", columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
