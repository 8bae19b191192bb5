"""The names that scripts written for the tutorial's RunManager read and set."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from tracker.errors import CallOrderError
from tracker.loop_arguments import say_once
from tracker.managed_runs import ManagedRuns
from tracker.run import Run
from tracker.training.distributed import is_main
from tracker.training.meters import EpochMeter
from tracker.training.networks import Networks, as_networks
from tracker.training.watch import LoopWatch
from tracker.views.base import Views
from tracker.views.files import ResultTable
from tracker.views.tensorboard import NoWriter


class NotInitializedError(CallOrderError, AttributeError):
    """A subclass does not call `super().__init__()`; hasattr and copy expect an AttributeError."""


class TutorialNames:
    """The public state of a manager, under the tutorial's names.

    Subclasses and scripts may set all of it. A loop of theirs that adds to `epoch_loss` itself,
    and does not call `track_loss`, has the loss of the tutorial: the sum over the data set's size.
    """

    loader: Any = None
    """The loader of the run."""
    run_params: Any = None
    """The hyperparameters of the run, as given to `begin_run`."""
    run_count = 0
    """Number of runs begun."""
    epoch_count = 0
    """Number of epochs begun in this run."""
    run_start_time = 0.0
    """When the run began, in seconds since 1970; of a resumed run, less the time it ran before."""
    epoch_start_time = 0.0
    """When the epoch began, in seconds since 1970."""
    _runs: ManagedRuns
    _results: ResultTable
    _views: Views
    _said: set[str]
    _is_kept: bool
    _has_tensorboard: bool
    _meter: EpochMeter  # of the current epoch, or of the last one
    _last_run: Run | None = None
    _watch: LoopWatch
    _given_network: Any = None
    _trained: nn.Module | None = None  # the network, or all of them in one module
    _own_run: Any = None
    _run_record: Any = None  # a copy's own, whose further attributes each run gets
    _own_epoch: Any = None
    _own_tb: Any = None
    _epoch_names: EpochNames | None = None

    @property
    def network(self) -> Any:
        """The network of the run, or several as they were given; a loop may replace it."""
        return self._given_network

    @network.setter
    def network(self, network: Any) -> None:
        self._given_network = network.given if isinstance(network, Networks) else network
        trained = as_networks(network)
        self._trained = trained if isinstance(trained, nn.Module) else None
        if "_watch" in vars(self):
            self._watch.watch(self._trained)

    @property
    def run(self) -> Any:
        """The current Run, or the last one that ended; raises CallOrderError if there is none.

        If something else was assigned, such as a subclass's hyperparameters, it is that.
        """
        if self._own_run is not None:
            return self._own_run
        if self._last_run is not None and self._runs.open_run is None:
            return self._last_run
        return self._runs.current("run")

    @run.setter
    def run(self, value: object) -> None:
        self._own_run = None
        if not _is_record(value):
            self._own_run = value
        elif value is not None and not isinstance(value, Run):
            self._run_record = value
            if "_runs" in vars(self) and self._runs.open_run is not None:
                adopt(value, self._runs.open_run)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the current run or the last one, to use with MLflow's own functions."""
        run = self._runs.open_run or self._last_run
        return None if run is None else run.run_id

    @property
    def run_data(self) -> list[dict[str, Any]]:
        """The table that `save` writes: a row for each epoch of each run."""
        return self._results.rows

    @run_data.setter
    def run_data(self, rows: Iterable[dict[str, Any]] | None) -> None:
        if "_results" in vars(self):
            self._results.rows = rows if isinstance(rows, list) else list(rows or ())

    @property
    def epoch(self) -> Any:
        """The epoch's `count`, `loss`, `num_correct` and `start_time`, or what was assigned."""
        if self._own_epoch is not None:
            return self._own_epoch
        if self._epoch_names is None:
            self._epoch_names = EpochNames(self)
        return self._epoch_names

    @epoch.setter
    def epoch(self, value: object) -> None:
        self._own_epoch = None
        if not _is_record(value):
            self._own_epoch = value
        elif value is not None:
            adopt(value, self.epoch)

    @property
    def epoch_loss(self) -> float:
        """Sum of this epoch's losses over the samples of this rank; waits for the device."""
        return self._meter.loss_sum

    @epoch_loss.setter
    def epoch_loss(self, value: Any) -> None:
        if "_meter" in vars(self):
            self._meter.loss_sum = value
            self._warn_untracked(value)

    @property
    def epoch_num_correct(self) -> int:
        """Number of correct predictions in this epoch on this rank; waits for the device."""
        return self._meter.correct

    @epoch_num_correct.setter
    def epoch_num_correct(self, value: Any) -> None:
        if "_meter" in vars(self):
            self._meter.correct = value
            self._warn_untracked(value)

    def _warn_untracked(self, value: Any) -> None:
        """Warn of a subclass that sums a loss, but never lets this class begin a run."""
        if self._last_run is None and (hint := self._hint("begin_run")) and bool(value):
            say_once(f"Nothing is tracked.{hint}", said=self._said)

    @property
    def tb(self) -> Any:
        """The SummaryWriter of `tensorboard=` while a run is open, or the one assigned here.

        Without one, an object whose methods write nothing and say once what to pass.
        """
        writer = self._own_tb or self._views.writer
        if writer is None:
            return NoWriter(self._has_tensorboard, self._said if self._is_kept else None)
        return writer

    @tb.setter
    def tb(self, writer: Any) -> None:
        self._own_tb = writer

    def save(self, name: str | Path) -> None:
        """Write `run_data` to `name.csv` and `name.json`; raises ArgumentError if it cannot."""
        if is_main():
            self._results.save(name)

    def _hint(self, verb: str) -> str:
        """Return what to do if a subclass overrides the method `verb`."""
        if getattr(type(self), verb).__module__.startswith("tracker."):
            return ""
        return f" {type(self).__name__}.{verb}() must call super().{verb}()."

    def __getattr__(self, name: str) -> Any:
        kind = type(self).__name__
        if "_runs" not in vars(self) and not name.startswith("__"):
            raise NotInitializedError(
                f"{kind}.__init__() must call super().__init__() before the manager is used."
            )
        if hasattr(type(self), name):  # a property that has raised: let it say why
            return object.__getattribute__(self, name)
        message = f"{kind} has no method or attribute {name!r}"
        if name.startswith("_"):
            raise AttributeError(f"{message}.")
        if hasattr(Run, name):
            raise AttributeError(f"{message}; a run has it: manager.run.{name}.")
        from difflib import get_close_matches  # seldom needed

        names = [known for known in {*dir(type(self)), *vars(self)} if not known.startswith("_")]
        near = get_close_matches(name, sorted(names), n=1, cutoff=0.5)
        raise AttributeError(f"{message}; the nearest is {near[0]!r}." if near else f"{message}.")


