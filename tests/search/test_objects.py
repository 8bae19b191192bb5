"""Samplers and pruners as objects and factories, with their settings."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    PartialFixedSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from tests.helpers import Store
from tracker import ArgumentError, Study, Trial
from tracker.search.sampler import pruner_text, sampler, sampler_text

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def quadratic(trial: Trial) -> float:
    return (trial.suggest_float("x", -1.0, 1.0) - 0.3) ** 2 + trial.suggest_float("y", 0.0, 1.0)


def slow_descent(trial: Trial) -> float:
    x = trial.suggest_float("x", 1.0, 2.0)
    for step in range(6):
        trial.report(x * (trial.number + 1), step)
        if trial.should_prune():
            raise optuna.TrialPruned()
    return x


def suggested(name: str, sampler: Any, trials: int = 12) -> list[dict[str, Any]]:
    study = Study(name, quadratic, sampler=sampler, trials=trials, offline=True).run()
    assert len(study.trials) == trials
    return [trial.params for trial in study.trials]


class Annealing(BaseSampler):
    """As in Optuna's tutorial: it keeps a generator, and what it learned, in memory."""

    def __init__(self, temperature: float = 100.0) -> None:
        self._rng = np.random.RandomState()
        self._temperature = temperature
        self.ended: list[int] = []

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(self, *_: Any) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any
    ) -> float:
        return float(self._rng.uniform(distribution.low, distribution.high))

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        self.ended.append(trial.number)


class Halfway(RandomSampler):
    """A sampler without a generator that can be seeded."""

    def __init__(self) -> None:
        self.__dict__.clear()

    def sample_independent(self, *arguments: Any) -> Any:
        return 0.5


class Later(BasePruner):
    def __init__(self, step: int) -> None:
        self.step = step

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.number > 0 and trial.last_step == self.step


# -- seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("random", RandomSampler),
        ("tpe", lambda: TPESampler(seed=7)),
        ("tpe", lambda: partial(TPESampler, seed=7)),
        ("tpe", lambda: TPESampler),
        ("cmaes", lambda: CmaEsSampler(warn_independent_sampling=False)),
        ("gp", lambda: GPSampler(n_startup_trials=10)),
    ],
)
def test_an_object_suggests_what_its_name_does(
    name: str, made: Callable[[], Any], tracking_uri: str
) -> None:
    assert suggested("object", made()) == suggested("name", name)


@pytest.mark.parametrize(
    "made",
    [
        lambda: TPESampler(multivariate=True, n_startup_trials=3),
        lambda: NSGAIISampler(population_size=4),
        lambda: PartialFixedSampler({"y": 0.5}, TPESampler(n_startup_trials=3)),
        lambda: Annealing(),
        lambda: Annealing,
        lambda: lambda: TPESampler(group=True, n_startup_trials=3),
        lambda: lambda seed: RandomSampler(seed),
    ],
)
def test_objects_and_factories_are_seeded_by_slot(
    made: Callable[[], Any], tracking_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, again = suggested("first", made()), suggested("again", made())
    assert first == again
    assert len({each["x"] for each in first}) > len(first) / 2  # a child may have a parent's
    assert "does not reach" not in caplog.text


def test_a_study_in_parts_equals_one_at_once_with_a_sampler_object(tracking_uri: str) -> None:
    results = []
    for name, parts in (("whole", (14,)), ("parts", (5, 14))):
        for trials in parts:
            study = Study(
                name,
                quadratic,
                sampler=TPESampler(multivariate=True, n_startup_trials=3),
                trials=trials,
                offline=True,
            ).run(resume=True)
        results.append([trial.params for trial in study.trials])
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "generator",
    [np.random.RandomState(), np.random.default_rng(), random.Random()],
    ids=["RandomState", "Generator", "random"],
)
def test_generators_of_numpy_and_python_are_seeded(generator: Any) -> None:
    class Own(RandomSampler):
        def __init__(self) -> None:
            super().__init__()
            self.own = generator

    def drawn(slot: int) -> float:
        given: Any = sampler(Own(), 3, slot)
        return float(given.own.uniform(0.0, 1.0))

    assert drawn(0) == drawn(0) != drawn(1)


def test_a_sampler_that_cannot_be_seeded_is_named_in_one_sentence(
    tracking_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert suggested("study", Halfway(), 2) == [{"x": 0.5, "y": 0.5}] * 2
    (record,) = [each for each in caplog.records if "sampler" in each.getMessage()]
    assert record.getMessage().startswith("seed=0 does not reach sampler=Halfway()")


def test_a_user_s_own_sampler_learns_from_trial_to_trial(tracking_uri: str) -> None:
    annealing = Annealing()
    suggested("study", annealing, 4)
    assert annealing.ended == [0, 1, 2, 3]


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("tpe", "tpe"),
        (TPESampler(), "TPESampler()"),
        (TPESampler(multivariate=True, constant_liar=False, seed=3), None),
        (partial(TPESampler, multivariate=True, constant_liar=False), None),
        (CmaEsSampler(popsize=6), "CmaEsSampler(popsize=6)"),
        (
            lambda: PartialFixedSampler({"x": 1}, TPESampler(n_startup_trials=3)),
            "PartialFixedSampler(base_sampler=TPESampler(n_startup_trials=3))",
        ),
        (Annealing(), "Annealing()"),
        (Annealing(3.0), "Annealing(temperature=3.0)"),
        (Annealing, "Annealing()"),
    ],
)
def test_a_sampler_is_stored_as_its_class_and_settings(given: Any, text: str | None) -> None:
    assert sampler_text(given) == (text or "TPESampler(multivariate=True, constant_liar=False)")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("median", "median"),
        (NopPruner(), "none"),
        (MedianPruner(n_warmup_steps=3), "MedianPruner(n_warmup_steps=3)"),
        (partial(MedianPruner, n_warmup_steps=3), "MedianPruner(n_warmup_steps=3)"),
        (Later(2), "Later(step=2)"),
        (
            lambda: PatientPruner(MedianPruner(n_startup_trials=1), patience=2),
            "PatientPruner(wrapped_pruner=MedianPruner(n_startup_trials=1), patience=2)",
        ),
    ],
)
def test_a_pruner_is_stored_as_its_class_and_settings(given: Any, text: str) -> None:
    assert pruner_text(given) == text


