"""Exported programs, read without running anything that a file may hide in them."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OBJECTS = ("custom_obj", "opaque_obj")  # pickles of any class
# torch passes expressions to sympy, which evaluates them as Python.
_SYMBOLS = re.compile(r"[suz]\d+|[A-Z]\w*|oo|int_oo|nan|floor|ceiling")
_ATTRIBUTE = re.compile(r"\.\s*[^\W\d]|[^\w\s+\-*/(),.<>=!&|~%]|__")


def load_exported(path: str | Path) -> ExportedProgram:
    """Load a `.pt2` file; raise if something in it would be unpickled or evaluated.

    torch.export.load itself unpickles whatever is not plain tensors.

    Raises:
        ValueError: The file holds objects of other classes, or code.
        Exception: It is not an exported program; torch raises many kinds.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if any(kind in name for kind in _OBJECTS):
                raise ValueError(f"it holds the object {name!r}, which may run code")
            if name.endswith(".json"):
                _check_expressions(json.loads(archive.read(name)))
    with _only_weights():
        return torch.export.load(path)


@contextmanager
def _only_weights() -> Iterator[None]:
    before = os.environ.get(_ONLY_WEIGHTS)
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ONLY_WEIGHTS]
        else:
            os.environ[_ONLY_WEIGHTS] = before


def _check_expressions(value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check_expressions(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "expr_str" and not _is_expression(str(item)):
                raise ValueError(f"it holds the expression {item!r:.80}, which may run code")
            _check_expressions(item)


def _is_expression(text: str) -> bool:
    text = re.sub(r"'\w+'|\b[a-z]+=(True|False)\b", "", text)  # Symbol('s3', integer=True)
    names = re.findall(r"(?<![\w.])[^\W\d]\w*", text)
    return not _ATTRIBUTE.search(text) and all(map(_SYMBOLS.fullmatch, names))