_RECORD = ("count", "data", "params", "start_time", "loss", "num_correct")
"""What the records of the tutorial's later versions hold."""


def _is_record(value: object) -> bool:
    """Whether it is a copy's own record of a run or an epoch, with the same names as ours."""
    return value is None or (hasattr(value, "count") and hasattr(value, "start_time"))


def adopt(record: object, ours: object) -> None:
    """Give `ours` the public attributes and methods that only the user's `record` has."""
    for name in dir(record):
        if name.startswith("_") or name in _RECORD or hasattr(type(ours), name):
            continue
        value = getattr(record, name)
        if isinstance(value, MethodType) and value.__self__ is record:
            value = MethodType(value.__func__, ours)
        setattr(ours, name, value)


def _of_manager(name: str, doc: str) -> Any:
    return property(
        lambda self: getattr(self._manager, name),
        lambda self, value: setattr(self._manager, name, value),
        doc=doc,
    )


class EpochNames:
    """A manager's epoch under the names of the tutorial's later versions: `manager.epoch.count`.

    Scripts may set names of their own on it.
    """

    def __init__(self, manager: TutorialNames) -> None:
        self._manager = weakref.proxy(manager)  # a manager that is dropped ends its run at once

    count = _of_manager("epoch_count", "Number of epochs begun in this run.")
    loss = _of_manager("epoch_loss", "Sum of the losses over the samples; waits for the device.")
    num_correct = _of_manager(
        "epoch_num_correct", "Number of correct predictions; waits for the device."
    )
    start_time = _of_manager("epoch_start_time", "When the epoch began, in seconds since 1970.")