def test_a_study_is_resumed_with_the_settings_of_its_objects(store: Store) -> None:
    def study(**settings: Any) -> Study:
        return Study("study", slow_descent, trials=1, **settings)

    given = {
        "sampler": TPESampler(multivariate=True),
        "pruner": MedianPruner(n_warmup_steps=3),
    }
    study(**given).run()
    (parent,) = [run for run in store.runs() if "sampler" in run.data.params]
    assert parent.data.params["sampler"] == "TPESampler(multivariate=True)"
    assert parent.data.params["pruner"] == "MedianPruner(n_warmup_steps=3)"
    study(**given | {"sampler": partial(TPESampler, multivariate=True)}).run(resume=True)
    for changed, message in (
        ({"sampler": TPESampler()}, r"has sampler='TPESampler\(multivariate=True\)', not"),
        ({"sampler": "tpe"}, "has sampler='TPESampler.*, not 'tpe'"),
        ({"pruner": MedianPruner()}, r"has pruner='MedianPruner\(n_warmup_steps=3\)', not"),
        ({"pruner": "median"}, "not 'median'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            study(**given | changed).run(resume=True)


@pytest.mark.parametrize(
    ("pruner", "expected"),
    [
        (MedianPruner(n_startup_trials=1, n_warmup_steps=3), [5, 3, 3]),
        (lambda: MedianPruner(n_startup_trials=1, n_warmup_steps=3), [5, 3, 3]),
        (lambda: PatientPruner(None, patience=1), [5, 5, 5]),
        (SuccessiveHalvingPruner(min_resource=2, reduction_factor=2), [5, 2, 2]),
        (HyperbandPruner(min_resource=2, max_resource=6, reduction_factor=2), None),
        (Later(2), [5, 2, 2]),
        (NopPruner(), [5, 5, 5]),
    ],
)
def test_pruners_have_their_settings(pruner: Any, expected: list[int] | None, store: Store) -> None:
    study = Study("study", slow_descent, sampler="random", pruner=pruner, trials=3).run()
    last_steps = [trial.last_step for trial in study.trials]
    assert expected is None or last_steps == expected
    (tags,) = [run.data.tags for run in store.runs() if run.data.tags.get("optuna.trial") == "2"]
    if study.trials[2].state == TrialState.PRUNED:
        assert tags["tracker.pruned"].startswith(pruner_text(pruner))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": 3}, "sampler=3 is not allowed; it must be a name, one of optuna.samplers"),
        ({"pruner": 3}, "pruner=3 is not allowed; it must be a name, one of optuna.pruners"),
        ({"sampler": MedianPruner()}, "sampler=.*MedianPruner.* is not allowed"),
        ({"sampler": lambda: 3}, "sampler=.* returned 3; it must be a sampler"),
        ({"pruner": lambda steps: NopPruner()}, "cannot be called: .*'steps'; its only argument"),
        (
            {"sampler": CmaEsSampler(), "direction": ["minimize"] * 2, "metric": ["a", "b"]},
            "supports one objective only",
        ),
        (
            {"pruner": MedianPruner(), "direction": ["minimize"] * 2, "metric": ["a", "b"]},
            r"pruner='MedianPruner\(\)' supports one objective only; it must be none",
        ),
        ({"sampler": TPESampler(), "trials": None}, r"sampler='TPESampler\(\)' has no natural end"),
    ],
)
def test_a_wrong_sampler_or_pruner_is_refused_at_once(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        Study("study", quadratic, **{"trials": 1, **settings})


# -- workers ---------------------------------------------------------------------------------------


class Unpicklable(RandomSampler):
    def __reduce__(self) -> Any:
        raise TypeError("this stays here")

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("this stays here")


def middle(trial: Trial) -> float:
    return float(trial.params["x"])


def test_samplers_and_pruners_stay_in_the_search_s_process(tracking_uri: str) -> None:
    space: Any = {"x": FloatDistribution(0.0, 1.0)}
    pruner = lambda: Later(2)  # noqa: E731 - it cannot be pickled either
    study = Study("study", middle, space=space, sampler=Unpicklable(), pruner=pruner, trials=3).run(
        workers=2
    )
    plain = optuna.create_study()
    for trial in study.trials:
        slot = trial.user_attrs["tracker:slot"]
        plain.sampler = sampler("random", 0, slot)
        assert trial.params == plain.ask(space).params
