"""Trials in the process of the search, one after the other."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from tracker.delivery.base import open_delivery
from tracker.search.channel import Channel
from tracker.search.executors.base import TrialSpec
from tracker.search.interrupts import Interrupts
from tracker.search.session import Search
from tracker.search.trial import Trial, run_trial

_WAIT_SECONDS = 0.5


class InProcessExecutor:
    """Runs trials in the calling thread."""

    def __init__(self, spec: TrialSpec) -> None:
        self._spec = spec
        self._delivery = open_delivery(spec.directory, spec.tracking_uri, spec.mode)

    def run(self, search: Search, interrupts: Interrupts) -> None:
        """Run trials until the study is done, or interrupted."""

        def objective(trial: Trial) -> Any:
            with interrupts.raising():
                return self._spec.objective(trial)

        spec = replace(self._spec, objective=objective)
        channel = _DirectChannel(search, interrupts)
        while not interrupts.count and (task := search.claim()) != "done":
            if task == "wait":
                time.sleep(_WAIT_SECONDS)
            elif (error := run_trial(task, spec, channel, self._delivery)) is not None:
                raise error

    def settle(self, timeout: float) -> bool:
        """Wait until the runs are delivered; return whether they all are."""
        settled = self._delivery.flush(timeout)
        if self._spec.mode == "inline":
            self._delivery.close()
        return settled


class _DirectChannel(Channel):
    """Calls the search, shielded from signals: an interrupted read would lose half its answer."""

    def __init__(self, search: Search, interrupts: Interrupts) -> None:
        self._search = search
        self._interrupts = interrupts

    def request(self, verb: str, *arguments: Any) -> Any:
        with self._interrupts.shield():
            return getattr(self._search, verb)(*arguments)
