"""Outages on purpose: each place of the code that asks a storage or MLflow is failed once.

A place is the stack of the lines of `tracker/` that lead to a request. Retries go from one failing
place to the next, so that one call of the code visits all of them.
"""

from __future__ import annotations

import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from sqlalchemy import Engine, event

import tracker
from tracker.search import storage as storages

STORAGE = "sqlite:///studies.db"
"""Stands in for PostgreSQL: its errors take the same way through SQLAlchemy and Optuna."""
_PACKAGE = str(Path(tracker.__file__).parent)


class Outages:
    """Requests that fail, from `begin` on."""

    def __init__(self) -> None:
        self.places: Counter[tuple[str, ...]] = Counter()
        """Where requests have failed, how often: lines of `tracker/`, outermost first."""
        self.on_strike: Callable[[], None] = lambda: None
        """Called before each failure."""
        self.fails: Callable[[tuple[str, ...]], bool] = lambda place: False
        """Whether a request of this place fails."""

    def each_place_once(self, file: str = "") -> None:
        """Let the first request of each place fail from now on; with `file`, of lines in it."""
        self.fails = lambda place: place not in self.places and file in place[-2]

    def everything(self) -> None:
        """Let all requests fail from now on."""
        self.fails = lambda place: True

    def over(self) -> None:
        """Let all requests pass from now on."""
        self.fails = lambda place: False

    def strike(self, what: str, error: Exception) -> None:
        """Raise `error` if the outage reaches this request."""
        place = (*_lines(), what)
        if self.fails(place):
            self.places[place] += 1
            self.on_strike()
            raise error


def _lines() -> Iterator[str]:
    """The lines of `tracker/` that are being executed, outermost first."""
    frame, lines = sys._getframe(), list[str]()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE):
            lines.append(f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return reversed(lines)


@contextmanager
def storage_outages(patch: pytest.MonkeyPatch) -> Iterator[Outages]:
    """Outages of the storage `STORAGE`: its connections, statements and locks."""
    outages = Outages()
    name = STORAGE.rpartition("/")[2]

    def connect(dialect: Any, record: Any, arguments: Any, options: Any) -> None:
        if Path(arguments[0]).name == name:
            outages.strike("connect", sqlite3.OperationalError("the server does not answer"))

    def execute(cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        if Path(context.engine.url.database or "").name == name:
            lost = sqlite3.OperationalError("the connection is lost")
            outages.strike(statement.split()[0], lost)

    take = storages._FileLock.take

    def taken(lock: Any, timeout: float = 0) -> bool:
        outages.strike("lock", ConnectionError("the connection of the lock is lost"))
        return take(lock, timeout)

    patch.setattr(storages._FileLock, "take", taken)
    event.listen(Engine, "do_connect", connect)
    event.listen(Engine, "do_execute", execute)
    try:
        yield outages
    finally:
        event.remove(Engine, "do_connect", connect)
        event.remove(Engine, "do_execute", execute)


def mlflow_outages(patch: pytest.MonkeyPatch, *, executed: bool) -> Outages:
    """Outages of MLflow.

    Args:
        patch: Undoes them.
        executed: Whether requests that fail are executed, and only their answers lost.
    """
    outages = Outages()

    def failing(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = method(*args, **kwargs) if executed else None
            outages.strike(name, MlflowException("no answer", TEMPORARILY_UNAVAILABLE))
            return answer if executed else method(*args, **kwargs)

        return call

    for name, method in vars(MlflowClient).items():
        if not name.startswith("_") and callable(method):
            patch.setattr(MlflowClient, name, failing(name, method))
    return outages
