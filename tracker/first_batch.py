"""What a run shows of its first batch: sample pictures, the graph, and the model's example."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tracker.capture.example import Example, FirstInputs, as_example, inputs_of, pictures_of
from tracker.capture.images import image_grid
from tracker.errors import ArgumentError
from tracker.run import Run
from tracker.training.networks import Networks
from tracker.views.base import View

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)


def checked_example(network: Any, example: Any) -> Any:
    """Return the user's example as an `Example`, by name for several networks; None stays None.

    Raises:
        ArgumentError: No network takes it.
    """
    if example is None:
        return None
    if not isinstance(network, Networks):
        return as_example(network, example)
    if not isinstance(example, Mapping) or set(example) != set(network.parts):
        names = ", ".join(map(repr, network.parts))
        raise ArgumentError(f"example must be a mapping with an example for each of {names}.")
    return {name: as_example(part, example[name]) for name, part in network.parts.items()}


class FirstBatch:
    """Describes a run once its loop has drawn a batch; nothing else is read from the data set."""

    def __init__(
        self,
        run: Run,
        network: nn.Module,
        view: View,
        is_new: bool,
        samples: bool,
        example: Any = None,
        loader: Any = None,
    ) -> None:
        """Wait for the first call of `network`.

        Args:
            run: The run to describe.
            network: Its network.
            view: Shows the first batch too.
            is_new: Whether the run lacks pictures and graph: it is not resumed.
            samples: Whether to keep samples; otherwise zeros stand for them, without pictures.
            example: The user's own example, as `checked_example` returns it.
            loader: If it is a list of batches, the first one is that of a loop that passes none.
        """
        self._run, self._network, self._view = run, network, view
        self._is_new, self._samples = is_new, samples
        self.is_seen = False
        """Whether the run is described."""
        self._examples: dict[str, Example] = {}
        self._drawn = loader[0] if type(loader) in (list, tuple) and loader else None
        parts = network.parts if isinstance(network, Networks) else {"": network}
        self._parts: dict[str, nn.Module] = parts
        known = example if isinstance(network, Networks) else {"": example}
        self._first = {k: FirstInputs(part, (known or {}).get(k)) for k, part in parts.items()}
        for first in self._first.values():
            weakref.finalize(self, first.remove).atexit = False

    def see(self, batch: Any = None, *, is_last: bool = False) -> None:
        """Describe the run, if it has not been, by `batch` or the network's first inputs.

        Of several networks each must have been called, unless this is the last chance.

        The pictures are those of the batch, and the graph and the logged model have the inputs
        that the network was called with, which may be something else.
        """
        if self.is_seen:
            return
        try:
            batch = self._drawn if batch is None else batch
            passed = {k: f.inputs for k, f in self._first.items() if f.inputs is not None}
            if "" in self._first and not passed and (guess := inputs_of(batch)) is not None:
                passed = {"": Example((guess,), {})}
            if not passed or (len(passed) < len(self._first) and not is_last):
                return
            self.is_seen = True
            for first in self._first.values():
                first.is_wanted, first.inputs = False, None
            self._describe({name: each.to("cpu") for name, each in passed.items()}, batch)
        except Exception as error:  # noqa: BLE001 - training must go on
            self.is_seen = True
            logger.warning("The first batch is not logged: %r.", error)

    def _describe(self, passed: dict[str, Example], batch: Any) -> None:
        grid: Image | None = None
        if self._samples:
            tensors = (pictures_of(part) for part in (batch, *(e.leaves for e in passed.values())))
            grid = next((image_grid(tensor) for tensor in tensors if tensor is not None), None)
        else:
            passed = {name: example.zeros() for name, example in passed.items()}
        self._examples = {name: example.first(4) for name, example in passed.items()}
        if self._is_new:
            if grid is not None:
                self._run.log_image(grid, "samples.png")
            self._run.log_network(self._network, self._example)
        name, example = next(iter(self._examples.items()))
        self._view.first_batch(self._parts[name], example, grid)

    @property
    def _example(self) -> Any:
        return self._examples if "" not in self._parts else self._examples.get("")

    def close(self, *, finished: bool) -> Any:
        """Stop waiting, and return the example for the logged model, if there is one.

        For several networks it is a dict of those there are.

        Args:
            finished: Whether the run ends well; otherwise the network is not called any more.
        """
        if finished:
            self.see(is_last=True)
        for first in self._first.values():
            first.remove()
        if not self.is_seen and self._is_new:
            self._run.log_network(self._network, None)
        self.is_seen = True
        return self._example
