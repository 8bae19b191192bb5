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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.capture.dataset import dataset_name, inputs_of, sample_batch
from tracker.capture.images import image_grid
from tracker.delivery.base import Delivery, NoDelivery, mode_of, open_delivery
from tracker.delivery.leftovers import settle_run
from tracker.errors import ArgumentError, CallOrderError, NonFiniteLossError
from tracker.grid import hyperparameters, run_name
from tracker.run import Run
from tracker.statuses import Outcome, outcome
from tracker.store.history import ResumeState, load_resume_state
from tracker.training.checkpoint import Checkpoint, Keep
from tracker.training.device import describe_device, device_of, unwrap
from tracker.training.distributed import is_main
from tracker.training.loop import Epoch
from tracker.training.meters import EpochMeter, batch_size
from tracker.training.rng import RandomStates
from tracker.validation import DIRECTORY, checked_name, checked_number
from tracker.views.files import csv_text, json_text, write_atomically
from tracker.views.table import View, live_view
from tracker.views.tensorboard import TensorBoard

if TYPE_CHECKING:
    from tracker.capture.model import Predictor

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
        checkpoints: Keep = Keep(),  # noqa: B008 - immutable
        tensorboard: str | Path | None = None,
        stop_on_nonfinite: bool = False,
        parent: Run | str | None = None,
        run: Run | None = None,
        inline: bool | None = None,
        offline: bool | None = None,
    ) -> None:
        """Nothing is opened before the first run begins.

        experiment: by default MLFLOW_EXPERIMENT_NAME, else `Default`.
        tracking_uri: by default the one that MLflow itself would use.
        tags: for every run.
        directory: holds the journal while a run lasts.
        batch_loss: log each batch's loss as the metric `batch_loss`, by global step from 1.
        histograms: log those of all weights and gradients, each epoch.
        model: log the trained network at the end of a run.
        checkpoints: which of those that `save_checkpoint` saves are kept.
        tensorboard: also write event files below this folder.
        stop_on_nonfinite: raise NonFiniteLossError when an epoch's loss is NaN or infinite.
        parent: the run that every run is a child of, or its id.
        run: an open run to log to, instead of one of its own; whoever started it ends it.
        inline: deliver from this thread, at each epoch's and run's end, not by a second process;
            by default as TRACKER_INLINE says.
        offline: keep the runs in their journal until `tracker sync`; by default as
            TRACKER_OFFLINE says.
        """
        self._mode = mode_of(inline=inline, offline=offline)
        self._parent = parent
        self._keep = checkpoints
        self._experiment = experiment
        self._tracking_uri = tracking_uri
        self._tags = {"tracker.session": uuid.uuid4().hex, **(tags or {})}
        self._directory = Path(directory)
        self._batch_loss = batch_loss
        self._histograms = histograms
        self._model = model
        self._stop_on_nonfinite = stop_on_nonfinite
        self._given = run
        view = live_view() if run is None else None
        self._views: list[View] = [] if view is None else [view]
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
        self._steps = 0
        self._main = True
        self._counts_epochs = True
        self._epoch_states: RandomStates | None = None
        self._metrics: dict[str, float] = {}  # of the last epoch
        self._kept: dict[int, Mapping[str, float]] = {}  # checkpoints by step
        self._earlier = run.earlier if run is not None else None
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

        self.checkpoint: Checkpoint | None = self._earlier.checkpoint if self._earlier else None
        """The checkpoint of the run that is continued; None where there is none."""

    @classmethod
    def resume(cls, run_id: str, **settings: Any) -> RunManager:
        """A manager whose next `begin_run` continues the MLflow run `run_id`.

        `checkpoint` is then the run's last one, for `checkpoint.restore(…)`, and after `begin_run`
        `epoch_count` is the number of epochs that are complete. Steps that the run has logged are
        not logged again; hyperparameters that differ go to the tags `tracker.param.NAME`.
        `settings` are those of `RunManager()`. Raises StoreError where there is no such run, or it
        still goes on.
        """
        manager = cls(**settings)
        settle_run(run_id, manager._tracking_uri, manager._directory)
        manager._earlier = load_resume_state(run_id, manager._tracking_uri)
        manager.checkpoint = manager._earlier.checkpoint
        return manager

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
            self._end(
                self._open.run.abandoned_outcome("when the next run began", self._epoch_left())
            )
        told = {
            "model": type(unwrap(network)).__name__,
            "dataset": dataset_name(getattr(loader, "dataset", loader)),
            "device": str(device_of(network)),
            "seed": torch.initial_seed(),
        }
        if isinstance(size := getattr(loader, "batch_size", None), int):
            told["batch_size"] = size
        tags = self._tags | {"tracker.device": describe_device(device_of(network))}
        earlier, self._earlier = self._earlier, None
        self._main = is_main()
        if self._given is not None:
            began = self._join(self._given, told | params, tags)
        else:
            began = self._begin(told | params, run_name(params), tags, earlier)
        self.network, self.loader, self.run_params = network, loader, run
        self.run_count += 1
        self.epoch_count = self._steps = 0
        self._counts_epochs = "epochs" not in params
        self._meter, self._in_epoch = EpochMeter(loader), False
        self._metrics, self._kept = {}, {}
        self._run_started = time.perf_counter()
        self._example = inputs_of(sample_batch(loader, _SAMPLES), _SAMPLES)
        if earlier is not None:
            self._continue(earlier)
        if self._main:
            self._describe(began, new=earlier is None or self._given is not None)
        for view in self._views:
            view.begin_run(self.run_count, params, network, self._example)
        began.deliver()
        return began

    def _begin(
        self,
        params: Mapping[str, Any],
        name: str | None,
        tags: Mapping[str, str],
        earlier: ResumeState | None,
    ) -> Run:
        """Begin a run of our own."""
        delivery = self._open.delivery or self._new_delivery()
        try:
            name = tags.get("mlflow.runName") or name
            began = Run(
                *(delivery, params, self._experiment, name, tags, self._parent), resume=earlier
            )
        except BaseException:  # Ctrl-C too leaves nothing behind
            if self._open.delivery is None:
                delivery.close()
            raise
        self._open.delivery, self._open.run = delivery, began
        return began

    def _join(self, given: Run, params: Mapping[str, Any], tags: Mapping[str, str]) -> Run:
        """Log to the run that somebody else has begun, and ends."""
        if self.run_count:
            raise CallOrderError("begin_run() was called twice; this manager logs to one run.")
        given.log_params(params)
        given.log_tags(tags)
        self._open.run, self._open.owns = given, False
        return given

    def _new_delivery(self) -> Delivery:
        if not self._main:  # under torchrun rank 0 alone writes
            self._views = []
            return NoDelivery()
        return open_delivery(self._directory, self._tracking_uri, self._mode)

    def _continue(self, earlier: ResumeState) -> None:
        """Count on from where the run that is continued was."""
        if earlier.checkpoint is not None:
            self.epoch_count, self._steps = earlier.checkpoint.epoch, earlier.checkpoint.step
            self._metrics = dict(earlier.checkpoint.metrics)
        self._kept = dict(earlier.kept)
        params = hyperparameters(self.run_params)
        for row in earlier.rows:
            metrics = {name: value for name, value in row.items() if name != "epoch"}
            self.run_data.append(_row(self.run_count, row["epoch"], metrics, params))
            self._run_started = time.perf_counter() - metrics.get("run_duration", 0.0)

    def _describe(self, run: Run, *, new: bool) -> None:
        """Log what the run works on and with."""
        if (dataset := getattr(self.loader, "dataset", None)) is not None:
            run.log_dataset(dataset)
        if not new:
            return
        if self._example is not None and (grid := image_grid(self._example)) is not None:
            run.log_image("samples.png", grid)
        assert self.network is not None
        run.log_network(self.network, self._example)

    def end_run(
        self, model_files: Mapping[str, str] | None = None, predictor: Predictor | None = None
    ) -> None:
        """End the run as FINISHED, and log the trained model.

        `model_files` and `predictor` travel with the model, as `Run.log_model` says.
        Raises CallOrderError where no run has begun.
        """
        self._current("end_run")
        self._end(outcome(None), files=model_files, predictor=predictor)

    def _end(self, ended: Outcome, **travels: Any) -> None:
        run = self._current("end_run")
        if left := self._epoch_left():
            ended = Outcome("FAILED", f"The run ended {left}.") if ended.reason is None else ended
        if self._counts_epochs:
            run.log_params({"epochs": self.epoch_count - self._in_epoch})
        model = self._model and self._main and ended.status == "FINISHED"
        if model and self.network is not None:
            run.log_model(self.network, self._example, step=self.epoch_count, **travels)
        if self._open.owns:
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
        if self._open.run is not None and not self._open.forked:
            self._end(
                self._open.run.abandoned_outcome("when the manager was closed", self._epoch_left())
            )
        self._finalizer()

    def __enter__(self) -> RunManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._open.run is not None and not self._open.forked:
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
        if (checkpoint := self._cut_off()) is not None:
            self._meter = EpochMeter.of(checkpoint.extra, self.loader)
            self._epoch_states = checkpoint.epoch_start
        else:
            self._meter = EpochMeter(self.loader)
            self._epoch_states = RandomStates.capture(self.loader)
        self._epoch_started = time.perf_counter()
        for view in self._views:
            view.begin_epoch(self.epoch_count, _length(self.loader))

    def track_loss(self, loss: Tensor | float, batch: Any = None) -> None:
        """Add the mean loss of a batch; nothing waits for the device.

        With `batch`, or its number of samples, the loss is weighted by that. Without it by the
        labels tracked for the batch, else by what the loader makes of its length.
        Raises CallOrderError outside an epoch.
        """
        size = None if batch is None else batch_size(batch)
        scalar = self._in("track_loss").add_loss(loss, size)
        self._steps += 1
        if self._batch_loss and self._open.run is not None:
            self._open.run.log_later("batch_loss", scalar, self._steps)
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
        found = self._in("end_epoch").compute()  # waits for the device and the other ranks
        found |= {
            checked_name(name, "metric"): checked_number(name, value)
            for name, value in (metrics or {}).items()
        }
        found["epoch_duration"] = time.perf_counter() - self._epoch_started
        self._in_epoch = False
        self._log(found)

    def log_epoch(self, epoch: Epoch) -> None:
        """Log an epoch of `fit`, as `begin_epoch` … `end_epoch` do for a loop of one's own.

        Raises CallOrderError outside a run or within an epoch, and NonFiniteLossError if that was
        asked for.
        """
        run = self._current("log_epoch")
        if self._in_epoch:
            raise CallOrderError("log_epoch() was called within an epoch; call end_epoch() first.")
        self.epoch_count += 1
        if self._batch_loss and len(epoch.batch_losses):
            run.log_series("batch_loss", epoch.batch_losses, self._steps + 1, epoch.batch_times)
        self._steps += len(epoch.batch_losses)
        self._log(epoch.metrics)

    def watch(self, loader: Iterable[Any], length: int | None = None) -> Iterable[Any]:
        """`loader`, with the progress of each pass over it shown; for `fit`.

        `length` is how many items it has, for one that does not say.
        """
        return _Watched(loader, self._views, self, length or _length(loader))

    def _log(self, metrics: Mapping[str, float]) -> None:
        run = self._current("end_epoch")
        epoch = self.epoch_count
        metrics = {**metrics, "run_duration": time.perf_counter() - self._run_started}
        self._metrics = metrics
        run.log_metrics(metrics, epoch)
        run.log_epoch({"epoch": epoch, **metrics})
        recorded = None
        if self._histograms and self._main and self.network is not None:
            recorded = run.log_histograms(self.network, epoch)
        self.run_data.append(_row(self.run_count, epoch, metrics, hyperparameters(self.run_params)))
        run.deliver()
        for view in self._views:
            view.end_epoch(self.run_data, metrics, recorded)
        loss = metrics.get("loss", 0.0)
        if self._stop_on_nonfinite and not math.isfinite(loss):
            raise NonFiniteLossError(f"loss is {loss} in epoch {epoch} of run {run.run_id}.")

    def save_checkpoint(
        self,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        """Save all that `resume` needs to go on from here, as an artifact of the run.

        That is the states of the network, of what is given, and of all random generators, between
        two epochs or after a batch's `track_loss`. Those that are not to be kept are deleted.
        Raises CallOrderError outside a run, and ArgumentError for a state that is not made of
        tensors, numbers and texts.
        """
        run = self._current("save_checkpoint")
        if not self._main or self.network is None:
            return
        saved = run.log_checkpoint(
            self._steps,
            network=self.network,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=scaler,
            loader=self.loader,
            epoch=self.epoch_count - self._in_epoch,
            position=len(self._meter) if self._in_epoch else 0,
            epoch_start=self._epoch_states if self._in_epoch else None,
            metrics=self._metrics,
            extra=self._meter.state() if self._in_epoch else None,
        )
        if not saved:  # the disk is full: the ones that there are stay
            return
        self._kept[self._steps] = self._metrics
        for step in self._keep.superseded(self._kept):
            run.delete_checkpoint(step)
            del self._kept[step]

    def rest_of_epoch(self) -> Iterable[Any]:
        """The batches of the first epoch of a run that is continued from the middle of one.

        Those that it was trained on are left out, their losses counted; later it is the loader.
        """
        checkpoint = self._cut_off()
        return self.loader if checkpoint is None else checkpoint.remaining(self.loader)

    def _cut_off(self) -> Checkpoint | None:
        """The checkpoint that was made in the middle of the epoch that goes on, if one was."""
        made = self.checkpoint
        return made if made and made.position and self._steps == made.step else None

    @property
    def earlier_params(self) -> Mapping[str, str]:
        """The params of the run that the next `begin_run` continues; none where there is none."""
        return {} if self._earlier is None else self._earlier.params

    @property
    def run(self) -> Run:
        """The run that goes on. Raises CallOrderError where there is none."""
        return self._current("run")

    @property
    def step(self) -> int:
        """Steps done in this run: calls of `track_loss`."""
        return self._steps

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run that goes on, for calls of your own."""
        return self._open.run.run_id if self._open.run is not None else None

    @property
    def epoch_loss(self) -> float:
        """The sum over this epoch's samples of their loss, of this rank. Waits for the device."""
        return self._meter.loss_sum

    @property
    def epoch_num_correct(self) -> int:
        """How many predictions of this epoch were right, on this rank. Waits for the device."""
        return self._meter.correct

    def save(self, name: str | Path) -> None:
        """Write `run_data` to `name.csv` and `name.json`, each as a whole or not at all.

        Raises ArgumentError where the folder does not exist or cannot be written.
        """
        try:
            if is_main():
                write_atomically(Path(f"{name}.csv"), csv_text(self.run_data))
                write_atomically(Path(f"{name}.json"), json_text(self.run_data))
        except OSError as error:
            raise ArgumentError(f"name={str(name)!r} cannot be written: {error}.") from error


class _Open:
    """What of a manager must be closed: apart from it, so that it can be dropped."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.delivery: Delivery | None = None
        self.run: Run | None = None
        self.owns = True

    @property
    def forked(self) -> bool:
        """Whether this is a fork, which has nothing to say about its parent's run."""
        return os.getpid() != self._pid

    def abandon(self, where: str) -> None:
        """Close a run that was never ended, and the journal."""
        if self.forked:
            return
        if self.run is not None and self.owns:
            self.run.end(self.run.abandoned_outcome(where))
        self.run = None
        if self.delivery is not None:
            self.delivery.close()
            self.delivery = None


class _Watched:
    """A loader that shows how far it is."""

    def __init__(
        self, loader: Iterable[Any], views: list[View], manager: RunManager, length: int | None
    ) -> None:
        self._loader, self._views, self._manager, self._length = loader, views, manager, length

    def __iter__(self) -> Iterator[Any]:
        for view in self._views:
            view.begin_epoch(self._manager.epoch_count + 1, self._length)
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
