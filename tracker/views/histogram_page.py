"""The histograms of a run as one HTML file that needs nothing else: no network, no storage."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from tracker.errors import ArgumentError

_DATA_LIMIT = 4_000_000
"""Characters of data in a page; epochs are left out until it fits."""


def histogram_page(records: Iterable[Mapping[str, Any]], title: str, max_steps: int = 60) -> str:
    """The page on which to pick a tensor and watch its weights and gradients over the epochs.

    `records` hold one epoch each: `{"step": 3, "histograms": [{"tensor": "conv1.weight", "kind":
    "weight", "bins": [-12, 5], "counts": [4, 1], "nan": 0, "posinf": 0, "neginf": 0}]}`, with
    kind `weight` or `gradient` and the sorted bins that hold a value. Bin 0 is |x| < 2^-126; bin
    k > 0 is [2^e * (1 + m/8), 2^e * (1 + (m+1)/8)) where k - 1 = (e + 126) * 8 + m and m is 0 to
    7; bin -k is its mirror image.

    With more than `max_steps` epochs, or more data than a browser loads with ease (4 MB), the
    page shows an even selection, the first and the last included, and says so. Where it names the
    first epoch with NaN or infinite values, the epochs left out count too.

    Raises ArgumentError where `max_steps` is less than 2.
    """
    if max_steps < 2:
        raise ArgumentError(f"max_steps={max_steps} is not allowed; it must be at least 2.")
    series: dict[tuple[str, str], int] = {}
    first_bad: dict[int, int] = {}
    # As text: a twentieth of the memory that the records take, of which a long run has many.
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
    names = _compact([[*key, first_bad.get(index)] for key, index in series.items()])
    rows = ",".join(epochs[index][1] for index in shown)
    # `<` occurs in JSON within strings only; escaped, it can neither end the script element nor
    # open a comment in it.
    data = f'{{"series":{names},"records":[{rows}]}}'.replace("<", "\\u003c")
    return _fill(title=html.escape(title), epochs=_extent(len(shown), len(epochs)), data=data)


def _cell(histogram: Mapping[str, Any]) -> list[int]:
    """NaN, +inf and -inf counts, the first bin, then counts of bin after bin; -n skips n bins."""
    cell = [histogram["nan"], histogram["posinf"], histogram["neginf"], *histogram["bins"][:1]]
    expected = cell[-1]
    for bin_, count in zip(histogram["bins"], histogram["counts"], strict=True):
        if bin_ != expected:
            cell.append(expected - bin_)
        cell.append(count)
        expected = bin_ + 1
    return cell


def _selection(sizes: Sequence[int], most: int) -> list[int]:
    """Indices, evenly spread from first to last, of at most `most` epochs within the limit."""
    keep = min(len(sizes), most)
    while True:
        spread = [round(i * (len(sizes) - 1) / max(1, keep - 1)) for i in range(keep)]
        size = sum(sizes[index] for index in spread)
        if keep <= 2 or size <= _DATA_LIMIT:
            return spread
        keep = max(2, min(keep - 1, keep * _DATA_LIMIT // size))


def _extent(shown: int, recorded: int) -> str:
    """How much of the run the page shows, in words."""
    if shown < recorded:
        return f"{shown} of {recorded} epochs, evenly spaced"
    return "1 epoch" if recorded == 1 else f"{recorded} epochs"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _fill(**values: str) -> str:
    """The template with its `{{name}}` marks replaced, in one pass: values may hold such marks."""
    template = files("tracker.views").joinpath("histograms.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], template)
