"""Ordinary Optuna studies, tracked: `study.optimize(tracked(objective), n_trials=20)`.

Optuna's `optimize` owns the loop, the storage and the sampler. Each trial is a run, below one run
for the study, and goes through the journal as other runs do.
"""

from __future__ import annotations

import logging
import os
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import BaseTrial

from tracker.capture.provenance import environment_tags
from tracker.delivery.base import Delivery, Mode, mode_of, open_delivery
from tracker.errors import TrackerError
from tracker.manager import RunManager
from tracker.run import Run
from tracker.search.best import best_tags, best_trials
from tracker.search.channel import Ended
from tracker.search.objects import describe
from tracker.search.running_trial import pruning_reason
from tracker.search.stored_study import STUDY
from tracker.search.tables import INTERMEDIATE, attribute_tags, objectives, rows
from tracker.search.trial import ObjectiveError, checked_values, trial_ended
from tracker.statuses import Outcome, outcome, uncaught_error
from tracker.store.uri import check_uri, resolve
from tracker.training.distributed import is_main
from tracker.validation import (
    DIRECTORY,
    MAX_EXPERIMENT_NAME,
    MAX_RUN_NAME,
    checked_local_path,
    checked_text,
    fitted,
)
from tracker.views.files import csv_text

Objective = Callable[[Any], Any]
_NAMESPACE = uuid.UUID("6f1c1d9e-6d0e-4c52-9d0c-3c1d6a5b7a10")

logger = logging.getLogger(__name__)


def tracked(
    objective: Objective | None = None,
    *,
    experiment: str | None = None,
    tracking_uri: str | None = None,
    directory: str | Path = DIRECTORY,
    inline: bool | None = None,
    offline: bool | None = None,
) -> Any:
    """Return an objective for `optuna.Study.optimize` that tracks each trial as an MLflow run.

    Args:
        objective: Called with the `optuna.Trial`, which also has `run` and `manager()`. Without it
            the result is a decorator.
        experiment: Name of the experiment; default as in MLflow.
        tracking_uri: Where runs are delivered; default as in MLflow.
        directory: Holds the journal while the study lasts.
        inline: Deliver in the thread of the trial, as for `start_run`.
        offline: Keep the runs on disk until `tracker sync`, as for `start_run`.

    Raises:
        ArgumentError: An argument is not allowed.
        StoreError: The store cannot be used.
    """
    checked_text(experiment or "-", "experiment", MAX_EXPERIMENT_NAME)
    check_uri(resolve(tracking_uri))
    wrap = partial(
        TrackedObjective,
        experiment=experiment,
        tracking_uri=tracking_uri,
        directory=checked_local_path(directory, "directory"),
        mode=mode_of(inline=inline, offline=offline),
    )
    return wrap if objective is None else wrap(objective)


class TrackedTrial(optuna.Trial):
    """The trial that Optuna made, which also has a run."""

    run: Run
    """The trial's run. It begins and ends with the trial."""

    def __init__(self, trial: optuna.Trial, run: Run) -> None:
        self.__dict__ = trial.__dict__  # shared: Optuna continues with its own object
        self.run = run
        self._logged: set[str] = set()
        self._pruned: str | None = None

    def manager(self, **settings: Any) -> RunManager:
        """Create a RunManager that logs to the trial's run; `settings` are its arguments."""
        self.log_params()
        return RunManager(run=self.run, **settings)

    def log_params(self) -> None:
        """Log the values suggested since the last call."""
        new = {name: value for name, value in self.params.items() if name not in self._logged}
        self._logged |= new.keys()
        for name, text in fitted(new).items():
            self._log(partial(self.run.log_params, {name: text}))

    def report(self, value: float, step: int) -> None:
        """Report an intermediate value, which MLflow gets too."""
        super().report(value, step)
        self.log_params()
        self._log(lambda: self.run.log_metrics({INTERMEDIATE: float(value)}, int(step)))

    def should_prune(self) -> bool:
        """Whether to stop the trial, given its reports: `raise optuna.TrialPruned()`."""
        if should := super().should_prune():
            self._pruned = self._reason(f"The {describe(self.study.pruner)} pruner")
        return should

    def _reason(self, who: str) -> str:
        return pruning_reason(self.storage.get_trial(self._trial_id), who)

    def set_user_attr(self, key: str, value: Any) -> None:
        """Store a user attribute, and log it as the tag `user_attrs.KEY`."""
        super().set_user_attr(key, value)
        self._log(lambda: self.run.set_tags(_tags({key: value})))

    def set_constraint(self, key: str, value: float) -> None:
        """Store by how much the trial violates a constraint, and log it as `constraint.KEY`."""
        super().set_constraint(key, value)
        self._log(lambda: self.run.log_metrics({f"constraint.{key}": float(value)}))

    def end(self, ended: Ended) -> None:
        """End the run as Optuna will end the trial."""
        self.log_params()
        tags: dict[str, str] = {"optuna.state": ended.state}
        if ended.state == "COMPLETE":
            values = objectives(_value_names(self.study), ended.values or ())
            self._log(lambda: self.run.log_metrics(values))
        elif ended.state == "PRUNED":
            tags["tracker.pruned"] = self._pruned or self._reason("The objective")
        self.run.set_tags(tags)
        self.run.end(Outcome(ended.status, ended.reason), wait=False)

    def _log(self, do: Callable[[], None]) -> None:
        """Log to the run; what MLflow cannot store is left to Optuna, with a warning."""
        try:
            do()
        except TrackerError as error:
            logger.warning("Trial %d lacks in MLflow: %s", self.number, error)


