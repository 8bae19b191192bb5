"""A request in doubt is checked without reading a long history, and nothing is stored twice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.utils import server_info
from mlflow.utils.search_utils import SearchUtils

from tests.rest import Answer, Request, StandIn
from tracker.store.client import MlflowStore

LONG = 1_000_000


class History:
    """The metric `loss` of a server, as its file store would page it, and what was read of it."""

    def __init__(self, server: StandIn, kind: str | None) -> None:
        self.logged: Any = ()
        self.rows = 0
        self.requests = 0
        self._kind = kind
        server.answer = self._answer

    def _answer(self, request: Request) -> Answer | None:
        if "server-info" in request.path:
            return Answer(
                200 if self._kind else 404, json.dumps({"store_type": self._kind}).encode()
            )
        if not request.path.endswith("metrics/get-history"):
            return None
        self.requests += 1
        token, size = request.body.get("page_token"), int(request.body["max_results"])
        page, token = SearchUtils.paginate(self.logged, token, size)
        self.rows += len(page)
        points = [dict(zip(("key", "value", "step", "timestamp"), p, strict=True)) for p in page]
        said = {"metrics": points, **({"next_page_token": token.decode()} if token else {})}
        return Answer(200, json.dumps(said).encode())


@pytest.fixture
def server() -> Iterator[StandIn]:
    server_info._clear_server_info_cache()
    with StandIn() as server:
        yield server


def begun(server: StandIn) -> tuple[MlflowStore, str]:
    """A store at the stand-in, and the id of a run in it."""
    store = MlflowStore(server.uri)
    return store, store.begin_run(
        experiment_id="0", name=None, start_time=1, tags={"tracker.run": "a"}
    )


class Million:
    """A long history whose points are made when they are read; `newest` follows them."""

    def __init__(self, newest: list[Any]) -> None:
        self._newest = newest

    def __len__(self) -> int:
        return LONG + len(self._newest)

    def __getitem__(self, part: slice) -> list[Any]:
        places = range(*part.indices(len(self)))
        old = [("loss", 1.0, place, place) for place in places if place < LONG]
        return old + [self._newest[place - LONG] for place in places if place >= LONG]


@pytest.mark.parametrize(("kind", "requests"), [("SqlStore", 0), ("FileStore", 30), (None, 30)])
def test_a_request_in_doubt_reads_little_of_a_long_history(
    server: StandIn, kind: str | None, requests: int
) -> None:
    store, run_id = begun(server)
    sent = [("loss", float(step), step, LONG + step) for step in range(200)]
    history = History(server, kind)
    history.logged = Million(sent[:150])
    store.log_batch(run_id, sent, in_doubt=True)
    assert history.requests <= requests
    assert history.rows <= 50_000
    # A database drops the others by itself.
    assert len(server.points) == (200 if kind == "SqlStore" else 50)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    before=st.integers(0, 45_000),
    sent=st.integers(1, 30),
    arrived=st.integers(0, 30),
    after=st.integers(0, 5),
)
def test_of_a_request_in_doubt_exactly_the_missing_points_are_sent(
    server: StandIn, before: int, sent: int, arrived: int, after: int
) -> None:
    store, run_id = begun(server)
    server.points.clear()
    points = [("loss", math.sqrt(step), step, step) for step in range(sent)]
    history = History(server, "FileStore")
    others = [("loss", 0.5, -1, -1)]  # older ones, and those of another process
    history.logged = others * before + points[:arrived] + others * after
    store.log_batch(run_id, points, in_doubt=True)
    assert server.points == [("loss", step) for step in range(arrived, sent)]


def test_the_last_steps_of_a_run_are_read_without_its_histories(server: StandIn) -> None:
    store, run_id = begun(server)
    history = History(server, "FileStore")
    server.runs[run_id]["latest"] = [{"key": "loss", "value": 1.0, "step": 7, "timestamp": 9}]
    assert store.last_steps(run_id) == {"loss": 7}
    assert history.requests == 0
