"""The benchmark runs. Its figures are not asserted, because machines differ."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ["tracker log_metrics", "tracker track_loss, batch_loss=True"]


@pytest.mark.slow
def test_the_benchmark_prints_every_row_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.outage", "--only", "restarted", "--steps", "5"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*command, "--limit", "1", "--restarts", "1"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split("|") for line in done.stdout.splitlines() if "|" in line]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    for name in OURS:
        calls, arrived, *times = rows[f"restarted: {name}"]
        assert arrived == calls
        assert all(float(cell.replace(",", "")) > 0 for cell in times)
    assert {"restarted: nothing", "restarted: MLflow log_metric"} <= set(rows)
    assert len(re.findall(r"^goal: .+: [\d,]+, (?:met|MISSED)$", done.stdout, re.MULTILINE)) == 2
    assert str(tmp_path) not in done.stdout
    assert socket.gethostname() not in done.stdout
    assert list(tmp_path.iterdir()) == []
