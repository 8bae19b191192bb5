"""Tables as CSV and JSON, written so that a reader never sees half a file."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def csv_text(rows: Sequence[Row]) -> str:
    """`rows` as CSV, with a column for every key that any row has, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    # Before Python 3.13 a lone carriage return is not seen as a reason for quotes.
    returns = any(isinstance(cell, str) and "\r" in cell for row in rows for cell in row.values())
    quoting: Any = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(text, columns, lineterminator="\n", quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def json_text(value: Any) -> str:
    """`value` as standard JSON, one line for each item of a list.

    JSON has no NaN and no infinity: they become the strings "NaN", "Infinity" and "-Infinity",
    which `pandas.read_json` reads back as numbers.
    """
    if isinstance(value, list):
        return "[\n" + ",\n".join(_dumps(item) for item in value) + "\n]\n"
    return _dumps(value)


def _dumps(value: Any) -> str:
    def dumps(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)

    try:
        return dumps(value)
    except ValueError:  # rare: most are finite, and looking at every number takes its time
        return dumps(_finite(value))


def _plain(value: Any) -> Any:
    """A numpy scalar as python's own, anything else as text."""
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
    """Write `text` to `path`: all of it or, if anything fails, nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
