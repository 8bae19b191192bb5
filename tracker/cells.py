"""The cells of a notebook: a run that begins in a cell that fails ends with it."""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from tracker.statuses import Outcome, outcome, uncaught_error


def when_cell_fails(end: Callable[[Outcome], object]) -> None:
    """Call the method `end` if the running cell of IPython raises or is interrupted.

    Does nothing outside IPython, which is not imported, and in other threads than the main one,
    which may outlive the cell.
    """
    get_shell = getattr(sys.modules.get("IPython"), "get_ipython", None)
    shell: Any = get_shell() if get_shell is not None else None
    if shell is None or threading.current_thread() is not threading.main_thread():
        return
    end_later = weakref.WeakMethod(end)  # a dropped manager ends its run itself
    error_before = uncaught_error()
    depth = 0  # of the cells that the cell runs itself

    def cell_begins(_: Any = None) -> None:
        nonlocal depth
        depth += 1

    def cell_ended(result: Any = None) -> None:
        nonlocal depth, error_before
        if result is not None and not result.info.raw_cell.strip():
            return  # IPython does not begin an empty cell, but ends it
        if depth:
            depth -= 1
            error_before = uncaught_error()  # the outer cell may go on
            return
        for event, callback in callbacks.items():
            shell.events.unregister(event, callback)
        error = _error(result)
        if error is None and (shown := uncaught_error()) is not error_before:
            error = shown  # %run shows an exception, and the cell continues
        if error is not None and (end_now := end_later()) is not None:
            end_now(outcome(error))

    callbacks = {"pre_run_cell": cell_begins, "post_run_cell": cell_ended}
    for event, callback in callbacks.items():
        shell.events.register(event, callback)


def _error(result: Any) -> BaseException | None:
    """Return the exception that ended a cell; `result` is None if its task was cancelled."""
    if result is None:
        return KeyboardInterrupt()
    error = result.error_in_exec or result.error_before_exec
    # A cell with `await` is interrupted so.
    return KeyboardInterrupt() if isinstance(error, asyncio.CancelledError) else error
