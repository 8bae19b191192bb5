"""Which searches live: each shows a beat in the study's attributes, and the others watch it.

Nobody compares clocks: a search is lost when its beat did not change for its own grace period,
which it shows too, or that of who watches, whichever is longer. One of the same machine is lost as
soon as its process is gone.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

PREFIX = "tracker:search:"
GRACE_SECONDS = 60.0
BEATS = 6  # in a grace period


def this_process() -> dict[str, Any]:
    """What tells this process from any other, on this machine and elsewhere."""
    return {"place": _place(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _place() -> str:
    """The machine since it was started, and the container: within one, a pid means something."""
    boot, names = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists():
        parts += [boot.read_text().strip(), os.readlink(names)]
    return " ".join(parts)


class Leases:
    """Tells the searches that live from those that do not."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._grace, self._clock = grace, clock
        self._seen: dict[str, tuple[Any, float]] = {}

    def forget(self) -> None:
        """The storage did not answer: what was not seen meanwhile says nothing."""
        self._seen.clear()

    def lives(self, search: str, attrs: Mapping[str, Any]) -> bool:
        """Whether `search` lives, by the study's `attrs` of now."""
        info = attrs.get(f"{PREFIX}{search}")
        if info is None or "left" in info:
            return False
        if info["place"] == _place() and not _runs(info["pid"], info["started"]):
            return False
        now = self._clock()
        beat, since = self._seen.get(search, (None, now))
        if beat != info["beat"]:
            self._seen[search] = (info["beat"], now)
            return True
        return now - since <= max(self._grace, grace_of(info))


def grace_of(info: Mapping[str, Any]) -> float:
    """The grace period that a search has shown."""
    return float(info.get("grace", 0.0))


def _runs(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        alike = abs(process.create_time() - started) < 1.0
        return bool(alike and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def active_searches(attrs: Mapping[str, Any]) -> set[str]:
    """The searches that have not said that they end."""
    return {
        search
        for search in searches(attrs)
        if (info := attrs[f"{PREFIX}{search}"]) is not None and "left" not in info
    }


def was_here(search: str, attrs: Mapping[str, Any]) -> bool:
    """Whether a search ran on this machine."""
    return (attrs.get(f"{PREFIX}{search}") or {}).get("place") == _place()


def searches(attrs: Mapping[str, Any]) -> list[str]:
    """The searches that ever were, in no order."""
    return [name.removeprefix(PREFIX) for name in attrs if name.startswith(PREFIX)]
