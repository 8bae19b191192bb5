"""The files that describe a network and a classifier's mistakes, by their paths in a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from torch import Tensor, nn

from tracker.capture.example import as_example
from tracker.capture.images import cannot_draw
from tracker.capture.layers import graph_svg, layer_table
from tracker.capture.mistakes import (
    cannot_plot,
    confusion_picture,
    find_mistakes,
    worst_picture,
)
from tracker.capture.trace import trace
from tracker.texts import csv_cell
from tracker.training.device import unwrap

logger = logging.getLogger(__name__)


def network_files(network: nn.Module, example: Any) -> dict[str, str]:
    """Return the table of layers and the graph; see `Run.log_network`."""
    traced = None
    if example is not None:
        try:
            traced = trace(network, as_example(network, example).first(2))
        except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
            logger.warning("The graph of the network is not logged: %s", error)
    files = {"network/layers.csv": _csv(layer_table(network, traced), index=False)}
    if traced is not None:
        files["network/graph.svg"] = graph_svg(traced, type(unwrap(network)).__name__)
    return files


def mistake_files(
    network: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: Sequence[str],
    scores: Callable[[Tensor], Tensor] | None = None,
    shown: Sequence[str] | None = None,
) -> dict[str, bytes]:
    """Return the confusion matrix and the worst mistakes; see `Run.log_mistakes`."""
    mistakes = find_mistakes(network, loader, classes=classes, scores=scores, shown=shown)
    files = {
        "mistakes/confusion.csv": _encoded(_csv(mistakes.confusion)),
        "mistakes/worst.csv": _encoded(_csv(mistakes.worst, index=False)),
    }
    if not cannot_draw() and not cannot_plot():
        files["mistakes/confusion.png"] = confusion_picture(mistakes.confusion)
        if (worst := worst_picture(mistakes)) is not None:
            files["mistakes/worst.png"] = worst
    return files


def _csv(table: pd.DataFrame, *, index: bool = True) -> str:
    cells = table.map(csv_cell).rename(index=csv_cell, columns=csv_cell)
    return str(cells.to_csv(index=index))


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")
