"""Measures delivery on a busy machine: a training beside one busy loop per core.

Printed are the time until the run exists in the store, the lag of a point, how long `end_run`
waits, and how many steps the training did beside its uploader for each step that it does without
one, as medians of a few trainings on a new SQLite store each.
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
from tracker.delivery.background import DEADLINE_SECONDS

TRAINING = """
import sys, time
from tracker import start_run
run = start_run()
print("begun", flush=True)
begun, until, steady, step = time.monotonic(), float(sys.argv[1]), float(sys.argv[2]), 0
late = 0  # steps after the uploader has started
while (passed := time.monotonic() - begun) < until:
    run.log_metrics({"loss": 1.0}, step)
    step += 1
    late += passed >= steady
    for _ in range(500_000):
        pass
started = time.monotonic()
run.end()
print(time.monotonic() - started, late, flush=True)
"""
ROOT = Path(__file__).parents[1]
NEVER = float("inf")
STEADY = 0.4
"""Steps are counted after this share of a training, when its uploader has long started."""


class Row(NamedTuple):
    """One way to deliver."""

    name: str
    niceness: int | None = None
    """What the uploader has from its start; None leaves the tracker's choice."""
    environment: tuple[tuple[str, str], ...] = ()


ROWS = (
    Row("no uploader (`TRACKER_OFFLINE`)", environment=(("TRACKER_OFFLINE", "1"),)),
    Row("niceness 19 from the start", 19),
    Row("today"),
)


class Figures(NamedTuple):
    """Seconds of one training."""

    exists: float
    """From `start_run` until the run is in the store; infinite if it was not when it ended."""
    lag: float
    """The median age of the newest point in the store."""
    end: float
    """What `end_run` waited."""
    steps: float
    """How many steps it did in a second, once its uploader had started."""


def measure(seconds: float, row: Row) -> Figures:
    """Measure one training that logs for `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "mlflow.db"
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "MLFLOW_TRACKING_URI": f"sqlite:///{store}",
            "TRACKER_INLINE": "0",
            **dict(row.environment),
        }
        training = subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(seconds), str(STEADY * seconds)],
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
            exists, lags = NEVER, []
            while time.monotonic() < begun + seconds:
                if row.niceness is not None:
                    _renice(training.pid, row.niceness)
                newest = _newest_point(store)
                if newest is not None:
                    exists = min(exists, time.monotonic() - begun)
                    lags.append(time.time() - newest / 1000)
                time.sleep(0.1)
            end, steps = map(float, said.readline().split())
        if not row.environment:
            _wait_for_uploader(Path(folder))
    return Figures(exists, median(lags) if lags else NEVER, end, steps / seconds / (1 - STEADY))


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


def _columns(figures: list[Figures], alone: list[Figures]) -> list[str]:
    seconds = [median(column) for column in list(zip(*figures, strict=True))[:3]]
    late = sum(figure.end >= DEADLINE_SECONDS for figure in figures)
    steps = [one.steps / other.steps for one, other in zip(figures, alone, strict=True)]
    return [
        *("" if value == NEVER else f"{value:.1f}" for value in seconds),
        f"{late} of {len(figures)}",
        f"{median(steps):.3f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="trainings per row")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of a training")
    parser.add_argument("--loops", type=int, default=os.cpu_count(), help="busy loops beside it")
    given = parser.parse_args(arguments)
    loops = [subprocess.Popen([sys.executable, "-c", "while 1: 1"]) for _ in range(given.loops)]
    figures: dict[Row, list[Figures]] = {row: [] for row in ROWS}
    try:
        for _ in range(given.rounds):  # in turn, because other programs disturb the machine
            for row in ROWS:
                figures[row].append(measure(given.seconds, row))
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    print(machine("mlflow"))
    columns = ["", "run exists", "lag of a point", "end_run", "ends at the deadline", "steps"]
    rows = [[row.name, *_columns(figures[row], figures[ROWS[0]])] for row in ROWS]
    table(f"Delivery beside {given.loops} busy loops, seconds", columns, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
