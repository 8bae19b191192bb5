"""The histograms of a run as one self-contained HTML file."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from tracker.errors import ArgumentError
from tracker.texts import visible

_DATA_LIMIT = 4_000_000
"""Maximum number of characters of data in a page; epochs are left out until it fits."""


def histogram_page(records: Iterable[Mapping[str, Any]], title: str, max_steps: int = 60) -> str:
    """Return an HTML page that shows a tensor's weights and gradients over the epochs.

    For the bins see `tracker.capture.histograms`.

    Args:
        records: One record per epoch: `{"step": 3, "histograms": [{"tensor": "conv1.weight",
            "kind": "weight", "bins": [-12, 5], "counts": [4, 1], "nan": 0, "posinf": 0,
            "neginf": 0}]}`, with kind `weight` or `gradient` and its non-empty bins, sorted.
        title: Title of the page.
        max_steps: Maximum number of epochs on the page. A longer run, or one with more data than
            a browser loads with ease (4 MB), is shown by an even selection that includes the
            first and the last epoch; the first epoch with NaN or infinity is always named.

    Raises:
        ArgumentError: `max_steps` is less than 2.
    """
    if max_steps < 2:
        raise ArgumentError(f"max_steps={max_steps} is not allowed; it must be at least 2.")
    series: dict[tuple[str, str], int] = {}
    first_bad: dict[int, int] = {}
    # Text takes a twentieth of the memory of the records.
    epochs: list[tuple[int, str]] = []
    for record in records:
        step = int(record["step"])
        cells: dict[int, list[int]] = {}
        for histogram in record["histograms"]:
            key = (histogram["tensor"], histogram["kind"])
            index = series.setdefault(key, len(series))
            cells[index] = _cell(histogram)
            if any(cells[index][:3]):
                first_bad[index] = min(step, first_bad.get(index, step))
        row = [step, *(cells.get(index, 0) for index in range(len(series)))]
        epochs.append((step, _compact(row)))
    epochs.sort(key=lambda epoch: epoch[0])
    shown = _selection([len(text) for _, text in epochs], max_steps)
    shown_names = [[visible(name), kind] for name, kind in series]
    names = _compact([[*shown_names[index], first_bad.get(index)] for index in series.values()])
    rows = ",".join(epochs[index][1] for index in shown)
    # In JSON, `<` occurs only within strings. Escaped, it cannot end the script element.
    data = f'{{"series":{names},"records":[{rows}]}}'.replace("<", "\\u003c")
    return _fill(
        title=html.escape(visible(title)), epochs=_extent(len(shown), len(epochs)), data=data
    )


def _cell(histogram: Mapping[str, Any]) -> list[int]:
    """Encode as NaN, +inf, -inf counts, the first bin, then a count per bin; -n skips n bins."""
    cell = [histogram["nan"], histogram["posinf"], histogram["neginf"], *histogram["bins"][:1]]
    expected = cell[-1]
    for bin_, count in zip(histogram["bins"], histogram["counts"], strict=True):
        if bin_ != expected:
            cell.append(expected - bin_)
        cell.append(count)
        expected = bin_ + 1
    return cell


def _selection(sizes: Sequence[int], most: int) -> list[int]:
    """Return evenly spread indices of at most `most` epochs that fit the limit."""
    keep = min(len(sizes), most)
    while True:
        spread = [round(i * (len(sizes) - 1) / max(1, keep - 1)) for i in range(keep)]
        size = sum(sizes[index] for index in spread)
        if keep <= 2 or size <= _DATA_LIMIT:
            return spread
        keep = max(2, min(keep - 1, keep * _DATA_LIMIT // size))


def _extent(shown: int, recorded: int) -> str:
    """Describe how much of the run the page shows."""
    if shown < recorded:
        return f"{shown} of {recorded} epochs, evenly spaced"
    return "1 epoch" if recorded == 1 else f"{recorded} epochs"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _fill(**values: str) -> str:
    """Fill in the template in one pass, as values may contain `{{name}}` themselves."""
    template = files("tracker.views").joinpath("histograms.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], template)
