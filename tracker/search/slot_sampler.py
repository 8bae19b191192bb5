"""SlotSampler: seeds by slot, and an exact budget, for a study that `optimize` runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tracker.errors import ArgumentError
from tracker.search.objects import SamplerLike
from tracker.search.sampler import sampler as sampler_of


class SlotSampler(BaseSampler):
    """Seeds another sampler by each trial's number, and ends the study with its budget.

    Optuna's storages never give two trials a number, so that it is a place in the budget which any
    threads and processes share. A failed trial keeps its place, as in Optuna. Suggestions follow
    from the seed, the number and, for samplers that learn, the trials that ended before.
    """

    def __init__(
        self, sampler: SamplerLike = "tpe", *, seed: int = 0, trials: int | None = None
    ) -> None:
        """Wrap a sampler.

        Args:
            sampler: A sampler of Optuna or your own, a function that returns one, or a name but
                "grid", as for `Study`.
            seed: The seed.
            trials: The number of trials of all processes, now and later; None for no limit.

        Raises:
            ArgumentError: An argument is not allowed.
        """
        for name, value, least in (
            ("seed", seed, 0),
            ("trials", 1 if trials is None else trials, 1),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(
                    f"{name}={value!r} is not allowed; it must be at least {least}."
                )
        if sampler == "grid":
            raise ArgumentError("sampler='grid' needs a space, which only tracker.Study has.")
        sampler_of(sampler, seed, 0)
        self._sampler = sampler
        self._seed = seed
        self._trials = trials
        self._samplers: dict[tuple[int, int], BaseSampler] = {}  # of running trials

    def reseed_rng(self) -> None:
        """Do nothing: a trial's seed follows from its number, whichever thread runs it."""

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Seed the sampler of this trial; let no trial follow the last one of the budget."""
        if self._trials is not None and trial.number >= self._trials - 1:
            _stop(study)
        self._of(study, trial).before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the hyperparameters that are sampled together."""
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Sample hyperparameters together.

        Raises:
            TrialPruned: The budget is used up: another process claimed its last place meanwhile.
        """
        if self._trials is not None and trial.number >= self._trials:
            raise optuna.TrialPruned(f"The budget of {self._trials} trials is used up.")
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Sample one hyperparameter."""
        one = self._of(study, trial)
        return one.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """End the study if all places are claimed, by whichever process."""
        one = self._of(study, trial)
        self._samplers.pop((study._study_id, trial.number), None)
        one.after_trial(study, trial, state, values)
        if self._trials is not None and study._storage.get_n_trials(study._study_id) >= (
            self._trials
        ):
            _stop(study)

    def _of(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        key = (study._study_id, trial.number)
        if (one := self._samplers.get(key)) is None:
            several = len(study.directions) > 1
            one = sampler_of(self._sampler, self._seed, trial.number, several=several)
            self._samplers[key] = one
        return one


def _stop(study: optuna.Study) -> None:
    """Let `optimize` start no more trials; `ask` has no loop to end."""
    with suppress(RuntimeError):
        study.stop()
