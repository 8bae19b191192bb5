"""Samplers and pruners by name or as objects, and the seeds of a slot.

Each trial gets a fresh sampler, seeded by the study's seed and the trial's slot. Suggestions follow
from these two and, for samplers that learn, from earlier trials. They do not depend on which
process asks, or on interruptions. A user's own sampler is one object for all trials.
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
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from tracker.errors import ArgumentError
from tracker.search.objects import (
    PrunerLike,
    SamplerLike,
    describe,
    generators,
    own_pruner,
    own_sampler,
    takes_seed,
)

SAMPLERS = ("grid", "tpe", "random", "gp", "cmaes", "qmc")
PRUNERS = ("none", "median", "hyperband")

_DIMENSIONS = 64
_CHUNK = 256  # points of the quasi-random sequence that are computed at once


def sampler(
    given: SamplerLike,
    seed: int,
    slot: int,
    *,
    several: bool = False,
    known: Mapping[str, Any] | None = None,
) -> BaseSampler:
    """Return the sampler for one slot of a study.

    Args:
        given: One of `SAMPLERS`, an object, or a factory. A grid's points are given to the trial,
            so its sampler only handles what else the objective suggests.
        seed: The study's seed.
        slot: The slot's number.
        several: Whether the study has several objectives.
        known: Values suggested to earlier trials of the slot, which are suggested again.

    Raises:
        ArgumentError: It is none of these, or supports one objective only.
    """
    own_seed = suggestion_seed(seed, slot)
    factories: dict[str, Callable[[], BaseSampler]] = {
        "grid": lambda: optuna.samplers.RandomSampler(seed=own_seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=own_seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=own_seed),
        "gp": lambda: optuna.samplers.GPSampler(seed=own_seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(
            seed=own_seed, warn_independent_sampling=False
        ),
        "qmc": lambda: QuasiRandomSampler(seed, slot),
    }
    if isinstance(given, str) and given not in factories:
        raise ArgumentError(f"sampler={given!r} is unknown; allowed: {', '.join(SAMPLERS)}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fresh = factories[given]() if isinstance(given, str) else own_sampler(given, own_seed)
    is_cmaes = isinstance(fresh, optuna.samplers.CmaEsSampler)
    if is_cmaes and several:
        raise ArgumentError(
            "sampler='cmaes' supports one objective only; all other samplers support several."
        )
    return _RepeatingSampler(fresh, slot, known or {}) if known or is_cmaes else fresh


def pruner(given: PrunerLike, steps: int | None) -> BasePruner:
    """Return a pruner for one trial.

    Args:
        given: One of `PRUNERS`, an object, or a factory.
        steps: The last step of a trial that is not pruned; None if unknown. Objects and factories
            have settings of their own.

    Raises:
        ArgumentError: It is none of these.
    """
    if not isinstance(given, str):
        return own_pruner(given)
    if given == "none":
        return optuna.pruners.NopPruner()
    if given == "median":
        return optuna.pruners.MedianPruner()
    if given == "hyperband":
        return optuna.pruners.HyperbandPruner(max_resource="auto" if steps is None else steps)
    raise ArgumentError(f"pruner={given!r} is unknown; allowed: {', '.join(PRUNERS)}.")


def sampler_text(given: SamplerLike) -> str:
    """Return what is stored of a sampler: its name, or its class and settings."""
    return given if isinstance(given, str) else describe(own_sampler(given, 0))


def pruner_text(given: PrunerLike) -> str:
    """Return what is stored of a pruner: its name, or its class and settings."""
    return given if isinstance(given, str) else describe(own_pruner(given))


def has_seed(given: SamplerLike) -> bool:
    """Whether a sampler's suggestions can be seeded by slot."""
    if isinstance(given, str) or takes_seed(given):
        return True
    return any(True for _ in generators(own_sampler(given, 0)))


