"""Which trial comes next: computed from the trials that there are, stored nowhere.

A study of N trials has N slots, 0 … N-1. A slot's hyperparameters and seeds follow from the study's
seed and its number; it may take several trials until it is done, where one fails or is lost. So the
budget is exact whoever works on it and whatever is interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
"""A slot whose worker died this often is given up: it is what kills it."""

Why = Literal["failed", "invalid", "died", "lost", "interrupted", "given up"]
"""Why a trial FAILed. An invalid value (NaN) would be so again. `died` is said by a search that saw
the trial's own worker die, and lived; a search or a machine that is gone, a silence, being
interrupted, or given up, is not the slot's fault."""


@dataclass
class _Slot:
    running: int | None = None
    done: bool = False
    failures: int = 0
    deaths: int = 0
    last: FrozenTrial | None = None
    reported: dict[int, float] = field(default_factory=dict)


@dataclass
class Plan:
    """The slots of a study, and how they stand. Feed it all trials; it looks at each end once."""

    retries: int
    """How often a slot is tried again after a failure."""
    points: dict[tuple[Any, ...], int] | None = None
    """The slot of each point, where the study is a grid."""
    slots: dict[int, _Slot] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    def observe(self, trials: Iterable[FrozenTrial]) -> None:
        """Take note of all `trials` of the study."""
        for slot in self.slots.values():
            slot.running = None
        for trial in trials:
            if trial.number in self._seen or (number := self._slot_of(trial)) is None:
                continue
            slot = self.slots.setdefault(number, _Slot())
            if not trial.state.is_finished():
                slot.running = trial.number
                continue
            self._seen.add(trial.number)
            slot.last = trial
            slot.reported |= trial.intermediate_values
            why = trial.user_attrs.get(ENDED, {}).get("why")
            slot.done |= trial.state != TrialState.FAIL or why == "invalid"
            slot.failures += trial.state == TrialState.FAIL and why in ("failed", None)
            slot.deaths += why == "died"

    def _slot_of(self, trial: FrozenTrial) -> int | None:
        if (slot := trial.user_attrs.get(SLOT)) is not None:
            return int(slot)
        if self.points is not None and trial.state == TrialState.COMPLETE:  # from elsewhere
            return self.points.get(identity(trial.params))
        return None

    def resolved(self, number: int) -> bool:
        """Whether a slot needs no more trials: it is done, or failed for the last time."""
        slot = self.slots.get(number)
        if slot is None:
            return False
        return slot.done or slot.failures > self.retries or slot.deaths >= MOST_DEATHS

    def free(self, total: int) -> int | None:
        """The first of `total` slots that nobody works on and that needs a trial."""
        for number in range(total):
            slot = self.slots.get(number)
            if slot is None or (slot.running is None and not self.resolved(number)):
                return number
        return None

    def finished(self, total: int) -> int:
        """How many of `total` slots need no more trials."""
        return sum(map(self.resolved, range(total)))

    def deaths(self, number: int) -> int:
        """How often a slot's worker died."""
        return self.slots[number].deaths if number in self.slots else 0

    def last(self, number: int) -> FrozenTrial | None:
        """The last trial of a slot that ended, None where there was none."""
        slot = self.slots.get(number)
        return None if slot is None else slot.last

    def reported(self, number: int) -> Mapping[int, float]:
        """What the trials of a slot that ended have reported, by step."""
        return self.slots[number].reported if number in self.slots else {}
