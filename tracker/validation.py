"""What MLflow takes, and otherwise refuses late, cuts or changes in silence.

Every function raises ArgumentError for what is not allowed.
"""

from __future__ import annotations

import operator
import posixpath
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tracker.errors import ArgumentError

RUN_TAG = "tracker.run"
"""The tag of an MLflow run that holds the key of the run here, by which it is found again."""

DIRECTORY = ".tracker"
"""Where journals are kept by default, below the current directory."""

_NAME = re.compile(r"[/\w.\- :]{1,250}")  # mlflow.utils.validation, 3.17
_MAX_PARAM = 6_000  # characters that MLflow keeps
_MAX_TAG = 8_000


@lru_cache(maxsize=10_000)  # a metric's name comes again every step
def checked_name(name: str, what: str) -> str:
    """`name`, if MLflow takes it for a metric, param or tag: `what` says which."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or posixpath.normpath(name) != name:
        raise ArgumentError(
            f"{what} name {name!r} is not allowed; allowed are up to 250 letters, digits, "
            "_ - . : / and spaces, and as a path it must be plain (no //, no .., no / at an end)."
        )
    if name.startswith(("/", "..")) or name == ".":
        raise ArgumentError(f"{what} name {name!r} is not allowed: it would leave its folder.")
    return name


def checked_params(params: Mapping[str, Any]) -> dict[str, str]:
    """Params as MLflow stores them: as text."""
    return {
        checked_name(name, "param"): _checked_text(name, value, "param", _MAX_PARAM)
        for name, value in params.items()
    }


def checked_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow stores them: as text."""
    return {
        checked_name(name, "tag"): _checked_text(name, value, "tag", _MAX_TAG)
        for name, value in tags.items()
    }


def checked_step(step: Any) -> int:
    """The step of a metric: a whole number of 64 bits."""
    try:
        number = operator.index(step)
        if -(2**63) <= number < 2**63:
            return number
    except TypeError:
        pass
    raise ArgumentError(f"step={step!r} is not allowed; it must be a whole number of 64 bits.")


def checked_path(path: str, what: str) -> str:
    """The path of an artifact: plain, relative, and within the run's artifacts."""
    if not path or posixpath.normpath(path) != path or path.startswith(("/", "..")) or path == ".":
        raise ArgumentError(
            f"{what}={path!r} is not allowed or leaves the run's artifacts; it must be a plain "
            "relative path such as folder/file.txt."
        )
    return _encodable(path, what)


def checked_model_name(name: str) -> str:
    """The name of a logged model."""
    if not name or any(sign in name for sign in "/:.%\"'"):  # mlflow.utils.validation, 3.17
        raise ArgumentError(f"name={name!r} is not allowed; a model's has none of / : . % \" '.")
    return _encodable(name, "name")


def _encodable(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{what} {text!r} is no text: {error.reason}.") from error
    return text


def _checked_text(name: str, value: Any, what: str, longest: int) -> str:
    text = str(value)
    if len(text) > longest:
        raise ArgumentError(
            f"{what} {name!r} has {len(text):,} characters; MLflow keeps {longest:,}. "
            "Log it with log_text() instead."
        )
    return _encodable(text, what)


def checked_number(name: str, value: Any) -> float:
    """The value of the metric `name` as a number; waits for the device of a tensor."""
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        shown = f"{type(value).__name__} {value!r}"[:100]
        raise ArgumentError(f"metric {name!r} is a {shown}; it must be one number.") from error
