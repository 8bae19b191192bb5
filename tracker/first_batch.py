"""What a run shows of its first batch: sample pictures, the graph, and the model's example."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tracker.capture.example import FirstInputs, inputs_of
from tracker.capture.images import image_grid
from tracker.run import Run
from tracker.views.base import View

logger = logging.getLogger(__name__)


class FirstBatch:
    """Describes a run once its loop has drawn a batch; nothing else is read from the data set."""

    def __init__(
        self, run: Run, network: nn.Module, view: View, is_new: bool, samples: bool
    ) -> None:
        """Wait for the first call of `network`.

        Args:
            run: The run to describe.
            network: Its network.
            view: Shows the first batch too.
            is_new: Whether the run lacks pictures and graph: it is not resumed.
            samples: Whether to keep samples; otherwise zeros stand for them, without pictures.
        """
        self._run, self._network, self._view = run, network, view
        self._is_new, self._samples = is_new, samples
        self.is_seen = False
        """Whether the run is described."""
        self._example: Tensor | None = None
        self._first = FirstInputs(network)
        weakref.finalize(self, self._first.remove).atexit = False

    def see(self, batch: Any = None) -> None:
        """Describe the run, if it has not been, by `batch` or the network's first inputs.

        The pictures are those of the batch, and the graph and the logged model have the inputs
        that the network was called with, which may be something else.
        """
        if self.is_seen:
            return
        try:
            drawn, passed = inputs_of(batch), self._first.inputs
            if drawn is None and passed is None:
                return
            self.is_seen, self._first.is_wanted, self._first.inputs = True, False, None
            self._describe(*(t if t is None else t.cpu() for t in (drawn, passed)))
        except Exception as error:  # noqa: BLE001 - training must go on
            self.is_seen = True
            logger.warning("The first batch is not logged: %r.", error)

    def _describe(self, drawn: Tensor | None, passed: Tensor | None) -> None:
        example = drawn if passed is None else passed
        assert example is not None
        grid = None
        if self._samples:
            grids = (image_grid(tensor) for tensor in (drawn, passed) if tensor is not None)
            grid = next((grid for grid in grids if grid is not None), None)
        else:
            example = torch.zeros_like(example)
        self._example = example[:4].clone()
        if self._is_new:
            if grid is not None:
                self._run.log_image(grid, "samples.png")
            self._run.log_network(self._network, self._example)
        self._view.first_batch(self._network, self._example, grid)

    def close(self, *, finished: bool) -> Tensor | None:
        """Stop waiting, and return the example for the logged model, (N, …), if there is one.

        Args:
            finished: Whether the run ends well; otherwise the network is not called any more.
        """
        if finished:
            self.see()
        self._first.remove()
        if not self.is_seen and self._is_new:
            self._run.log_network(self._network, None)
        self.is_seen = True
        return self._example
