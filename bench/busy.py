"""Measures delivery on a busy machine: a training beside one busy loop per core.

Printed are the time until the run exists in the store, the lag of a point, how long `end_run`
waits, and what the uploader takes from the training, as medians of a few trainings on a new SQLite
store each. What it takes is its share of one core: steps of the training beside a running and a
suspended uploader were compared too, but other programs change them by more than the uploader.
"""

from __future__ import annotations

import argparse
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
import sys, time
from tracker import start_run
run = start_run()
print("begun", flush=True)
until, step = time.monotonic() + float(sys.argv[1]), 0
while time.monotonic() < until:
    run.log_metrics({"loss": 1.0}, step)
    step += 1
    for _ in range(500_000):
        pass
started = time.monotonic()
run.end()
print(time.monotonic() - started, flush=True)
"""
ROOT = Path(__file__).parents[1]
NEVER = float("inf")
STEADY = 0.4
"""After this share of a training, the uploader's share of a core is measured."""


class Figures(NamedTuple):
    """Seconds of one training."""

    exists: float
    """From `start_run` until the run is in the store; infinite if it was not when it ended."""
    lag: float
    """The median age of the newest point in the store."""
    end: float
    """What `end_run` waited."""
    share: float
    """The uploader's share of one core in the steady state."""


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
            used: list[tuple[float, float]] = []  # the time, and the uploader's CPU time until then
            while (now := time.monotonic()) < begun + seconds:
                for child in _uploader(training.pid):
                    if niceness is not None and child.nice() < niceness:
                        child.nice(niceness)
                    if now >= begun + STEADY * seconds:
                        used.append((now, sum(child.cpu_times()[:2])))
                newest = _newest_point(store)
                if newest is not None:
                    exists = min(exists, time.monotonic() - begun)
                    lags.append(time.time() - newest / 1000)
                time.sleep(0.1)
            end = float(said.readline())
        _wait_for_uploader(Path(folder))
    (first, before), (last, after) = used[0], used[-1]
    share = (after - before) / (last - first)
    return Figures(exists, median(lags) if lags else NEVER, end, share)


def _uploader(pid: int) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        yield from psutil.Process(pid).children()


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
    *seconds, share = (median(column) for column in zip(*figures, strict=True))
    late = sum(figure.end >= DEADLINE_SECONDS for figure in figures)
    return [
        *("never" if value == NEVER else f"{value:.1f}" for value in seconds),
        f"{late} of {len(figures)}",
        f"{100 * share:.1f} %",
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
    columns = ["", "run exists", "lag of a point", "end_run", "ends at the deadline", "uploader"]
    table(
        f"Delivery beside {given.loops} busy loops, seconds",
        columns,
        [[name, *_columns(figures[name])] for name in rows],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
