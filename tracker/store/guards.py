"""Guards around calls of MLflow's client: its errors, retries, prints and pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

from mlflow.exceptions import MlflowException
from mlflow.store.entities import PagedList

from tracker.errors import RefusedError, StoreError, first_line

T = TypeVar("T")

_REFUSAL = "INVALID_PARAMETER_VALUE"  # not RESOURCE_DOES_NOT_EXIST: it may be the wrong store


@contextmanager
def translated(action: str) -> Iterator[None]:
    """Raise StoreError or RefusedError in place of MLflow's errors.

    Args:
        action: What MLflow is asked to do, for the message: "MLflow could not ACTION: …".

    Raises:
        RefusedError: The store answered, and will never accept the request.
        StoreError: The request failed in another way.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # MLflow's file store raises plain ones
        refused = (
            isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError))
            or (isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG)
            or (isinstance(error, MlflowException) and error.error_code == _REFUSAL)
        )
        kind = RefusedError if refused else StoreError
        raise kind(f"MLflow could not {action}: {first_line(error)}.") from error


def all_pages(search: Callable[..., PagedList[T]], *args: Any, **kwargs: Any) -> Iterator[T]:
    """Yield the results of a search of MLflow's client, page after page."""
    token = None
    while True:
        page = search(*args, page_token=token, **kwargs)
        yield from page
        if not (token := page.token):
            return


def quiet() -> AbstractContextManager[None]:
    """Keep MLflow from printing a server's URL with its password and from drawing progress bars."""
    return _environment(
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"
    )


def without_retries() -> AbstractContextManager[None]:
    """Keep MLflow from repeating a request that may have succeeded, which would create two runs."""
    return _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
