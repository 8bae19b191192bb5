"""One trial: what the objective is given, and the run that it is."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from torch import Tensor, nn

from tracker.delivery.base import Delivery
from tracker.errors import ArgumentError, CallOrderError, StoreError
from tracker.grid import run_name
from tracker.manager import RunManager
from tracker.run import Run
from tracker.search.plan import Why
from tracker.search.session import Ended, Task, TrialLostError, Verdict
from tracker.search.space import contains
from tracker.search.tables import INTERMEDIATE, objectives
from tracker.statuses import Outcome, outcome
from tracker.store.history import ResumeState
from tracker.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tracker.training.rng import set_seed
from tracker.views.files import json_text, write_atomically

Objective = Callable[["Trial"], float | Sequence[float]]


class Channel(Protocol):
    """The way from a trial to the search that it belongs to."""

    def suggest(self, number: int, name: str, distribution: BaseDistribution) -> Any:
        """The value of a hyperparameter."""

    def report(self, number: int, value: float, step: int) -> None:
        """Tell an intermediate value."""

    def prune(self, number: int) -> str | None:
        """Why the trial is to be pruned, None where it is not."""

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """Set an attribute of the user's."""

    def constrain(self, number: int, name: str, value: float) -> None:
        """Set a constraint."""

    def finish(self, number: int, ended: Ended) -> Verdict:
        """Tell how the trial ended."""


@dataclass(frozen=True)
class Tracking:
    """How the trials of a study are tracked."""

    study: str
    """The study's name."""
    key: str
    """The key of the study's run, the parent of them all."""
    metrics: tuple[str, ...]
    experiment: str | None
    directory: Path
    """Holds the journals and, below `checkpoints`, what trials go on from."""
    models: str
    """`best` logs a model if its trial is the best so far; `all` and `none`."""
    is_replay: bool = False
    """Whether the run stands alone, for a trial that was trained before."""

    @property
    def folders(self) -> Path:
        """Where the slots' folders lie while the study goes on."""
        return self.directory.absolute() / "checkpoints" / self.key

    def folder(self, slot: int) -> Path:
        """Where a slot's checkpoints lie until it is done."""
        return self.folders / f"{slot:06d}"


