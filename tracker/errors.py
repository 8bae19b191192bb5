"""What can go wrong, and whose fault it is.

TrackerError             anything this library raises on purpose
├── ArgumentError        an argument's value is not allowed (also a ValueError)
├── CallOrderError       a method was called before the one it needs (also a RuntimeError)
├── StoreError           the tracking URI, experiment, run or journal cannot be used
│   └── RefusedError     the store answered, and will never take what it was given
├── DeployError          a model cannot be written in a format, or computes something else there
└── NonFiniteLossError   the loss became NaN or infinite and the user asked to stop

Every message is one sentence that names the argument, its value and what is allowed.
"""

from __future__ import annotations

from tracker.redaction import public_uri


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, without passwords and without a final full stop.

    An error without a text is named by its type.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return public_uri(lines[0]).rstrip(". ")


class TrackerError(Exception):
    """Base of every error that this library raises on purpose."""


class ArgumentError(TrackerError, ValueError):
    """An argument has a value that is not allowed."""


class CallOrderError(TrackerError, RuntimeError):
    """A method was called out of order, `end_epoch()` before `begin_epoch()` for one."""


class StoreError(TrackerError):
    """A tracking URI, an experiment, a run or a journal cannot be opened or written."""


class RefusedError(StoreError):
    """The store takes requests, but not this one, however often it is tried."""


class NonFiniteLossError(TrackerError, ArithmeticError):
    """The loss of an epoch is NaN or infinite, and `stop_on_nonfinite` was set."""
