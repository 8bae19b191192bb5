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
    """Return an HTML page that shows weights, gradients, activations and values over time.

    For the bins see `tracker.capture.histograms`.

    Args:
        records: One or more records per epoch or step: `{"step": 3, "unit": "epoch",
            "histograms": [{"tensor": "conv1.weight", "kind": "weight", "bins": [-12, 5],
            "counts": [4, 1], "nan": 0, "posinf": 0, "neginf": 0}]}`, with kind `weight`,
            `gradient`, `activation` or `value` and its non-empty bins, sorted.
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
    first_bad: dict[int, tuple[str, int]] = {}
    # Text takes a twentieth of the memory of the records.
    rows: dict[tuple[str, int], dict[int, str]] = {}
    for record in records:
        at = record.get("unit", "epoch"), int(record["step"])
        cells = rows.setdefault(at, {})
        for histogram in record["histograms"]:
            key = (histogram["tensor"], histogram["kind"])
            index = series.setdefault(key, len(series))
            cell = _cell(histogram)
            cells[index] = _compact(cell)
            if any(cell[:3]):
                first_bad[index] = min(at, first_bad.get(index, at))
    texts: list[str] = []
    extents: list[str] = []
    units = sorted({unit for unit, _ in rows}) or ["epoch"]
    for unit in units:
        steps = sorted(step for one, step in rows if one == unit)
        last = [max(rows[unit, step], default=-1) for step in steps]
        lines = [
            ",".join(rows[unit, step].get(index, "0") for index in range(last[n] + 1))
            for n, step in enumerate(steps)
        ]
        shown = _selection([len(line) for line in lines], max_steps, _DATA_LIMIT // len(units))
        for n in shown:
            label = _compact(_label(unit, steps[n]))
            texts.append(f"[{label},{lines[n]}]" if lines[n] else f"[{label}]")
        extents.append(_extent(len(shown), len(steps), unit))
    names = _compact(
        [
            [visible(name), kind, _label(*first_bad[index]) if index in first_bad else None]
            for (name, kind), index in series.items()
        ]
    )
    # In JSON, `<` occurs only within strings. Escaped, it cannot end the script element.
    data = f'{{"series":{names},"records":[{",".join(texts)}]}}'.replace("<", "\\u003c")
    return _fill(title=html.escape(visible(title)), epochs="; ".join(extents), data=data)


def _label(unit: str, step: int) -> int | str:
    """Return how the page names a row: an epoch by its number, another step as text."""
    return step if unit == "epoch" else f"{unit} {step}"


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


def _selection(sizes: Sequence[int], most: int, limit: int) -> list[int]:
    """Return evenly spread indices of at most `most` rows with at most `limit` characters."""
    keep = min(len(sizes), most)
    while True:
        spread = [round(i * (len(sizes) - 1) / max(1, keep - 1)) for i in range(keep)]
        size = sum(sizes[index] for index in spread)
        if keep <= 2 or size <= limit:
            return spread
        keep = max(2, min(keep - 1, keep * limit // size))


def _extent(shown: int, recorded: int, unit: str) -> str:
    """Describe how much of the run the page shows."""
    if shown < recorded:
        return f"{shown} of {recorded} {unit}s, evenly spaced"
    return f"1 {unit}" if recorded == 1 else f"{recorded} {unit}s"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _fill(**values: str) -> str:
    """Fill in the template in one pass, as values may contain `{{name}}` themselves."""
    template = files("tracker.views").joinpath("histograms.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: values[mark[1]], template)
