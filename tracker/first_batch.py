"""What a run shows of its first batch: sample pictures, the graph, and the model's example."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from PIL.Image import Image
from torch import nn

from tracker.capture.example import Example, FirstInputs, inputs_of, pictures_of
from tracker.capture.example import as_example as as_example
from tracker.capture.images import image_grid
from tracker.run import Run
from tracker.views.base import View

logger = logging.getLogger(__name__)


class FirstBatch:
    """Describes a run once its loop has drawn a batch; nothing else is read from the data set."""

    def __init__(
        self,
        run: Run,
        network: nn.Module,
        view: View,
        is_new: bool,
        samples: bool,
        example: Example | None = None,
        loader: Any = None,
    ) -> None:
        """Wait for the first call of `network`.

        Args:
            run: The run to describe.
            network: Its network.
            view: Shows the first batch too.
            is_new: Whether the run lacks pictures and graph: it is not resumed.
            samples: Whether to keep samples; otherwise zeros stand for them, without pictures.
            example: The user's own example, described instead of the first batch.
            loader: If it is a list of batches, the first one is that of a loop that passes none.
        """
        self._run, self._network, self._view = run, network, view
        self._is_new, self._samples = is_new, samples
        self.is_seen = False
        """Whether the run is described."""
        self._example: Example | None = None
        self._drawn = loader[0] if isinstance(loader, (list, tuple)) and loader else None
        self._first = FirstInputs(network, example)
        weakref.finalize(self, self._first.remove).atexit = False

    def see(self, batch: Any = None) -> None:
        """Describe the run, if it has not been, by `batch` or the network's first inputs.

        The pictures are those of the batch, and the graph and the logged model have the inputs
        that the network was called with, which may be something else.
        """
        if self.is_seen:
            return
        try:
            batch = self._drawn if batch is None else batch
            passed, self._first.inputs = self._first.inputs, None
            if passed is None and (guess := inputs_of(batch)) is not None:
                passed = Example((guess,), {})
            if passed is None:
                return
            self.is_seen, self._first.is_wanted = True, False
            self._describe(passed.to("cpu"), batch)
        except Exception as error:  # noqa: BLE001 - training must go on
            self.is_seen = True
            logger.warning("The first batch is not logged: %r.", error)

    def _describe(self, example: Example, batch: Any) -> None:
        grid: Image | None = None
        if self._samples:
            tensors = (pictures_of(batch), pictures_of(example.leaves))
            grid = next((image_grid(tensor) for tensor in tensors if tensor is not None), None)
        else:
            example = example.zeros()
        self._example = example.first(4)
        if self._is_new:
            if grid is not None:
                self._run.log_image(grid, "samples.png")
            self._run.log_network(self._network, self._example)
        self._view.first_batch(self._network, self._example, grid)

    def close(self, *, finished: bool) -> Example | None:
        """Stop waiting, and return the example for the logged model, if there is one.

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
