"""Live views: a table in a notebook, a progress bar and a line per epoch in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from tracker.views.base import View
from tracker.views.files import ResultTable


class NotebookTable(View):
    """The table of all runs and epochs, updated in place below the cell."""

    def __init__(self, results: ResultTable) -> None:
        self._results = results
        self._handle: Any = None
        self._cell: int | None = None

    def begin_run(self, number: int, params: Mapping[str, Any]) -> None:
        """Start a new table if another cell is running."""
        cell = sys.modules["IPython"].get_ipython().execution_count
        if cell != self._cell:
            self._cell = cell
            self._handle = None

    def end_epoch(
        self, epoch: int, metrics: Mapping[str, float], histograms: Mapping[str, Any] | None
    ) -> None:
        """Replace the table."""
        import pandas as pd
        from IPython.display import display

        frame = pd.DataFrame(self._results.rows)
        if self._handle is None:
            self._handle = display(frame, display_id=True)
        else:
            self._handle.update(frame)


class TerminalLines(View):
    """A progress bar for the batches of an epoch, and one line for each finished epoch."""

    def __init__(self) -> None:
        self._number = 0
        self._bar: tqdm[Any] | None = None

    def begin_run(self, number: int, params: Mapping[str, Any]) -> None:
        """Print a line with the run's hyperparameters."""
        self._number = number
        shown = " ".join(f"{name}={value}" for name, value in params.items())
        tqdm.write(f"run {number}  {shown}", file=sys.stderr)

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        """Show a progress bar."""
        self._bar = tqdm(total=batches, desc=f"  epoch {epoch}", leave=False, unit="batch")

    def batch(self) -> None:
        """Advance the progress bar."""
        if self._bar is not None:
            self._bar.update()

    def end_epoch(
        self, epoch: int, metrics: Mapping[str, float], histograms: Mapping[str, Any] | None
    ) -> None:
        """Replace the progress bar by a line with the epoch's metrics."""
        self._close_bar()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k != "run_duration")
        tqdm.write(f"  epoch {epoch}  {shown}", file=sys.stderr)

    def end_run(self, status: str) -> None:
        """Print a line with the status unless it is FINISHED."""
        self._close_bar()
        if status != "FINISHED":
            tqdm.write(f"run {self._number}  {status}", file=sys.stderr)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
