"""Measures delivery on a busy machine: a training beside one busy loop per core.

Printed are the time until the run exists in the store, the lag of a point, how long `end_run`
waits, and how many steps the training does while its uploader runs for each one that it does while
the uploader is suspended, as medians of a few trainings on a new SQLite store each.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

from bench.measuring import machine, table
from tracker.delivery.background import DEADLINE_SECONDS

TRAINING = """
import json, sys, time
from tracker import start_run
run = start_run()
print("begun", flush=True)
until, steps = time.monotonic() + float(sys.argv[1]), []
while time.monotonic() < until:
    run.log_metrics({"loss": 1.0}, len(steps))
    steps.append(time.monotonic())
    for _ in range(500_000):
        pass
started = time.monotonic()
run.end()
print(json.dumps([time.monotonic() - started, steps]), flush=True)
"""
ROOT = Path(__file__).parents[1]
NEVER = float("inf")
STEADY = 0.4
"""After this share of a training its uploader is suspended, and goes on, in turn."""
WINDOW = 2.0
"""Seconds that it runs, or is suspended."""


class Figures(NamedTuple):
    """Seconds of one training."""

    exists: float
    """From `start_run` until the run is in the store; infinite if it was not when it ended."""
    lag: float
    """The median age of the newest point in the store."""
    end: float
    """What `end_run` waited."""
    steps: float
    """Steps per second beside the uploader, by those beside a suspended one."""


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
            exists, lags = NEVER, []
            while time.monotonic() < begun + STEADY * seconds:
                for child in _uploader(training.pid):
                    if niceness is not None and child.nice() < niceness:
                        child.nice(niceness)
                newest = _newest_point(store)
                if newest is not None:
                    exists = min(exists, time.monotonic() - begun)
                    lags.append(time.time() - newest / 1000)
                time.sleep(0.1)
            windows = _toggle(training.pid, begun + seconds)
            end, steps = json.loads(said.readline())
        _wait_for_uploader(Path(folder))
    return Figures(exists, median(lags) if lags else NEVER, end, _ratio(windows, steps))


def _uploader(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        yield from psutil.Process(pid).children()


def _toggle(pid: int, until: float) -> list[tuple[bool, float, float]]:
    """Suspend the uploader and let it go on, in turn; return (runs, from, to) of each window."""
    windows = []
    runs = False
    while (now := time.monotonic()) + WINDOW < until:
        for child in _uploader(pid):
            child.resume() if runs else child.suspend()
        time.sleep(WINDOW)
        windows.append((runs, now, time.monotonic()))
        runs = not runs
    for child in _uploader(pid):
        child.resume()
    return windows


def _ratio(windows: Sequence[tuple[bool, float, float]], steps: Sequence[float]) -> float:
    rates = []
    for kind in (True, False):
        spans = [(start, end) for runs, start, end in windows if runs == kind]
        done = sum(start <= step < end for start, end in spans for step in steps)
        rates.append(done / sum(end - start for start, end in spans))
    return rates[0] / rates[1]


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


def _columns(figures: Sequence[Figures]) -> list[str]:
    *seconds, steps = (median(column) for column in zip(*figures, strict=True))
    late = sum(figure.end >= DEADLINE_SECONDS for figure in figures)
    return [
        *("never" if value == NEVER else f"{value:.1f}" for value in seconds),
        f"{late} of {len(figures)}",
        f"{steps:.3f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="trainings per row")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a training")
    parser.add_argument("--loops", type=int, default=os.cpu_count(), help="busy loops beside it")
    given = parser.parse_args(arguments)
    loops = [subprocess.Popen([sys.executable, "-c", "while 1: 1"]) for _ in range(given.loops)]
    rows: dict[str, int | None] = {"niceness 19 from the start": 19, "today": None}
    figures: dict[str, list[Figures]] = {name: [] for name in rows}
    try:
        for _ in range(given.rounds):  # in turn, because other programs disturb the machine
            for name, niceness in rows.items():
                figures[name].append(measure(given.seconds, niceness))
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    print(machine("mlflow"))
    columns = ["", "run exists", "lag of a point", "end_run", "ends at the deadline", "steps"]
    table(
        f"Delivery beside {given.loops} busy loops, seconds",
        columns,
        [[name, *_columns(figures[name])] for name in rows],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
