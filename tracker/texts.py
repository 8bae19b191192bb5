"""Texts of unknown origin, such as names, made safe to show."""

from __future__ import annotations

import re
from typing import Any

_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # control characters, but tabs and the ends of lines
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # which change the direction of writing
    "\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]"  # invisible, or not allowed in XML
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def visible(text: str, most: int | None = None) -> str:
    r"""Return `text` with invisible characters written out, such as `\x00` and `\u202e`.

    Args:
        text: Any text.
        most: Maximum number of characters; more are cut out of the middle.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"
    return _HIDDEN.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def csv_cell(value: Any) -> Any:
    """Return a cell of a CSV file: a text that a spreadsheet would run gets a `'` before it.

    Such a text begins with `=`, `+`, `-`, `@`, a tab or the end of a line, and is not a number.
    """
    if value is None or isinstance(value, (int, float)):
        return value
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()
