"""A study is complete in MLflow if its storage and MLflow are back before the program ends."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow.entities import LoggedModelOutput
from optuna.trial import TrialState

from tests.helpers import Store
from tests.postgres import PostgresServer
from tests.search.outages import STORAGE, Outages, mlflow_outages, storage_outages
from tracker import StoreError, Study, Trial
from tracker.cli import main
from tracker.delivery.base import leave_all
from tracker.search.keeper import KeeperConfig, KeeperProcess, MirrorService
from tracker.search.session import Search
from tracker.search.storage import Storage
from tracker.search.stored_study import STUDY, load

POINTS = [3, 1, 2]


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Outages]:
    with storage_outages(monkeypatch) as outages:
        yield outages


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr("tracker.search.keeper._RETRY_SECONDS", 0.0)
    monkeypatch.setattr("tracker.search.session._HOLD_SECONDS", 0.0)
    monkeypatch.setattr("tracker.search.storage._PAUSE_SECONDS", 0.0)


def plain(trial: Trial) -> float:
    trial.report(7.0, 3)
    trial.set_constraint("size", -1.0)
    return float(trial.params["x"])


def make(objective: Any = plain, **settings: Any) -> Study:
    given = {"space": {"x": POINTS}, "sampler": "grid", "storage": STORAGE}
    return Study("study", objective, **{**given, **settings})


def run_unmirrored() -> None:
    """Run the study, and leave nothing of it in MLflow."""
    make(offline=True).run()
    leave_all()
    shutil.rmtree(".tracker")


def config(uri: str, storage: str = STORAGE, **settings: Any) -> KeeperConfig:
    return KeeperConfig(
        storage=storage,
        study="study",
        search=settings.get("search", "another"),
        tracking_uri=uri,
        directory=".tracker",
        environment=settings.get("environment", {}),
        adopt=None,
        started=1,
        grace=60.0,
    )


def check_complete(store: Store, folder: Path) -> None:
    """Check that MLflow shows the whole study, and everything once."""
    runs = store.runs()
    (parent,) = [run for run in runs if "optuna.trial" not in run.data.tags]
    children = {int(run.data.tags["optuna.trial"]): run for run in runs if run is not parent}
    assert len(runs) == 1 + len(children)
    assert parent.info.status == "FINISHED"
    with closing(Storage(STORAGE)) as storage:
        trials = optuna.Study("study", storage.optuna).trials
    assert children.keys() == set(range(len(trials)))
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert [trial.params["x"] for trial in complete] == POINTS
    (best,) = [trial for trial in complete if trial.value == 1.0]
    assert store.history(parent, "best_objective") == [(best.number, 1.0)]
    for trial in trials:
        run = children[trial.number]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.params == {name: str(x) for name, x in trial.params.items()}
        if trial not in complete:  # whether the storage took it was unknown
            assert run.info.status == "FAILED"
            continue
        assert run.info.status == "FINISHED"
        assert store.history(run, "objective") == [(0, trial.value)]
        assert store.history(run, "intermediate_value") == [(3, 7.0)]
        assert store.history(run, "constraint.size") == [(0, -1.0)]
    assert store.artifacts(parent) == {"study.html", "trials.csv", "trials.json", "best.json"}
    assert "An exception" not in store.text(parent, "study.html", folder)


def test_the_mirror_is_completed_although_each_answer_of_mlflow_is_lost_once(
    store: Store, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_unmirrored()
    away = mlflow_outages(monkeypatch, executed=True)
    away.each_place_once()
    assert MirrorService(config(store.uri)).finish(settled=True) is None
    away.over()
    assert len(away.places) > 30
    check_complete(store, workdir)


def test_a_study_is_complete_although_each_request_to_its_storage_fails_once(
    store: Store,
    workdir: Path,
    storage: Outages,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Search, "enter", armed(storage, Search.enter))
    make().run()
    storage.over()
    assert len(storage.places) > 40
    assert "not yet complete" not in caplog.text
    check_complete(store, workdir)


def armed(outages: Outages, method: Any) -> Any:
    """Begin the outages with the first call of a method."""

    def call(*args: Any) -> Any:
        outages.each_place_once()
        return method(*args)

    return call


def test_a_stale_lock_does_not_keep_a_study_out_of_mlflow(
    store: Store, workdir: Path, database: str, postgres: PostgresServer
) -> None:
    make(offline=True, storage=database).run()
    leave_all()
    with closing(Storage(database)) as storage:  # a keeper has connected, but not begun the run
        postgres.restart()
        keeper = MirrorService(config(store.uri, database), storage)
        assert keeper.finish(settled=True) is None
    assert {run.info.status for run in store.runs()} == {"FINISHED"}


def test_the_model_is_registered_although_the_registry_fails_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(register="tiny").run()
    (best,) = [run for run in store.runs() if run.data.params.get("x") == "1"]
    client = store.client
    model = client.create_logged_model(best.info.experiment_id, "m", best.info.run_id)
    client.log_outputs(best.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    away = mlflow_outages(monkeypatch, executed=True)
    away.each_place_once("/store/models.py")
    assert MirrorService(config(store.uri)).finish(settled=True) is None
    away.over()
    (version,) = client.search_model_versions("name = 'tiny'")
    assert version.run_id == best.info.run_id


def test_a_killed_search_is_cleaned_up_although_each_request_fails_once(
    store: Store, storage: Outages
) -> None:
    make(space={"x": [1]}, offline=True).run()
    leave_all()
    shutil.rmtree(".tracker")
    with closing(Storage(STORAGE)) as opened:
        study = optuna.Study("study", opened.optuna)
        record = load(opened, "study")
        search = Search(opened, replace(record, spaces=({"x": [1, 2]},)), grace=60.0)
        opened.optuna.set_study_user_attr(record.study_id, STUDY, search.record.to_json())
        search.enter()
        search.plan.observe(search.trials())
        assert not isinstance(search.claim(), str)
        storage.each_place_once()
        keeper = MirrorService(config(store.uri, search=search.id))
        assert keeper.reap() is None
        storage.over()
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL"]
    assert sorted(run.info.status for run in store.runs()) == ["FAILED", "FAILED", "FINISHED"]


def test_a_study_whose_storage_and_store_are_gone_for_good_ends_with_one_sentence(
    store: Store,
    storage: Outages,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = mlflow_outages(monkeypatch, executed=False)

    def objective(trial: Trial) -> float:
        storage.everything()
        away.everything()
        return 1.0

    monkeypatch.setattr("tracker.search.storage.PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr("tracker.search.keeper.SETTLE_SECONDS", 0.0)
    with pytest.raises(StoreError) as caught:
        make(objective, grace_seconds=0.2).run()
    storage.over()
    away.over()
    assert str(caught.value).startswith("storage='sqlite:///studies.db' does not answer: ")
    tries = [count for place, count in storage.places.items() if "study.py" in place[0]]
    assert sum(count > 4 for count in tries) == 1  # a storage that is gone is waited for once
    (warning,) = [text for text in caplog.messages if "not yet complete" in text]
    assert "Complete it with: tracker reap --study study --storage sqlite:///studies.db" in warning
    words = ["reap", "--study", "study", "--storage", STORAGE, "--grace-seconds", "0.2"]
    assert main(words) == 0
    assert sorted(run.info.status for run in store.runs()) == ["FAILED", "FAILED"]
    make().run(resume=True)
    check_complete(store, Path())


def test_a_study_whose_store_is_gone_for_good_names_the_command_that_completes_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = mlflow_outages(monkeypatch, executed=False)

    def objective(trial: Trial) -> float:
        away.everything()
        return plain(trial)

    monkeypatch.setattr("tracker.search.keeper.SETTLE_SECONDS", 0.0)
    study = make(objective).run()
    away.over()
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    (warning,) = [text for text in caplog.messages if "not yet complete" in text]
    assert "tracker mirror --study study --storage sqlite:///studies.db" in warning
    assert main(["mirror", "--study", "study", "--storage", STORAGE]) == 0
    check_complete(store, Path())


def test_ctrl_c_ends_a_study_whose_storage_does_not_answer(
    store: Store, storage: Outages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(trial: Trial) -> float:
        storage.everything()
        return 1.0

    def interrupt() -> None:
        storage.on_strike = lambda: None
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("tracker.search.keeper.SETTLE_SECONDS", 0.0)
    storage.on_strike = interrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            make(objective).run()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_keeper_that_cannot_start_does_not_end_the_study(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    keeper = KeeperProcess(
        config(store.uri, environment={"tag": "more than a pipe holds" * 10_000})
    )
    assert keeper.finish(settled=True) == "the keeper's process ended"


def test_a_command_reports_each_outage_in_one_sentence(
    store: Store, storage: Outages, capsys: pytest.CaptureFixture[str]
) -> None:
    run_unmirrored()
    storage.each_place_once("/search/reap.py")
    words = ["reap", "--study", "study", "--storage", STORAGE]
    while main(words) != 0:
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tracker: storage='sqlite:///studies.db' ")


@pytest.mark.parametrize("begin", ["replay", "warm start"])
def test_an_outage_at_the_beginning_is_reported_in_one_sentence(
    begin: str, store: Store, storage: Outages
) -> None:
    run_unmirrored()
    other = Study("other", plain, sampler="random", trials=1, storage=STORAGE)
    other.warm_start_from_study("study")
    storage.each_place_once("study.py" if begin == "replay" else "warm_start.py")
    errors: list[str] = []
    done = False
    while not done:
        try:
            make().replay(0) if begin == "replay" else other.run(resume=True)
            done = True
        except StoreError as error:
            errors.append(str(error))
    assert len(errors) > 1
    assert all(text.startswith("storage='sqlite:///studies.db' ") for text in errors)
