"""The benchmarks run, each with few of its contestants. Their figures are not asserted."""

from __future__ import annotations

import argparse
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench import outage
from tests.faults import TrackingServer

ROOT = Path(__file__).parents[2]

OVERHEAD = ("bench.overhead", "--only", "calls", "--rounds", "1")
TRIALS = ("bench.trials", "--rounds", "1", "--trials", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rows", "goals"),
    [
        (OVERHEAD, ["tracker track_loss", "track_loss, batch_loss=True", "tutorial, both"], 0),
        ((*TRIALS, "--only", "tracker Study"), ["tracker Study"], 2),
    ],
    ids=["overhead", "trials"],
)
def test_a_benchmark_prints_its_rows_and_leaves_nothing_behind(
    command: tuple[str, ...], rows: list[str], goals: int, tmp_path: Path
) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split("|") for line in done.stdout.splitlines() if "|" in line]
    printed = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    for name in rows:
        assert all(float(cell.replace(",", "")) > 0 for cell in printed[name][:2])
    found = re.findall(r"^goal: .+: -?[\d.]+, (?:met|MISSED)$", done.stdout, re.MULTILINE)
    assert len(found) == goals
    assert str(tmp_path) not in done.stdout
    assert socket.gethostname() not in done.stdout
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"torchinductor_root"}  # torch's own cache


@pytest.mark.slow
def test_the_outage_benchmark_measures_every_call(
    tracking_server: TrackingServer, tmp_path: Path
) -> None:
    given = argparse.Namespace(steps=5, limit=1, restarts=1)
    calls = outage.measure(outage.TRACKER, "refused", tracking_server, tmp_path, given)
    assert len(calls.seconds) == calls.arrived == 5
    assert not calls.cut
    assert calls.cells()[:2] == ["5", "5"]
