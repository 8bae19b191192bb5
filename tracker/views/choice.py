"""Which views a manager has."""

from __future__ import annotations

import sys
from pathlib import Path

from tracker.views.base import View, Views
from tracker.views.files import ResultTable
from tracker.views.table import NotebookTable, TerminalLines
from tracker.views.tensorboard import TensorBoard


def views_of(results: ResultTable, tensorboard: str | Path | None, *, live: bool) -> Views:
    """Return the views of a manager.

    Args:
        results: Its table of results, which a notebook shows as it grows.
        tensorboard: The folder of TensorBoard's event files; None for none.
        live: Whether to show the progress where this process has a notebook or a terminal.
    """
    views: list[View] = [results]
    if live:
        ipython = sys.modules.get("IPython")
        shell = ipython.get_ipython() if ipython else None
        if shell is not None and hasattr(shell, "kernel"):
            views.append(NotebookTable(results))
        elif sys.stderr.isatty():
            views.append(TerminalLines())
    if tensorboard is not None:
        views.append(TensorBoard(tensorboard))
    return Views(*views)
