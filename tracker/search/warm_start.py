"""Trials that a study starts with: from another study, or from runs of an MLflow experiment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.errors import ArgumentError, StoreError
from tracker.redaction import public_uri
from tracker.search.config import StudyConfig
from tracker.search.plan import SOURCE, STARTED, times
from tracker.search.space import contains, distributions, grid, identity
from tracker.search.storage import Storage, parse
from tracker.search.stored_study import StoredStudy
from tracker.store.uri import check_exists, resolve


class Source(Protocol):
    """Where earlier trials come from."""

    def trials(self, config: StudyConfig) -> list[FrozenTrial]:
        """Return the trials that fit a study.

        Raises:
            StoreError: The source cannot be read.
            ArgumentError: No trial fits.
        """


@dataclass(frozen=True)
class FromStudy:
    """Another study of Optuna, created by this library or not."""

    name: str
    storage: str | None

    def trials(self, config: StudyConfig) -> list[FrozenTrial]:
        """Return its complete trials whose hyperparameters lie in the space.

        Raises:
            StoreError: The study does not exist, or its storage does not answer.
            ArgumentError: It is the study itself, has other directions, or no trial fits.
        """
        if self.name == config.name and _location(self.storage) == _location(config.storage):
            raise ArgumentError(f"study={self.name!r} cannot start with its own trials.")
        with closing(Storage(self.storage, make=False)) as storage:
            complete = storage.patiently(partial(self._complete, storage, config), patience=0.0)
        filter_ = _Filter(config)
        fitting = []
        for trial in complete:
            # Without a declared space, every trial fits.
            wanted = filter_.distributions if config.spaces else trial.distributions
            params = {name: trial.params[name] for name in wanted if name in trial.params}
            if filter_.accepts(params):
                source = f"study {self.name} trial {trial.number}"
                new = _new_trial(params, wanted, trial.values, source)
                new.datetime_start = trial.datetime_start or new.datetime_start
                new.datetime_complete = trial.datetime_complete or new.datetime_complete
                new.set_user_attr(STARTED, times(trial)[0])
                fitting.append(new)
        return _not_empty(fitting, f"study={self.name!r}")

    def _complete(self, storage: Storage, config: StudyConfig) -> list[FrozenTrial]:
        """Return its complete trials."""
        try:
            study_id = storage.optuna.get_study_id_from_name(self.name)
        except KeyError:
            where = public_uri(storage.url)
            raise StoreError(f"study={self.name!r} is not in storage={where!r}.") from None
        directions = [d.name.lower() for d in storage.optuna.get_study_directions(study_id)]
        if tuple(directions) != config.directions:
            raise ArgumentError(
                f"study={self.name!r} has direction={directions}, not {list(config.directions)}."
            )
        return storage.optuna.get_all_trials(study_id, states=(TrialState.COMPLETE,))


@dataclass(frozen=True)
class FromRuns:
    """The FINISHED runs of an MLflow experiment."""

    experiment: str
    metric: str
    tracking_uri: str | None

    def trials(self, config: StudyConfig) -> list[FrozenTrial]:
        """Return the runs that have the metric, and params in the space.

        Raises:
            StoreError: The store or the experiment does not exist.
            ArgumentError: The study has several objectives, or no run fits.
        """
        from tracker.store.client import MlflowStore  # importing mlflow takes seconds
        from tracker.store.runs import finished_runs

        if config.is_multi_objective:
            raise ArgumentError("warm_start_from_runs supports one objective only.")
        check_exists(resolve(self.tracking_uri), f"the experiment {self.experiment!r}")
        filter_ = _Filter(config)
        fitting = []
        for run in finished_runs(MlflowStore(self.tracking_uri), self.experiment):
            is_copy = {"tracker.source", "tracker.replays"} & run.tags.keys()
            if is_copy or run.tags.get("tracker.study") == config.name:
                continue
            params = {
                name: value
                for name, distribution in filter_.distributions.items()
                for value in _parsed(distribution, run.params.get(name))
            }
            has_value = not math.isnan(run.metrics.get(self.metric, math.nan))
            if has_value and filter_.accepts(params):
                values, source = [run.metrics[self.metric]], f"run {run.run_id}"
                fitting.append(_new_trial(params, filter_.distributions, values, source))
        return _not_empty(fitting, f"experiment={self.experiment!r}")


def add(storage: Storage, record: StoredStudy, trials: Iterable[FrozenTrial]) -> None:
    """Add trials to a study, except for those that were added before.

    Args:
        storage: The storage of the study.
        record: The study.
        trials: The result of `Source.trials`.
    """
    with storage.study_lock(record.key):
        present = {
            trial.user_attrs.get(SOURCE)
            for trial in storage.optuna.get_all_trials(record.study_id, deepcopy=False)
        }
        for trial in trials:
            if trial.user_attrs[SOURCE] not in present:
                storage.optuna.create_new_trial(record.study_id, trial)


@dataclass
class _Filter:
    """Accepts hyperparameters that lie in a study's space."""

    config: StudyConfig
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_grid = self.config.sampler == "grid"
        points = grid(self.config.spaces) if is_grid else []
        self._points = set(map(identity, points)) if is_grid else None
        if self.config.spaces:
            self.distributions = distributions(self.config.spaces[-1], grid=is_grid)

    def accepts(self, params: Mapping[str, Any]) -> bool:
        is_in_space = all(
            name in params and contains(distribution, params[name])
            for name, distribution in self.distributions.items()
        )
        return is_in_space and (self._points is None or identity(params) in self._points)


def _new_trial(
    params: Mapping[str, Any],
    wanted: Mapping[str, BaseDistribution],
    values: Sequence[float],
    source: str,
) -> FrozenTrial:
    return create_trial(
        state=TrialState.COMPLETE,
        params=dict(params),
        distributions=dict(wanted),
        values=list(values),
        user_attrs={SOURCE: source},
    )


def _location(url: str | None) -> object:
    url, _, file = parse(url)
    return file or public_uri(url)


def _parsed(distribution: BaseDistribution, text: str | None) -> list[Any]:
    """The value that MLflow shows as `text`, in a list; empty if it is not in `distribution`."""
    if text is None:
        return []
    if isinstance(distribution, CategoricalDistribution):
        return [choice for choice in distribution.choices if _is_shown_as(choice, text)][:1]
    try:
        number = float(text)
    except ValueError:
        return []
    value = int(number) if isinstance(distribution, IntDistribution) else number
    return [value] if value == number and contains(distribution, value) else []


def _is_shown_as(choice: Any, text: str) -> bool:
    if isinstance(choice, (bool, type(None), str)):
        return str(choice).lower() == text.lower()
    try:
        return float(text) == float(choice)
    except ValueError:
        return False


def _not_empty(trials: list[FrozenTrial], source: str) -> list[FrozenTrial]:
    if not trials:
        raise ArgumentError(f"{source} has no complete trial with these hyperparameters.")
    return trials
