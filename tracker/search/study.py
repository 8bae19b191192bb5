"""Study: a search space, an objective and a budget; each trial is an MLflow run.

def objective(trial):
    network = build(width=trial.params["width"])
    with trial.manager() as manager:
        ...
    return loss

Study("widths", objective, space={"width": [16, 32]}, sampler="grid").run()
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from tracker.capture.provenance import environment_tags
from tracker.delivery.base import mode_of, open_delivery
from tracker.errors import ArgumentError, CallOrderError, StoreError
from tracker.journal.records import now
from tracker.redaction import public_uri
from tracker.search import warm_start
from tracker.search.channel import Ended
from tracker.search.config import StudyConfig
from tracker.search.executors.base import Executor, TrialSpec
from tracker.search.executors.choice import choose_executor
from tracker.search.executors.processes import WORKER
from tracker.search.interrupts import Interrupts
from tracker.search.keeper import (
    SETTLE_SECONDS,
    InlineKeeper,
    Keeper,
    KeeperConfig,
    KeeperProcess,
    warn_of,
)
from tracker.search.leases import GRACE_SECONDS
from tracker.search.objects import PrunerLike, SamplerLike
from tracker.search.policy import Catch, checked_catch
from tracker.search.progress import Progress
from tracker.search.queue import Queue
from tracker.search.reap import reap
from tracker.search.sampler import has_seed, sampler_text
from tracker.search.session import Callback, Search
from tracker.search.space import checked_space
from tracker.search.stopping import StopFlag
from tracker.search.storage import Storage, default_url, parse
from tracker.search.stored_study import StoredStudy, load, open_study
from tracker.search.trial import Objective, replay
from tracker.statuses import Outcome, outcome
from tracker.store.uri import check_uri, resolve
from tracker.validation import DIRECTORY, checked_local_path

logger = logging.getLogger(__name__)


class Study:
    """A search over hyperparameters: stored by Optuna, shown by MLflow."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        *,
        space: Mapping[str, Any] | None = None,
        sampler: SamplerLike = "tpe",
        pruner: PrunerLike = "none",
        trials: int | None = None,
        direction: str | Sequence[str] = "minimize",
        metric: str | Sequence[str] = "objective",
        seed: int = 0,
        retries: int = 0,
        steps: int | None = None,
        experiment: str | None = None,
        models: str = "best",
        register: str | None = None,
        alias: str | None = None,
        replay: str | None = None,
        fixed: Mapping[str, Any] | None = None,
        storage: str | None = None,
        tracking_uri: str | None = None,
        directory: str | Path = DIRECTORY,
        grace_seconds: float = GRACE_SECONDS,
        inline: bool | None = None,
        offline: bool | None = None,
    ) -> None:
        """Configure a study; nothing is opened or created before `run`.

        `StudyConfig` describes the arguments that are not listed here.

        Args:
            name: Its name, in the storage and of its run.
            objective: Called with a `Trial`; returns one value, or one for each direction.
            sampler: "tpe", "grid", "random", "qmc", "gp", "cmaes", a sampler of Optuna or your own,
                or a function that returns one: `partial(TPESampler, multivariate=True)`.
            pruner: "none", "median", "hyperband", a pruner object, or a function that returns one.
            space: A list of values or one of optuna.distributions for each hyperparameter in
                `trial.params`. The objective may suggest more.
            direction: "minimize", "maximize", or a list of them for several objectives.
            metric: The name of the objective, or a list.
            experiment: The MLflow experiment, by default that of MLflow's environment variables.
            storage: journal:///FILE, sqlite:///FILE or postgresql://…. The default,
                journal:///studies.journal, suits any number of workers on one machine.
            tracking_uri: The MLflow store, as for `RunManager`.
            directory: Where journals and checkpoints are kept.
            grace_seconds: How long a worker or another search may be silent before it counts as
                lost.
            inline: Whether this process delivers the runs itself, as for `RunManager`.
            offline: Whether runs stay on disk until `tracker sync`, as for `RunManager`.

        Raises:
            ArgumentError: An argument is not allowed.
        """
        if not callable(objective):
            raise ArgumentError(f"objective={objective!r} is not allowed; it must be a function.")
        if not isinstance(grace_seconds, int | float) or not grace_seconds > 0:
            raise ArgumentError(
                f"grace_seconds={grace_seconds!r} is not allowed; it must be above 0."
            )
        self._objective = objective
        self._storage_url = storage or default_url(tracking_uri)
        self._tracking_uri = tracking_uri
        self._directory = checked_local_path(directory, "directory")
        self._grace = float(grace_seconds)
        self._mode = mode_of(inline=inline, offline=offline)
        self._config = StudyConfig(
            name=name,
            sampler=sampler,
            pruner=pruner,
            trials=trials,
            directions=_texts(direction),
            metrics=_texts(metric),
            seed=seed,
            retries=retries,
            steps=steps,
            spaces=() if space is None else (checked_space(space),),
            experiment=experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME"),
            experiment_id=None if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID"),
            storage=public_uri(parse(self._storage_url)[0]),
            models=models,
            register=register,
            alias=alias,
            replay=replay,
            fixed=fixed or {},
        )
        self._sources: list[warm_start.Source] = []
        self._queue = Queue()
        self._flag: StopFlag | None = None

    @property
    def trials(self) -> list[FrozenTrial]:
        """Its trials so far, and those that `run` will add to it; this creates nothing.

        Raises:
            StoreError: The storage cannot be read.
        """
        stored: list[FrozenTrial] = []
        if (file := parse(self._storage_url)[2]) is None or file.exists():
            storage = Storage(self._storage_url, make=False)
            with closing(storage), suppress(KeyError):
                study_id = storage.optuna.get_study_id_from_name(self._config.name)
                stored = storage.optuna.get_all_trials(study_id)
        pending = [copy.deepcopy(trial) for trial in self._queue.missing_from(stored)]
        for number, trial in enumerate(pending, start=len(stored)):
            trial.number = number
        return stored + pending

    def enqueue_trial(
        self,
        params: Mapping[str, Any],
        user_attrs: Mapping[str, Any] | None = None,
        skip_if_exists: bool = False,
    ) -> None:
        """Try given hyperparameters before the sampler's.

        `run` adds the trial to the study, once: a program that is started again with `resume=True`
        may enqueue its trials again. It takes the next free slot of the budget; if there is none,
        it runs in addition.

        Args:
            params: Values of some or all hyperparameters; the sampler suggests the others.
            user_attrs: User attributes of the trial.
            skip_if_exists: Whether to leave it out if the study has a trial with these values.

        Raises:
            ArgumentError: A value is not in the space, or the study is a grid.
        """
        self._queue.add(self._config, params, user_attrs, skip_if_exists)

    def warm_start_from_study(self, name: str, storage: str | None = None) -> None:
        """Start with the complete trials of another study whose hyperparameters fit.

        Args:
            name: The other study.
            storage: Its storage, by default this study's.
        """
        self._sources.append(warm_start.FromStudy(name, storage or self._storage_url))

    def warm_start_from_runs(self, experiment: str, metric: str) -> None:
        """Start with the FINISHED runs of an MLflow experiment whose params fit the space.

        Args:
            experiment: The name of the experiment.
            metric: The metric whose last value is the objective.

        Raises:
            ArgumentError: The study has no space.
        """
        if not self._config.spaces:
            raise ArgumentError("warm_start_from_runs needs a space, to match the runs' params.")
        self._sources.append(warm_start.FromRuns(experiment, metric, self._tracking_uri))

    def stop(self) -> None:
        """Let `run` start no more trials: from a callback, another thread, or the objective.

        In an objective that runs in a worker, call `trial.study.stop()`.

        Raises:
            CallOrderError: The study is not running in this process.
        """
        if self._flag is None:
            raise CallOrderError(
                "stop() needs a study that is running in this process; an objective in a worker "
                "calls trial.study.stop()."
            )
        self._flag.set()

    def run(
        self,
        *,
        workers: int = 1,
        resume: bool = False,
        timeout: float | None = None,
        callbacks: Sequence[Callback] = (),
        catch: type[Exception] | Iterable[type[Exception]] | None = None,
        devices: str | Sequence[str | int] | None = None,
        gpus_per_trial: float | None = None,
    ) -> optuna.Study:
        """Run trials until the budget is used up.

        Args:
            workers: How many trials run at a time. A single worker runs in this process; several
                run in separate processes, which get a copy of the objective.
            resume: Continue the study if it exists. docs/studies.md lists the settings that must be
                those stored, and those that take their new values.
            timeout: Seconds after which no more trials start.
            callbacks: Called in this process after each trial with the `optuna.Study`, whose
                `stop()` ends the run, and the trial as an `optuna.trial.FrozenTrial`.
            catch: Exceptions of the objective that only fail their trial; others end the study. By
                default all only fail their trial but usage errors, and mistakes such as an
                ImportError or a TypeError in the first three trials while none has ended well.
            devices: The GPUs that workers get by round robin, such as `["0", "1"]`; "auto" for all
                that this process may use, which several workers get by default; "all" to let each
                worker see all. A single worker with its own GPUs is a separate process too.
            gpus_per_trial: How many GPUs each trial has (1, 2, …), or which part of one (0.5).

        Returns:
            The study as an `optuna.Study`.

        Raises:
            ArgumentError: An argument, or the objective, is not allowed.
            StoreError: The storage or the MLflow store cannot be used.
            Exception: The objective or a callback raised an exception that ends the study.
            KeyboardInterrupt: Ctrl-C or SIGTERM, after the running trials have ended; a second one
                kills them.
        """
        for callback in callbacks:
            if not callable(callback):
                raise ArgumentError(f"callbacks contains {callback!r}; it must be a function.")
        flag, caught = StopFlag(timeout), checked_catch(catch)
        if multiprocessing.current_process().name == WORKER:
            raise ArgumentError(
                "run() was called in a worker: put it under `if __name__ == '__main__':`."
            )
        make_executor = choose_executor(
            self._objective,
            caught,
            workers=workers,
            devices=devices,
            gpus_per_trial=gpus_per_trial,
        )
        if not has_seed(self._config.sampler):
            logger.warning(
                "seed=%d does not reach sampler=%s: it keeps no random generator of NumPy or "
                "Python, and a function that makes it has no parameter seed.",
                self._config.seed,
                sampler_text(self._config.sampler),
            )
        uri = resolve(self._tracking_uri)
        check_uri(uri)
        config = replace(self._config, tracking_uri=public_uri(uri))
        imported = [source.trials(config) for source in self._sources]
        storage = Storage(self._storage_url)
        try:
            storage.patiently(storage.own, patience=0.0)
            create = partial(open_study, storage, config, resume=resume)
            record = storage.patiently(create, patience=0.0)
            for trials in imported:
                storage.patiently(partial(warm_start.add, storage, record, trials))
            storage.patiently(partial(self._queue.store, storage, record))
            search = Search(
                storage,
                record,
                grace=self._grace,
                sampler=config.sampler,
                pruner=config.pruner,
            )
            search.callbacks = tuple(callbacks)
            self._flag = search.flag = flag
            self._run(search, make_executor, caught)
            return storage.patiently(lambda: optuna.Study(record.name, storage.optuna))
        finally:
            self._flag = None
            storage.close()  # the returned study opens its own connections when needed

    def _run(
        self, search: Search, make_executor: Callable[[TrialSpec], Executor], catch: Catch
    ) -> None:
        trials = search.storage.patiently(search.trials)
        search.plan.observe(trials)
        progress = Progress(search.record, search.plan, trials)
        search.on_end = progress.trial_ended
        spec = replace(self._spec(search.record, environment_tags()), catch=catch)
        ended = Outcome("FAILED", "The study was abandoned.")
        keeper: Keeper | None = None
        executor: Executor | None = None
        search.enter()
        try:
            with Interrupts(progress.say) as interrupts:
                search.stopping = lambda: interrupts.count > 0
                keeper = self._start_keeper(search, spec.environment)
                executor = make_executor(spec)
                try:
                    with search.beating():
                        executor.run(search, interrupts)
                        if not interrupts.count:
                            search.call_back()
                except StoreError:  # after Ctrl-C nothing waits for the storage
                    if not interrupts.count:
                        raise
                if interrupts.count:
                    raise KeyboardInterrupt(interrupts.name)
            ended = Outcome("FINISHED")
        except BaseException as error:
            ended = outcome(error)
            raise
        finally:
            progress.close()
            away: StoreError | None = None
            try:
                self._end(search, spec, ended)
            except StoreError as error:
                away = error
            settled = executor is None or executor.settle(SETTLE_SECONDS)
            if keeper is not None:
                left = away is None
                if (problem := keeper.finish(settled=settled, left=left)) is not None:
                    warn_of(problem, search.record.name, search.storage.url, left=left)
            if away is not None and ended.status == "FINISHED":  # else the first error says why
                raise away

    def _spec(self, record: StoredStudy, environment: Mapping[str, str]) -> TrialSpec:
        return TrialSpec(
            record=record,
            objective=self._objective,
            directory=self._directory,
            tracking_uri=self._tracking_uri,
            mode=self._mode,
            environment=environment,
        )

    def _start_keeper(self, search: Search, environment: Mapping[str, str]) -> Keeper | None:
        if self._mode == "offline":
            return None  # `tracker mirror` completes it later
        config = KeeperConfig(
            storage=search.storage.url,
            study=search.record.name,
            search=search.id,
            tracking_uri=self._tracking_uri,
            directory=str(self._directory.absolute()),
            environment=environment,
            adopt=os.environ.get("MLFLOW_RUN_ID"),
            started=now(),
            grace=self._grace,
        )
        return InlineKeeper(config, search) if self._mode == "inline" else KeeperProcess(config)

    def _end(self, search: Search, spec: TrialSpec, ended: Outcome) -> None:
        """End trials that still run, and leave the study."""
        search.abandon(Ended.failed("interrupted", "The study ended before the trial did."))
        storage, record = search.storage, search.record
        storage.patiently(lambda: reap(storage, record, {search.id}))  # of lost answers
        search.leave(ended.status, ended.reason)
        if search.plan.is_finished:
            shutil.rmtree(spec.checkpoints, ignore_errors=True)

    def replay(self, number: int) -> Sequence[float] | None:
        """Train a trial again, with its hyperparameters and seed, as a separate run.

        The study does not change.

        Args:
            number: The trial's number.

        Returns:
            Its values; None if it failed.

        Raises:
            StoreError: The study or the trial does not exist, or the storage does not answer.
        """
        with closing(Storage(self._storage_url, make=False)) as storage:
            record, trials = storage.patiently(partial(self._stored, storage), patience=0.0)
        if not 0 <= number < len(trials):
            raise StoreError(
                f"study={record.name!r} has no trial {number}; it has 0 to {len(trials) - 1}."
            )
        delivery = open_delivery(self._directory, self._tracking_uri, self._mode)
        try:
            return replay(trials[number], self._spec(record, environment_tags()), delivery).values
        finally:
            if self._mode == "inline":
                delivery.close()

    def _stored(self, storage: Storage) -> tuple[StoredStudy, list[FrozenTrial]]:
        record = load(storage, self._config.name)
        return record, storage.optuna.get_all_trials(record.study_id)


def _texts(given: Any) -> tuple[str, ...]:
    """Return one text, or several, as a tuple; `StudyConfig` checks them."""
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)
