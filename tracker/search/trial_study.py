"""A study as its objective sees it, also from a worker, which does not reach the storage."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tracker.search.best import best_trials
from tracker.search.channel import Channel
from tracker.search.stored_study import StoredStudy


class TrialStudy:
    """`trial.study`: the part of `optuna.Study` that an objective may use."""

    def __init__(self, record: StoredStudy, number: int, channel: Channel) -> None:
        self.study_name = record.name
        self._record = record
        self._number = number
        self._channel = channel

    @property
    def directions(self) -> list[StudyDirection]:
        """The direction of each objective."""
        return [StudyDirection[direction.upper()] for direction in self._record.directions]

    @property
    def direction(self) -> StudyDirection:
        """The direction of the only objective.

        Raises:
            RuntimeError: There are several, as in Optuna.
        """
        if self._record.is_multi_objective:
            raise RuntimeError("The study has several objectives; use study.directions.")
        return self.directions[0]

    @property
    def metric_names(self) -> list[str]:
        """The name of each objective."""
        return list(self._record.metrics)

    def _is_multi_objective(self) -> bool:  # asked for by Optuna's integrations
        return self._record.is_multi_objective

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials of the study, as they are now."""
        return self.get_trials()

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials of the study in these states; None for all."""
        trials = self._channel.trials(self._number)
        chosen = [trial for trial in trials if states is None or trial.state in states]
        return copy.deepcopy(chosen) if deepcopy else chosen

    @property
    def best_trials(self) -> list[FrozenTrial]:
        """The Pareto front so far; with one objective the best trial, if one is complete."""
        return best_trials(self.trials, self._record.directions)

    @property
    def best_trial(self) -> FrozenTrial:
        """The best trial so far.

        Raises:
            ValueError: No trial is complete, as in Optuna.
        """
        if not (best := self.best_trials):
            raise ValueError("No trials are completed yet.")
        return best[0]

    @property
    def best_value(self) -> float:
        """The value of the best trial so far."""
        value: float = self.best_trial.values[0]
        return value

    @property
    def best_params(self) -> dict[str, Any]:
        """The hyperparameters of the best trial so far."""
        return self.best_trial.params

    def stop(self) -> None:
        """Start no more trials; those that run end as usual."""
        self._channel.stop(self._number)
