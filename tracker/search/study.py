"""Study: a search space, an objective, a budget; each trial an MLflow run below the study's.

def objective(trial):
    network = build(width=trial.params["width"])
    with trial.manager() as manager:
        ...
    return loss

Study("widths", objective, space={"width": [16, 32]}, sampler="grid").run()
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from tracker.capture.provenance import environment_tags
from tracker.delivery.base import Delivery, Mode, delivery, mode_of
from tracker.errors import ArgumentError, StoreError
from tracker.journal.records import now
from tracker.redaction import public_uri
from tracker.search import warm_start
from tracker.search.executors.inprocess import run_here
from tracker.search.executors.processes import WORKER, Pool, Spec, check_picklable
from tracker.search.interrupts import Interrupts
from tracker.search.keeper import (
    SETTLE_SECONDS,
    InlineKeeper,
    Keeper,
    KeeperConfig,
    KeeperProcess,
    NoKeeper,
    adopted,
)
from tracker.search.leases import GRACE_SECONDS
from tracker.search.progress import Progress
from tracker.search.record import Record, load, open_study
from tracker.search.replay import replay
from tracker.search.sampler import directions
from tracker.search.session import Ended, Search, reap
from tracker.search.space import checked_space
from tracker.search.storage import Storage, parse
from tracker.search.trial import Objective, Tracking
from tracker.statuses import Status, outcome
from tracker.store.uri import check, resolve
from tracker.validation import DIRECTORY

logger = logging.getLogger(__name__)


class Study:
    """A search over hyperparameters, in Optuna's storage, mirrored in MLflow."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        *,
        space: Mapping[str, Any] | None = None,
        sampler: str = "tpe",
        pruner: str = "none",
        trials: int | None = None,
        direction: str | Sequence[str] = "minimize",
        metric: str | Sequence[str] = "objective",
        storage: str | None = None,
        seed: int = 0,
        retries: int = 0,
        steps: int | None = None,
        experiment: str | None = None,
        tracking_uri: str | None = None,
        directory: str | Path = DIRECTORY,
        models: str = "best",
        register: str | None = None,
        alias: str | None = None,
        replay: str | None = None,
        fixed: Mapping[str, Any] | None = None,
        grace_seconds: float = GRACE_SECONDS,
        inline: bool | None = None,
        offline: bool | None = None,
    ) -> None:
        """Nothing is opened or made before `run`.

        name: of the study, in the storage and of its run.
        objective: called with a `Trial`, returns its value, or one for each direction.
        space: what every trial is given in `trial.params`: lists of values, as for
            `RunBuilder.get_runs`, or optuna.distributions. The objective may suggest more.
        sampler: grid, tpe, random, gp, cmaes or qmc.
        pruner: none, median or hyperband.
        trials: the budget, in trials that are done: complete, pruned, or failed for the last time.
            None is all of a grid.
        direction: minimize or maximize; a list of them for several objectives.
        metric: the objectives' names.
        storage: journal:///FILE, sqlite:///FILE or postgresql://…; by default
            journal:///studies.journal, which is right for any number of workers of one machine.
        seed: with a trial's place in the study decides what is suggested and trained.
        retries: how often a trial that raised is tried again.
        steps: the last step that a trial reports, which hyperband needs and pruning is measured by.
        experiment, tracking_uri, directory, inline, offline: as for `RunManager`.
        models: whose models are kept: best, all or none.
        register: the name to register the best trial's model under, with `alias`.
        replay: the command that trains trial {number} again, for the study's page.
        fixed: what all trials have in common, as JSON: a study is not gone on with beside it.
        grace_seconds: how long a worker or another search may be silent before it counts as lost.

        Raises ArgumentError for what is not allowed.
        """
        if not callable(objective):
            raise ArgumentError(f"objective={objective!r} is not allowed; it must be a function.")
        if not grace_seconds > 0:
            raise ArgumentError(f"grace_seconds={grace_seconds!r} must be above 0.")
        self._objective = objective
        self._storage_url = storage
        self._directory = Path(directory)
        self._tracking_uri = tracking_uri
        self._mode: Mode = mode_of(inline=inline, offline=offline)
        self._grace = float(grace_seconds)
        self._sources: list[warm_start.Source] = []
        self._record = Record(
            name=name,
            sampler=sampler,
            pruner=pruner,
            trials=trials,
            directions=tuple(directions(direction)),
            metrics=(metric,) if isinstance(metric, str) else tuple(metric),
            seed=seed,
            retries=retries,
            steps=steps,
            spaces=() if space is None else (checked_space(space),),
            experiment=experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME"),
            experiment_id=None if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID"),
            storage=public_uri(parse(storage)[0]),
            models=models,
            register=register,
            alias=alias,
            replay=replay,
            fixed=dict(fixed or {}),
        )

    def warm_start_from_study(self, name: str, storage: str | None = None) -> None:
        """Begin with the complete trials of another study that have this one's hyperparameters."""
        self._sources.append(warm_start.FromStudy(name, storage or self._storage_url))

    def warm_start_from_runs(self, experiment: str, metric: str) -> None:
        """Begin with the FINISHED runs of an MLflow experiment that have the space's params.

        `metric`, its last value, is their objective.
        """
        if not self._record.spaces:
            raise ArgumentError("warm_start_from_runs needs a space, to match the runs' params.")
        self._sources.append(warm_start.FromRuns(experiment, metric, self._tracking_uri))

    def run(self, *, workers: int = 1, resume: bool = False) -> optuna.Study:
        """Run trials until the budget is used, and return the study as Optuna's own.

        With one worker trials run in this process, else in processes of their own, which import
        the objective. `resume` goes on with the study where it exists. Raises ArgumentError or
        StoreError, with nothing half-made, for what is not allowed; KeyboardInterrupt for Ctrl-C
        and SIGTERM, when the running trials have ended; a second one ends them at once.
        """
        if not isinstance(workers, int) or workers < 1:
            raise ArgumentError(f"workers={workers!r} is not allowed; it must be at least 1.")
        if _in_worker():
            raise ArgumentError(
                "run() was called in a worker: put it under `if __name__ == '__main__':`."
            )
        if workers > 1:
            check_picklable(self._objective)
        uri = resolve(self._tracking_uri)
        check(uri)
        given = replace(self._record, tracking_uri=public_uri(uri))
        imported = [source.trials(given) for source in self._sources]
        storage = Storage(self._storage_url)
        try:
            storage.own()
            record = open_study(storage, given, resume=resume)
            for trials in imported:
                warm_start.add(storage, record, trials)
            return self._run(storage, record, workers)
        finally:
            storage.close()  # what is returned opens its own connections, if it is asked more

    def _run(self, storage: Storage, record: Record, workers: int) -> optuna.Study:
        environment = environment_tags()
        search = Search(storage, record, grace=self._grace)
        search.enter()
        trials = storage.optuna.get_all_trials(record.study_id, deepcopy=False)
        search.plan.observe(trials)
        progress = Progress(record, search.total, search.plan.finished(search.total))
        for trial in trials:
            progress.known(trial)
        search.on_end = lambda trial: progress.ended(trial, search.plan.finished(search.total))
        ended: tuple[Status, str | None] = ("FAILED", "The study was left.")
        keeper: Keeper = NoKeeper()
        way: Delivery | None = None
        try:
            with Interrupts(progress.say) as interrupts:
                search.stopping = lambda: interrupts.count > 0
                keeper = self._keeper(record, search, environment)
                if workers == 1:
                    way = delivery(self._directory, self._tracking_uri, self._mode)
                    tracking = self._tracking(record)
                    run_here(search, self._objective, way, tracking, environment, interrupts)
                else:
                    spec = Spec(
                        self._objective,
                        self._tracking(record),
                        self._tracking_uri,
                        self._mode,
                        environment,
                        max(1, (os.cpu_count() or 1) // workers),
                    )
                    Pool(search, spec, workers).run(lambda: interrupts.count)
                if interrupts.count:
                    raise KeyboardInterrupt(interrupts.name)
            ended = ("FINISHED", None)
        except BaseException as error:
            result = outcome(error)
            ended = (result.status, result.reason)
            raise
        finally:
            progress.close()
            self._leave(search, keeper, way, ended)
        return optuna.Study(record.name, storage.optuna)

    def _tracking(self, record: Record) -> Tracking:
        experiment = record.experiment
        return Tracking(
            record.name, record.key, record.metrics, experiment, self._directory, record.models
        )

    def _keeper(self, record: Record, search: Search, environment: Mapping[str, str]) -> Keeper:
        if self._mode == "offline":
            return NoKeeper()
        duty = KeeperConfig(
            storage=search.storage.url,
            study=record.name,
            search=search.id,
            tracking_uri=self._tracking_uri,
            directory=str(self._directory.absolute()),
            environment=environment,
            adopt=adopted(),
            started=now(),
            grace=self._grace,
        )
        return InlineKeeper(duty) if self._mode == "inline" else KeeperProcess(duty)

    def _leave(
        self,
        search: Search,
        keeper: Keeper,
        way: Delivery | None,
        ended: tuple[Status, str | None],
    ) -> None:
        """End what is left, complete the mirror; say what is not."""
        reason = "The study ended in the middle of it."
        search.abandon(Ended("FAIL", why="interrupted", status="KILLED", reason=reason))
        storage, record = search.storage, search.record
        storage.patiently(lambda: reap(storage, record, search.id.__eq__))  # lost answers
        search.leave(*ended)
        if search.plan.finished(search.total) == search.total:
            shutil.rmtree(self._tracking(search.record).folders, ignore_errors=True)
        settled = True
        if way is not None:
            settled = way.flush(SETTLE_SECONDS)
            if self._mode == "inline":
                way.close()
        if (problem := keeper.finish(settled=settled)) is not None:
            logger.warning(
                "The study is not all in MLflow yet: %s. What is missing is written by: "
                "tracker mirror --study %s --storage %s",
                *(problem.rstrip("."), search.record.name, search.record.storage),
            )

    def replay(self, number: int) -> Sequence[float] | None:
        """Train trial `number` again, with its hyperparameters and seed, as a run of its own.

        Returns its values, None where it failed. The study does not change. Raises StoreError
        where there is no such study or trial.
        """
        storage = Storage(self._storage_url, make=False)
        record = load(storage, self._record.name)
        trials = storage.optuna.get_all_trials(record.study_id)
        if not 0 <= number < len(trials):
            raise StoreError(
                f"study={record.name!r} has no trial {number}; it has 0 to {len(trials) - 1}."
            )
        way = delivery(self._directory, self._tracking_uri, self._mode)
        try:
            tracking = self._tracking(record)
            return replay(record, trials[number], self._objective, way, tracking).values
        finally:
            storage.close()
            if self._mode == "inline":
                way.close()


def _in_worker() -> bool:
    return multiprocessing.current_process().name == WORKER
