"""What a store refuses costs that record only; what it postpones is waited for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.rest import Answer, Request, StandIn
from tracker import start_run
from tracker.cli import main
from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.base import _close_all
from tracker.store.client import MlflowStore
from tracker.store.guards import note_answers


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with StandIn() as stand_in:
        yield stand_in


def track(uri: str) -> None:
    """Track one run, which `tracker sync` is to deliver."""
    Path("big.bin").write_bytes(b"large")
    run = start_run(tracking_uri=uri, offline=True)
    run.log_metrics({"before": 1.0})
    run.log_artifact("big.bin")
    run.log_metrics({"after": 1.0, "foreign": 2.0})
    run.end()
    _close_all(BackgroundDelivery.leave)


def is_upload(request: Request) -> bool:
    return request.method == "PUT"


def is_foreign(request: Request) -> bool:
    names = [m["key"] for m in request.body.get("metrics", [])] if not is_upload(request) else []
    return "foreign" in names


@pytest.mark.parametrize("of", [is_upload, is_foreign])
@pytest.mark.parametrize(
    "answer",
    [
        Answer(400),
        Answer(400, b'{"detail": "no"}'),
        Answer(403),
        Answer(403, b'{"error_code": "FORBIDDEN_HERE"}'),
        Answer(403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}'),
        Answer(404),
        Answer(413),
        Answer(422, b"[]"),
    ],
)
def test_a_refused_request_costs_its_record_and_the_run_ends_truly(
    server: StandIn,
    of: Callable[[Request], bool],
    answer: Answer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answer = lambda request: answer if of(request) else None
    track(server.uri)
    assert main(["sync"]) == 0
    assert server.statuses == ["FINISHED"]
    kept = {name for name, _ in server.points} | set(server.files)
    assert kept == {"before", "after", "foreign", "big.bin"} - (
        {"big.bin"} if of is is_upload else {"foreign"}
    )
    assert len(server.points) == len(set(server.points))
    assert "is set aside in .tracker/refused/" in capsys.readouterr().err
    (line,) = [
        json.loads(line)
        for path in Path(".tracker/refused").glob("*/records.jsonl")
        for line in path.read_text().splitlines()
    ]
    if of is is_upload:
        (file,) = Path(".tracker/refused").glob(f"*/{line['file']}")
        assert file.read_bytes() == b"large"
    else:
        ((name, value, *_),) = line["record"]["metrics"]
        assert (name, value) == ("foreign", 2.0)
    assert main(["sync"]) == 0


PASSING = [Answer(401), Answer(429), Answer(500), Answer(503, b'{"detail": "later"}')]
PASSING_JSON = [
    Answer(400, b'{"error_code": "BAD_REQUEST", "message": "the database is gone"}'),
    Answer(200, b"<html>please log in</html>"),
]


@pytest.mark.parametrize(
    ("of", "answer"),
    [
        *((is_upload, answer) for answer in PASSING),
        *((is_foreign, answer) for answer in PASSING + PASSING_JSON),
    ],
)
def test_what_may_pass_is_kept_for_the_next_time(
    server: StandIn, of: Callable[[Request], bool], answer: Answer
) -> None:
    server.answer = lambda request: answer if of(request) else None
    track(server.uri)
    assert main(["sync"]) == 2
    assert server.statuses == ["RUNNING"]
    server.answer = lambda request: None
    assert main(["sync"]) == 0
    assert server.statuses == ["FINISHED"]
    assert {name for name, _ in server.points} == {"before", "after", "foreign"}
    assert not Path(".tracker/refused").exists()


@pytest.mark.parametrize("status", [429, 503])
def test_sync_waits_as_long_as_a_busy_server_asks_for(server: StandIn, status: int) -> None:
    times = iter(range(3))
    server.answer = lambda request: (
        Answer(status, headers={"Retry-After": "0.01"})
        if is_upload(request) and next(times, None) is not None
        else None
    )
    track(server.uri)
    assert main(["sync"]) == 0
    assert server.statuses == ["FINISHED"]
    assert server.files == ["big.bin"]


def test_retry_after_is_seconds_or_a_date_and_bounded(server: StandIn) -> None:
    note_answers()
    store = MlflowStore(server.uri)
    for header, low, high in (
        ("7", 7, 7),
        ("Fri, 31 Dec 2100 23:59:59 GMT", 600, 600),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("-1", 0, 0),
    ):
        answer = Answer(429, headers={"Retry-After": header})
        server.answer = lambda request, answer=answer: answer  # type: ignore[misc]
        with pytest.raises(Exception, match="MLflow could not") as caught:
            store.experiment_id("Default")
        assert low <= caught.value.retry_after <= high, header  # type: ignore[attr-defined]


def test_a_name_that_clashes_in_the_file_store_costs_that_name_only(tmp_path: Path) -> None:
    uri = (tmp_path / "runs").as_uri()
    run = start_run(tracking_uri=uri, params={"opt": "sgd"})
    run.log_params({"opt/lr": 0.1, "depth": 3})
    run.log_metrics({"val": 1.0})
    run.log_metrics({"val/loss": 2.0, "loss": 3.0})
    run.log_metrics({"loss": 4.0}, 1)
    run.end()
    stored = Store(uri).run()
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"opt": "sgd", "depth": "3"}
    assert stored.data.metrics == {"val": 1.0, "loss": 4.0}
    assert Store(uri).history(stored, "loss") == [(0, 3.0), (1, 4.0)]


@pytest.mark.parametrize("answers", [True, False])
def test_a_slow_health_check_has_as_long_as_a_request(
    server: StandIn, answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.store.uri.ANSWER_SECONDS", 0.05)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60" if answers else "0.2")
    track(server.uri)
    healthy = threading.Event()

    def slow(request: Request) -> None:
        if request.path == "/health":
            healthy.wait(0.4 if answers else 60)

    server.answer = slow
    assert main(["sync"]) == (0 if answers else 2)
    healthy.set()
    assert server.statuses == (["FINISHED"] if answers else [])
