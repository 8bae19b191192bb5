"""Which trial comes next, computed from the trials that exist and stored nowhere.

A study of N trials has N slots, 0 … N-1. A slot's hyperparameters and seeds follow from the study's
seed and the slot's number. A slot may need several trials if one fails or is lost. The budget is
therefore exact, whichever processes work on the study and however they are interrupted.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tracker.journal.records import now
from tracker.search.config import StudyConfig
from tracker.search.space import Point, grid, identity

SLOT = "tracker:slot"
SEARCH = "tracker:search"
STARTED = "tracker:started"
ENDED = "tracker:ended"
SOURCE = "tracker:source"
ENQUEUED = "tracker:enqueued"
"""User attributes of a trial: its slot, the search that runs it, when it began (milliseconds since
1970: Optuna stores local times without a zone), how it failed, its origin, what was enqueued."""
FIXED = "fixed_params"
"""Optuna's system attribute of an enqueued trial: its values."""

MOST_DEATHS = 5
"""A slot whose worker dies or hangs this often is abandoned: it probably kills its workers."""

Why = Literal["failed", "invalid", "died", "lost", "interrupted", "given up"]
"""Why a trial failed, as stored.

`invalid` (a NaN) would be repeated by another attempt. `died` is stored by a live search whose
worker died or hung. A lost search, an interruption and an abandoned trial ("given up") are not the
slot's fault.
"""


@dataclass
class Slot:
    """The state of a slot, summed up from its ended trials."""

    done: bool = False
    failures: int = 0
    deaths: int = 0
    last: FrozenTrial | None = None
    """The latest trial that ended."""
    params: dict[str, Any] = field(default_factory=dict)
    """All suggested values, by name."""
    reported: dict[int, float] = field(default_factory=dict)
    """All reported values, by step."""


@dataclass
class Plan:
    """The state of a study's slots."""

    retries: int
    """How often a slot is tried again after a failure."""
    total: int
    """The budget, in slots."""
    points: Sequence[Point] | None = None
    """The points of a grid, one for each slot."""
    slots: dict[int, Slot] = field(default_factory=dict)
    first_open: int = 0
    """The number of the first trial that had not ended when last observed."""
    _slot_of_point: dict[tuple[Any, ...], int] = field(default_factory=dict)
    _counted: set[int] = field(default_factory=set)
    _running: set[int] = field(default_factory=set)
    _unresolved: set[int] = field(default_factory=set)  # slots that have trials
    _resolved: list[int] = field(default_factory=list)  # sorted
    _first_unused: int = 0  # the first slot without trials

    def __post_init__(self) -> None:
        for slot, point in enumerate(self.points or ()):
            self._slot_of_point[identity(point)] = slot

    @classmethod
    def of(cls, config: StudyConfig) -> Plan:
        """Return the plan of a study without trials."""
        points = grid(config.spaces) if config.sampler == "grid" else None
        largest = sys.maxsize if points is None else len(points)
        return cls(config.retries, min(config.trials or largest, largest), points)

    def observe(self, trials: Sequence[FrozenTrial]) -> None:
        """Update the slots from all `trials`, in order; each ended trial counts once."""
        self._running.clear()
        for trial in trials[self.first_open :]:
            if trial.number in self._counted or (number := self._slot_of(trial)) is None:
                continue
            slot = self.slots.setdefault(number, Slot())
            if trial.state.is_finished():
                self._counted.add(trial.number)
                self._count(number, slot, trial)
            else:
                self._running.add(number)
            if not self.resolved(number):
                self._unresolved.add(number)
        while self.first_open < len(trials) and trials[self.first_open].state.is_finished():
            self.first_open += 1

    def _count(self, number: int, slot: Slot, trial: FrozenTrial) -> None:
        was_resolved = self.resolved(number)
        why = trial.user_attrs.get(ENDED, {}).get("why")
        slot.last = trial
        slot.params |= trial.params
        slot.reported |= trial.intermediate_values
        slot.done |= trial.state != TrialState.FAIL or why == "invalid"
        slot.failures += trial.state == TrialState.FAIL and why in ("failed", None)
        slot.deaths += why == "died"
        if self.resolved(number) and not was_resolved:
            insort(self._resolved, number)
            self._unresolved.discard(number)

    def _slot_of(self, trial: FrozenTrial) -> int | None:
        if (slot := trial.user_attrs.get(SLOT)) is not None:
            return int(slot)
        if trial.state == TrialState.COMPLETE:  # from another study
            return self._slot_of_point.get(identity(trial.params))
        return None

    def slot(self, number: int) -> Slot:
        """Return the state of a slot."""
        return self.slots.get(number, Slot())

    def resolved(self, number: int) -> bool:
        """Whether a slot needs no more trials: it is done, or has no attempts left."""
        slot = self.slot(number)
        return slot.done or slot.failures > self.retries or slot.deaths >= MOST_DEATHS

    def next_slot(self) -> int | None:
        """Return the first slot of the budget that needs a trial and has none running."""
        slots = [slot for slot in (self.next_retry(0), self.next_unused()) if slot is not None]
        return min((slot for slot in slots if slot < self.total), default=None)

    def next_unused(self) -> int | None:
        """Return the first slot of the budget that never had a trial."""
        while self._first_unused in self.slots:
            self._first_unused += 1
        return self._first_unused if self._first_unused < self.total else None

    def next_retry(self, first: int) -> int | None:
        """Return the first slot, from `first`, that needs another trial and has none running."""
        idle = self._unresolved - self._running
        return min((number for number in idle if number >= first), default=None)

    def finished(self) -> int:
        """Return how many slots of the budget need no more trials."""
        return bisect_left(self._resolved, self.total)

    @property
    def is_finished(self) -> bool:
        """Whether the budget is used up."""
        return self.finished() == self.total


def times(trial: FrozenTrial) -> tuple[int, int]:
    """Return when a trial began and ended, in milliseconds since 1970; now where it has not.

    Optuna's times are local ones of the machine that ran the trial, so only their difference is
    used if this library ran it.
    """
    begun, ended = trial.datetime_start, trial.datetime_complete
    if begun is None:
        return now(), now()
    start = int(trial.user_attrs.get(STARTED, begun.timestamp() * 1000))
    return start, now() if ended is None else start + int((ended - begun).total_seconds() * 1000)
