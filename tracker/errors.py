"""The errors that this library raises on purpose.

TrackerError             base of all of them
├── ArgumentError        an argument has a value that is not allowed (also a ValueError)
├── CallOrderError       a method was called before one that it needs (also a RuntimeError)
├── StoreError           the tracking URI, experiment, run or journal cannot be used
│   ├── RefusedError     the store answered, and will never accept the request
│   └── GoneError        the experiment or run does not exist, or is deleted
├── MissingError         a package that an extra brings is not installed (also an ImportError)
├── DeployError          a model cannot be written in a format, or the file computes something else
└── NonFiniteLossError   the loss became NaN or infinite and `stop_on_nonfinite` is set

Every message names the argument, its value and what is allowed or what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from tracker.redaction import public_uri


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, to embed in a sentence.

    It is without passwords, without a final full stop, and cut after 200 characters. An error
    without a text is named by its type, and so is SystemExit, whose text is a number.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, SystemExit):
        lines = [f"SystemExit: {lines[0]}"]
    return public_uri(lines[0])[:200].rstrip(".: ")


def stays_here(name: str, instead: str) -> Callable[[Any], NoReturn]:
    """Return a `__reduce__` for objects that only the process that made them can use.

    Args:
        name: Their class.
        instead: What to do in place of sending one.
    """

    def refuse(self: Any) -> NoReturn:
        raise ArgumentError(f"a {name} cannot be copied or sent to another process; {instead}.")

    return refuse


class TrackerError(Exception):
    """Base of every error that this library raises on purpose."""


class ArgumentError(TrackerError, ValueError):
    """An argument has a value that is not allowed."""


class CallOrderError(TrackerError, RuntimeError):
    """A method was called out of order, such as `end_epoch()` before `begin_epoch()`."""


class StoreError(TrackerError):
    """A tracking URI, an experiment, a run or a journal cannot be opened or written."""

    retry_after = 0.0
    """How many seconds the store asked to wait before the next request."""


class RefusedError(StoreError):
    """The store refuses a request, and would refuse it again."""


class GoneError(StoreError):
    """The experiment or run of a request does not exist, or is deleted."""


class MissingError(TrackerError, ImportError):
    """A package is not installed that one of the extras brings."""


class NonFiniteLossError(TrackerError, ArithmeticError):
    """The loss of an epoch is NaN or infinite, and `stop_on_nonfinite` is set."""
