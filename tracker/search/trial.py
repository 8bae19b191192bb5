"""One trial: the object passed to the objective, and the decision on how the trial ended."""

from __future__ import annotations

import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial, FrozenTrial

from tracker.delivery.base import Delivery
from tracker.errors import ArgumentError, StoreError, stays_here
from tracker.manager import RunManager
from tracker.run import Run
from tracker.search.channel import Channel, Ended, Task, TrialLostError, Verdict
from tracker.search.executors.base import TrialSpec
from tracker.search.plan import SLOT
from tracker.search.policy import ends_study
from tracker.search.sampler import training_seed
from tracker.search.space import contains, distributions
from tracker.search.tables import INTERMEDIATE, attribute_tags, objectives
from tracker.search.trial_run import TrialRun
from tracker.search.trial_study import TrialStudy
from tracker.statuses import Outcome, outcome
from tracker.training.rng import set_seed
from tracker.validation import checked_params, checked_step

Objective = Callable[["Trial"], float | Sequence[float]]


class Trial(BaseTrial):
    """The argument of an objective: it suggests hyperparameters, and has a run to log to.

    It is one of Optuna's trials, so that Optuna's integrations take it.
    """

    __reduce__ = stays_here("Trial", "send its params, and report in the objective's own process")

    def __init__(self, task: Task, run: TrialRun, channel: Channel, folder: Path) -> None:
        self._task = task
        self.seed = task.seed
        """The seed of all random generators when the objective is called."""
        self.run: Run = run
        """The trial's run. The study begins and ends it."""
        self.folder = folder
        """A folder for checkpoints, shared by all attempts at this trial; see `manager`. Create it
        before writing to it. It is removed when the trial is done."""
        self.study = TrialStudy(run.study, task.number, channel)
        """The study: its name, directions and trials, and `stop()`."""
        self._params = dict(task.params)
        space, is_grid = run.study.spaces[-1:], run.study.sampler == "grid"
        self._distributions = distributions(space[0], grid=is_grid) if space else {}
        self._user_attrs = dict(task.user_attrs)
        self._constraints: dict[str, float] = {}
        self._channel = channel
        self._unlogged: dict[str, Any] = {}

    @property
    def number(self) -> int:
        """The number of the trial in Optuna's storage."""
        return self._task.number

    @property
    def params(self) -> dict[str, Any]:
        """The suggested values; initially those of the study's space."""
        return dict(self._params)

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Where the suggested values come from."""
        return {k: v for k, v in self._distributions.items() if k in self._params}

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The user attributes: those of an enqueued trial, and of `set_user_attr`."""
        return dict(self._user_attrs)

    @property
    def system_attrs(self) -> dict[str, Any]:
        """Optuna's attributes, as they were when the trial started."""
        return dict(self._task.system_attrs)

    @property
    def datetime_start(self) -> datetime | None:
        """When the trial started, in local time."""
        return self._task.started

    @property
    def constraints(self) -> dict[str, float]:
        """By how much the trial violates its constraints."""
        return dict(self._constraints)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Suggest a number.

        Args:
            name: The hyperparameter.
            low: The smallest value.
            high: The largest value.
            step: The distance between values; by default the range is continuous.
            log: Whether to sample logarithmically.

        Raises:
            ArgumentError: The range is invalid, or differs from an earlier one.
        """
        return float(self._suggest(name, lambda: FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """Suggest an integer; see `suggest_float` for the arguments and errors."""
        return int(self._suggest(name, lambda: IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Iterable[Any]) -> Any:
        """Suggest one of several values.

        Args:
            name: The hyperparameter.
            choices: The values: numbers, strings, booleans or None.

        Raises:
            ArgumentError: There are no choices, or they differ from earlier ones.
        """
        return self._suggest(name, lambda: CategoricalDistribution(list(choices)))

    def suggest_uniform(self, name: str, low: float, high: float) -> float:
        """Call `suggest_float`, as Optuna's deprecated method does."""
        return self.suggest_float(name, low, high)

    def suggest_loguniform(self, name: str, low: float, high: float) -> float:
        """Call `suggest_float`, as Optuna's deprecated method does."""
        return self.suggest_float(name, low, high, log=True)

    def suggest_discrete_uniform(self, name: str, low: float, high: float, q: float) -> float:
        """Call `suggest_float`, as Optuna's deprecated method does."""
        return self.suggest_float(name, low, high, step=q)

    def _suggest(self, name: str, distribution: Callable[[], BaseDistribution]) -> Any:
        self.run.name_of(name, "param")
        try:
            wanted = distribution()
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{name!r} cannot be suggested: {error}") from error
        if name in self._params and name not in self._unlogged and name in self.run.params:
            if contains(wanted, value := self._params[name]):
                return value
            raise ArgumentError(f"{name!r} is already {value!r}, which is not in {wanted}.")
        value = self._channel.suggest(self.number, name, wanted)
        checked_params({name: value})
        self._params[name] = self._unlogged[name] = value
        self._distributions[name] = wanted
        return value

    def report(self, value: float, step: int) -> None:
        """Report an intermediate value to the pruner.

        Args:
            value: How good the trial is after `step`.
            step: Usually an epoch.

        Raises:
            ArgumentError: The value is not a number, or the step not an integer from 0.
            TrialLostError: The trial was abandoned in the meantime.
        """
        step = checked_step(step)
        if step < 0:
            raise ArgumentError(f"step={step!r} is not allowed; it must be an integer from 0.")
        number = _number(value)
        if number is None:
            raise ArgumentError(f"value={value!r} is not allowed; it must be a number.")
        self.log_params()
        self.run.log_metrics({INTERMEDIATE: number}, step)
        self._channel.report(self.number, number, step)

    def restore(self, reported: Mapping[int, float], last: int) -> None:
        """Repeat the reports of an earlier attempt.

        Args:
            reported: Its reports, by step.
            last: The last step to repeat.
        """
        for step, value in sorted(reported.items()):
            if step <= last:
                self.report(value, step)
                self._channel.prune(self.number)  # some pruners keep a state; the answer was no

    def should_prune(self) -> bool:
        """Whether to stop the trial, given its reports: `raise optuna.TrialPruned()`."""
        reason = self._channel.prune(self.number)
        if reason is None:
            return False
        self.run.set_tags({"tracker.pruned": reason})
        return True

    def set_user_attr(self, key: str, value: Any) -> None:
        """Store a JSON value in Optuna's storage, and as the tag `user_attrs.KEY` of the run.

        Raises:
            TypeError: The value is not JSON.
        """
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's
        tags = attribute_tags({key: value})
        self._channel.set_attr(self.number, key, value)
        self._user_attrs[key] = value
        self.run.set_tags(tags)

    def set_constraint(self, key: str, value: float) -> None:
        """Store by how much the trial violates a constraint.

        Args:
            key: The constraint.
            value: 0 or less satisfies it.
        """
        number = _number(value)
        if number is None:
            raise ArgumentError(f"value={value!r} is not allowed; it must be a number.")
        self.run.log_metrics({f"constraint.{key}": number})
        self._channel.constrain(self.number, key, number)
        self._constraints[key] = number

    def manager(self, **settings: Any) -> RunManager:
        """Create a RunManager that logs to the trial's run.

        `save_checkpoint` keeps its checkpoints in `folder`. If an earlier attempt at this trial was
        cut off, `manager.checkpoint` is its last one, as in a resumed run. `settings` are arguments
        of `RunManager`.
        """
        self.log_params()
        return RunManager(run=self.run, **settings)

    def log_params(self) -> None:
        """Log the values suggested since the last call."""
        if self._unlogged:
            self.run.log_params(self._unlogged)
            self._unlogged = {}


