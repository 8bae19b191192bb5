"""Decides the final status of a run whose process is alive when it ends.

docs/statuses.md lists all cases.
"""

from __future__ import annotations

import signal
import sys
import traceback
from typing import Literal, NamedTuple

Status = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_REASON = 5_000  # characters; MLflow keeps 8,000 of a tag
_SIGNALLED = {128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP}


class Outcome(NamedTuple):
    """A final status and, unless it is FINISHED, the reason."""

    status: Status
    reason: str | None = None


def outcome(error: BaseException | None) -> Outcome:
    """Return the outcome of a run that `error` ended; None means that it ended normally."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return Outcome("FINISHED")
    # A file name that is not UTF-8 has characters that no store takes.
    lines = [
        line.encode(errors="backslashreplace").decode()
        for line in traceback.format_exception(error)
    ]
    reason = f"{lines[-1].strip()}\n\n{''.join(lines)[-_MAX_REASON:]}"[:_MAX_REASON]
    interrupted = isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code in _SIGNALLED
    )
    return Outcome("KILLED" if interrupted else "FAILED", reason)


def abandoned(error: BaseException | None, where: str) -> Outcome:
    """Return the outcome of a run whose `end_run()` was never called.

    Without an exception it is FAILED too, as nothing says that the training was complete.

    Args:
        error: The exception that was not caught since the run began, if any.
        where: Completes the sentence "The run was abandoned …".
    """
    if error is not None:
        return outcome(error)
    return Outcome("FAILED", f"The run was abandoned {where}: end_run() was never called.")


def uncaught_error() -> BaseException | None:
    """Return the last exception that was not caught, in a notebook's cell or by the program."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return error if isinstance(error, BaseException) else None
