"""Event files that TensorBoard opens: scalars, histograms, pictures, graph, hyperparameters."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from tracker.capture.histograms import bin_edges
from tracker.capture.images import image_grid
from tracker.errors import ArgumentError
from tracker.training.device import device_of, unwrap
from tracker.training.rng import preserve_rng

Row = Mapping[str, Any]


logger = logging.getLogger(__name__)


class TensorBoard:
    """Writes one folder of event files a run below `folder`."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ArgumentError where the package tensorboard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ArgumentError(
                f"tensorboard={str(folder)!r} needs the package tensorboard: "
                "pip install mlflow-runmanager[tensorboard]."
            ) from error
        self._make_writer = SummaryWriter
        self._folder = Path(folder)
        self._writer: Any = None
        self._params: Mapping[str, Any] = {}
        self._last: dict[str, float] = {}

    def begin_run(
        self, number: int, params: Mapping[str, Any], network: nn.Module, example: Tensor | None
    ) -> None:
        """Open the run's folder; write the sample pictures and the graph."""
        name = "-".join([f"run{number:03d}", *(f"{k}={v}" for k, v in params.items())])
        safe = "".join(c if c.isalnum() or c in "-_=.," else "_" for c in name)[:120]
        self._writer = self._make_writer(str(_unused(self._folder / safe)))
        self._params, self._last = params, {}
        if example is None:
            return
        if (grid := image_grid(example)) is not None:
            self._writer.add_image(
                "images", np.asarray(grid), dataformats="HWC" if grid.mode == "RGB" else "HW"
            )
        with preserve_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.trace, which TensorBoard's graph needs
            try:
                model = copy.deepcopy(unwrap(network)).eval()
                self._writer.add_graph(model, example[:2].to(device_of(network)))
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                logger.warning("TensorBoard's graph is missing: %s", error)

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """Nothing to write yet."""

    def batch(self) -> None:
        """Nothing to write yet."""

    def end_epoch(
        self,
        rows: Sequence[Row],
        metrics: Mapping[str, float],
        histograms: Mapping[str, Any] | None,
    ) -> None:
        """Write the epoch's scalars and histograms."""
        epoch = rows[-1]["epoch"]
        self._last = dict(metrics)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, epoch)
        for item in (histograms or {}).get("histograms", ()):
            self._add_histogram(item, epoch)
        self._writer.flush()

    def _add_histogram(self, item: Mapping[str, Any], epoch: int) -> None:
        if not item["bins"]:
            return
        left, right = bin_edges(item["bins"])
        counts = np.asarray(item["counts"], dtype=float)
        middle = (left + right) / 2
        suffix = ".grad" if item["kind"] == "gradient" else ""
        self._writer.add_histogram_raw(
            item["tensor"] + suffix,
            min=left[0],
            max=right[-1],
            num=int(counts.sum()),
            sum=float(counts @ middle),
            sum_squares=float(counts @ middle**2),
            bucket_limits=right.tolist(),
            bucket_counts=counts.tolist(),
            global_step=epoch,
        )

    def end_run(self, status: str) -> None:
        """Write the hyperparameters beside the last epoch's metrics, and close."""
        if self._writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        known = (bool, int, float, str)
        params = {k: v if isinstance(v, known) else str(v) for k, v in self._params.items()}
        for summary in hparams(params, self._last):
            self._writer.file_writer.add_summary(summary)
        self._writer.close()
        self._writer = None


def _unused(folder: Path) -> Path:
    """`folder`, or it with a number behind: event files of two runs never mix."""
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free
