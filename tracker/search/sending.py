"""Objectives for other processes: functions of notebooks, lambdas and closures too."""

from __future__ import annotations

import pickle
import sys
from contextlib import suppress
from typing import Any

import cloudpickle

from tracker.errors import ArgumentError


def dumps(given: Any, *, by_value: bool = False) -> bytes:
    """Return an object as bytes for `pickle.loads` in another process.

    Functions and classes of modules and scripts are sent by name. Those of a notebook, lambdas and
    those inside functions are sent with all that they refer to.

    Args:
        given: The object.
        by_value: Whether to send functions and classes of a script like those of a notebook.
    """
    is_script = getattr(sys.modules["__main__"], "__file__", None) is not None
    if is_script and not by_value:  # other processes import it too
        with suppress(Exception):  # cloudpickle tells the reason
            return pickle.dumps(given)
    return bytes(cloudpickle.dumps(given))


def pack(objective: Any, catch: Any, *, by_value: bool = False) -> bytes:
    """Return an objective and the exceptions to catch as bytes, like `dumps`.

    Raises:
        ArgumentError: They refer to something that cannot be sent.
    """
    try:
        return dumps((objective, catch), by_value=by_value)
    except Exception as error:
        reason = str(error).rstrip(".")
        raise ArgumentError(
            f"objective={objective!r} cannot run in another process ({reason}); what cannot be "
            "sent, such as locks, open files and connections, must be made inside it."
        ) from error
