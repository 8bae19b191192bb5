"""Checks of names and values that MLflow would reject late, or truncate or change silently.

Every function returns the checked value, and raises ArgumentError if it is not allowed.
"""

from __future__ import annotations

import argparse
import logging
import operator
import os
import posixpath
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tracker.errors import ArgumentError

logger = logging.getLogger(__name__)

DIRECTORY = ".tracker"
"""Default directory of the journals, relative to the current directory."""
RUN_TAG = "tracker.run"
"""Tag of an MLflow run that holds the key of the run, by which it is looked up."""
TABLES_TAG = "mlflow.loggedArtifacts"
"""Tag of an MLflow run that lists its tables."""

_LONGEST_NAME = 250  # mlflow.utils.validation, 3.17
_NAME = re.compile(rf"[/\w.\- :]{{1,{_LONGEST_NAME}}}")
_RENAMED = ("metric", "param", "tag")
_MAX_PARAM = 6_000  # characters that MLflow keeps
_MAX_TAG = 8_000
MAX_RUN_NAME = 250
"""Characters that a database of MLflow keeps of a run's name."""
MAX_EXPERIMENT_NAME = 500


@lru_cache(maxsize=10_000)  # the same metric names come back in every step
def checked_name(name: str, what: str) -> str:
    """Check the name of a metric, param or tag; `what` names its kind in the error."""
    if not _is_allowed(name):
        stored = allowed_name(name) if what in _RENAMED else ""
        hint = f"; rename=True would store it as {stored!r}" if stored else ""
        raise ArgumentError(
            f"{what} name {name!r} is not allowed; allowed are up to 250 letters, digits, spaces "
            f"and _ - . : /, without //, .., or a / at either end{hint}."
        )
    return name


def _is_allowed(name: Any) -> bool:
    return isinstance(name, str) and bool(_NAME.fullmatch(name)) and _is_plain(name)


Namer = Callable[[str, str], str]
"""Returns the name under which MLflow stores a name; the second argument is its kind."""


class Renamer:
    """Replaces what MLflow does not allow in names: `AR@100` becomes `AR_at_100`.

    `@` becomes `_at_`, and every other sign that is not allowed `_`. If two names of a kind would
    become the same one, the later gets `_2` or the next free number at its end.
    """

    def __init__(self) -> None:
        self._stored: dict[tuple[str, str], str] = {}

    def __call__(self, name: str, what: str) -> str:
        """Return the name to store, after a warning if it is another one.

        Raises:
            ArgumentError: Nothing of the name is left.
        """
        if (stored := self._stored.get((what, name))) is None:
            wanted = name if _is_allowed(name) else allowed_name(name)
            if not _is_allowed(wanted):
                return checked_name(name, what)
            stored, number = wanted, 1
            taken = {other for kind, other in self._stored.items() if kind[0] == what}
            while stored in taken:
                number += 1
                stored = f"{wanted[: _LONGEST_NAME - 8].rstrip('/')}_{number}"
            self._stored[what, name] = stored
            if stored != name:
                logger.warning("The %s %r is stored as %r.", what, name, stored)
        return stored


def allowed_name(name: Any) -> str:
    """Replace what is not allowed in a name; the result may be empty."""
    text = re.sub(r"[^/\w.\- :]", "_", str(name).replace("@", "_at_"))
    parts = [part.replace("..", "__") for part in text.split("/") if part not in ("", ".")]
    return "/".join(parts)[:_LONGEST_NAME].rstrip("/")


def named_values(given: Any, argument: str) -> dict[str, Any]:
    """Return the values by name in a mapping, named tuple, dataclass or namespace.

    Raises:
        ArgumentError: `given`, the value of `argument`, is not one of these.
    """
    if isinstance(given, Mapping):
        return dict(given)
    if hasattr(given, "_asdict"):
        return dict(given._asdict())
    if is_dataclass(given) and not isinstance(given, type):
        return {field.name: getattr(given, field.name) for field in fields(given)}
    if isinstance(given, (argparse.Namespace, SimpleNamespace)):
        return dict(vars(given))
    shown = " ".join(reprlib.repr(given).split())
    raise ArgumentError(
        f"{argument}={shown} has no hyperparameters; it must be a mapping, a named tuple, a "
        "dataclass or a namespace."
    )


def checked_mapping(value: Any, argument: str) -> Mapping[str, Any]:
    """Check that the argument is a mapping."""
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{argument}={value!r} is not allowed; it must be a mapping.")
    return value


def checked_params(params: Any, name_of: Namer = checked_name) -> dict[str, str]:
    """Check params, see `named_values`, and convert them to text, as MLflow stores them.

    Functions and objects lose their address, which differs in every process.

    Args:
        params: Values by name.
        name_of: Checks or changes their names.
    """
    named = named_values(params, "params").items()
    texts = {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in named}
    return _checked_texts(texts, "param", _MAX_PARAM, name_of)


def checked_tags(tags: Mapping[str, Any], name_of: Namer = checked_name) -> dict[str, str]:
    """Check tags and convert their values to text, as MLflow stores them."""
    return _checked_texts(checked_mapping(tags, "tags"), "tag", _MAX_TAG, name_of)


