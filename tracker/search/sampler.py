"""Samplers and pruners by name, and the seeds of a slot.

Each trial gets a sampler of its own, seeded by the study's seed and the trial's slot. So what is
suggested follows from the two, and from the trials before it where the sampler learns from them;
not from who asks, or what was interrupted.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tracker.errors import ArgumentError

SAMPLERS = ("grid", "tpe", "random", "gp", "cmaes", "qmc")
PRUNERS = ("none", "median", "hyperband")

_DIMENSIONS = 64
_CHUNK = 256


def sampler(
    name: str,
    seed: int,
    slot: int,
    *,
    several: bool = False,
    known: Mapping[str, Any] | None = None,
) -> BaseSampler:
    """The sampler `name` for one slot of a study; `several` objectives, or one.

    A grid's points are given to it, so it samples only what the objective suggests besides. `known`
    is what an earlier attempt at the slot had: it has the same again.
    """
    own = suggestion_seed(seed, slot)
    make: dict[str, Callable[[], BaseSampler]] = {
        "grid": lambda: optuna.samplers.RandomSampler(seed=own),
        "random": lambda: optuna.samplers.RandomSampler(seed=own),
        "tpe": lambda: optuna.samplers.TPESampler(seed=own),
        "gp": lambda: optuna.samplers.GPSampler(seed=own),
        "cmaes": lambda: _CmaEs(own, slot),
        "qmc": lambda: QuasiRandomSampler(seed, slot),
    }
    if name not in make:
        raise ArgumentError(f"sampler={name!r} is not known; allowed: {', '.join(SAMPLERS)}.")
    if name == "cmaes" and several:
        raise ArgumentError("sampler='cmaes' takes one objective; tpe and gp take several.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        made = make[name]()
    return _ReplaySampler(made, known) if known else made


def pruner(name: str, steps: int | None) -> BasePruner:
    """The pruner `name`, where a whole trial reports at the `steps` 1, 2, …; None is not known."""
    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "median":
        return optuna.pruners.MedianPruner()
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource="auto" if steps is None else steps)
    raise ArgumentError(f"pruner={name!r} is not known; allowed: {', '.join(PRUNERS)}.")


def suggestion_seed(seed: int, slot: int) -> int:
    """The seed of a slot's sampler, below 2**32."""
    return int(np.random.SeedSequence([seed, slot, 0]).generate_state(1)[0])


def training_seed(seed: int, slot: int) -> int:
    """The seed of a slot's training, below 2**32."""
    return int(np.random.SeedSequence([seed, slot, 1]).generate_state(1)[0])


class _CmaEs(optuna.samplers.CmaEsSampler):
    """Optuna's seeds each trial by its number, which is another one after an interruption."""

    def __init__(self, seed: int, slot: int) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._slot = slot

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The same for every trial of a slot, if those that ended before are the same."""
        trial = copy.copy(trial)
        trial.number = self._slot
        return super().sample_relative(study, trial, search_space)


class _ReplaySampler(BaseSampler):
    """Gives what an earlier attempt had, which its checkpoint belongs to, and samples the rest.

    What is known is drawn all the same: a random state, or what CMA-ES stores with a trial, is
    then as it would have been.
    """

    def __init__(self, sampler: BaseSampler, known: Mapping[str, Any]) -> None:
        self._sampler, self._known = sampler, known

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._sampler.after_trial(study, trial, state, values)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        drawn = self._sampler.sample_relative(study, trial, search_space)
        return {name: self._known.get(name, value) for name, value in drawn.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        drawn = self._sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._known.get(param_name, drawn)


class QuasiRandomSampler(BaseSampler):
    """Slot k is the k-th point of a scrambled Sobol sequence, whoever asks and in what order.

    The i-th hyperparameter that a trial suggests takes the i-th coordinate, so that a space that
    is defined by running works too. Optuna's own counts its points in the storage, where two
    workers take the same one, and draws the first trials at random. Source: A. Owen, "Scrambling
    Sobol' and Niederreiter-Xing points", 1998, as scipy.stats.qmc has it.
    """

    def __init__(self, seed: int, slot: int) -> None:
        self._seed, self._slot = seed, slot

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Nothing is sampled together."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Nothing is sampled together."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """The value at this trial's point of the sequence."""
        dimension = len(trial.params)
        if dimension >= _DIMENSIONS:
            raise ArgumentError(f"sampler='qmc' takes at most {_DIMENSIONS} hyperparameters.")
        where = _sobol(self._seed, self._slot // _CHUNK)[self._slot % _CHUNK, dimension]
        return value_at(param_distribution, float(where))


def value_at(distribution: BaseDistribution, where: float) -> Any:
    """The value of `distribution` at a share `where` of it, from 0 up to but without 1."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(where * len(distribution.choices))]
    low, high = float(getattr(distribution, "low")), float(getattr(distribution, "high"))  # noqa: B009
    step = getattr(distribution, "step", None)
    log = bool(getattr(distribution, "log", False))
    whole = isinstance(distribution, optuna.distributions.IntDistribution)
    if log:
        ends = (low - 0.5, high + 0.5) if whole else (low, high)
        value = float(np.exp(np.log(ends[0]) + where * (np.log(ends[1]) - np.log(ends[0]))))
        value = min(max(value, low), high)
        return min(max(round(value), int(low)), int(high)) if whole else value
    if step is not None:
        count = round((high - low) / step) + 1
        exact = Decimal(str(low)) + int(where * count) * Decimal(str(step))  # 0.1 + 2 * 0.1 is 0.3
        return int(exact) if whole else float(exact)
    return min(max((1.0 - where) * low + where * high, low), high)


@lru_cache(maxsize=4)
def _sobol(seed: int, chunk: int) -> Any:
    from scipy.stats import qmc

    sequence = qmc.Sobol(_DIMENSIONS, scramble=True, rng=np.random.default_rng(seed))
    if chunk:
        sequence.fast_forward(chunk * _CHUNK)
    return sequence.random(_CHUNK)


def directions(given: str | Sequence[str]) -> list[str]:
    """`minimize` and `maximize`, one or several; ArgumentError for anything else."""
    several = [given] if isinstance(given, str) else list(given)
    for direction in several:
        if direction not in ("minimize", "maximize"):
            raise ArgumentError(
                f"direction={direction!r} is not allowed; it must be minimize or maximize."
            )
    if not several:
        raise ArgumentError("direction is empty; it must be minimize, maximize or a list of them.")
    return several
