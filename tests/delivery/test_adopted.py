"""Runs that exist and are continued, and experiments that contradict each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Store
from tracker import StoreError, start_run
from tracker.cli import main
from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.base import _close_all


@pytest.fixture
def ids(store: Store) -> dict[str, str]:
    """The ids of the experiments `a` and `b`, and of an ended run in `a`."""
    found = {name: str(store.client.create_experiment(name)) for name in "ab"}
    found["run"] = str(store.client.create_run(found["a"], run_name="made").info.run_id)
    store.client.set_tag(found["run"], "tracker.failure", "it was killed")
    store.client.set_terminated(found["run"], "FAILED")
    return found


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_an_ended_run_that_is_adopted_is_running_until_it_ends_again(
    status: str, store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.client.set_terminated(ids["run"], status)
    monkeypatch.setenv("MLFLOW_RUN_ID", ids["run"])

    def stored() -> tuple[str, str | None]:
        run = store.client.get_run(ids["run"])
        return str(run.info.status), run.data.tags.get("tracker.failure")

    def crash() -> None:
        with start_run() as run:
            assert run.run_id == ids["run"]
            assert stored() == ("RUNNING", None)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    ended, reason = stored()
    assert ended == "FAILED"
    assert "ZeroDivisionError" in (reason or "")
    with start_run():  # a second run of the same environment is a new one
        pass
    assert stored() == (ended, reason)


class Case:
    """What the user asks for: variables of MLflow, and the argument `experiment`."""

    def __init__(self, says: str = "", experiment: str | None = None, **variables: str) -> None:
        self.says = says
        self.experiment = experiment
        self._variables = variables

    def apply(self, ids: dict[str, str], patch: pytest.MonkeyPatch) -> None:
        for name, value in self._variables.items():
            patch.setenv(f"MLFLOW_{name}", ids.get(value, value) if "_ID" in name else value)

    def start(self, **how: Any) -> Any:
        return start_run(experiment=self.experiment, **how)


RUN = r"MLFLOW_RUN_ID='\w+' is a run of the experiment 'a', not of {}; unset MLFLOW_RUN_ID or"
DISAGREE = [
    Case(RUN.format("'b'"), "b", RUN_ID="run"),
    Case(RUN.format("'new'"), "new", RUN_ID="run"),
    Case(RUN.format("'Default'"), "Default", RUN_ID="run"),
    Case(RUN.format("'b'"), RUN_ID="run", EXPERIMENT_NAME="b"),
    Case(RUN.format(r"'\d+'"), RUN_ID="run", EXPERIMENT_ID="b"),
    Case(RUN.format("'b'"), RUN_ID="run", EXPERIMENT_ID="a", EXPERIMENT_NAME="b"),
    Case(
        r"MLFLOW_EXPERIMENT_ID='\d+' is the experiment 'a', but MLFLOW_EXPERIMENT_NAME='b'; they",
        EXPERIMENT_ID="a",
        EXPERIMENT_NAME="b",
    ),
    Case(
        r"MLFLOW_EXPERIMENT_ID='\d+' is the experiment 'a', but MLFLOW_EXPERIMENT_NAME='new'; they",
        EXPERIMENT_ID="a",
        EXPERIMENT_NAME="new",
    ),
]


@pytest.mark.parametrize("case", DISAGREE)
def test_experiments_that_disagree_are_one_sentence_at_the_start(
    case: Case, store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.apply(ids, monkeypatch)
    with pytest.raises(StoreError, match=f"^{case.says}[^\n.]*\\.$"):
        case.start()
    assert {experiment.name for experiment in store.client.search_experiments()} == {
        *("Default", "a", "b")
    }
    assert [run.info.status for run in store.runs("a")] == ["FAILED"]
    assert store.runs("b") == store.runs() == []


@pytest.mark.parametrize("case", [DISAGREE[0], DISAGREE[-1]])
def test_experiments_that_disagree_are_said_when_an_offline_run_is_delivered(
    case: Case,
    store: Store,
    ids: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case.apply(ids, monkeypatch)
    with case.start(offline=True) as run:
        run.log_metrics({"loss": 0.5}, 1)
    _close_all(BackgroundDelivery.leave)
    assert main(["sync"]) == 2
    assert len(re.findall(case.says, capsys.readouterr().err)) == 1
    assert main(["sync", "--experiment", "rescued"]) == 0
    (rescued,) = store.runs("rescued")
    assert store.history(rescued, "loss") == [(1, 0.5)]
    assert list(Path(".tracker").iterdir()) == []


@pytest.mark.parametrize(
    "case",
    [
        Case(RUN_ID="run"),
        Case(experiment="a", RUN_ID="run"),
        Case(RUN_ID="run", EXPERIMENT_ID="a"),
        Case(RUN_ID="run", EXPERIMENT_ID="a", EXPERIMENT_NAME="a"),
        Case(experiment="a", EXPERIMENT_ID="b", EXPERIMENT_NAME="b"),
        Case(EXPERIMENT_ID="a", EXPERIMENT_NAME="a"),
        Case(EXPERIMENT_ID="a", EXPERIMENT_NAME="", RUN_ID=""),
        Case(experiment="a", EXPERIMENT_ID=""),
    ],
)
def test_experiments_that_agree_or_are_replaced_by_the_argument_are_used(
    case: Case, store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case.apply(ids, monkeypatch)
    with case.start() as run:
        pass
    assert run.run_id in {run.info.run_id for run in store.runs("a")}
    assert store.runs("b") == store.runs() == []
