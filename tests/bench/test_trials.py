"""The benchmark runs. Its figures are not asserted, because machines differ."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.trials import CONTESTANTS, OURS

ROOT = Path(__file__).parents[2]
QUICK = [OURS, "Optuna in memory"]


@pytest.mark.slow
@pytest.mark.parametrize("names", [QUICK, [name for name in CONTESTANTS if name not in QUICK]])
def test_the_benchmark_prints_every_row_and_leaves_nothing_behind(
    names: list[str], tmp_path: Path
) -> None:
    only = [word for name in names for word in ("--only", name)]
    command = [sys.executable, "-m", "bench.trials", "--rounds", "1", "--trials", "4", *only]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split("|") for line in done.stdout.splitlines() if "|" in line]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    for name in names:
        trials, *waits = rows[name][:4]
        assert int(trials) >= 3
        assert all(float(cell.replace(",", "")) > 0 for cell in waits)
    goals = re.findall(r"^goal: .+: -?[\d.]+, (?:met|MISSED)$", done.stdout, re.MULTILINE)
    assert len(goals) == 2 * (OURS in names)
    assert str(tmp_path) not in done.stdout
    assert socket.gethostname() not in done.stdout
    assert list(tmp_path.iterdir()) == []
