"""The mirror adds the missing parts of a study to MLflow, and writes nothing twice."""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import optuna
import psutil
import pytest
import torch
from mlflow.entities import Run as MlflowRun
from torch import nn

from tests.helpers import Store
from tests.programs import wait_for
from tracker import StoreError, Study, Trial
from tracker.cli import main
from tracker.delivery.base import leave_all
from tracker.delivery.leftovers import journals
from tracker.delivery.uploader import Uploader
from tracker.journal.reader import Journal
from tracker.search.cli import mirror_study
from tracker.search.keeper import KeeperConfig, KeeperProcess, MirrorService
from tracker.search.mirror import Mirror
from tracker.search.storage import LockedError, Storage
from tracker.search.stored_study import load
from tracker.store.client import MlflowStore

SLOW = pytest.mark.slow
SPACE = {"x": [3, 1, 2]}


def make(objective: Callable[[Trial], Any], **settings: Any) -> Study:
    return Study("study", objective, **{"space": SPACE, "sampler": "grid", **settings})


def plain(trial: Trial) -> float:
    return float(trial.params["x"])


def mirrored(uri: str | None = None) -> int:
    """Mirror the study; return how many items were missing."""
    storage = Storage()
    try:
        return mirror_study(storage, load(storage, "study"), uri, Path(".tracker"))[0]
    finally:
        storage.close()


def family(store: Store) -> tuple[MlflowRun, list[MlflowRun]]:
    """The run of the study, and those of its trials by number."""
    runs = store.runs()
    (parent,) = [run for run in runs if "optuna.trial" not in run.data.tags]
    children = sorted(
        (run for run in runs if "optuna.trial" in run.data.tags),
        key=lambda run: int(run.data.tags["optuna.trial"]),
    )
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parent.info.run_id}
    return parent, children


def model(trial: Trial) -> float:
    """Log a network, and return the trial's `x`."""
    example = torch.zeros(2, 4)
    with trial.manager() as manager:
        manager.begin_run(trial.params, nn.Linear(4, 1), [(example, torch.zeros(2, 1))])
        manager.begin_epoch()
        manager.end_epoch()
        manager.end_run()
    return float(trial.params["x"])


# -- missing items are added -------------------------------------------------------------------


def test_deleted_tags_and_files_of_a_study_are_restored(store: Store, workdir: Path) -> None:
    make(plain, replay="train {number}").run()
    before, _ = family(store)
    assert before.data.tags["tracker.replay"] == "train 1"
    names = ["best.trial", "best.value", "best.params", "best.run", "tracker.replay"]
    for name in [*names, "tracker.study"]:
        store.client.delete_tag(before.info.run_id, name)
    folder = Path(urlsplit(before.info.artifact_uri).path)
    for file in ("study.html", "trials.csv"):
        (folder / file).unlink()
    assert mirrored() > 0
    after, _ = family(store)
    assert after.data.tags == before.data.tags
    assert store.artifacts(after) == {"study.html", "trials.csv", "trials.json", "best.json"}
    assert store.history(after, "best_objective") == [(1, 1.0)]
    assert mirrored() == 0


