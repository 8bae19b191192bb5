"""Guards around calls of MLflow's client: its errors, retries, prints and pages."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar

from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.store.entities import PagedList
from mlflow.utils import request_utils
from urllib3.connectionpool import ConnectionPool
from urllib3.response import BaseHTTPResponse
from urllib3.util.retry import Retry

from tracker.errors import GoneError, RefusedError, StoreError, first_line

T = TypeVar("T")

_REFUSALS = ("INVALID_PARAMETER_VALUE", "PERMISSION_DENIED")
_ABSENT = "RESOURCE_DOES_NOT_EXIST"
_UNCERTAIN = "BAD_REQUEST"  # MLflow's answer to any failure of its database
_PASSING = (401, 408, 409, 423, 425, 429)  # credentials may be renewed, a lock released
_CODES = set(ErrorCode.keys())
_CLASHES = (NotADirectoryError, IsADirectoryError, FileExistsError)
_LONGEST_WAIT = 600.0


@contextmanager
def translated(action: str) -> Iterator[None]:
    """Raise StoreError or RefusedError in place of MLflow's errors.

    Args:
        action: What MLflow is asked to do, for the message: "MLflow could not ACTION: …".

    Raises:
        RefusedError: The store answered, and will never accept the request.
        GoneError: What it names does not exist, which may mean that it is the wrong store.
        StoreError: The request failed in another way.
    """
    _Answers.status, _Answers.retry_after = None, 0.0
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # MLflow's file store raises plain ones
        text = f"MLflow could not {action}: {first_line(error)}."
        if isinstance(error, MlflowException) and error.error_code == _ABSENT:
            raise GoneError(text) from error
        failure = (RefusedError if _is_refusal(error) else StoreError)(text)
        failure.retry_after = _Answers.retry_after
        raise failure from error


class _Answers(Retry):
    """Notes the status of the last answer of a server, and how long it asked to wait."""

    status: int | None = None
    retry_after = 0.0

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        _Answers.status = status_code
        return super().is_retry(method, status_code, has_retry_after)

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: ConnectionPool | None = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        _Answers.retry_after = _seconds(response.headers.get("Retry-After") if response else None)
        return super().increment(method, url, response, error, _pool, _stacktrace)


def note_answers() -> None:
    """Let errors follow from the status and Retry-After of answers, which MLflow's own omit.

    It replaces a class in MLflow's client, so it is only for processes that do nothing but deliver.
    """
    vars(request_utils)["Retry"] = _Answers
    request_utils._cached_get_request_session.cache_clear()


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a header `Retry-After` asks to wait; 0 if it is not understood."""
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(str(retry_after)).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, min(seconds, _LONGEST_WAIT)) if seconds == seconds else 0.0


def _is_refusal(error: Exception) -> bool:
    """Return whether the same request would fail the same way."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    for each in chain:
        if isinstance(each, _CLASHES):
            return True
        if isinstance(each, OSError) and each.errno == errno.ENAMETOOLONG:
            return True
    if isinstance(error, MlflowException):
        if error.error_code in _REFUSALS:
            return True
        if isinstance(error, RestException) and error.json.get("error_code") in _CODES:
            # A value that the database cannot hold; anything else of its may pass.
            is_value = re.search(r"\b(DataError|IntegrityError)\b", str(error)) is not None
            return error.error_code == _UNCERTAIN and is_value
        answer = re.search(r"failed with error code (\d+)", str(error))  # and a foreign body
        status = int(answer[1]) if answer else _Answers.status
    else:
        status = next(filter(None, map(_http_status, chain)), None)
    return status is not None and 400 <= status < 500 and status not in _PASSING


def _http_status(error: BaseException) -> int | None:
    """Return the status of the answer that an error of requests or a cloud's client is about."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", getattr(error, "status_code", None))
    return status if isinstance(status, int) else None


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
