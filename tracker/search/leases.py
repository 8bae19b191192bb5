"""Which searches are alive: each one stores a heartbeat in the study's attributes.

No clocks are compared. A search counts as lost when its beat has not changed for a grace period on
the observer's own clock: the longer of the two searches' periods. On the same machine it is also
lost as soon as its process has ended.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from optuna.storages import BaseStorage

PREFIX = "tracker:search:"
GRACE_SECONDS = 60.0
BEATS = 6
"""Beats per grace period."""

logger = logging.getLogger(__name__)


def this_process() -> dict[str, Any]:
    """Identify this process among those of all machines."""
    return {"place": _place(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def _place() -> str:
    """The boot of this machine and the container: where a process id is unambiguous."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    parts = [socket.gethostname()]
    if boot.exists():
        parts += [boot.read_text().strip(), os.readlink(namespace)]
    return " ".join(parts)


class Heart:
    """Stores the heartbeat of one search."""

    def __init__(self, storage: BaseStorage, study_id: int, search: str, grace: float) -> None:
        """Prepare a heart; `show` makes it visible.

        Args:
            storage: Where the study is.
            study_id: Its id there.
            search: The id of the search.
            grace: Its grace period, in seconds.
        """
        self._storage = storage
        self._study_id = study_id
        self._name = f"{PREFIX}{search}"
        self._info = {**this_process(), "grace": grace}
        self._pause = grace / BEATS

    def show(self, **state: Any) -> None:
        """Store a beat, or how the search left."""
        info = {**self._info, "time": time.time(), **state}
        self._storage.set_study_user_attr(self._study_id, self._name, info)

    @contextmanager
    def beating(self, failed: Callable[[], None]) -> Iterator[None]:
        """Beat in a thread during a block; call `failed` for each beat that cannot be stored."""
        ended = threading.Event()

        def beat() -> None:
            for number in itertools.count(1):
                if ended.wait(self._pause):
                    return
                try:
                    self.show(beat=number)
                except Exception as error:  # noqa: BLE001 - the trials' requests report it
                    logger.debug("A beat is missing: %s", error)
                    failed()

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Leases:
    """Tells live searches from dead ones."""

    def __init__(self, grace: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Create an observer that has seen no beats.

        Args:
            grace: The observer's own grace period, in seconds.
            clock: A monotonic clock, in seconds.
        """
        self._grace = grace
        self._clock = clock
        self._last_beats: dict[str, tuple[Any, float]] = {}

    def forget(self) -> None:
        """Restart all grace periods, since no search can store a beat during an outage."""
        self._last_beats.clear()

    def lives(self, search: str, attrs: Mapping[str, Any]) -> bool:
        """Return whether a search is alive, and remember its heartbeat.

        Args:
            search: The id of the search.
            attrs: The study's current attributes, which hold the heartbeats.
        """
        info = attrs.get(f"{PREFIX}{search}")
        if info is None or "left" in info:
            return False
        if info["place"] == _place() and not _is_running(info["pid"], info["started"]):
            return False
        now = self._clock()
        beat, since = self._last_beats.get(search, (None, now))
        if beat != info["beat"]:
            self._last_beats[search] = (info["beat"], now)
            return True
        return now - since <= max(self._grace, grace_of(info))


def grace_of(info: Mapping[str, Any]) -> float:
    """Return the grace period that a search has stored, in seconds."""
    return float(info.get("grace", 0.0))


def _is_running(pid: int, started: float) -> bool:
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 1.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def searches(attrs: Mapping[str, Any]) -> list[str]:
    """Return all searches that ever took part in the study, in no particular order."""
    return [name.removeprefix(PREFIX) for name in attrs if name.startswith(PREFIX)]


def active_searches(attrs: Mapping[str, Any]) -> set[str]:
    """Return the searches that have not left."""
    infos = {search: attrs[f"{PREFIX}{search}"] for search in searches(attrs)}
    return {search for search, info in infos.items() if info is not None and "left" not in info}
