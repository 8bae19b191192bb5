"""Which exceptions of an objective end the study, and which only its trial."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterable
from typing import Any

import optuna

from tracker.errors import ArgumentError, CallOrderError, TrackerError
from tracker.search.channel import Channel, TrialLostError
from tracker.search.sending import dumps

Catch = tuple[type[Exception], ...] | None
"""Exceptions that only fail their trial, as in Optuna; None for all but obvious mistakes."""

MISTAKES = (ImportError, NameError, AttributeError, TypeError, SyntaxError)
"""Exceptions of the program, which every trial would meet again …"""
FIRST = 3
"""… if one of the first trials meets them, before any has ended well."""


def checked_catch(given: Any) -> Catch:
    """Return one exception class, or several, as a tuple.

    Raises:
        ArgumentError: They are not classes of exceptions.
    """
    if given is None:
        return None
    several = tuple(given) if isinstance(given, Iterable) else (given,)
    for each in several:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise ArgumentError(
                f"catch={given!r} is not allowed; it must be a subclass of Exception, or several."
            )
    return several


def ends_study(error: BaseException, catch: Catch, number: int, channel: Channel) -> bool:
    """Whether an exception ends the study; one that does so by default gets a note.

    Args:
        error: What the objective raised.
        catch: The classes that do not end the study.
        number: The number of the trial.
        channel: The trial's connection to its search.
    """
    if not isinstance(error, Exception):
        return True
    if isinstance(error, (optuna.TrialPruned, TrialLostError)):
        return False
    if catch is not None:
        return not isinstance(error, catch)
    if isinstance(error, (ArgumentError, CallOrderError)):
        return True
    if not isinstance(error, MISTAKES) or not _is_early(number, channel):
        return False
    error.add_note(
        f"Trial {number} ended the study, as every trial would probably meet this error; with "
        f"run(catch={type(error).__name__}) it only fails its trial."
    )
    return True


def _is_early(number: int, channel: Channel) -> bool:
    try:
        return channel.is_early(number)
    except TrialLostError:
        return False


# -- from a worker to its search -------------------------------------------------------------------


def packed(error: Exception) -> tuple[bytes | None, str]:
    """Return an exception and its traceback in a form that another process can read."""
    if not isinstance(error, TrackerError):
        text = "".join(traceback.format_exception(error)).rstrip()
        error.add_note(f"The traceback of the worker:\n{text}")
    try:
        content = dumps(error)
        pickle.loads(content)
    except Exception:  # noqa: BLE001 - of a class that cannot be pickled
        content = None
    return content, f"{type(error).__name__}: {error}"


def unpacked(content: bytes | None, text: str) -> Exception:
    """Invert `packed`; an exception that cannot be sent is a TrackerError with its text."""
    if content is not None:
        try:
            error = pickle.loads(content)
            if isinstance(error, Exception):
                return error
        except Exception:  # noqa: BLE001 - its class is only known to the worker
            return TrackerError(text)
    return TrackerError(text)
