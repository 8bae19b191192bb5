"""Which trial comes next: computed from the trials that there are, stored nowhere.

A study of N trials has N slots, 0 … N-1. A slot's hyperparameters and seeds follow from the study's
seed and its number; it may take several trials until it is done, where one fails or is lost. So the
budget is exact whoever works on it and whatever is interrupted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tracker.search.space import identity

SLOT = "tracker:slot"
SEARCH = "tracker:search"
ENDED = "tracker:ended"
SOURCE = "tracker:source"
"""User attributes of a trial: its slot, which search runs it, how it failed, where it is from."""

MOST_DEATHS = 5
"""A slot whose worker died or fell silent this often is given up: it is what kills it."""

Why = Literal["failed", "invalid", "died", "lost", "interrupted", "given up"]
"""Why a trial FAILed. An invalid value (NaN) would be so again. `died` is said by a search that saw
the trial's own worker die, or say nothing for its grace period, and lived; a search or a machine
that is gone, being interrupted, or given up, is not the slot's fault."""


@dataclass
class Slot:
    """What the trials of a slot that ended came to."""

    done: bool = False
    failures: int = 0
    deaths: int = 0
    last: FrozenTrial | None = None
    params: dict[str, Any] = field(default_factory=dict)
    """What was suggested to any of them, …"""
    reported: dict[int, float] = field(default_factory=dict)
    """… and what they reported, by step."""


@dataclass
class Plan:
    """The slots of a study, and how they stand. Feed it all trials; it looks at each end once."""

    retries: int
    """How often a slot is tried again after a failure."""
    points: dict[tuple[Any, ...], int] | None = None
    """The slot of each point, where the study is a grid."""
    slots: dict[int, Slot] = field(default_factory=dict)
    ended: int = 0
    """All trials before this one have ended, and were seen."""
    _seen: set[int] = field(default_factory=set)
    _running: set[int] = field(default_factory=set)
    _open: set[int] = field(default_factory=set)  # slots that have trials, and are not resolved
    _resolved: list[int] = field(default_factory=list)  # in order
    _new: int = 0  # the first slot that has no trials

    def observe(self, trials: Sequence[FrozenTrial]) -> None:
        """Take note of all `trials` of the study, in order."""
        self._running.clear()
        for trial in trials[self.ended :]:
            if trial.number in self._seen or (number := self._slot_of(trial)) is None:
                continue
            if trial.state.is_finished():
                self._seen.add(trial.number)
                self._note(number, trial)
            else:
                self._running.add(number)
                self.slots.setdefault(number, Slot())
            if not self.resolved(number):
                self._open.add(number)
        while self.ended < len(trials) and trials[self.ended].state.is_finished():
            self.ended += 1

    def _note(self, number: int, trial: FrozenTrial) -> None:
        before = self.resolved(number)
        slot = self.slots.setdefault(number, Slot())
        slot.last = trial
        slot.params |= trial.params
        slot.reported |= trial.intermediate_values
        why = trial.user_attrs.get(ENDED, {}).get("why")
        slot.done |= trial.state != TrialState.FAIL or why == "invalid"
        slot.failures += trial.state == TrialState.FAIL and why in ("failed", None)
        slot.deaths += why == "died"
        if self.resolved(number) and not before:
            insort(self._resolved, number)
            self._open.discard(number)

    def _slot_of(self, trial: FrozenTrial) -> int | None:
        if (slot := trial.user_attrs.get(SLOT)) is not None:
            return int(slot)
        if self.points is not None and trial.state == TrialState.COMPLETE:  # from elsewhere
            return self.points.get(identity(trial.params))
        return None

    def slot(self, number: int) -> Slot:
        """What is known of a slot."""
        return self.slots.get(number, Slot())

    def resolved(self, number: int) -> bool:
        """Whether a slot needs no more trials: it is done, or failed for the last time."""
        slot = self.slots.get(number)
        if slot is None:
            return False
        return slot.done or slot.failures > self.retries or slot.deaths >= MOST_DEATHS

    def free(self, total: int) -> int | None:
        """The first of `total` slots that nobody works on and that needs a trial."""
        while self._new in self.slots:
            self._new += 1
        again = self.again(0)
        number = self._new if again is None else min(again, self._new)
        return number if number < total else None

    def again(self, first: int) -> int | None:
        """The first slot from `first` on that nobody works on any more, and that needs a trial."""
        idle = self._open - self._running
        return min((number for number in idle if number >= first), default=None)

    def finished(self, total: int) -> int:
        """How many of `total` slots need no more trials."""
        return bisect_left(self._resolved, total)
