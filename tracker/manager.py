"""RunManager: the verbs of the tutorial, on MLflow.

manager = RunManager()
for run in RunBuilder.get_runs(params):
    manager.begin_run(run, network, loader)
    for epoch in range(5):
        manager.begin_epoch()
        for batch in loader:
            ...
            manager.track_loss(loss, batch)
            manager.track_num_correct(preds, labels)
        manager.end_epoch()
    manager.end_run()
manager.save("results")
"""

from __future__ import annotations

import math
import os
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from tracker.builder import hyperparameters, run_name
from tracker.checks import checked_name, checked_number
from tracker.environment import describe_device, device_of, unwrap
from tracker.errors import ArgumentError, CallOrderError, NonFiniteLossError
from tracker.images import image_grid
from tracker.journal import now
from tracker.loop import Epoch
from tracker.meters import EpochMeter, batch_size
from tracker.run import DIRECTORY, Run
from tracker.samples import dataset_name, inputs_of, sample_batch
from tracker.statuses import Outcome, outcome
from tracker.uploader import InlineDelivery
from tracker.views.files import csv_text, json_text, write_atomically
from tracker.views.table import View, live_view
from tracker.views.tensorboard import TensorBoard

_SAMPLES = 64  # pictures in the sample grid


class RunManager:
    """Tracks one run after the other, each an MLflow run, tied together by a tag."""

    def __init__(
        self,
        *,
        experiment: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        directory: str | Path = DIRECTORY,
        batch_loss: bool = False,
        histograms: bool = True,
        model: bool = True,
        tensorboard: str | Path | None = None,
        stop_on_nonfinite: bool = False,
    ) -> None:
        """Nothing is opened before the first run begins.

        experiment: by default MLFLOW_EXPERIMENT_NAME, else `Default`.
        tracking_uri: by default the one that MLflow itself would use.
        tags: for every run.
        directory: holds the journal while a run lasts.
        batch_loss: log each batch's loss as the metric `batch_loss`, by global step from 1.
        histograms: log those of all weights and gradients, each epoch.
        model: log the trained network at the end of a run.
        tensorboard: also write event files below this folder.
        stop_on_nonfinite: raise NonFiniteLossError when an epoch's loss is NaN or infinite.
        """
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._tags = {"tracker.session": uuid.uuid4().hex, **(tags or {})}
        self._directory = Path(directory)
        self._batch_loss = batch_loss
        self._histograms = histograms
        self._model = model
        self._stop_on_nonfinite = stop_on_nonfinite
        self._views: list[View] = [view for view in [live_view()] if view is not None]
        if tensorboard is not None:
            self._views.append(TensorBoard(tensorboard))
        self._open = _Open()
        # Not atexit: a notebook's cell run again drops this manager with its run still open.
        self._finalizer = weakref.finalize(
            self, _Open.abandon, self._open, "when the program ended, or dropped its manager"
        )
        self._example: Tensor | None = None
        self._meter = EpochMeter()  # of the epoch that goes on, or of the last one
        self._in_epoch = False
        self._batch_times: list[int] = []
        self._steps = 0
        self._run_started = self._epoch_started = 0.0

        self.network: nn.Module | None = None
        """The network of the run."""
        self.loader: Any = None
        """The loader of the run."""
        self.run_params: Any = None
        """The hyperparameters of the run, as they were given to `begin_run`."""
        self.run_count = 0
        """Runs begun."""
        self.epoch_count = 0
        """Epochs begun in this run."""
        self.run_data: list[dict[str, Any]] = []
        """A row for each epoch of each run: what `save` writes."""

    # -- runs ------------------------------------------------------------------------------

    def begin_run(self, run: Any, network: nn.Module, loader: Any) -> Run:
        """Begin a run with the hyperparameters in `run`: a named tuple or a mapping.

        Logs them, the data set, a grid of sample pictures, the network's layers and graph. The
        loader's order, all random generators and the network's buffers stay as they are. A run
        that was not ended before is closed with the status that it truly has.

        Raises ArgumentError or StoreError, with nothing half-made, where a hyperparameter is not
        allowed or the store does not open.
        """
        params = hyperparameters(run)
        if self._open.run is not None:
            self._end(self._open.run.left("when the next run began", self._epoch_left()))
        told = {
            "model": type(unwrap(network)).__name__,
            "dataset": dataset_name(getattr(loader, "dataset", loader)),
            "device": str(device_of(network)),
            "seed": torch.initial_seed(),
        }
        if isinstance(size := getattr(loader, "batch_size", None), int):
            told["batch_size"] = size
        tags = self._tags | {"tracker.device": describe_device(device_of(network))}
        delivery = self._open.delivery or InlineDelivery(self._directory, self._tracking_uri)
        try:
            name = tags.get("mlflow.runName") or run_name(params)
            began = Run(delivery, told | params, self._experiment, name, tags)
        except BaseException:  # Ctrl-C too leaves nothing behind
            if self._open.delivery is None:
                delivery.close()
            raise
        self._open.delivery, self._open.run = delivery, began
        self.network, self.loader, self.run_params = network, loader, run
        self.run_count += 1
        self.epoch_count = self._steps = 0
        self._meter, self._in_epoch = EpochMeter(loader), False
        self._run_started = time.perf_counter()
        self._example = inputs_of(sample_batch(loader, _SAMPLES), _SAMPLES)
        if (dataset := getattr(loader, "dataset", None)) is not None:
            began.log_dataset(dataset)
        if self._example is not None and (grid := image_grid(self._example)) is not None:
            began.log_image("samples.png", grid)
        began.log_network(network, self._example)
        for view in self._views:
            view.begin_run(self.run_count, params, network, self._example)
        began.flush()
        return began

    def end_run(self) -> None:
        """End the run as FINISHED, and log the trained model.

        Raises CallOrderError where no run has begun.
        """
        self._current("end_run")
        self._end(outcome(None))

    def _end(self, ended: Outcome) -> None:
        run = self._current("end_run")
        if left := self._epoch_left():
            ended = Outcome("FAILED", f"The run ended {left}.") if ended.reason is None else ended
        if "epochs" not in run.params:
            run.log_params({"epochs": self.epoch_count - self._in_epoch})
        if self._model and ended.status == "FINISHED" and self.network is not None:
            run.log_model(self.network, self._example, step=self.epoch_count)
        run.end(ended)
        for view in self._views:
            view.end_run(ended.status)
        self._open.run, self._in_epoch = None, False

    def _epoch_left(self) -> str | None:
        return f"within epoch {self.epoch_count}" if self._in_epoch else None

    def _current(self, verb: str) -> Run:
        if self._open.run is None:
            raise CallOrderError(f"{verb}() was called without a run; call begin_run() first.")
        return self._open.run

    def close(self) -> None:
        """Deliver what is left. A run that is still open is closed as one that was never ended."""
        if self._open.run is not None:
            self._end(self._open.run.left("when the manager was closed", self._epoch_left()))
        self._finalizer()

    def __enter__(self) -> RunManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open.run is not None:
            self._end(outcome(error))
        self.close()

    # -- epochs ----------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Begin an epoch. Raises CallOrderError outside a run or within an epoch."""
        self._current("begin_epoch")
        if self._in_epoch:
            raise CallOrderError(
                f"begin_epoch() was called within epoch {self.epoch_count}; call end_epoch() first."
            )
        self._in_epoch = True
        self.epoch_count += 1
        self._meter = EpochMeter(self.loader)
        self._batch_times = []
        self._epoch_started = time.perf_counter()
        for view in self._views:
            view.begin_epoch(self.epoch_count, _length(self.loader))

    def track_loss(self, loss: Tensor | float, batch: Any = None) -> None:
        """Add the mean loss of a batch; nothing waits for the device.

        With `batch`, or its number of samples, the loss is weighted by that. Without it by the
        labels tracked for the batch, else by what the loader makes of its length.
        Raises CallOrderError outside an epoch.
        """
        self._in("track_loss").add_loss(loss, None if batch is None else batch_size(batch))
        if self._batch_loss:
            self._batch_times.append(now())
        for view in self._views:
            view.batch()

    def track_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Add the right predictions of a batch: scores (N, classes, …), class numbers (N, …).

        Raises CallOrderError outside an epoch.
        """
        self._in("track_num_correct").add_correct(preds, labels)

    def _in(self, verb: str) -> EpochMeter:
        if not self._in_epoch:
            raise CallOrderError(f"{verb}() was called outside an epoch; call begin_epoch() first.")
        return self._meter

    def end_epoch(self, metrics: Mapping[str, float] | None = None) -> None:
        """End the epoch: log its loss, accuracy, duration and histograms.

        `metrics` are more of them, of a validation for one: `{"val_loss": 0.4}`.
        Raises CallOrderError outside an epoch, and NonFiniteLossError if that was asked for.
        """
        meter = self._in("end_epoch")
        more = {
            checked_name(name, "metric"): checked_number(name, value)
            for name, value in (metrics or {}).items()
        }
        found = meter.compute() | more  # waits for the device, then the epoch is over
        found["epoch_duration"] = time.perf_counter() - self._epoch_started
        self._in_epoch = False
        self._log(found, meter.losses if self._batch_loss else (), self._batch_times)

    def log_epoch(self, epoch: Epoch) -> None:
        """Log an epoch of `fit`, as `begin_epoch` … `end_epoch` do for a loop of one's own.

        Raises CallOrderError outside a run or within an epoch, and NonFiniteLossError if that was
        asked for.
        """
        self._current("log_epoch")
        if self._in_epoch:
            raise CallOrderError("log_epoch() was called within an epoch; call end_epoch() first.")
        self.epoch_count += 1
        self._log(epoch.metrics, epoch.batch_losses if self._batch_loss else (), epoch.batch_times)

    def watch(self, loader: Iterable[Any]) -> Iterable[Any]:
        """`loader`, with the progress of each pass over it shown; for `fit`."""
        return _Watched(loader, self._views, self)

    def _log(self, metrics: Mapping[str, float], losses: Any, times: list[int]) -> None:
        run = self._current("end_epoch")
        epoch = self.epoch_count
        metrics = {**metrics, "run_duration": time.perf_counter() - self._run_started}
        run.log_metrics(metrics, epoch)
        run.log_epoch({"epoch": epoch, **metrics})
        if len(losses):
            run.log_series("batch_loss", losses, self._steps + 1, times)
            self._steps += len(losses)
        recorded = None
        if self._histograms and self.network is not None:
            recorded = run.log_histograms(self.network, epoch)
        self.run_data.append(_row(self.run_count, epoch, metrics, hyperparameters(self.run_params)))
        run.flush()
        for view in self._views:
            view.end_epoch(self.run_data, metrics, recorded)
        loss = metrics.get("loss", 0.0)
        if self._stop_on_nonfinite and not math.isfinite(loss):
            raise NonFiniteLossError(f"loss is {loss} in epoch {epoch} of run {run.run_id}.")

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run that goes on, for calls of your own."""
        return self._open.run.run_id if self._open.run is not None else None

    @property
    def epoch_loss(self) -> float:
        """The sum over this epoch's samples of their loss. Waits for the device."""
        return self._meter.loss_sum

    @property
    def epoch_num_correct(self) -> int:
        """How many predictions of this epoch were right. Waits for the device."""
        return self._meter.correct

    def save(self, name: str | Path) -> None:
        """Write `run_data` to `name.csv` and `name.json`, each as a whole or not at all.

        Raises ArgumentError where the folder does not exist or cannot be written.
        """
        try:
            write_atomically(Path(f"{name}.csv"), csv_text(self.run_data))
            write_atomically(Path(f"{name}.json"), json_text(self.run_data))
        except OSError as error:
            raise ArgumentError(f"name={str(name)!r} cannot be written: {error}.") from error