def _checked_texts(
    pairs: Mapping[str, Any], what: str, limit: int, name_of: Namer
) -> dict[str, str]:
    texts = {name_of(name, what): str(value) for name, value in pairs.items()}
    for name, text in texts.items():
        if len(text) > limit:
            raise ArgumentError(
                f"{what} {name!r} has {len(text):,} characters; MLflow keeps {limit:,}, so log it "
                "with log_text() instead."
            )
        _checked_encoding(text, what)
    return texts


def checked_step(step: Any, what: str = "step") -> int:
    """Check a 64-bit integer, the argument `what`; 1.0 and NumPy's and torch's integers are one."""
    if type(step) is int and -(2**63) <= step < 2**63:  # in every step of a loop
        return step
    try:
        number = step.item() if hasattr(step, "item") else step
        is_whole = isinstance(number, float) and number.is_integer()
        number = int(number) if is_whole else operator.index(number)
    except (TypeError, ValueError, RuntimeError):  # a tensor or array of several numbers
        number = 2**63
    if -(2**63) <= number < 2**63:
        return number
    raise ArgumentError(f"{what}={step!r} is not allowed; it must be a 64-bit integer.")


def flag(variable: str) -> bool | None:
    """Return the value of an environment variable that is true or false; None if it is not set."""
    value = os.environ.get(variable, "").strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ArgumentError(f"{variable}={value!r} is not allowed; it must be 1, 0, true or false.")
    return value in ("1", "true") if value else None


def checked_path(path: Any, what: str) -> str:
    """Check that the path of an artifact, the argument `what`, is plain and relative."""
    if not isinstance(path, str) or not _is_plain(path) or "\0" in path:
        raise ArgumentError(
            f"{what}={path!r} is not allowed; it must be a plain relative path inside the run's "
            "artifacts, such as folder/file.txt."
        )
    return _checked_encoding(path, what)


def path_at_step(path: Any, step: Any) -> str:
    """Return the path of an artifact at a step: `folder/file.txt` is `folder/file/000003.txt`.

    Raises:
        ArgumentError: The path, the argument `artifact_file`, or the step is not allowed.
    """
    plain = checked_path(path, "artifact_file")
    if step is None:
        return plain
    stem, suffix = posixpath.splitext(plain)
    return f"{stem}/{checked_step(step):06d}{suffix}"


def _is_plain(path: str) -> bool:
    return posixpath.normpath(path) == path and path != "." and not path.startswith(("/", ".."))


def checked_model_name(name: str) -> str:
    """Check the name of a logged model."""
    if not name or any(sign in name for sign in "/:.%\"'"):  # mlflow.utils.validation, 3.17
        raise ArgumentError(f"name={name!r} is not allowed; it must not contain / : . % \" '.")
    return _checked_encoding(name, "name")


def checked_text(value: Any, argument: str, most: int) -> str:
    """Check a text that is an argument, such as the name of a run.

    Args:
        value: The text.
        argument: The argument's name, for the error.
        most: How many characters are allowed.
    """
    if not isinstance(value, str) or not value or len(value) > most or "\0" in value:
        raise ArgumentError(
            f"{argument}={reprlib.repr(value)} is not allowed; it must be a text of up to {most} "
            "characters, without NUL."
        )
    return _checked_encoding(value, argument)


def checked_local_path(value: Any, argument: str) -> Path:
    """Check the path of a file or folder, which need not exist."""
    try:
        path = Path(value)
        if b"\0" in os.fsencode(path):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{argument}={value!r} is not allowed; it must be a path.") from error
    return path


def fitted(values: Mapping[str, Any]) -> dict[str, str]:
    """Return what the tracker itself says of a run, cut so that it never stops a training."""
    # File names may not be UTF-8.
    texts = {k: str(v).encode(errors="backslashreplace").decode() for k, v in values.items()}
    most = _MAX_PARAM
    return {k: v if len(v) <= most else f"{v[: most - 1]}…" for k, v in texts.items()}


def _checked_encoding(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{what} {text!r} is not valid text: {error.reason}.") from error
    return text


def checked_metrics(metrics: Any, name_of: Namer = checked_name) -> dict[str, float]:
    """Check a mapping of metrics, and convert their values to floats, waiting for devices."""
    pairs = checked_mapping(metrics, "metrics").items()
    for name, _ in pairs:
        name_of(name, "metric")
    return {name: checked_number(name, value) for name, value in pairs}


def checked_number(name: str, value: Any) -> float:
    """Convert the value of the metric `name` to a float, waiting for a tensor's device."""
    if hasattr(value, "full_tensor"):  # a DTensor; torch is not imported for other values
        from tracker.transfers import local_copy

        if (local := local_copy(value)) is None:
            raise ArgumentError(
                f"metric {name!r} is a DTensor of which each rank has a part; call full_tensor() "
                "on every rank, and log its result."
            )
        value = local
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return float(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        shown = f"{type(value).__name__} {value!r}"[:100]
        raise ArgumentError(f"metric {name!r} is a {shown}; it must be one number.") from error
