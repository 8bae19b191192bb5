"""Trials that the user enqueues: kept by the `Study`, stored once when it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.errors import ArgumentError
from tracker.search.config import StudyConfig
from tracker.search.plan import ENQUEUED, FIXED
from tracker.search.space import contains, distributions
from tracker.search.storage import Storage
from tracker.search.stored_study import StoredStudy
from tracker.validation import checked_mapping, checked_params


class Queue:
    """Enqueued trials, in order.

    A program that was stopped and is started again enqueues its trials again. Each is therefore
    known by its values, and by how often they were enqueued before.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[FrozenTrial, bool]] = []

    def add(
        self,
        config: StudyConfig,
        params: Mapping[str, Any],
        user_attrs: Mapping[str, Any] | None,
        skip_if_exists: bool,
    ) -> None:
        """Enqueue a trial; see `Study.enqueue_trial`."""
        if config.sampler == "grid":
            raise ArgumentError(
                "enqueue_trial is not allowed with sampler='grid', which runs all of its points; "
                "add the values to its space, or choose another sampler."
            )
        params = {
            name: value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's
            for name, value in checked_mapping(params, "params").items()
        }
        checked_params(params)
        space = distributions(config.spaces[-1], grid=False) if config.spaces else {}
        for name, value in params.items():
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise ArgumentError(
                    f"params[{name!r}]={value!r} is not allowed; allowed are numbers, strings, "
                    "True, False and None."
                )
            if name in space and not contains(space[name], value):
                raise ArgumentError(f"params[{name!r}]={value!r} is not in {space[name]}.")
        try:
            json.dumps(user_attrs)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"user_attrs={user_attrs!r} is not JSON: {error}.") from None
        values = json.dumps(params, sort_keys=True)
        before = sum(trial.system_attrs[FIXED] == params for trial, _ in self._entries)
        if before and skip_if_exists:
            return
        trial = create_trial(
            state=TrialState.WAITING,
            user_attrs={**(user_attrs or {}), ENQUEUED: f"{values} #{before}"},
            system_attrs={FIXED: params},
        )
        self._entries.append((trial, skip_if_exists))

    def missing_from(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Return the enqueued trials that are not among those of the study."""
        present = {trial.user_attrs.get(ENQUEUED) for trial in trials}
        known = [trial.system_attrs.get(FIXED, trial.params) for trial in trials]
        return [
            trial
            for trial, skip_if_exists in self._entries
            if trial.user_attrs[ENQUEUED] not in present
            and not (skip_if_exists and trial.system_attrs[FIXED] in known)
        ]

    def store(self, storage: Storage, record: StoredStudy) -> None:
        """Add the missing trials to the study."""
        with storage.study_lock(record.key):
            trials = storage.optuna.get_all_trials(record.study_id, deepcopy=False)
            for trial in self.missing_from(trials):
                storage.optuna.create_new_trial(record.study_id, trial)
