"""A trial of a study trained once more, with its hyperparameters and seed."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from tracker.capture.provenance import environment_tags
from tracker.delivery.base import Delivery
from tracker.errors import ArgumentError
from tracker.search.plan import SLOT
from tracker.search.record import Record
from tracker.search.sampler import training_seed
from tracker.search.session import Ended, Task, Verdict
from tracker.search.trial import Objective, Tracking, run_trial


class _Known:
    """Answers a trial as it was answered before."""

    def __init__(self, frozen: FrozenTrial) -> None:
        self._params = frozen.params
        self.ended: Ended | None = None

    def suggest(self, number: int, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._params:
            raise ArgumentError(f"{name!r} was not suggested in trial {number}.")
        return self._params[name]

    def report(self, number: int, value: float, step: int) -> None:
        """Nobody compares it."""

    def prune(self, number: int) -> str | None:
        return None

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """It is there."""

    def constrain(self, number: int, name: str, value: float) -> None:
        """It is there."""

    def finish(self, number: int, ended: Ended) -> Verdict:
        self.ended = ended
        return Verdict(accepted=True, best=True)


def replay(
    record: Record,
    frozen: FrozenTrial,
    objective: Objective,
    delivery: Delivery,
    tracking: Tracking,
) -> Ended:
    """Train a trial again, as a run of its own; returns how it ended."""
    slot = frozen.user_attrs.get(SLOT)
    if slot is None:
        raise ArgumentError(f"trial {frozen.number} was not run by this study.")
    key = f"replay-{uuid.uuid4().hex}"
    task = Task(
        number=frozen.number,
        slot=slot,
        seed=training_seed(record.seed, slot),
        key=key,
        params=frozen.params,
    )
    known = _Known(frozen)
    # A key of its own: no checkpoint of the study's is used, and its run is no child of it.
    own = replace(tracking, key=key, models="all", is_replay=True)
    run_trial(task, objective, known, delivery, own, environment_tags())
    assert known.ended is not None
    return known.ended
