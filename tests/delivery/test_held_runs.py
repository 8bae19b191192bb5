"""A run that cannot be delivered does not keep the others waiting, and nothing of it is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Store
from tracker import StoreError, start_run
from tracker.cli import main
from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.base import _close_all
from tracker.delivery.leftovers import drop, journals
from tracker.delivery.uploader import Uploader
from tracker.journal.reader import Journal
from tracker.run import Run
from tracker.store.client import MlflowStore

PROBLEMS: dict[str, dict[str, str]] = {
    "unknown experiment": {"MLFLOW_EXPERIMENT_ID": "999"},
    "deleted experiment": {"MLFLOW_EXPERIMENT_NAME": "gone"},
    "unknown run": {"MLFLOW_RUN_ID": "0" * 32},
}


def track(problem: str | None, steps: int = 5) -> None:
    """Track a run that has a problem."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PROBLEMS.get(problem or "", {}).items():
            patch.setenv(name, value)
        with start_run(offline=True, params={"of": problem or "none"}) as run:
            for step in range(steps):
                run.log_metrics({"loss": 1.0}, step)
            run.log_text("kept", "note.txt")


def held() -> str:
    """The key of the only held run."""
    (folder,) = journals(Path(".tracker"))
    with closing(Journal(folder)) as journal:
        (key,) = journal.held()
    return key


@pytest.fixture
def store_with_gone(store: Store) -> Store:
    store.client.delete_experiment(store.client.create_experiment("gone"))
    return store


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_other_runs_arrive_and_the_held_one_can_be_sent_elsewhere(
    problem: str, store_with_gone: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_with_gone
    track(problem)
    track(None)
    _close_all(BackgroundDelivery.leave)
    for _ in range(2):
        assert main(["sync"]) == 2
        assert [run.info.status for run in store.runs()] == ["FINISHED"]
        said = capsys.readouterr()
        assert said.err.count(f"keeps the run {held()}, which cannot be delivered") == 1
        assert "1 journal unfinished" in said.out
    assert main(["status"]) == 0
    assert "unfinished: " in capsys.readouterr().out
    assert main(["sync", "--experiment", "rescued"]) == 0
    (rescued,) = store.runs("rescued")
    assert (rescued.info.status, rescued.data.params) == ("FINISHED", {"of": problem})
    assert store.history(rescued, "loss") == [(step, 1.0) for step in range(5)]
    assert "note.txt" in store.artifacts(rescued)
    assert list(Path(".tracker").iterdir()) == []


def test_a_held_run_can_be_given_up(
    store_with_gone: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    track("deleted experiment")
    track(None)
    _close_all(BackgroundDelivery.leave)
    assert main(["sync"]) == 2
    key = held()
    assert main(["sync", "--drop", "nothing"]) == 2
    assert "--drop nothing is not a run in these journals" in capsys.readouterr().err
    assert main(["sync", "--drop", key]) == 0
    assert "Dropped " in capsys.readouterr().out
    assert list(Path(".tracker").iterdir()) == []
    assert main(["sync"]) == 0
    assert len(store_with_gone.runs()) == 1


def test_a_held_run_is_delivered_when_its_experiment_is_restored(store_with_gone: Store) -> None:
    track("deleted experiment")
    _close_all(BackgroundDelivery.leave)
    assert main(["sync"]) == 2
    gone = store_with_gone.client.get_experiment_by_name("gone")
    assert gone is not None
    store_with_gone.client.restore_experiment(gone.experiment_id)
    assert main(["sync"]) == 0
    (run,) = store_with_gone.runs("gone")
    assert store_with_gone.history(run, "loss") == [(step, 1.0) for step in range(5)]


def test_a_run_that_is_deleted_while_it_trains_has_all_its_points_when_it_is_restored(
    store: Store,
) -> None:
    with start_run() as run:
        run.log_metrics({"loss": 1.0}, 0)
        run.flush()
        assert run.run_id is not None
        store.client.delete_run(run.run_id)
        run.log_metrics({"loss": 1.0}, 1)
        assert not run.flush()
        with start_run(params={"other": 1}) as other:
            pass
        store.client.restore_run(run.run_id)
        run.log_metrics({"loss": 1.0}, 2)
    tracked = store.client.get_run(run.run_id)
    assert tracked.info.status == "FINISHED"
    assert store.history(tracked, "loss") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert other.run_id is not None
    assert store.client.get_run(other.run_id).info.status == "FINISHED"


@pytest.fixture
def delivery(store_with_gone: Store) -> Iterator[BackgroundDelivery]:
    delivery = BackgroundDelivery(Path(".tracker"), store_with_gone.uri, uploader=False)
    yield delivery
    delivery.leave()


def test_the_others_do_not_wait_for_a_held_run(
    delivery: BackgroundDelivery, store_with_gone: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_run = Run(delivery, experiment="gone")
    other = Run(delivery)
    other.log_metrics({"loss": 1.0}, 1)
    delivery.journal.flush()
    with closing(Journal(delivery.journal.folder)) as journal:
        Uploader(journal, MlflowStore(store_with_gone.uri)).drain()
    monkeypatch.setattr(delivery, "_wants_uploader", True)  # the uploader is the one above
    assert other.flush(timeout=10.0)
    assert not held_run.flush(timeout=1.0)


def test_dropping_a_run_whose_program_lives_says_so(delivery: BackgroundDelivery) -> None:
    run = Run(delivery)
    delivery.journal.flush()
    with pytest.raises(StoreError, match="is still in use by process"):
        drop(delivery.journal.folder, run._key)
    assert drop(delivery.journal.folder, "another run") == 0


def test_an_unknown_experiment_is_said_at_the_start_where_the_store_answers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "999")
    with pytest.raises(StoreError, match="could not open the experiment '999'"):
        start_run()


class Killed(BaseException):
    """Ends a delivery as a kill would, between a request and its mark."""


@pytest.mark.parametrize("command", [["sync", "--experiment", "rescued"], ["sync"]])
def test_a_held_run_that_is_interrupted_anywhere_arrives_once(
    command: list[str], store_with_gone: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_with_gone
    track("deleted experiment")
    track(None)
    _close_all(BackgroundDelivery.leave)
    assert main(["sync"]) == 2
    gone = store.client.get_experiment_by_name("gone")
    assert gone is not None
    if command == ["sync"]:
        store.client.restore_experiment(gone.experiment_id)
    left = 0
    for name in ("begin_run", "log_batch", "log_artifact", "end_run"):
        real = getattr(MlflowStore, name)

        def interrupted(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            done = real(*args, **kwargs)
            if left == 0:
                raise Killed
            return done

        monkeypatch.setattr(MlflowStore, name, interrupted)
    code = None
    for kill in range(1, 20):
        left = 1 if kill < 8 else 0  # each time after the next request that is not marked
        try:
            code = main(command)
            break
        except Killed:
            continue
    left = 0
    assert (code if code is not None else main(command)) == 0
    (run,) = store.runs("rescued" if len(command) > 1 else "gone")
    assert run.info.status == "FINISHED"
    assert store.history(run, "loss") == [(step, 1.0) for step in range(5)]
    assert len(store.runs()) == 1
