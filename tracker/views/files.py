"""Tables as CSV and JSON files that a reader never sees half-written."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tracker.errors import ArgumentError
from tracker.texts import csv_cell
from tracker.views.base import View

Row = Mapping[str, Any]


class ResultTable(View):
    """The tutorial's table of results, with a row for each epoch of each run."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._number = 0
        self._params: dict[str, Any] = {}

    def begin_run(self, number: int, params: Mapping[str, Any]) -> None:
        """Note what the rows of this run have in common."""
        self._number = number
        self._params = dict(params)

    def end_epoch(
        self, epoch: int, metrics: Mapping[str, float], histograms: Mapping[str, Any] | None
    ) -> None:
        """Add a row: the tutorial's columns, the hyperparameters, then other metrics."""
        titles = ("loss", "accuracy", "epoch_duration", "run_duration")
        first = {name.replace("_", " "): metrics[name] for name in titles if name in metrics}
        row = {"run": self._number, "epoch": epoch, **first}
        row |= {f"param {key}" if key in row else key: v for key, v in self._params.items()}
        others = {key: value for key, value in metrics.items() if key not in titles}
        row |= {f"metric {key}" if key in row else key: value for key, value in others.items()}
        self.rows.append(row)

    def save(self, name: str | Path) -> None:
        """Write the table to `name.csv` and `name.json`.

        Raises:
            ArgumentError: They cannot be written.
        """
        try:
            write_atomically(Path(f"{name}.csv"), csv_text(self.rows))
            write_atomically(Path(f"{name}.json"), json_text(self.rows))
        except OSError as error:
            raise ArgumentError(f"name={str(name)!r} cannot be written: {error}.") from error


def csv_text(rows: Sequence[Row]) -> str:
    """Return `rows` as CSV, with a column for each key, in order of first appearance.

    For texts that look like formulas see `csv_cell`.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    # Python before 3.13 does not quote a lone carriage return by itself.
    cells = (cell for row in [columns, *(row.values() for row in rows)] for cell in row)
    returns = any(isinstance(cell, str) and "\r" in cell for cell in cells)
    quoting: Any = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    writer = csv.writer(text, lineterminator="\n", quoting=quoting)
    writer.writerow(map(csv_cell, columns))
    writer.writerows([csv_cell(row.get(key, "")) for key in columns] for row in rows)
    return text.getvalue()


def json_text(value: Any) -> str:
    """Return `value` as standard JSON, with one line for each item of a list.

    JSON cannot express NaN and infinity: they become the strings "NaN", "Infinity" and
    "-Infinity", which `pandas.read_json` reads back as numbers.
    """
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(_dumps, value)) + "\n]\n"
    return _dumps(value)


def _dumps(value: Any) -> str:
    options: dict[str, Any] = {"ensure_ascii": False, "allow_nan": False, "default": _plain}
    try:
        return json.dumps(value, **options)
    except ValueError:  # rare, so numbers are not looked at one by one unless they must be
        return json.dumps(_finite(value), **options)


def _plain(value: Any) -> Any:
    """Convert a numpy scalar to a Python number, anything else to text."""
    return value.item() if hasattr(value, "item") else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path`; if that fails, the old content stays.

    Raises:
        OSError: The file cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