class _Open:
    """What of a manager must be closed: apart from it, so that it can be dropped."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.delivery: InlineDelivery | None = None
        self.run: Run | None = None

    def abandon(self, where: str) -> None:
        """Close a run that was never ended, and the journal."""
        if os.getpid() != self.pid:  # a fork has nothing to say about its parent's run
            return
        if self.run is not None:
            self.run.end(self.run.left(where))
            self.run = None
        if self.delivery is not None:
            self.delivery.close()
            self.delivery = None


class _Watched:
    """A loader that shows how far it is."""

    def __init__(self, loader: Iterable[Any], views: list[View], manager: RunManager) -> None:
        self._loader, self._views, self._manager = loader, views, manager

    def __iter__(self) -> Iterator[Any]:
        for view in self._views:
            view.begin_epoch(self._manager.epoch_count + 1, _length(self._loader))
        for batch in self._loader:
            yield batch
            for view in self._views:
                view.batch()


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None


def _row(
    run: int, epoch: int, metrics: Mapping[str, float], params: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of the tutorial's table: its columns, the hyperparameters, then other metrics."""
    first = {name: metrics[name] for name in ("loss", "accuracy") if name in metrics}
    durations = {f"{name} duration": metrics[f"{name}_duration"] for name in ("epoch", "run")}
    row = {"run": run, "epoch": epoch, **first, **durations}
    row |= {f"param {key}" if key in row else key: value for key, value in params.items()}
    known = (*first, "epoch_duration", "run_duration")
    return row | {key: value for key, value in metrics.items() if key not in known}