class ObjectiveError(ArgumentError):
    """The objective did not return its values."""


def run_trial(
    task: Task, spec: TrialSpec, channel: Channel, delivery: Delivery
) -> Exception | None:
    """Run one trial, from the beginning of its run to the end.

    Args:
        task: The trial.
        spec: What the trials of the study share.
        channel: The trial's connection to its search.
        delivery: Delivers the run to MLflow.

    Returns:
        The exception of the objective that ends the study, see `ends_study`; others only fail the
        trial.

    Raises:
        KeyboardInterrupt: The trial was interrupted, and has ended. SystemExit is raised too.
    """
    run = TrialRun(delivery, task, spec)
    trial = Trial(task, run, channel, spec.folder(task.slot))
    metrics, models = spec.record.metrics, spec.record.models
    error: BaseException | None = None
    values: list[float] | None = None
    try:
        if run.resume_state is not None and run.resume_state.checkpoint is not None:
            trial.restore(task.reported, run.resume_state.checkpoint.epoch)
        set_seed(task.seed)
        values = checked_values(spec.objective(trial), len(metrics))
    except BaseException as raised:  # noqa: BLE001 - raised again below if it concerns the study
        error = raised
    stops = error is not None and ends_study(error, spec.catch, task.number, channel)
    ended = trial_ended(error, values, stops=stops)
    trial.log_params()
    is_complete = ended.state == "COMPLETE"
    try:
        if is_complete and (
            models == "all" or (models == "best" and _is_best(task, ended, channel))
        ):
            run.log_pending_model()  # first: this process may die when the study knows the trial
        verdict = channel.finish(task.number, ended)
    except StoreError as away:  # the search cannot store the end, and ends itself
        run.end(outcome(away), wait=False)
        raise
    if not verdict.accepted:
        ended = Ended.failed("given up", "The trial was abandoned.")
    elif is_complete:
        run.log_metrics(objectives(metrics, ended.values or ()))
    run.set_tags({"optuna.state": ended.state})
    run.end(Outcome(ended.status, ended.reason), wait=False)
    if not verdict.retry:
        shutil.rmtree(trial.folder, ignore_errors=True)
    if isinstance(error, Exception):
        return error if stops else None
    if error is not None:
        raise error
    return None


