"""Trials that a study begins with: those of another study, or runs of an MLflow experiment."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tracker.errors import ArgumentError, StoreError
from tracker.redaction import public_uri
from tracker.search.plan import SOURCE
from tracker.search.record import Record
from tracker.search.space import contains, distributions, grid, identity
from tracker.search.storage import Storage, parse
from tracker.store.uri import check_exists, resolve

Points = Set[tuple[Any, ...]] | None
"""The points of a grid."""


class Source(Protocol):
    """Where earlier trials come from."""

    def trials(self, record: Record) -> list[FrozenTrial]:
        """Those that fit `record`; StoreError or ArgumentError where there are none."""


@dataclass(frozen=True)
class FromStudy:
    """Another study of Optuna's, ours or not."""

    name: str
    storage: str | None

    def trials(self, record: Record) -> list[FrozenTrial]:
        """Its complete trials that have the hyperparameters of the space, within their ranges."""
        if self.name == record.name and _place(self.storage) == _place(record.storage):
            raise ArgumentError(f"study={self.name!r} cannot begin with its own trials.")
        storage = Storage(self.storage, make=False)
        try:
            try:
                study_id = storage.optuna.get_study_id_from_name(self.name)
            except KeyError:
                raise StoreError(
                    f"study={self.name!r} is not in storage={public_uri(storage.url)!r}."
                ) from None
            directions = [d.name.lower() for d in storage.optuna.get_study_directions(study_id)]
            if tuple(directions) != record.directions:
                raise ArgumentError(
                    f"study={self.name!r} has direction={directions}, not "
                    f"{list(record.directions)}."
                )
            found = storage.optuna.get_all_trials(study_id, states=(TrialState.COMPLETE,))
            label, points = f"study {self.name} trial", _points(record)
            fitting = [
                fits
                for trial in found
                if (fits := _fitting(record, points, trial, f"{label} {trial.number}")) is not None
            ]
        finally:
            storage.close()
        return _some(fitting, f"study={self.name!r}")


@dataclass(frozen=True)
class FromRuns:
    """The FINISHED runs of an experiment in MLflow."""

    experiment: str
    metric: str
    tracking_uri: str | None

    def trials(self, record: Record) -> list[FrozenTrial]:
        """Those with a value of the metric and params within the space."""
        from tracker.store.client import MlflowStore  # importing mlflow takes seconds
        from tracker.store.runs import finished_runs

        if len(record.directions) > 1:
            raise ArgumentError("warm_start_from_runs takes one objective.")
        check_exists(resolve(self.tracking_uri), f"the experiment {self.experiment!r}")
        runs = finished_runs(MlflowStore(self.tracking_uri), self.experiment)
        wanted = distributions(record.spaces[-1], grid=record.sampler == "grid")
        points = _points(record)
        fitting = []
        for run in runs:
            ours = {"tracker.source", "tracker.replays"} & run.tags.keys()
            if ours or run.tags.get("tracker.study") == record.name:
                continue  # what comes from here, or was brought here
            if math.isnan(run.metrics.get(self.metric, math.nan)):
                continue
            params = {}
            for name, distribution in wanted.items():
                if name in run.params and (read := _read(distribution, run.params[name])):
                    params[name] = read[0]
            if params.keys() == wanted.keys() and _is_point(points, params):
                source = f"run {run.run_id}"
                value = [run.metrics[self.metric]]
                fitting.append(_trial(params, wanted, value, source, None, None))
        return _some(fitting, f"experiment={self.experiment!r}")


def add(storage: Storage, record: Record, trials: Iterable[FrozenTrial]) -> None:
    """Add `trials` to a study, each once."""
    with storage.lock():
        had = {
            trial.user_attrs.get(SOURCE)
            for trial in storage.optuna.get_all_trials(record.study_id, deepcopy=False)
        }
        for trial in trials:
            if trial.user_attrs[SOURCE] not in had:
                storage.optuna.create_new_trial(record.study_id, trial)


def _fitting(record: Record, points: Points, trial: FrozenTrial, source: str) -> FrozenTrial | None:
    if not record.spaces:
        params, wanted = trial.params, trial.distributions
    else:
        wanted = distributions(record.spaces[-1], grid=record.sampler == "grid")
        params = {name: trial.params[name] for name in wanted if name in trial.params}
        if params.keys() != wanted.keys() or not all(
            contains(distribution, params[name]) for name, distribution in wanted.items()
        ):
            return None
        if not _is_point(points, params):
            return None
    times = trial.datetime_start, trial.datetime_complete
    return _trial(params, wanted, trial.values, source, *times)


def _trial(
    params: Mapping[str, Any],
    wanted: Mapping[str, BaseDistribution],
    values: Sequence[float],
    source: str,
    begin: datetime | None,
    end: datetime | None,
) -> FrozenTrial:
    trial = create_trial(
        state=TrialState.COMPLETE,
        params=dict(params),
        distributions=dict(wanted),
        values=list(values),
        user_attrs={SOURCE: source},
    )
    trial.datetime_start, trial.datetime_complete = (
        begin or trial.datetime_start,
        end or trial.datetime_complete,
    )
    return trial


def _place(url: str | None) -> Path | str:
    known, _, file = parse(url)
    return file or public_uri(known)


def _points(record: Record) -> Points:
    return {identity(point) for point in grid(record.spaces)} if record.sampler == "grid" else None


def _is_point(points: Points, params: Mapping[str, Any]) -> bool:
    return points is None or identity(params) in points


def _read(distribution: BaseDistribution, text: str) -> list[Any]:
    """The value that MLflow holds as `text`, in a list; empty if it is not in `distribution`."""
    if isinstance(distribution, CategoricalDistribution):
        return [choice for choice in distribution.choices if _same(choice, text)][:1]
    try:
        number = float(text)
    except ValueError:
        return []
    value = int(number) if isinstance(distribution, IntDistribution) else number
    return [value] if value == number and contains(distribution, value) else []


def _same(choice: Any, text: str) -> bool:
    if isinstance(choice, (bool, type(None), str)):
        return str(choice).lower() == text.lower()
    try:
        return float(text) == float(choice)
    except ValueError:
        return False


def _some(trials: list[FrozenTrial], where: str) -> list[FrozenTrial]:
    if not trials:
        raise ArgumentError(f"{where} has no complete trial with these hyperparameters.")
    return trials
