"""Trials in the process that runs the search, one after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from optuna.distributions import BaseDistribution

from tracker.delivery.base import Delivery
from tracker.search.interrupts import Interrupts
from tracker.search.leases import BEATS
from tracker.search.session import Ended, Search, Verdict
from tracker.search.trial import Objective, Tracking, Trial, run_trial

_WAIT_SECONDS = 0.5

T = TypeVar("T")


def run_here(
    search: Search,
    objective: Objective,
    delivery: Delivery,
    tracking: Tracking,
    environment: Mapping[str, str],
    interrupts: Interrupts,
) -> None:
    """Run trials in this thread until the study is done, or interrupted."""
    channel = _Shielded(search, interrupts)

    def interruptible(trial: Trial) -> Any:
        with interrupts.raising():
            return objective(trial)

    with _beating(search):
        while not interrupts.count and (task := search.claim()) != "done":
            if task == "wait":
                time.sleep(_WAIT_SECONDS)
            else:
                run_trial(task, interruptible, channel, delivery, tracking, environment)


class _Shielded:
    """The search, whose storage no signal interrupts: half of what it read would be forgotten."""

    def __init__(self, search: Search, interrupts: Interrupts) -> None:
        self._search, self._interrupts = search, interrupts

    def _call(self, verb: Callable[..., T], *arguments: Any) -> T:
        with self._interrupts.shield():
            return verb(*arguments)

    def suggest(self, number: int, name: str, distribution: BaseDistribution) -> Any:
        return self._call(self._search.suggest, number, name, distribution)

    def report(self, number: int, value: float, step: int) -> None:
        self._call(self._search.report, number, value, step)

    def prune(self, number: int) -> str | None:
        return self._call(self._search.prune, number)

    def set_attr(self, number: int, name: str, value: Any) -> None:
        self._call(self._search.set_attr, number, name, value)

    def constrain(self, number: int, name: str, value: float) -> None:
        self._call(self._search.constrain, number, name, value)

    def finish(self, number: int, ended: Ended) -> Verdict:
        return self._call(self._search.finish, number, ended)


@contextmanager
def _beating(search: Search) -> Iterator[None]:
    """Show that the search lives, from a thread: its objective may take hours."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(search.grace / BEATS):
            search.beat(force=True)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
