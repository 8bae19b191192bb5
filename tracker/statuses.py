"""How a run ended: the one place that decides it.

| what happened                        | status   | `tracker.failure` tag                     |
|--------------------------------------|----------|-------------------------------------------|
| `end_run()`, or the block's own end  | FINISHED |                                           |
| an exception                         | FAILED   | the exception and the end of its traceback |
| Ctrl-C, SIGTERM                      | KILLED   | the same                                  |
| never ended                          | FAILED   | where it was left                         |
"""

from __future__ import annotations

import signal
import traceback
from typing import Literal, NamedTuple

Status = Literal["FINISHED", "FAILED", "KILLED"]

_MAX_REASON = 5_000  # characters; MLflow keeps 8,000 of a tag
_SIGNALLED = {128 + signal.SIGINT, 128 + signal.SIGTERM}


class Outcome(NamedTuple):
    """A final status and, unless it is FINISHED, the reason."""

    status: Status
    reason: str | None = None


def outcome(error: BaseException | None) -> Outcome:
    """What the exception that ended a run makes of it; None is a normal end."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return Outcome("FINISHED")
    lines = traceback.format_exception(error)
    reason = f"{lines[-1].strip()}\n\n{''.join(lines)[-_MAX_REASON:]}"[:_MAX_REASON]
    interrupted = isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and error.code in _SIGNALLED
    )
    return Outcome("KILLED" if interrupted else "FAILED", reason)


def abandoned(error: BaseException | None, where: str) -> Outcome:
    """What a run comes to whose `end_run()` was not called.

    `error` is the exception that nobody caught since the run began, if any. Without one we do not
    know that the training was complete, so it is not FINISHED: only `end_run()` says that.
    """
    if error is not None:
        return outcome(error)
    return Outcome("FAILED", f"The run was left {where}: end_run() was never called.")
