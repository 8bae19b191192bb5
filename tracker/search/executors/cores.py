"""How many cores this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def usable_cores(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> int:
    """Return the number of cores by affinity, and by the quotas of control groups, at least 1.

    Args:
        groups: Names the control groups of this process, of version 1 or 2.
        mount: Where the control groups are mounted; in a container, its own group.
    """
    cores = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, int(min([cores, *_quotas(groups, mount)])))


def _quotas(groups: Path, mount: Path) -> Iterator[float]:
    for folder in {mount, *_folders(groups, mount)}:
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with suppress(OSError, ValueError, ZeroDivisionError):  # "max": no quota
                words = " ".join((folder / name).read_text() for name in files).split()
                quota, period = map(int, words)
                if quota > 0:  # -1: no quota
                    yield quota / period


def _folders(groups: Path, mount: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups and of those that they are in."""
    with suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "cpu") or "cpu" in controllers.split(","):
                top = mount / controllers
                group = top / path.strip("/")
                yield from (group, *(above for above in group.parents if top in above.parents))
                yield top
