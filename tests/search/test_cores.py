"""How many cores the workers of a study share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tracker.search.executors.cores import usable_cores


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_the_affinity_of_the_process_counts_and_not_the_machine(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores(tmp_path / "none", tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)
    assert usable_cores(tmp_path / "none", tmp_path) == len(before)


@pytest.mark.usefixtures("eight_cores")
@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "other/cpu.max": "100000 100000"}, 4),
        ("0::/not/mounted\n", {"cpu.max": "500000 100000"}, 5),
        (
            "5:memory:/a\n4:cpu,cpuacct:/a/b\n1:name=systemd:/\n",
            {
                "cpu,cpuacct/a/b/cpu.cfs_quota_us": "-1\n",
                "cpu,cpuacct/a/b/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/a/cpu.cfs_quota_us": "600000\n",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "0"}, 8),
        ("nonsense\n", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_the_quota_of_a_control_group_counts(
    tmp_path: Path, groups: str, files: dict[str, str], cores: int
) -> None:
    mount = tmp_path / "mount"
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    assert usable_cores(tmp_path / "groups", mount) == cores
