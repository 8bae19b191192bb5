"""When histograms are logged, and from when on the network's outputs are counted for them."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from tracker.capture.activations import Activations
from tracker.capture.every import Every
from tracker.run import Run
from tracker.training.watch import gradient_metrics, gradient_norm
from tracker.views.base import View

_NEVER = sys.maxsize
_SHORT = (
    "Epoch %d has no histograms of activations, which are those of its last step: "
    "it had %d steps instead of %d."
)

logger = logging.getLogger(__name__)


class DueHistograms:
    """Logs the histograms of one run when `every` says."""

    step: int
    """The step after which `after` must be called next."""

    def __init__(
        self,
        run: Run,
        network: nn.Module | None,
        every: Every,
        view: View,
        step: int,
        said: set[str],
    ) -> None:
        """Begin.

        Args:
            run: The run.
            network: Its network, wrapped or not, or several; later calls may have another one.
            every: When to log, and what.
            view: Shows histograms of steps; those of epochs are returned.
            step: Number of steps that the run has made.
            said: The warnings that were given.
        """
        self._run, self._every, self._view, self._said = run, every, view, said
        self._activations: Activations | None = None
        if every.activations:
            self._activations = Activations(every, said)
            weakref.finalize(self, self._activations.stop).atexit = False
        self._began = self._last = step  # of the epoch: the steps before it, and its last one
        self._length: int | None = None  # of the last epoch
        self.step = _NEVER
        if every.steps:
            self._wait_from(step, network)

    def _wait_from(self, step: int, network: nn.Module | None) -> None:
        """Set what comes after `step`: first the outputs of the step before they are logged."""
        steps = self._every.steps or 1
        due = step - step % steps + steps
        if self._activations is None:
            self.step = due
        elif step == due - 1:
            self._activations.start(network)
            self.step = due
        else:
            self.step = due - 1

    def begin_epoch(
        self, network: nn.Module | None, epoch: int, began: int, step: int, batches: int | None
    ) -> None:
        """Expect the last step of an epoch, if its histograms are due.

        Args:
            network: The network.
            epoch: Its number.
            began: Number of steps before it.
            step: Number of steps so far: more than `began` in the middle of a resumed epoch.
            batches: Its number of batches, if it is known; else its first batch has to do.
        """
        self._began = began
        if self._activations is None or self._every.steps:
            return
        self.step = _NEVER
        if self._every.is_due(epoch=epoch):
            length = self._length or batches or 0
            self._last = max(began + length, step + 1)
            self.step = self._last - 1
            if step == self.step:
                self.after(step, network)

    def after(self, step: int, network: nn.Module | None) -> None:
        """Do what is due after this step."""
        if self._every.steps:
            if step % self._every.steps == 0 and network is not None:
                self._view.histograms(step, self._log(network, step))
            self._wait_from(step, network)
        elif self._activations is not None and step < self._last:
            self._activations.start(network)
            self.step = self._last
        elif self._activations is not None:
            self._activations.stop()
            self.step = _NEVER

    def end_epoch(
        self, network: nn.Module | None, epoch: int, step: int, *, norm: bool
    ) -> tuple[Mapping[str, Any] | None, dict[str, float]]:
        """Log the histograms of this epoch if they are due.

        Args:
            network: The network.
            epoch: The number of the epoch.
            step: Number of steps so far.
            norm: Whether the norm of the gradients is wanted.

        Returns:
            The record of the histograms, None if they are not due; and the metric of the norm.
        """
        made, expected = step - self._began, self._last - self._began
        self._length = made or None
        if network is None or not self._every.is_due(epoch=epoch):
            return None, {}
        if self._activations is not None and made < expected - 1 and _SHORT not in self._said:
            self._said.add(_SHORT)
            logger.warning(_SHORT, epoch, made, expected)
        total = gradient_norm(network) if norm else None
        record = self._log(network, epoch)
        return record, gradient_metrics(total, record)

    def _log(self, network: nn.Module, number: int) -> Mapping[str, Any]:
        outputs = [] if self._activations is None else self._activations.take()
        return self._run.log_histograms(network, number, self._every, outputs=outputs)

    def close(self) -> None:
        """Remove what watches the network."""
        if self._activations is not None:
            self._activations.stop()
