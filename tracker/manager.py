"""RunManager: the tutorial's methods on MLflow; the README shows a loop that uses them."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from tracker.batch_tracking import BatchTracking
from tracker.capture.every import Every, checked_every
from tracker.capture.facts import training_facts, training_tags
from tracker.cells import when_cell_fails
from tracker.delivery.base import mode_of
from tracker.errors import CallOrderError, NonFiniteLossError, stays_here
from tracker.first_batch import FirstBatch, checked_example
from tracker.journal.records import Point
from tracker.loop_arguments import LoopArguments, given_metrics, params_among, say_once
from tracker.managed_runs import ManagedRuns
from tracker.run import Run
from tracker.statuses import Outcome, outcome
from tracker.store.history import ResumeState
from tracker.training.checkpoint import Checkpoint, Keep, Retention
from tracker.training.epoch import OpenEpoch, Rest
from tracker.training.loop import Epoch
from tracker.training.meters import EpochMeter
from tracker.training.watch import LoopWatch, beside
from tracker.tutorial_names import adopt
from tracker.validation import DIRECTORY, checked_metrics, checked_name, named_values
from tracker.views.base import ShownLoader, Views, length_of
from tracker.views.choice import views_of
from tracker.views.files import ResultTable

if TYPE_CHECKING:
    from tracker.capture.model import Predictor

_REPEATED = (
    "save_checkpoint() cannot tell how much of the epoch is done, and a resumed run repeats it; "
    "loop over rest_of_epoch(), or call track_loss() for each batch."
)


class RunManager(BatchTracking):
    """Tracks one run after another as MLflow runs with a common tag `tracker.session`.

    A method that is called out of order raises CallOrderError, and changes nothing.
    """

    __reduce__ = stays_here("RunManager", "make one there, with RunManager(parent=run_id)")

    def __init__(
        self,
        *,
        experiment: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
        directory: str | Path = DIRECTORY,
        batch_loss: bool = False,
        accuracy: Callable[[Any, Any], Any] | None = None,
        histograms: bool | Every = True,
        loop_metrics: bool = True,
        model: bool | Literal["pickle"] = True,
        samples: bool = True,
        digest: bool = True,
        checkpoints: Keep = Keep(),  # noqa: B008 - immutable
        tensorboard: str | Path | None = None,
        stop_on_nonfinite: bool = False,
        rename: bool = False,
        parent: Run | str | None = None,
        run: Run | None = None,
        inline: bool | None = None,
        offline: bool | None = None,
        exit_timeout: float | None = None,
    ) -> None:
        """Configure the runs; nothing is opened before the first one begins.

        Args:
            experiment: Name of the experiment; default MLFLOW_EXPERIMENT_NAME, then `Default`.
            tracking_uri: Where runs are delivered; default the one that MLflow would use.
            tags: Tags of every run.
            directory: Holds the journal while a run lasts.
            batch_loss: Log the loss of each batch as `batch_loss`, by global step from 1.
            accuracy: `accuracy(preds, labels)` returns the number of correct predictions in the
                batch; or a pair: that, and the number of labels. Numbers or tensors.
            histograms: Log those of weights and gradients in each epoch, or as `Every(…)` says.
            loop_metrics: Log learning rates, speed, data wait, memory, gradient norm of each epoch.
            model: Log the trained network at the end of a run; "pickle": with its class.
            samples: Keep samples of the first batch: as pictures, and as the model's example.
            digest: Log a digest of the data that the data set holds in memory.
            checkpoints: Which checkpoints of `save_checkpoint` to keep.
            tensorboard: Also write event files below this folder.
            stop_on_nonfinite: Raise NonFiniteLossError if an epoch's loss is NaN or infinite.
            rename: Rename metrics, params and tags that MLflow refuses: `AR@100` to `AR_at_100`.
            parent: Parent of every run, or its id.
            run: Log to this open run, which the caller ends, instead of to new ones.
            inline: Deliver from this thread, not from a second process; default TRACKER_INLINE.
            offline: Keep runs on disk until `tracker sync`; default TRACKER_OFFLINE.
            exit_timeout: Seconds that ends wait for the delivery; default TRACKER_EXIT_TIMEOUT.

        Raises:
            ArgumentError: Two arguments exclude each other, or TensorBoard is not installed.
        """
        self._runs = ManagedRuns(
            experiment=experiment,
            tracking_uri=tracking_uri,
            directory=directory,
            mode=mode_of(inline=inline, offline=offline),
            exit_timeout=exit_timeout,
            tags=tags,
            parent=parent,
            joined=run,
            rename=rename,
        )
        if checkpoints.best is not None and not rename:
            checked_name(checkpoints.best, "metric")
        # Not atexit: running a notebook's cell again drops this manager with its run still open.
        self._finalizer = weakref.finalize(
            self, self._runs.close, "when the program ended or its manager was garbage-collected"
        )
        self._keep = checkpoints
        self._batch_loss = batch_loss
        self._accuracy = accuracy
        self._every = checked_every(histograms)
        self._loop_metrics = loop_metrics
        self._model = model
        self._samples = samples
        self._digest = digest
        self._stop_on_nonfinite = stop_on_nonfinite
        self._results = ResultTable()
        self._views = views_of(self._results, tensorboard, live=run is None)
        self._has_tensorboard = tensorboard is not None
        self._first: FirstBatch | None = None
        self._histograms = self._due = None
        self._other_loaders: Mapping[str, Any] = {}
        self._epoch: OpenEpoch | None = None
        self._meter = EpochMeter()
        self._is_kept = True
        self._run_started = 0.0
        self._said: set[str] = set()  # warnings that are given once
        self._metrics: dict[str, float] = {}  # of the last epoch
        self._resume_state = run.resume_state if run is not None else None

        self.step = 0
        self.checkpoint: Checkpoint | None = getattr(self._resume_state, "checkpoint", None)
        """The checkpoint from which the run is resumed, or None."""

    @classmethod
    def resume(cls, run_id: str, **settings: Any) -> RunManager:
        """Return a manager whose next `begin_run` continues an MLflow run.

        Its `checkpoint` is the last one of the run, for `checkpoint.restore(…)`; after `begin_run`,
        `epoch_count` is the number of complete epochs. Steps that the run has logged are not logged
        again; hyperparameters that differ become the tags `tracker.param.NAME`. In a process group
        all ranks must call it.

        Args:
            run_id: MLflow's id of the run.
            settings: Arguments of `RunManager()`.

        Raises:
            StoreError: The run does not exist, or its process may still be running.
        """
        manager = cls(**settings)
        manager._resume_state = manager._runs.load(run_id)
        manager.checkpoint = manager._resume_state.checkpoint
        return manager

    def begin_run(
        self,
        run: Any = None,
        network: nn.Module | None = None,
        loader: Any = None,
        *more: Any,
        example: Any = None,
        **named: Any,
    ) -> Run:
        """Begin a run, and log its hyperparameters and data sets.

        No sample is drawn: pictures, graph and the model's example are taken from the loop's first
        batch. A run that is still open is closed with the status of an abandoned one.

        Args:
            run: Hyperparameters: a named tuple, mapping, dataclass or namespace.
            network: The network to train, or several in a tuple, list or mapping; without one,
                weights and a model are not logged.
            loader: Yields the batches.
            more: A device, which is compared with the network's, and loaders or data sets to
                validate and test with; one warning names what is something else.
            example: Inputs as for `Run.log_model`; default those of the network's first call.
            named: As `more`; the name of a loader says what it is for (`val_loader=`).

        Raises:
            ArgumentError: A hyperparameter is not allowed; nothing has begun.
            StoreError: The store cannot be opened; nothing has begun.
        """
        run = params_among(named) if run is None else run
        params = {} if run is None else named_values(run, "run")
        given = LoopArguments.of(network, loader, more, named, self._said)
        network, loader = given.network, given.loader
        inputs = None if network is None else checked_example(network, example)
        self._abandon("when the next run began")
        resume_state, self._resume_state = self._resume_state, None
        facts, tags = training_facts(network, loader), training_tags(network)
        tracked = self._runs.begin(params, facts, tags, resume_state)
        self._is_kept = tracked.is_kept
        if not self._is_kept:
            self._views = Views(self._results)
        self.network = network
        self.loader = loader
        self._other_loaders = given.others
        self.run_params = run
        self.run_count += 1
        self.epoch_count = self.step = 0
        self._epoch = None
        self._watch = LoopWatch(network, loader, self._loop_metrics and self._is_kept)
        self._meter = EpochMeter(loader)
        self._metrics = {}
        self._retention = Retention(self._keep, resume_state.kept if resume_state else None)
        self._run_started, self.run_start_time = time.perf_counter(), time.time()
        self._last_run = tracked
        tracked.given, tracked.count, tracked.data = params, self.run_count, self.run_data
        adopt(self._run_record, tracked)
        self._views.begin_run(self.run_count, params)
        when_cell_fails(self._end_open)
        if self._is_kept:
            for context, dataset in given.datasets.items():
                tracked.log_dataset(dataset, context, digest=self._digest)
            is_new = resume_state is None or self._runs.joined is not None
            self._first = None
            if network is not None:
                self._first = FirstBatch(
                    tracked, network, self._views, is_new, self._samples, inputs, loader
                )
        if resume_state is not None:
            self._continue(resume_state)
        self._begin_histograms(tracked)
        tracked.deliver()
        return tracked

    def _continue(self, state: ResumeState) -> None:
        if state.checkpoint is not None:
            self.epoch_count = state.checkpoint.epoch
            self.step = state.checkpoint.step
            self._metrics = dict(state.checkpoint.metrics)
        for row in state.rows:
            metrics = {name: value for name, value in row.items() if name != "epoch"}
            self._results.end_epoch(row["epoch"], metrics, None)
            before = metrics.get("run_duration", 0.0)
            self._run_started = time.perf_counter() - before
            self.run_start_time = time.time() - before

    def end_run(
        self, model_files: Mapping[str, str] | None = None, predictor: Predictor | None = None
    ) -> None:
        """End the run as FINISHED, and log the trained model.

        Args:
            model_files, predictor: `files` and `predictor` of `Run.log_model`.
        """
        if model_files is not None and not isinstance(model_files, Mapping):
            what = "end_run() has no use for a %s; model_files are texts by name."
            say_once(what, type(model_files).__name__, said=self._said)
            model_files = None
        self._end(outcome(None), files=model_files, predictor=predictor)

    def _end(self, ended: Outcome, **model_extras: Any) -> None:
        run = self._runs.current("end_run")
        if self._epoch is not None and ended.reason is None:
            ended = Outcome("FAILED", f"The run ended within epoch {self.epoch_count}.")
        try:
            run.log_facts({"epochs": self.epoch_count - (self._epoch is not None)})
            if self._first is not None:
                example = self._first.close(finished=ended.status == "FINISHED")
                if self._model and ended.status == "FINISHED" and self._trained is not None:
                    model_extras |= {"step": self.epoch_count, "pickle": self._model == "pickle"}
                    run.log_model(self._trained, example, **model_extras)
        except BaseException as error:
            ended = ended if isinstance(error, Exception) else outcome(error)
            raise
        finally:  # whatever was raised, the run gets its status
            self._epoch = self._first = None
            self._close_histograms()
            self._watch.close()
            self._runs.end(ended)
            self._views.end_run(ended.status)

    def _abandon(self, when: str) -> None:
        if (run := self._runs.open_run) is not None and not self._runs.is_forked:
            where = f"within epoch {self.epoch_count}, {when}" if self._epoch else when
            self._end(run.abandoned_outcome(where))

    def close(self) -> None:
        """Deliver the rest; a run that is still open ends with the status of an abandoned one."""
        self._abandon("when the manager was closed")
        self._finalizer()

    def __enter__(self) -> RunManager:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end_open(outcome(error))
        self.close()

    def _end_open(self, ended: Outcome) -> None:
        if self._runs.open_run is not None and not self._runs.is_forked:
            self._end(ended)

    def begin_epoch(self, *unused: Any, **named: Any) -> None:
        """Begin an epoch; arguments, such as its number, are ignored with one warning."""
        if unused or named:
            say_once("begin_epoch() takes no arguments and ignores those given.", said=self._said)
        self._runs.current("begin_epoch")
        if self._epoch is not None:
            raise CallOrderError(
                f"begin_epoch() was called within epoch {self.epoch_count}; call end_epoch() first."
                f"{self._hint('end_epoch')}"
            )
        self.epoch_count += 1
        self._counts_itself = self._accuracy is not None or self._is_counting_overridden
        saved = self._mid_epoch_checkpoint()
        self._epoch = OpenEpoch(self.loader, self._other_loaders, saved, self._said, self._watch)
        self._meter, self.epoch_start_time = self._epoch.meter, time.time()
        batches = length_of(self.loader)
        if self._due is not None:
            began = self.step - len(self._meter)
            self._due.begin_epoch(self._trained, self.epoch_count, began, self.step, batches)
        self._views.begin_epoch(self.epoch_count, batches)

    def end_epoch(
        self, metrics: Mapping[str, float] | None = None, *more: Any, **named: Any
    ) -> dict[str, float]:
        """End the epoch, and log its loss, accuracy, duration and histograms.

        Args:
            metrics: More metrics to log, such as `{"val_loss": 0.4}`.
            more: Further mappings; one warning names a network, a loader and the like.
            named: The same by name: `val_loss=0.4`.

        Returns:
            All metrics of the epoch.

        Raises:
            ArgumentError: A metric is not allowed; the epoch has not ended.
            NonFiniteLossError: The loss is NaN or infinite and `stop_on_nonfinite` is set.
        """
        epoch, run = self._current_epoch("end_epoch"), self._runs.current("end_epoch")
        epoch_metrics = epoch.compute()  # waits for the device and for the other ranks
        given = given_metrics((metrics, *more), named, self._said)
        epoch_metrics |= checked_metrics(given, run.name_of)
        epoch_metrics["epoch_duration"] = epoch.seconds
        self._epoch = None
        if not len(epoch.meter):  # its checkpoints have steps too
            self.step += max(1, epoch.untracked_steps)
        self._log_metrics(epoch_metrics, self._watch.end(epoch.meter))
        return dict(self._metrics)

    def log_epoch(self, epoch: Epoch) -> None:
        """Log an epoch of `fit`; raises NonFiniteLossError as `end_epoch` does."""
        run = self._runs.current("log_epoch")
        if self._epoch is not None:
            raise CallOrderError("log_epoch() was called within an epoch; call end_epoch() first.")
        self.epoch_count += 1
        if self._batch_loss:
            batches = zip(count(self.step + 1), epoch.batch_losses.tolist(), epoch.batch_times)
            run.append_points([Point("batch_loss", loss, step, at) for step, loss, at in batches])
        self._add_steps(len(epoch.batch_losses))
        self._log_metrics(epoch.metrics, epoch.observed if self._loop_metrics else {})

    def progress(self, loader: Iterable[Any], length: int | None = None) -> Iterable[Any]:
        """Wrap a loader for `fit`: the manager shows the progress of each epoch and sees its steps.

        Args:
            loader: Yields the batches.
            length: Number of batches; default that of the loader, if it has one.
        """
        return ShownLoader(loader, self._views, self._begin_pass, length, self._end_of_batch)

    def _log_metrics(self, metrics: Mapping[str, float], observed: Mapping[str, float]) -> None:
        run, epoch = self._runs.current("end_epoch"), self.epoch_count
        self._see()
        seconds = time.perf_counter() - self._run_started
        self._metrics = metrics = {**metrics, "run_duration": seconds}
        run.log_metrics(metrics, epoch)
        run.log_epoch({"epoch": epoch} | {k: v for k, v in metrics.items() if k != "epoch"})
        histograms = None
        if (due := self._histograms) is not None:
            ended = due.end_epoch(self._trained, epoch, self.step, norm=self._loop_metrics)
            histograms, observed = ended[0], {**observed, **ended[1]}
        observed = beside(observed, metrics)
        run.log_metrics(observed, epoch)
        run.deliver()
        self._views.end_epoch(epoch, metrics, histograms)
        self._views.observed(epoch, observed)
        if self._stop_on_nonfinite and not math.isfinite(loss := metrics.get("loss", 0.0)):
            raise NonFiniteLossError(f"loss is {loss} in epoch {epoch} of run {run.run_id}.")

    def save_checkpoint(self, **objects: Any) -> None:
        """Log all states that `resume` needs, and delete superseded checkpoints.

        Call it between two epochs, or after any batch of a loop over `rest_of_epoch()`. The states
        of the network and of all random generators are always included.

        Args:
            objects: Optimizers, schedulers, scalers, other networks and whatever has `state_dict`,
                or lists and dicts of them, by the names that `checkpoint.restore` takes.

        Raises:
            ArgumentError: A state holds more than tensors, numbers and text.
        """
        run = self._runs.current("save_checkpoint")
        if not self._is_kept or self._trained is None:
            return
        step = self.step
        if self._epoch is not None:
            step += self._epoch.untracked_steps
            if not self._epoch.position:
                say_once(_REPEATED, said=self._said)
        if run.log_checkpoint(
            step,
            network=objects.pop("network", self.network),
            objects=objects,
            loader=self.loader,
            epoch=self.epoch_count - (self._epoch is not None),
            metrics=self._metrics,
            **({} if self._epoch is None else self._epoch.checkpoint_fields()),
        ):  # else the disk is full, and the older ones must stay
            for superseded in self._retention.add(step, self._metrics):
                run.delete_checkpoint(superseded)

    def rest_of_epoch(self) -> Iterable[Any]:
        """Return the batches of an epoch, without those trained on before the run was resumed."""
        checkpoint = self._mid_epoch_checkpoint()
        if self._epoch is not None:
            return Rest(self._epoch, self.loader, checkpoint)
        return self.loader if checkpoint is None else checkpoint.remaining(self.loader)

    def _mid_epoch_checkpoint(self) -> Checkpoint | None:
        saved = self.checkpoint
        return saved if saved and saved.position and self.step == saved.step else None

    @property
    def resumed_params(self) -> Mapping[str, str]:
        """Params of the run that the next `begin_run` continues; empty if it begins a new one."""
        return {} if self._resume_state is None else self._resume_state.params