def suggest(trial: optuna.Trial, name: str, distribution: BaseDistribution) -> Any:
    """Return the value that a trial suggests for a hyperparameter."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(name, distribution.choices)
    wanted: Any = distribution
    suggest = (
        trial.suggest_int if isinstance(distribution, IntDistribution) else trial.suggest_float
    )
    return suggest(name, wanted.low, wanted.high, step=wanted.step, log=wanted.log)


def suggestion_seed(seed: int, slot: int) -> int:
    """Return the seed of a slot's sampler, below 2**32."""
    return int(np.random.SeedSequence([seed, slot, 0]).generate_state(1)[0])


def training_seed(seed: int, slot: int) -> int:
    """Return the seed of a slot's training, below 2**32."""
    return int(np.random.SeedSequence([seed, slot, 1]).generate_state(1)[0])


class _RepeatingSampler(BaseSampler):
    """Repeats the values of an earlier attempt, which its checkpoint needs, and samples the rest.

    Known values are sampled too, and discarded: random states, and what CMA-ES stores with the
    trial, then stay the same as without the interruption. CMA-ES adds the trial's number to its
    seed, which an interruption changes; it gets the slot's.
    """

    def __init__(self, sampler: BaseSampler, slot: int, known: Mapping[str, Any]) -> None:
        self._sampler = sampler
        self._slot = slot
        self._known = known

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
        if isinstance(self._sampler, optuna.samplers.CmaEsSampler):
            trial = copy.copy(trial)
            trial.number = self._slot
        sampled = self._sampler.sample_relative(study, trial, search_space)
        return {name: self._known.get(name, value) for name, value in sampled.items()}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        sampled = self._sampler.sample_independent(study, trial, param_name, param_distribution)
        return self._known.get(param_name, sampled)


class QuasiRandomSampler(optuna.samplers.RandomSampler):
    """Slot k is the k-th point of a scrambled Sobol sequence, whatever the order of the trials.

    The i-th hyperparameter that a trial suggests takes the i-th coordinate, so define-by-run spaces
    work too. Optuna's own sampler counts its points in the storage, where two workers can get the
    same one, and draws the first trials at random. Source: A. Owen, "Scrambling Sobol' and
    Niederreiter-Xing points", 1998, as implemented by scipy.stats.qmc.
    """

    def __init__(self, seed: int, slot: int) -> None:
        super().__init__(suggestion_seed(seed, slot))
        self._seed = seed
        self._slot = slot

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the value at this slot's point of the sequence.

        Raises:
            ArgumentError: The trial has more hyperparameters than the sequence has dimensions.
        """
        dimension = len(trial.params)
        if dimension >= _DIMENSIONS:
            raise ArgumentError(f"sampler='qmc' supports at most {_DIMENSIONS} hyperparameters.")
        share = _sobol(self._seed, self._slot // _CHUNK)[self._slot % _CHUNK, dimension]
        return value_at(param_distribution, float(share))


def value_at(distribution: Any, share: float) -> Any:
    """Return the value at a share of a distribution's range.

    Args:
        distribution: Optuna's distribution.
        share: 0 <= share < 1; equal steps of it are equally likely values.
    """
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(share * len(distribution.choices))]
    low, high, step = distribution.low, distribution.high, distribution.step
    is_int = isinstance(distribution, IntDistribution)
    if distribution.log:
        start, end = np.log([low - 0.5, high + 0.5] if is_int else [low, high])
        value = float(np.exp(start + share * (end - start)))
        return min(max(round(value) if is_int else value, low), high)
    if step is not None:
        count = round((high - low) / step) + 1
        exact = Decimal(str(low)) + int(share * count) * Decimal(str(step))  # 0.1 + 2 * 0.1 is 0.3
        return int(exact) if is_int else float(exact)
    return min(max((1.0 - share) * low + share * high, low), high)


@lru_cache(maxsize=4)
def _sobol(seed: int, chunk: int) -> Any:
    from scipy.stats import qmc

    sequence = qmc.Sobol(_DIMENSIONS, scramble=True, rng=np.random.default_rng(seed))
    if chunk:
        sequence.fast_forward(chunk * _CHUNK)
    return sequence.random(_CHUNK)
