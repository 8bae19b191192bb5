"""Which points of metrics a store has already, when an earlier request may have arrived."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.rest_store import RestStore
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.search_utils import SearchUtils
from mlflow.utils.server_info import ServerInfoRequestError, fetch_server_info

from tracker.store.uri import is_database, is_http

MetricPoint = tuple[str, float, int, int]
"""Name, value, step, and time in milliseconds since 1970."""

_LARGEST = sys.float_info.max
_MARGIN = 10_000  # newer points: of the same request, or that another process has logged


def without_logged(
    client: MlflowClient, uri: str, run_id: str, metrics: Sequence[MetricPoint]
) -> Sequence[MetricPoint]:
    """Leave out the points that an earlier request has logged.

    Databases drop duplicates by themselves, those of servers too; a file store would keep them.

    Args:
        client: A client of the store.
        uri: The store's tracking URI.
        run_id: The run.
        metrics: The points of the last request that was sent to the run.
    """
    if not metrics or is_database(uri) or (is_http(uri) and _has_database(uri)):
        return metrics
    counts: dict[str, int] = {}
    for name, *_ in metrics:
        counts[name] = counts.get(name, 0) + 1
    logged = {
        (name, _as_stored(point.value), point.step, point.timestamp)
        for name, count in counts.items()
        for point in _newest(client, uri, run_id, name, count + _MARGIN)
    }
    return [m for m in metrics if (m[0], _as_stored(m[1]), *m[2:]) not in logged]


def _has_database(uri: str) -> bool:
    """Return whether a server says that it keeps its runs in a database."""
    try:
        answer = fetch_server_info(get_default_host_creds(uri))
    except ServerInfoRequestError:
        return False
    return answer.data is not None and answer.data.get("store_type") == "SqlStore"


def _newest(client: MlflowClient, uri: str, run_id: str, name: str, count: int) -> Sequence[Metric]:
    """Return the last points of a metric, at least `count` of them if it has as many.

    A server gives its file store's points in the order of their arrival, and they may be millions:
    the end is found by bisection.
    """
    if not is_http(uri):
        return list(client.get_metric_history(run_id, name))
    store = RestStore(lambda: get_default_host_creds(uri))

    def page(number: int, size: int = 1) -> Sequence[Metric]:
        token = SearchUtils.create_page_token(number * count).decode() if number else None
        return list(store.get_metric_history(run_id, name, size, token))

    try:
        first = store.get_metric_history(run_id, name, count)
        if first.token is None:
            return list(first)
        last, end = 1, 2  # pages: `last` has points
        while page(end):
            last, end = end, 2 * end
        while end - last > 1:
            middle = (last + end) // 2
            last, end = (middle, end) if page(middle) else (last, middle)
        return page(last - 1, 2 * count)
    except MlflowException:  # not MLflow's own server: it has other tokens
        return list(client.get_metric_history(run_id, name))


def _as_stored(value: float) -> float | str:
    """Return a metric's value as it compares after MLflow stored it: NaN equal, infinity cut."""
    return "nan" if math.isnan(value) else max(-_LARGEST, min(value, _LARGEST))