class TrialRun(Run):
    """The run of a trial: its checkpoints stay on disk, its model waits for the verdict."""

    def __init__(
        self,
        delivery: Delivery,
        task: Task,
        tracking: Tracking,
        environment: Mapping[str, str],
    ) -> None:
        super().__init__(
            delivery,
            task.params,
            tracking.experiment,
            run_name({"trial": task.number, **task.params}) or f"trial={task.number}",
            {
                "tracker.replays" if tracking.is_replay else "tracker.study": tracking.study,
                "optuna.trial": str(task.number),
                "optuna.state": "RUNNING",
                "tracker.slot": str(task.slot),
            },
            key=task.key,
            parent_key=None if tracking.is_replay else tracking.key,
            environment=environment,
        )
        self._folder = tracking.folder(task.slot)
        self._rows: list[dict[str, Any]] = []
        self._held: Callable[[], bool] | None = None
        self.resume_state = _resume_state(self._folder)
        for row in self.resume_state.rows if self.resume_state else []:
            metrics = {name: value for name, value in row.items() if name != "epoch"}
            self.log_metrics(metrics, row["epoch"])
            self.log_epoch(row)

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to the epochs' table; another attempt at the trial goes on from there."""
        self._rows.append(dict(row))
        super().log_epoch(row)

    def log_model(
        self,
        network: nn.Module,
        example: Tensor | None,
        name: str = "model",
        step: int = 0,
        **more: Any,
    ) -> bool:
        """Log `network`, as it is when the objective returns, if the trial is the best so far."""
        if name != "model":
            return super().log_model(network, example, name, step, **more)
        self._held = partial(super().log_model, network, example, name, step, **more)
        return True

    def log_held_model(self) -> None:
        """Log the model that was to be logged."""
        if self._held is not None:
            self._held()

    def log_checkpoint(self, step: int, **states: Any) -> bool:
        """Save a checkpoint where the next attempt at the trial finds it."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = [{**row} for row in self._rows]
            write_atomically(self._folder / "rows.json", json_text(rows))
            save_checkpoint(self._folder / f"{step:08d}", step=step, **states)
        except (OSError, StoreError) as error:
            self._journal.lose(f"checkpoint {step}", error)
            return False
        return True

    def delete_checkpoint(self, step: int) -> None:
        """Delete the checkpoint of a step."""
        shutil.rmtree(self._folder / f"{step:08d}", ignore_errors=True)


def _resume_state(folder: Path) -> ResumeState | None:
    """What an earlier attempt at a trial left in `folder`: its last whole checkpoint."""
    steps = sorted(int(path.name) for path in folder.glob("*") if path.name.isdecimal())
    checkpoints: dict[int, Checkpoint] = {}
    for step in reversed(steps):
        try:
            checkpoints[step] = load_checkpoint(folder / f"{step:08d}")
        except StoreError:  # it was being written, or deleted
            continue
    if not checkpoints:
        return None
    last = checkpoints[max(checkpoints)]
    rows = [
        {key: float(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        if row["epoch"] <= last.epoch
    ]
    return ResumeState(
        run_id="",
        params={},
        last_steps={},
        samples=0,
        rows=rows,
        histograms=[],
        kept={step: checkpoint.metrics for step, checkpoint in checkpoints.items()},
        checkpoint=last,
    )


class Trial:
    """What an objective is given: hyperparameters to ask for, a run to log to."""

    def __init__(self, task: Task, run: TrialRun, channel: Channel, folder: Path) -> None:
        self.number = task.number
        """The number of the trial in Optuna's storage."""
        self.seed = task.seed
        """The seed that all random generators have when the objective is called."""
        self.params: dict[str, Any] = dict(task.params)
        """What was suggested; all of the study's space from the beginning."""
        self.run: Run = run
        """The trial's run. The study begins and ends it."""
        self.folder = folder
        """A folder that all attempts at this trial share, for what it goes on from; see `manager`,
        which keeps checkpoints there. Made by who writes to it, removed when the trial is done."""
        self._channel = channel
        self._unlogged: dict[str, Any] = {}
        self._reported: tuple[float, int] | None = None

    def suggest_float(
        self,
        name: str,
        low: float,
        high: float,
        *,
        step: float | None = None,
        log: bool = False,
    ) -> float:
        """A number from `low` to `high`. Raises ArgumentError for a range that cannot be."""
        return float(self._suggest(name, lambda: FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        """A whole number from `low` to `high`. Raises ArgumentError for one that cannot be."""
        return int(self._suggest(name, lambda: IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Iterable[Any]) -> Any:
        """One of `choices`. Raises ArgumentError where there are none."""
        return self._suggest(name, lambda: CategoricalDistribution(list(choices)))

    def _suggest(self, name: str, distribution: Callable[[], BaseDistribution]) -> Any:
        try:
            wanted = distribution()
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"{name!r} cannot be suggested: {error}") from error
        if name in self.params and name not in self._unlogged and name in self.run.params:
            if contains(wanted, value := self.params[name]):
                return value
            raise ArgumentError(f"{name!r} is {value!r} already, which is not of {wanted}.")
        value = self._channel.suggest(self.number, name, wanted)
        self.params[name] = self._unlogged[name] = value
        return value

    def report(self, value: float, step: int) -> None:
        """Tell how good the trial is after `step`, an epoch as a rule, for the pruner.

        Raises ArgumentError for what is no number or step, TrialLostError where the trial was given
        up meanwhile.
        """
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ArgumentError(f"step={step!r} is not allowed; it must be a whole number from 0.")
        number = _number(value)
        if number is None:
            raise ArgumentError(f"value={value!r} is not allowed; it must be a number.")
        self._tell(number, step)

    def _tell(self, value: float, step: int) -> None:
        self.log_params()
        self.run.log_metrics({INTERMEDIATE: value}, step)
        self._channel.report(self.number, value, step)

    def restore(self, reported: Mapping[int, float], last: int) -> None:
        """Report again what an earlier attempt did up to its step `last`, as if it had gone on."""
        for step, value in sorted(reported.items()):
            if step <= last:
                self._tell(value, step)
                self._channel.prune(self.number)  # some pruners note what they saw; it said no then

    def should_prune(self) -> bool:
        """Whether to give the trial up, by what was reported: `raise optuna.TrialPruned()`."""
        reason = self._channel.prune(self.number)
        if reason is None:
            return False
        self.run.set_tags({"tracker.pruned": reason})
        return True

    def set_user_attr(self, name: str, value: Any) -> None:
        """Keep something with the trial in Optuna's storage; it must be made of JSON."""
        self._channel.set_attr(self.number, name, value)

    def set_constraint(self, name: str, value: float) -> None:
        """Say how far a constraint is broken: not, where `value` is 0 or less."""
        self._channel.constrain(self.number, name, float(value))
        self.run.log_metrics({f"constraint.{name}": float(value)})

    def manager(self, **settings: Any) -> RunManager:
        """A RunManager that logs to the trial's run, for the verbs and for `fit`.

        `save_checkpoint` keeps its checkpoints in `folder`. Where an earlier attempt at this trial
        was cut off, `manager.checkpoint` is its last one, as for a run that is resumed. `settings`
        are those of `RunManager()`.
        """
        self.log_params()
        return RunManager(run=self.run, **settings)

    def log_params(self) -> None:
        """Log what was suggested since."""
        if self._unlogged:
            self.run.log_params(self._unlogged)
            self._unlogged = {}


class ObjectiveError(ArgumentError):
    """The objective returned what is no value."""


def run_trial(
    task: Task,
    objective: Objective,
    channel: Channel,
    delivery: Delivery,
    tracking: Tracking,
    environment: Mapping[str, str],
) -> None:
    """Run one trial, from its run's beginning to its end.

    An objective that fails is no error here. Raises KeyboardInterrupt, SystemExit and the user's
    mistakes (ArgumentError, CallOrderError) after the trial has ended.
    """
    run = TrialRun(delivery, task, tracking, environment)
    trial = Trial(task, run, channel, tracking.folder(task.slot))
    error: BaseException | None = None
    values: list[float] | None = None
    try:
        if run.resume_state is not None and run.resume_state.checkpoint is not None:
            trial.restore(task.reported, run.resume_state.checkpoint.epoch)
        set_seed(task.seed)
        values = _checked(objective(trial), len(tracking.metrics))
    except BaseException as raised:  # noqa: BLE001 - passed on below where it is not a trial's own
        error = raised
    ended = trial_ended(error, values)
    trial.log_params()
    verdict = channel.finish(task.number, ended)
    if not verdict.accepted:
        ended = Ended("FAIL", why="given up", status="FAILED", reason="The trial was given up.")
    if verdict.accepted and ended.state == "COMPLETE":
        run.log_metrics(objectives(tracking.metrics, ended.values or ()))
        if tracking.models == "all" or (tracking.models == "best" and verdict.best):
            run.log_held_model()
    run.set_tags({"optuna.state": ended.state})
    run.end(Outcome(ended.status, ended.reason), wait=False)
    if not verdict.again:
        shutil.rmtree(trial.folder, ignore_errors=True)
    if error is not None and _stops(error):
        raise error


def trial_ended(error: BaseException | None, values: Sequence[float] | None) -> Ended:
    """How a trial ended whose objective raised `error` or returned `values`: the one place.

    | what happened | trial | run |
    |---|---|---|
    | it returned | COMPLETE | FINISHED |
    | TrialPruned | PRUNED | KILLED |
    | NaN, an exception | FAIL | FAILED |
    | Ctrl-C, SIGTERM | FAIL, its slot is free again | KILLED |
    | given up meanwhile | FAIL | FAILED |
    """
    if error is None:
        assert values is not None
        if any(map(math.isnan, values)):
            reason = f"The objective returned {values}, and NaN is no value to compare."
            return Ended("FAIL", why="invalid", status="FAILED", reason=reason)
        return Ended("COMPLETE", values)
    if isinstance(error, optuna.TrialPruned):
        return Ended("PRUNED", status="KILLED", reason=None)
    run = outcome(error)
    if run.status == "KILLED":
        return Ended("FAIL", why="interrupted", status="KILLED", reason=run.reason)
    given_up = isinstance(error, (TrialLostError, ArgumentError, CallOrderError))
    why: Why = "given up" if given_up else "failed"
    return Ended("FAIL", why=why, status="FAILED", reason=run.reason)


def _stops(error: BaseException) -> bool:
    """Whether an objective's error is the whole study's."""
    return isinstance(error, (ArgumentError, CallOrderError)) or not isinstance(error, Exception)


def _checked(returned: Any, count: int) -> list[float]:
    several = list(returned) if isinstance(returned, (list, tuple)) else [returned]
    numbers = [_number(value) for value in several]
    if None in numbers or len(numbers) != count:
        wanted = "a number" if count == 1 else f"{count} numbers"
        raise ObjectiveError(f"The objective returned {returned!r}; it must return {wanted}.")
    return [number for number in numbers if number is not None]


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of many
        return None