def trial_ended(
    error: BaseException | None, values: Sequence[float] | None, *, stops: bool = False
) -> Ended:
    """Decide how a trial ended; docs/statuses.md lists all cases.

    Args:
        error: What the objective raised; None if it returned.
        values: What it returned, if it did.
        stops: Whether the error ends the study; it then costs the slot no attempt.
    """
    if error is None:
        assert values is not None
        if any(map(math.isnan, values)):
            reason = f"The objective returned {values}, but NaN cannot be compared."
            return Ended.failed("invalid", reason)
        return Ended("COMPLETE", values)
    if isinstance(error, optuna.TrialPruned):
        return Ended("PRUNED", status="KILLED")
    run = outcome(error)
    if run.status == "KILLED":
        return Ended.failed("interrupted", run.reason)
    is_slots_fault = not stops and not isinstance(error, TrialLostError)
    return Ended.failed("failed" if is_slots_fault else "given up", run.reason)


def _is_best(task: Task, ended: Ended, channel: Channel) -> bool:
    try:
        return channel.is_best(task.number, ended)
    except TrialLostError:  # `finish` will be told so
        return False


def checked_values(returned: Any, count: int) -> list[float]:
    """Return the values that an objective returned.

    Args:
        returned: A number, or a list or tuple of them.
        count: How many there must be.

    Raises:
        ObjectiveError: It is something else.
    """
    several = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    numbers = [number for value in several if (number := _number(value)) is not None]
    if not len(numbers) == len(several) == count:
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise ObjectiveError(f"The objective returned {returned!r}; it must return {wanted}.")
    return numbers


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # None, or a tensor of several numbers
        return None


class _ReplayChannel(Channel):
    """Answers as the search did when the trial ran."""

    def __init__(self, frozen: FrozenTrial) -> None:
        self._params = frozen.params
        self.ended: Ended | None = None

    def request(self, verb: str, *arguments: Any) -> Any:
        if verb == "suggest":
            number, name, _ = arguments
            if name not in self._params:
                raise ArgumentError(f"{name!r} was not suggested in trial {number}.")
            return self._params[name]
        if verb == "finish":
            _, self.ended = arguments
            return Verdict(accepted=True)
        if verb == "trials_for":
            return []
        return None  # nothing is stored, and no trial pruned


def replay(frozen: FrozenTrial, spec: TrialSpec, delivery: Delivery) -> Ended:
    """Train a trial again, as a separate run.

    Args:
        frozen: The trial, which has ended.
        spec: What the trials of the study share.
        delivery: Delivers the run to MLflow.

    Returns:
        How it ended this time.

    Raises:
        ArgumentError: The trial was not run by this library.
    """
    slot = frozen.user_attrs.get(SLOT)
    if slot is None:
        raise ArgumentError(f"trial {frozen.number} was not run by this study.")
    key = f"replay-{uuid.uuid4().hex}"  # so that none of the study's checkpoints is used
    seed = training_seed(spec.record.seed, slot)
    task = Task(number=frozen.number, slot=slot, seed=seed, key=key, params=frozen.params)
    record = replace(spec.record, key=key, models="all")
    channel = _ReplayChannel(frozen)
    error = run_trial(task, replace(spec, record=record, is_replay=True), channel, delivery)
    if error is not None:
        raise error
    assert channel.ended is not None
    return channel.ended