def test_files_are_written_under_the_mirrors_lock(
    store: Store, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(plain).run()
    parent, _ = family(store)
    store.client.delete_tag(parent.info.run_id, "tracker.mirrored")
    monkeypatch.setattr("tracker.search.storage.LOCK_SECONDS", 0.0)
    other, written = Storage(), list[str]()

    class Checked(MlflowStore):
        def log_text(self, run_id: str, text: str, path: str) -> None:
            with pytest.raises(LockedError), other.lock("mirror"):
                pass
            written.append(path)
            super().log_text(run_id, text, path)

    with closing(other), closing(Storage()) as storage:
        Mirror(storage, load(storage, "study"), Checked(store.uri)).refresh()
        assert set(written) == {"study.html", "trials.csv", "trials.json", "best.json"}
        with other.lock("mirror"):
            pass


def test_an_older_view_of_a_study_does_not_replace_a_newer_page(
    store: Store, workdir: Path
) -> None:
    settings: dict[str, Any] = {"sampler": "random", "space": {"x": [1.0, 2.0]}}
    make(plain, trials=1, **settings).run()
    parent, _ = family(store)
    store.client.delete_tag(parent.info.run_id, "tracker.mirrored")

    class Overtaken(Storage):
        """While a mirror waits for the lock, another trial ends and is mirrored."""

        is_overtaken = False

        def lock(self, name: str = "tracker") -> AbstractContextManager[None]:
            if name == "mirror" and not self.is_overtaken:
                self.is_overtaken = True
                make(plain, trials=2, **settings).run(resume=True)
            return super().lock(name)

    with closing(Overtaken()) as storage:
        Mirror(storage, load(storage, "study"), MlflowStore(store.uri)).refresh()
        assert storage.is_overtaken
    parent, _ = family(store)
    assert len(json.loads(store.text(parent, "trials.json", workdir))) == 2
    assert "2: 2 complete" in store.text(parent, "study.html", workdir)


def test_a_trial_without_a_parent_gets_its_parent_back(store: Store) -> None:
    make(plain).run()
    _, children = family(store)
    store.client.delete_tag(children[1].info.run_id, "mlflow.parentRunId")
    assert mirrored() == 1
    assert [run.info.run_id for run in family(store)[1]] == [c.info.run_id for c in children]
    assert mirrored() == 0


def test_a_deleted_study_run_is_replaced_and_gets_the_trials_below_it(
    store: Store,
) -> None:
    make(plain).run()
    parent, children = family(store)
    store.client.delete_run(parent.info.run_id)
    assert mirrored() > 0
    again, moved = family(store)
    assert again.info.run_id != parent.info.run_id
    assert again.info.status == "FINISHED"
    assert again.info.start_time <= children[0].info.start_time
    assert [run.info.run_id for run in moved] == [run.info.run_id for run in children]
    assert again.data.params == parent.data.params
    assert mirrored() == 0


@pytest.mark.parametrize("tracking_uri", ["sqlite", "file"], indirect=True)
def test_infinite_and_nan_values_do_not_count_as_missing(store: Store) -> None:
    def objective(trial: Trial) -> float:
        trial.report(1.0, 1)
        trial.report(math.nan, 2)
        return math.inf

    make(objective).run()
    assert mirrored(store.uri) == 0
    parent, children = family(store)
    assert [step for step, _ in store.history(children[0], "intermediate_value")] == [1, 2]
    assert len(store.history(parent, "best_objective")) == 1


def test_a_restored_run_has_its_pruned_step_and_its_constraints(
    store: Store,
) -> None:
    def objective(trial: Trial) -> float:
        trial.set_constraint("size", 0.5)
        trial.report(7.0, 3)
        if trial.number == 2:
            raise optuna.TrialPruned
        return 1.0

    make(objective).run()
    assert mirrored() == 0
    _, children = family(store)
    store.client.delete_run(children[2].info.run_id)
    assert mirrored() > 0
    _, again = family(store)
    assert again[2].data.tags["tracker.pruned"] == "It was stopped at step 3, value 7."
    assert again[2].data.metrics == children[2].data.metrics
    assert mirrored() == 0


def test_a_file_that_cannot_be_written_does_not_hold_back_the_rest(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    make(plain).run()
    parent, _ = family(store)
    page = Path(urlsplit(parent.info.artifact_uri).path, "study.html")
    page.unlink()
    (page / "folder").mkdir(parents=True)
    make(plain, space={"x": [3, 1, 2, 0]}).run(resume=True)
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best.trial"] == "3"
    assert len(children) == 4
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "study.html cannot be written" in warning
    assert "tracker mirror --study study" in warning
    shutil.rmtree(page)
    assert mirrored() > 0
    assert "study.html" in store.artifacts(parent)
    assert mirrored() == 0


# -- mirrors beside other deliveries -----------------------------------------------------------


def run_offline(objective: Callable[[Trial], Any]) -> None:
    """Run the study, and leave the journal of its trials to `tracker sync`."""
    make(objective, offline=True).run()
    leave_all()


def begun() -> None:
    """Create the study's run, which deliveries of its trials need."""
    storage = Storage()
    Mirror(storage, load(storage, "study"), MlflowStore()).begin({})
    storage.close()


def delivered() -> None:
    assert main(["sync"]) == 0


def first_run_delivered_in_part() -> None:
    """Deliver the beginning of the first trial's run and no more."""
    (folder,) = journals(Path(".tracker"))
    answers = iter([False, True])
    with closing(Journal(folder)) as journal:
        assert Uploader(journal, MlflowStore()).drain(lambda: next(answers)) > 0


@pytest.mark.parametrize(
    "steps",
    [
        (mirrored, delivered),
        (begun, delivered, mirrored),
        (mirrored, mirrored, delivered),
        (begun, first_run_delivered_in_part, mirrored, delivered),
    ],
    ids=["mirror first", "delivery first", "two mirrors first", "mirror during a delivery"],
)
def test_a_trial_that_is_mirrored_and_delivered_has_one_run_and_each_point_once(
    steps: Sequence[Callable[[], object]], store: Store
) -> None:
    def objective(trial: Trial) -> float:
        trial.report(7.0, 3)
        return plain(trial)

    run_offline(objective)
    for step in steps:
        step()
    mirrored()
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    assert [child.data.tags["optuna.trial"] for child in children] == ["0", "1", "2"]
    for child, x in zip(children, SPACE["x"], strict=True):
        assert child.info.status == "FINISHED"
        assert child.data.params == {"x": str(x)}
        assert store.history(child, "objective") == [(0, float(x))]
        assert store.history(child, "intermediate_value") == [(3, 7.0)]
    assert mirrored() == 0


def test_a_waiting_trial_that_is_claimed_while_the_study_is_mirrored_keeps_its_run(
    store: Store,
) -> None:
    optuna_study = make(plain, sampler="random", trials=1).run()
    optuna_study.enqueue_trial({"x": 2})
    key = store.runs()[0].data.tags["tracker.run"]
    claimed = store.client.create_run("0", tags={"tracker.run": f"{key}-1"})
    mirrored()
    run = store.client.get_run(claimed.info.run_id)
    assert run.info.status == "RUNNING"
    assert "optuna.state" not in run.data.tags


def test_a_resumed_study_keeps_its_run_and_adopts_no_other(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(plain).run()
    before, _ = family(store)
    monkeypatch.setenv("MLFLOW_RUN_ID", store.client.create_run("0").info.run_id)
    make(plain, space={"x": [3, 1, 2, 4]}).run(resume=True)
    key = before.data.tags["tracker.run"]
    (after,) = (run for run in store.runs() if run.data.tags.get("tracker.run") == key)
    assert after.info.run_id == before.info.run_id
    assert after.data.tags["best.trial"] == "1"


def test_a_missing_run_is_restored_beside_the_others_of_a_study_that_adopts_a_run(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", store.client.create_run("0").info.run_id)
    make(plain, experiment="other").run()
    before = store.runs("other")
    store.client.delete_run(before[1].info.run_id)
    mirrored()
    assert len(store.runs("other")) == len(before)
    assert len(store.runs()) == 1


def test_a_mirror_and_a_delivery_at_the_same_time_leave_one_run_a_trial(store: Store) -> None:
    run_offline(plain)
    begun()
    with ThreadPoolExecutor() as pool:
        for step in (mirrored, delivered, mirrored):
            pool.submit(step)  # MLflow refuses one of two requests that log the same param
    delivered()
    mirrored()
    _, children = family(store)
    assert [child.data.tags["optuna.trial"] for child in children] == ["0", "1", "2"]
    assert {child.info.status for child in children} == {"FINISHED"}
    assert mirrored() == 0


class FailingStore(MlflowStore):
    """A store that stops answering after some requests."""

    def __init__(self, uri: str, requests: int) -> None:
        super().__init__(uri)
        self.remaining = requests

    def log_batch(self, *args: Any, **kwargs: Any) -> None:
        self._answer()
        super().log_batch(*args, **kwargs)

    def end_run(self, *args: Any, **kwargs: Any) -> None:
        self._answer()
        super().end_run(*args, **kwargs)

    def _answer(self) -> None:
        self.remaining -= 1
        if self.remaining < 0:
            raise StoreError("the server does not answer")


@pytest.mark.parametrize("requests", range(5))
def test_an_interrupted_mirror_is_completed_by_the_next(requests: int, store: Store) -> None:
    make(plain).run()
    before = family(store)
    for run in (before[0], *before[1]):
        store.client.delete_run(run.info.run_id)
    storage = Storage()
    mirror = Mirror(storage, load(storage, "study"), FailingStore(store.uri, requests))
    with pytest.raises(StoreError):
        mirror.complete()
    storage.close()
    assert mirrored() > 0
    parent, children = family(store)
    assert parent.data.params == before[0].data.params
    for child, lost in zip(children, before[1], strict=True):
        assert child.info.status == "FINISHED"
        assert child.data.params == lost.data.params
        assert child.data.metrics == lost.data.metrics
        assert len(store.history(child, "objective")) == 1
    assert mirrored() == 0


# -- the best ----------------------------------------------------------------------------------


def test_the_tags_of_a_pareto_front_list_its_trials_in_one_order(store: Store) -> None:
    def objective(trial: Trial) -> Sequence[float]:
        return trial.params["x"], -trial.params["x"]

    points = [*range(12)]
    make(objective, space={"x": points}, direction=["minimize"] * 2, metric=["a", "b"]).run()
    parent, children = family(store)
    tags = parent.data.tags
    assert tags["best.trial"] == f"{', '.join(map(str, points[:10]))} and 2 more"
    assert tags["best.value"].split("; ") == [f"{x}, {-x}" for x in points[:10]]
    assert tags["best.run"].split(", ") == [run.info.run_id for run in children[:10]]
    assert json.loads(tags["best.params"]) == [{"x": x} for x in points[:10]]
    assert mirrored() == 0


def test_a_beaten_model_is_deleted_while_the_study_is_running(store: Store) -> None:
    remaining: list[str | None] = []

    def objective(trial: Trial) -> float:
        if trial.number == 2:
            with closing(Storage()) as storage:
                MirrorService(config(store.uri), storage).refresh()
            models = store.client.search_logged_models([store.runs()[0].info.experiment_id])
            remaining.extend(model.source_run_id for model in models)
        return model(trial)

    make(objective).run()
    _, children = family(store)
    assert remaining == [children[1].info.run_id]


@pytest.mark.parametrize("kind", ["sqlite", "file", pytest.param("server", marks=SLOW)])
def test_the_best_model_is_registered_in_the_store_of_the_study(
    kind: str, workdir: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uris = {"sqlite": "sqlite:///other.db", "file": f"file://{workdir}/other"}
    uri = uris.get(kind) or request.getfixturevalue("server")
    make(model, tracking_uri=uri, register="tiny", alias="best").run()
    store = Store(uri)
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    version = store.client.get_model_version_by_alias("tiny", "best")
    assert version.run_id == children[1].info.run_id
    place = store.client.get_model_version_download_uri("tiny", str(version.version))
    (logged,) = store.client.search_logged_models([parent.info.experiment_id])
    assert place == logged.artifact_location
    assert kind == "file" or not Path("mlflow.db").exists()  # MLflow's file store makes one
    store.client.delete_registered_model_alias("tiny", "best")
    assert mirrored(uri) == 1
    assert mirrored(uri) == 0


def test_a_model_that_cannot_be_registered_does_not_hold_back_the_rest(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    store.client.register_prompt("taken", "by a text")  # the name of a prompt cannot be a model's
    make(model, register="taken").run()
    parent, _ = family(store)
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best.trial"] == "1"
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    (warning,) = [text for text in warnings if "incomplete" in text or "not yet complete" in text]
    assert "MLflow could not register the model taken" in warning
    assert mirrored() == 0


# -- keepers -----------------------------------------------------------------------------------


def config(uri: str, search: str = "another") -> KeeperConfig:
    return KeeperConfig(
        storage="journal:///studies.journal",
        study="study",
        search=search,
        tracking_uri=uri,
        directory=".tracker",
        environment={},
        adopt=None,
        started=1,
        grace=60.0,
    )


def test_a_keeper_that_died_is_replaced_at_the_end(store: Store) -> None:
    make(plain).run()
    others = psutil.Process().children()
    keeper = KeeperProcess(config(store.uri))
    (process,) = [child for child in psutil.Process().children() if child not in others]
    wait_for(lambda: family(store)[0].info.status == "RUNNING", "the study's run to be RUNNING")
    process.kill()
    process.wait()
    assert keeper.finish(settled=True) is None
    assert family(store)[0].info.status == "FINISHED"


@pytest.fixture
def hanging() -> Iterator[str]:
    """A server that answers health checks, and nothing else until the test ends."""
    over = threading.Event()

    class Hanging(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "health" not in self.path and "version" not in self.path:
                over.wait()
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(b"OK")

        def do_POST(self) -> None:
            body = b"{}"  # no experiments
            if "experiments/search" not in self.path:
                self.do_GET()
                return
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hanging)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_claiming_a_trial_never_waits_for_a_server_that_hangs(
    hanging: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    make(plain, tracking_uri="sqlite:///mlflow.db").run()

    def keep() -> None:
        with closing(Storage()) as storage, suppress(StoreError):
            MirrorService(config(hanging), storage).begin()

    keeper = threading.Thread(target=keep)
    keeper.start()
    waited = 0.0
    storage = Storage()
    while keeper.is_alive():
        began = time.monotonic()
        with storage.lock():
            waited = max(waited, time.monotonic() - began)
        time.sleep(0.05)
    storage.close()
    assert waited < 6.0  # shorter than the eight seconds of one request
