"""The epochs as they go by: a table in a notebook, a bar and a line an epoch in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pandas as pd
from torch import Tensor, nn
from tqdm import tqdm

Row = Mapping[str, Any]


class View(Protocol):
    """Something that shows a manager's runs while they go on."""

    def begin_run(
        self, number: int, params: Mapping[str, Any], network: nn.Module, example: Tensor | None
    ) -> None:
        """Run `number`, from 1, begins."""

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """Epoch `epoch`, from 1, begins; it has `batches` of them, None if unknown."""

    def batch(self) -> None:
        """One batch is done. Called every step: it must cost next to nothing."""

    def end_epoch(
        self,
        rows: Sequence[Row],
        metrics: Mapping[str, float],
        histograms: Mapping[str, Any] | None,
    ) -> None:
        """An epoch is done, with `metrics`; the last of `rows` is its own."""

    def end_run(self, status: str) -> None:
        """The run has ended."""


def live_view() -> View | None:
    """The view for where this program runs; None where nobody watches."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        return NotebookTable()
    return TerminalLines() if sys.stderr.isatty() else None


class NotebookTable:
    """The table of all runs and epochs below the cell, replaced as it grows."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._cell: int | None = None

    def begin_run(
        self, number: int, params: Mapping[str, Any], network: nn.Module, example: Tensor | None
    ) -> None:
        """Another cell has a table of its own."""
        cell = sys.modules["IPython"].get_ipython().execution_count
        if cell != self._cell:
            self._cell, self._handle = cell, None

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """Nothing to show yet."""

    def batch(self) -> None:
        """Nothing to show yet."""

    def end_epoch(
        self,
        rows: Sequence[Row],
        metrics: Mapping[str, float],
        histograms: Mapping[str, Any] | None,
    ) -> None:
        """Replace the table."""
        from IPython.display import display

        frame = pd.DataFrame(list(rows))
        if self._handle is None:
            self._handle = display(frame, display_id=True)
        else:
            self._handle.update(frame)

    def end_run(self, status: str) -> None:
        """The table stays."""


class TerminalLines:
    """A bar for the batches of the epoch, and one line for each epoch that is done."""

    def __init__(self) -> None:
        self._number = 0
        self._bar: tqdm[Any] | None = None

    def begin_run(
        self, number: int, params: Mapping[str, Any], network: nn.Module, example: Tensor | None
    ) -> None:
        """One line with the run's params."""
        self._number = number
        shown = " ".join(f"{name}={value}" for name, value in params.items())
        tqdm.write(f"run {number}  {shown}", file=sys.stderr)

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """A bar that goes when the epoch is done."""
        self._bar = tqdm(total=batches, desc=f"  epoch {epoch}", leave=False, unit="batch")

    def batch(self) -> None:
        """One step of the bar."""
        if self._bar is not None:
            self._bar.update()

    def end_epoch(
        self,
        rows: Sequence[Row],
        metrics: Mapping[str, float],
        histograms: Mapping[str, Any] | None,
    ) -> None:
        """One line with the epoch's metrics."""
        self._close()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "run_duration")
        tqdm.write(f"  epoch {rows[-1]['epoch']}  {shown}", file=sys.stderr)

    def end_run(self, status: str) -> None:
        """A line if the run did not end well."""
        self._close()
        if status != "FINISHED":
            tqdm.write(f"run {self._number}  {status}", file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
