"""What a loop tracks of each batch: loss and correct predictions, without waiting for a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tracker.capture.every import Every
from tracker.due_histograms import DueHistograms
from tracker.errors import CallOrderError
from tracker.first_batch import FirstBatch
from tracker.journal.records import Point, now
from tracker.loop_arguments import say_once
from tracker.run import Run
from tracker.training.epoch import OpenEpoch
from tracker.training.meters import EpochMeter
from tracker.transfers import read_later
from tracker.tutorial_names import TutorialNames

_UNSEEN = (
    "Histograms of steps and of activations need to see each batch: "
    "fit(network, manager.progress(loader), …)."
)


class BatchTracking(TutorialNames):
    """The part of a manager that runs in every step of the loop."""

    step: int
    """Number of steps in this run: calls of `track_loss`; a loop without any has its batches."""
    _first: FirstBatch | None
    _epoch: OpenEpoch | None
    _batch_loss: bool
    _every: Every | None
    _histograms: DueHistograms | None
    _due: DueHistograms | None  # the same, if steps matter to it
    _passed = 0  # steps of `fit` since the last epoch that was logged
    _accuracy: Callable[[Any, Any], Any] | None
    _counts_itself: bool  # whether a function of the user's counts correct predictions

    def track_loss(self, loss: Tensor | float, batch: Any = None) -> None:
        """Add the loss of a batch without waiting for the device.

        Args:
            loss: Mean loss of the batch: a number or a tensor that holds one.
            batch: The batch or its number of samples; default what its labels or the loader say.

        Raises:
            ArgumentError: The loss is not one number, or the batch has no size.
        """
        meter = (self._epoch or self._current_epoch("track_loss")).meter
        scalar = meter.add_loss(loss, meter.size_of(batch))
        self.step += 1
        if self._batch_loss and self._is_kept and (run := self._runs.open_run) is not None:
            number = scalar if isinstance(scalar, float) else read_later(scalar)
            run.append_points((Point("batch_loss", number, self.step, now()),))
        self._views.batch()
        if (first := self._first) is not None and not first.is_seen:
            first.see(batch)
        if (due := self._due) is not None and self.step >= due.step:
            due.after(self.step, self._trained)

    def _begin_histograms(self, run: Run) -> None:
        if (every := self._every) is not None and self._is_kept:
            arguments = run, self._trained, every, self._views, self.step, self._said
            self._histograms = DueHistograms(*arguments)
            self._due = self._histograms if every.steps or every.activations else None

    def _close_histograms(self) -> None:
        if self._histograms is not None:
            self._histograms.close()
        self._histograms = self._due = None

    def _begin_pass(self, batches: int | None) -> int:
        """Begin an epoch of `fit`, or a pass within an epoch, and return the epoch's number."""
        self._passed, number = 0, self.epoch_count + (self._epoch is None)
        if self._due is not None and self._epoch is None:
            self._due.begin_epoch(self._trained, number, self.step, self.step, batches)
        return number

    def _end_of_batch(self) -> None:
        """Receive the end of a step of `fit`."""
        self._see()
        if (due := self._due) is not None and self._epoch is None:
            self._passed += 1
            if (step := self.step + self._passed) >= due.step:
                due.after(step, self._trained)

    def _add_steps(self, steps: int) -> None:
        """Add the steps of a complete epoch of `fit`."""
        self.step += steps
        if self._due is not None and self._passed == 0:
            say_once(_UNSEEN, said=self._said)
        self._passed = 0

    def _see(self, batch: Any = None) -> None:
        if self._first is not None and not self._first.is_seen:
            self._first.see(batch)

    def track_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Add the number of correct predictions of a batch without waiting for the device.

        Args:
            preds, labels: Scores, shape (N, classes, …), and class numbers, shape (N, …); or one
                score for each label, which is a yes or no; or what `accuracy=` takes.

        Raises:
            ArgumentError: The shapes do not fit.
        """
        meter = (self._epoch or self._current_epoch("track_num_correct")).meter
        self._add_correct(meter, preds, labels)

    def _add_correct(self, meter: EpochMeter, preds: Tensor, labels: Tensor) -> None:
        if self._counts_itself:
            meter.add_counted(self._get_num_correct(preds, labels), labels)
        else:
            meter.add_correct(preds, labels)

    def _get_num_correct(self, preds: Any, labels: Any) -> Any:
        """Return the number of correct predictions of a batch; subclasses may override this.

        Returns:
            The number, out of the samples of the batch; or a pair, that and the number of labels.
        """
        if self._accuracy is not None:
            return self._accuracy(preds, labels)
        meter = EpochMeter()
        meter.add_correct(preds, labels)
        return meter.count

    @property
    def _is_counting_overridden(self) -> bool:
        function = getattr(self._get_num_correct, "__func__", None)
        return function is not BatchTracking._get_num_correct

    def track_val_loss(self, loss: Tensor | float, batch: Any = None) -> None:
        """Add the loss of a validation batch to `val_loss`; otherwise like `track_loss`."""
        self._add_loss("val", loss, batch)

    def track_val_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Add a validation batch to `val_accuracy`; otherwise like `track_num_correct`."""
        meter = self._current_epoch("track_val_num_correct").meter_of("val")
        self._add_correct(meter, preds, labels)

    def track_test_loss(self, loss: Tensor | float, batch: Any = None) -> None:
        """Add the loss of a test batch to `test_loss`; otherwise like `track_loss`."""
        self._add_loss("test", loss, batch)

    def track_test_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Add a test batch to `test_accuracy`; otherwise like `track_num_correct`."""
        meter = self._current_epoch("track_test_num_correct").meter_of("test")
        self._add_correct(meter, preds, labels)

    def _add_loss(self, part: str, loss: Tensor | float, batch: Any) -> None:
        meter = self._current_epoch(f"track_{part}_loss").meter_of(part)
        meter.add_loss(loss, meter.size_of(batch))

    def _current_epoch(self, verb: str) -> OpenEpoch:
        if self._epoch is None:
            raise CallOrderError(
                f"{verb}() was called outside an epoch; call begin_epoch() first."
                f"{self._hint('begin_epoch')}"
            )
        return self._epoch
