"""TensorBoard event files: scalars, histograms, pictures, graph and hyperparameters."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from tracker.capture.example import Example
from tracker.capture.histograms import bin_edges
from tracker.errors import ArgumentError
from tracker.extras import install
from tracker.training.device import device_of, is_sharded, unwrap
from tracker.training.rng import preserve_rng
from tracker.validation import checked_local_path
from tracker.views.base import View

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = {"gradient": ".grad", "activation": ".activation"}

logger = logging.getLogger(__name__)


class TensorBoard(View):
    """Writes one folder of event files per run below `folder`.

    Raises:
        ArgumentError: `folder` is not a path, or the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                f"tensorboard={str(folder)!r} needs the package tensorboard; "
                f"{install('tensorboard')}"
            ) from error
        self._make_writer = SummaryWriter
        self._folder = checked_local_path(folder, "tensorboard")
        self._writer: Any = None
        self._params: Mapping[str, Any] = {}
        self._last: dict[str, float] = {}

    @property
    def writer(self) -> Any:
        """The SummaryWriter of the open run."""
        return self._writer

    def begin_run(self, number: int, params: Mapping[str, Any]) -> None:
        """Open a new folder."""
        name = "-".join([f"run{number:03d}", *(f"{k}={v}" for k, v in params.items())])
        safe = "".join(c if c.isalnum() or c in "-_=.," else "_" for c in name)[:120]
        self._writer = self._make_writer(str(_unused(self._folder / safe)))
        self._params = params
        self._last = {}

    def first_batch(self, network: nn.Module, example: Example, pictures: Image | None) -> None:
        """Write the sample pictures and the graph."""
        if pictures is not None:
            formats = "HWC" if pictures.mode == "RGB" else "HW"
            self._writer.add_image("images", np.asarray(pictures), dataformats=formats)
        if is_sharded(network):
            return
        with preserve_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
            try:
                model = copy.deepcopy(unwrap(network)).eval()
                inputs = example.first(2).to(device_of(network))
                bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
                self._writer.add_graph(model, bound.args)  # what is keyword-only is left out
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                logger.warning("TensorBoard shows no graph of the network: %s", error)

    def end_epoch(
        self, epoch: int, metrics: Mapping[str, float], histograms: Mapping[str, Any] | None
    ) -> None:
        """Write the epoch's scalars and histograms."""
        self._last = dict(metrics)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        if histograms is not None:
            self.histograms(epoch, histograms)
        self._writer.flush()

    def histograms(self, step: int, record: Mapping[str, Any]) -> None:
        """Write the histograms of a step, or of an epoch."""
        for item in record.get("histograms", ()):
            self._add_histogram(item, step)

    def observed(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of the loop."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def _add_histogram(self, item: Mapping[str, Any], step: int) -> None:
        if not item["bins"]:
            return
        left, right = bin_edges(item["bins"])
        counts = np.asarray(item["counts"], dtype=float)
        middle = (left + right) / 2
        self._writer.add_histogram_raw(
            item["tensor"] + _SUFFIXES.get(item["kind"], ""),
            min=left[0],
            max=right[-1],
            num=int(counts.sum()),
            sum=float(counts @ middle),
            sum_squares=float(counts @ middle**2),
            bucket_limits=right.tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def end_run(self, status: str) -> None:
        """Write the hyperparameters with the last epoch's metrics, and close the folder."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        allowed = (bool, int, float, str)
        params = {k: v if isinstance(v, allowed) else str(v) for k, v in self._params.items()}
        for summary in hparams(params, self._last):
            self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._writer = None


class NoWriter:
    """Takes every call of a SummaryWriter, writes nothing, and says so once."""

    def __init__(self, has_folder: bool, said: set[str] | None) -> None:
        """Stand for the writer that is not there.

        Args:
            has_folder: Whether there are event files, but no run is open.
            said: The warnings that were given; None for none at all.
        """
        self._todo = "call begin_run() first" if has_folder else "pass RunManager(tensorboard=…)"
        self._said = said

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(f"tb has no method {name!r}.")

        def ignore(*arguments: object, **named: object) -> None:
            if self._said is None or self._todo in self._said or name in ("flush", "close"):
                return
            self._said.add(self._todo)
            logger.warning(
                "tb.%s() writes nothing; %s to write TensorBoard's event files.", name, self._todo
            )

        return ignore


def _unused(folder: Path) -> Path:
    """Return `folder`, numbered if it exists: event files of two runs must not mix."""
    number, unused = 1, folder
    while unused.exists():
        number += 1
        unused = folder.with_name(f"{folder.name}-{number}")
    return unused
