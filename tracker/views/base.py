"""The events that a view of a training receives, and the fan-out to several views."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from tracker.capture.example import Example

logger = logging.getLogger(__name__)


class View:
    """Shows a manager's runs while they last; subclasses override the events they need."""

    @property
    def writer(self) -> Any:
        """TensorBoard's SummaryWriter, of a view that has one open."""
        return None

    def begin_run(self, number: int, params: Mapping[str, Any]) -> None:
        """Receive the start of a run.

        Args:
            number: Number of the run in its manager, from 1.
            params: Hyperparameters of the run.
        """

    def first_batch(self, network: nn.Module, example: Example, pictures: Image | None) -> None:
        """Receive the first batch of a run.

        Args:
            network: The network, which may have made one step.
            example: A call of the network with some inputs, on the CPU.
            pictures: The samples as a grid, if they are pictures.
        """

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """Receive the start of `epoch`, from 1, with its number of batches if that is known."""

    def batch(self) -> None:
        """Receive the end of a batch. Called in every step, so it must cost next to nothing."""

    def end_epoch(
        self, epoch: int, metrics: Mapping[str, float], histograms: Mapping[str, Any] | None
    ) -> None:
        """Receive the end of an epoch.

        Args:
            epoch: Number of the epoch in its run, from 1.
            metrics: All metrics of the epoch, durations in seconds included.
            histograms: The record of its histograms; None if they are off.
        """

    def histograms(self, step: int, record: Mapping[str, Any]) -> None:
        """Receive the record of the histograms of a step, which are logged by steps."""

    def observed(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Receive values observed in an ended epoch besides its metrics, such as `train/lr`."""

    def end_run(self, status: str) -> None:
        """Receive the end of a run with its final status."""


_Event = TypeVar("_Event", bound=Callable[..., None])


def _to_each(event: _Event) -> _Event:
    """Return a method that passes `event` on to every view that handles it."""
    name = event.__name__

    def pass_on(self: Views, *details: Any) -> None:
        for view in self._handlers[name]:
            try:
                getattr(view, name)(*details)
            except Exception as error:  # noqa: BLE001 - a view never ends the training
                self._switch_off(view)
                cause = f"{type(error).__name__}: {error}"
                logger.warning(
                    "%s is switched off: its %s() raised %s", type(view).__name__, name, cause
                )

    pass_on.__doc__ = f"Pass `{name}` on to each view."
    return cast(_Event, pass_on)


class Views(View):
    """Passes each event on to several views, and switches off one that raises with a warning."""

    def __init__(self, *views: View) -> None:
        self._views = list(views)
        self._handlers = {
            name: [view for view in views if getattr(type(view), name) is not getattr(View, name)]
            for name, event in vars(View).items()
            if callable(event)
        }

    begin_run = _to_each(View.begin_run)
    first_batch = _to_each(View.first_batch)
    begin_epoch = _to_each(View.begin_epoch)
    batch = _to_each(View.batch)
    end_epoch = _to_each(View.end_epoch)
    histograms = _to_each(View.histograms)
    observed = _to_each(View.observed)
    end_run = _to_each(View.end_run)

    @property
    def writer(self) -> Any:
        """The first open SummaryWriter of the views."""
        writers = (view.writer for view in self._views)
        return next((writer for writer in writers if writer is not None), None)

    def _switch_off(self, view: View) -> None:
        self._views.remove(view)
        for name, views in self._handlers.items():
            self._handlers[name] = [other for other in views if other is not view]


class ShownLoader:
    """A loader whose every pass is shown as an epoch."""

    def __init__(
        self,
        loader: Iterable[Any],
        view: View,
        begin: Callable[[int | None], int],
        batches: int | None,
        after: Callable[[], None],
    ) -> None:
        """Wrap `loader`.

        Args:
            loader: Yields the batches.
            view: Shows them.
            begin: Called before each pass with its number of batches, if that is known; returns
                the number of the epoch.
            batches: Number of batches; default that of the loader, if it has one.
            after: Called after each batch.
        """
        self._loader = loader
        self._view = view
        self._begin = begin
        self._after = after
        self._batches = batches or length_of(loader)

    def set_epoch(self, epoch: int) -> None:
        """Tell the samplers which epoch begins, counted from 0."""
        from tracker.training.loop import set_epoch  # imports torch; the uploader must not

        set_epoch(self._loader, epoch)

    def __iter__(self) -> Iterator[Any]:
        self._view.begin_epoch(self._begin(self._batches), self._batches)
        for batch in self._loader:
            yield batch
            self._view.batch()
            self._after()


def length_of(loader: Any) -> int | None:
    """Return the number of batches of `loader`; None if it is not known."""
    from tracker.capture.dataset import undisturbed  # imports torch; the uploader must not

    with undisturbed(loader):
        try:
            return len(loader)
        except Exception:  # noqa: BLE001 - the data set's own length may raise anything
            return None
