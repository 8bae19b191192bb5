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
TRAINING = [
    *("bare loop", "bare loop again"),
    *("tracker RunManager", "tracker RunManager, batch_loss=True"),
    *("MLflow log_metric per epoch", "MLflow log_metric per step", "the same, synchronous=False"),
    "tutorial RunManager, TensorBoard",
    *("Lightning, MLFlowLogger every 50", "Lightning, MLFlowLogger every 1"),
]
PARTS = [
    *("tracker histograms()", "tracker network_histograms()", "torch.histc, 64 bins"),
    *("numpy.histogram, 64 bins", "TensorBoard add_histogram, flush"),
    *("tracker track_loss", "tracker track_num_correct", "tracker, both", "tutorial, both"),
    *("track_loss, batch_loss=True", "run.log_metrics of one number"),
]


@pytest.mark.slow
def test_the_benchmark_prints_every_row_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.overhead", "--rounds", "1", "--steps", "3"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split("|") for line in done.stdout.splitlines() if "|" in line]
    rows = {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}
    assert {*TRAINING, *PARTS, "start"} <= set(rows)
    assert all(float(rows[name][0].replace(",", "")) > 0 for name in [*TRAINING, *PARTS])
    ratios = [float(rows[name][1].removesuffix("x")) for name in TRAINING]
    assert all(ratio > 0 for ratio in ratios)
    assert ratios[0] == 1
    assert len(re.findall(r"^goal: .+: [\d.]+, (?:met|MISSED)$", done.stdout, re.MULTILINE)) == 3
    assert str(tmp_path) not in done.stdout
    assert socket.gethostname() not in done.stdout
    assert list(tmp_path.iterdir()) == []