class StudyRun(Run):
    """The run of a study, for as long as this process works on it."""

    def __init__(
        self, study: optuna.Study, key: str, delivery: Delivery, experiment: str | None
    ) -> None:
        self.environment = environment_tags()
        """The tags of this process's environment."""
        self.delivery = delivery
        """Delivers the runs of the trials too."""
        self.key = key
        """The key of the run, with which those of the trials begin."""
        self.interrupted: KeyboardInterrupt | None = None
        """Ctrl-C during the last trial."""
        self._tracked = study
        super().__init__(
            delivery,
            fitted(
                {
                    "study": study.study_name,
                    "sampler": describe(study.sampler),
                    "pruner": describe(study.pruner),
                    "direction": ",".join(d.name.lower() for d in study.directions),
                }
            ),
            experiment,
            fitted({"": study.study_name})[""][:MAX_RUN_NAME],
            fitted({"tracker.study": study.study_name}),
            key=key,
            environment=self.environment,
            owns_delivery=True,
            rename=True,
        )

    @property
    def is_usable(self) -> bool:
        """Whether trials of this process can begin below it."""
        return self.status is None and os.getpid() == self._pid

    def abandon(self) -> None:
        """End the run, with a table of all trials so far and the best of them.

        Only the end of the program waits for the delivery: `optimize` returns at once.
        """
        if self.is_usable:
            try:
                self._log_trials()
            except Exception as error:  # noqa: BLE001 - of the storage: the trials have their runs
                logger.warning("trials.csv of the study is not logged: %s", error)
        self.end(self.abandoned_outcome("when the program ended"), wait=False)

    def _log_trials(self) -> None:
        study = self._tracked
        trials = study.get_trials(deepcopy=False)
        self.log_text(csv_text(rows(_value_names(study), trials)), "trials.csv")
        directions = [direction.name.lower() for direction in study.directions]
        self.set_tags(best_tags(best_trials(trials, directions)))

    def abandoned_outcome(self, where: str) -> Outcome:
        """Return FINISHED, unless an exception stopped the study: `optimize` says no more."""
        error = uncaught_error()
        return outcome(error if error is not self._error_before else self.interrupted)


class TrackedObjective:
    """An objective whose trials are runs; see `tracked`.

    The run of a study ends when this object is no longer used, which is when `optimize` returns if
    nothing else refers to it, or else when the program ends.
    """

    def __init__(
        self,
        objective: Objective,
        experiment: str | None,
        tracking_uri: str | None,
        directory: Path,
        mode: Mode,
    ) -> None:
        """Wrap an objective; `tracked` describes the arguments."""
        self._objective = objective
        self._experiment = experiment
        self._where = (directory, tracking_uri, mode)
        self._beginning = threading.Lock()
        self._studies: dict[tuple[str, int], StudyRun] = {}
        weakref.finalize(self, _end, self._studies).atexit = False  # the delivery ends them then

    def __reduce__(self) -> Any:
        directory, uri, mode = self._where
        return type(self), (self._objective, self._experiment, uri, directory, mode)

    def __call__(self, trial: BaseTrial) -> Any:
        """Run the objective in a run; a FixedTrial or FrozenTrial belongs to no study and has none.

        Raises:
            BaseException: What the objective raises, so that Optuna's `catch` works.
        """
        if not isinstance(trial, optuna.Trial):
            return self._objective(trial)
        study = trial.study
        parent = self._parent(study)
        parent.interrupted = None
        ours = TrackedTrial(trial, self._begin(parent, trial))
        try:
            returned = self._objective(ours)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                parent.interrupted = error
            ours.end(trial_ended(error, None))
            raise
        try:
            ours.end(trial_ended(None, checked_values(returned, len(study.directions))))
        except ObjectiveError as error:  # Optuna fails the trial too, and continues
            ours.end(Ended.failed("failed", str(error)))
        return returned

    def _begin(self, parent: StudyRun, trial: optuna.Trial) -> Run:
        return Run(
            parent.delivery,
            None,
            self._experiment,
            f"trial={trial.number}",
            {
                "tracker.study": parent.params["study"],
                "optuna.trial": str(trial.number),
                "optuna.state": "RUNNING",
                **_tags(trial.user_attrs),
            },
            key=f"{parent.key}-{trial.number}",
            parent_key=parent.key,
            environment=parent.environment,
            rename=True,
        )

    def _parent(self, study: optuna.Study) -> StudyRun:
        """Return the run of a study, begun at its first trial in this process."""
        name = (study.study_name, id(study._storage))
        with self._beginning:
            run = self._studies.get(name)
            if run is None or not run.is_usable:
                delivery = open_delivery(*self._where, writes=is_main())
                try:
                    run = StudyRun(study, key_of(study), delivery, self._experiment)
                except BaseException:
                    delivery.close()
                    raise
                self._studies[name] = run
            return run


def key_of(study: optuna.Study) -> str:
    """Return the key of a study's run, which all processes that work on it derive alike.

    A study of `tracker.Study` has one in its settings. Others have none that could be stored
    without a race between processes that start together; their name and the start of their first
    trial never change, and differ from those of a later study of the same name.
    """
    if (settings := study.user_attrs.get(STUDY)) is not None:
        return str(settings["key"])
    started = study.get_trials(deepcopy=False)[0].datetime_start
    return uuid.uuid5(_NAMESPACE, f"{study.study_name} {started}").hex


def _end(studies: dict[tuple[str, int], StudyRun]) -> None:
    for run in studies.values():
        run.abandon()


def _value_names(study: optuna.Study) -> Sequence[str]:
    count = len(study.directions)
    return study.metric_names or (["objective"] if count == 1 else list(map(str, range(count))))


def _tags(attrs: dict[str, Any]) -> dict[str, str]:
    try:
        return attribute_tags(attrs)
    except (TypeError, ValueError):  # an in-memory study stores anything
        return attribute_tags({name: repr(value) for name, value in attrs.items()})
