"""Ordinary Optuna studies whose objective is tracked."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from mlflow.entities import Run as MlflowRun
from optuna.trial import TrialState

from tests.helpers import Store
from tests.programs import ROOT, ForkServer, wait_for
from tests.test_documentation import python_block, run_as_script
from tracker import ArgumentError, StoreError, current_run, tracked


def quadratic(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -10, 10)
    return (x - 2) ** 2


def family(store: Store, experiment: str = "Default") -> tuple[MlflowRun, dict[int, MlflowRun]]:
    """Return the study's run, and its trials' runs by number."""
    gc.collect()  # an exception that a test has caught may keep the objective, and so the run
    runs = store.runs(experiment)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert all(c.data.tags["mlflow.parentRunId"] == parent.info.run_id for c in children)
    by_number = {int(run.data.tags["optuna.trial"]): run for run in children}
    assert len(by_number) == len(children)
    return parent, by_number


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Keep pytest from recording the exceptions that Optuna logs, and with them the objective."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(params=["memory", "journal"])
def make(request: pytest.FixtureRequest, workdir: Path) -> Callable[..., optuna.Study]:
    """Creates a study with one of Optuna's storages."""

    def make(**settings: Any) -> optuna.Study:
        storage: Any = None
        if request.param == "journal":
            backend = optuna.storages.journal.JournalFileBackend("optuna.log")
            storage = optuna.storages.JournalStorage(backend)
        return optuna.create_study(storage=storage, study_name="study", **settings)

    return make


def test_each_trial_of_optimize_is_a_child_of_the_study_s_run(
    make: Callable[..., optuna.Study], store: Store, workdir: Path
) -> None:
    study = make(sampler=optuna.samplers.TPESampler(n_startup_trials=3, seed=1))
    study.optimize(tracked(quadratic, experiment="e"), n_trials=4)
    parent, children = family(store, "e")
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "study"
    assert parent.data.params == {
        "study": "study",
        "sampler": "TPESampler(n_startup_trials=3)",
        "pruner": "MedianPruner()",
        "direction": "minimize",
    }
    assert set(children) == set(range(4))
    assert parent.data.tags["best.trial"] == str(study.best_trial.number)
    assert json.loads(parent.data.tags["best.params"]) == study.best_params
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    assert list(table["objective"]) == [trial.value for trial in study.trials]
    assert list(table["x"]) == [trial.params["x"] for trial in study.trials]
    for trial in study.trials:
        run = children[trial.number]
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"trial={trial.number}"
        assert run.data.params == _texts(trial.params)
        assert run.data.metrics == {"objective": trial.value}
        assert run.data.tags["optuna.state"] == "COMPLETE"
        assert run.data.tags["tracker.study"] == "study"


def everything(trial: Any) -> float:
    assert optuna.Trial in type(trial).__mro__
    x: int = trial.suggest_int("x (odd)", 0, 100)
    trial.suggest_categorical("layers", [(1, 2), (3, 4)])  # Optuna warns of it
    trial.set_user_attr("note", {"a": 1})
    trial.set_constraint("memory", 0.5)
    for step in range(3):
        trial.report(float(step), step)
    assert current_run() is trial.run
    trial.run.log_metric("accuracy", 0.5)
    assert trial.params["x (odd)"] == x
    assert trial.user_attrs == {"note": {"a": 1}, "given": "yes"}
    return x


@pytest.mark.filterwarnings("ignore:Choices for a categorical")
def test_a_run_has_all_that_its_trial_has(store: Store) -> None:
    study = optuna.create_study()
    study.enqueue_trial({"x (odd)": 7}, user_attrs={"given": "yes"})
    study.optimize(tracked(everything), n_trials=1)
    (trial,) = study.trials
    run = family(store)[1][0]
    assert run.data.params == {"x _odd_": "7", "layers": str(trial.params["layers"])}
    assert run.data.tags["user_attrs.note"] == '{"a": 1}'
    assert run.data.tags["user_attrs.given"] == "yes"
    assert run.data.metrics == {
        "objective": 7.0,
        "constraint.memory": 0.5,
        "intermediate_value": 2.0,
        "accuracy": 0.5,
    }
    assert store.history(run, "intermediate_value") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_manager_logs_to_the_trial_s_run(store: Store) -> None:
    def objective(trial: Any) -> float:
        trial.suggest_float("lr", 0.1, 0.2)
        with trial.manager(model=False) as manager:
            manager.begin_run({"more": 1})
            manager.begin_epoch()
            manager.end_epoch(loss=0.5)
            manager.end_run()
        return 0.5

    optuna.create_study().optimize(tracked(objective), n_trials=1)
    run = family(store)[1][0]
    assert run.info.status == "FINISHED"
    assert run.data.params.keys() >= {"lr", "more"}
    assert run.data.metrics.keys() >= {"loss", "objective"}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_several_objectives_have_a_metric_each(store: Store) -> None:
    study = optuna.create_study(directions=["minimize", "maximize"])
    study.optimize(tracked(lambda trial: (1.0, 2.0)), n_trials=1)
    study.set_metric_names(["loss", "top-1 (%)"])
    study.optimize(tracked(lambda trial: [3, 4]), n_trials=1)
    parent, children = family(store)
    assert parent.data.params["direction"] == "minimize,maximize"
    assert children[0].data.metrics == {"objective.0": 1.0, "objective.1": 2.0}
    assert children[1].data.metrics == {"objective.loss": 3.0, "objective.top-1 ___": 4.0}


# -- how trials end ----------------------------------------------------------------------------


class OddError(Exception):
    pass


def ends_in_every_way(trial: optuna.Trial) -> Any:
    trial.suggest_float("x", 0, 1)
    number = trial.number
    if number == 1:
        raise OddError("odd")
    if number == 2:
        trial.report(7.0, 5)
        raise optuna.TrialPruned
    return {3: float("nan"), 4: None, 5: (1.0, 2.0), 6: "text"}.get(number, 1.0)


def test_statuses_are_those_of_optuna_s_trials(
    make: Callable[..., optuna.Study], store: Store
) -> None:
    study = make()
    study.optimize(tracked(ends_in_every_way), n_trials=8, catch=OddError)
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    expected = ["FINISHED", "FAILED", "KILLED", *["FAILED"] * 4, "FINISHED"]
    assert [children[number].info.status for number in range(8)] == expected
    for trial in study.trials:
        run = children[trial.number]
        assert run.data.tags["optuna.state"] == trial.state.name
        assert ("objective" in run.data.metrics) == (trial.state == TrialState.COMPLETE)
        assert ("tracker.failure" in run.data.tags) == (trial.state == TrialState.FAIL)
    assert children[1].data.tags["tracker.failure"].startswith("tests.search.test_tracked.OddError")
    pruned = children[2].data.tags["tracker.pruned"]
    assert pruned == "The objective stopped it at step 5, value 7."


def test_a_pruner_is_named_by_its_settings(store: Store) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.report(float(trial.number), 1)
        if trial.should_prune():
            raise optuna.TrialPruned
        return float(trial.number)

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    study = optuna.create_study(pruner=pruner)
    study.optimize(tracked(objective), n_trials=2)
    assert study.trials[1].state == TrialState.PRUNED
    run = family(store)[1][1]
    who = "The MedianPruner(n_startup_trials=1) pruner"
    assert run.data.tags["tracker.pruned"] == f"{who} stopped it at step 1, value 1."


@pytest.mark.parametrize(
    ("error", "status", "of_study"),
    [
        (OddError("no"), "FAILED", "FINISHED"),
        (KeyboardInterrupt(), "KILLED", "KILLED"),
        (SystemExit(130), "KILLED", "FINISHED"),
    ],
)
def test_an_exception_that_is_not_caught_leaves_optimize(
    error: BaseException, status: str, of_study: str, store: Store
) -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            raise error
        return 1.0

    study = optuna.create_study()
    with pytest.raises(type(error)) as raised:
        study.optimize(tracked(objective), n_trials=5)
    assert raised.value is error
    del raised
    error.__traceback__ = None  # it holds the objective, as that of an uncaught one does
    parent, children = family(store)
    assert [children[number].info.status for number in (0, 1)] == ["FINISHED", status]
    assert parent.info.status == of_study
    # The study continues in the same run.
    study.optimize(tracked(lambda trial: 1.0), n_trials=1)
    parent, children = family(store)
    assert (parent.info.status, len(children)) == ("FINISHED", 3)


# -- whoever calls optimize ----------------------------------------------------------------------


def test_trials_run_in_threads(make: Callable[..., optuna.Study], store: Store) -> None:
    def objective(trial: Any) -> float:
        assert current_run() is trial.run
        for step in range(5):
            trial.report(float(trial.number), step)
        return float(trial.number)

    study = make()
    study.optimize(tracked(objective), n_trials=8, n_jobs=2)
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    assert len(children) == 8
    for number, run in children.items():
        assert run.info.status == "FINISHED"
        assert run.data.metrics == {"objective": number, "intermediate_value": number}
        assert len(store.history(run, "intermediate_value")) == 5


def test_a_decorated_objective_works_with_several_studies_and_can_be_copied(store: Store) -> None:
    @tracked(experiment="decorated")  # type: ignore[untyped-decorator]
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 0, 1)

    studies = [optuna.create_study(study_name=f"study {n}") for n in range(2)]
    for study in studies * 2:
        study.optimize(objective, n_trials=1)
    studies[0].optimize(copy.deepcopy(objective), n_trials=1)
    runs = store.runs("decorated")
    of_study = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in of_study] == ["study 0", "study 1"]
    assert len(runs) == 2 + 5
    # Optuna's ways to call an objective once more, outside a study.
    assert objective(optuna.trial.FixedTrial({"x": 0.5})) == 0.5
    assert objective(studies[0].best_trial) == studies[0].best_value
    assert len(store.runs("decorated")) == 2 + 5
    del objective
    gc.collect()
    assert {run.info.status for run in store.runs("decorated")} == {"FINISHED"}


def test_a_storage_that_is_gone_at_the_end_costs_only_the_table(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    objective = tracked(quadratic)
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    monkeypatch.setattr(study._storage, "get_all_trials", None)
    del objective
    parent, children = family(store)
    assert (parent.info.status, children[0].info.status) == ("FINISHED", "FINISHED")
    assert "trials.csv of the study is not logged" in caplog.text


def test_a_tracked_objective_can_be_sent_to_another_process(store: Store) -> None:
    sent = pickle.loads(pickle.dumps(tracked(quadratic, experiment="sent")))
    optuna.create_study().optimize(sent, n_trials=1)
    assert len(store.runs("sent")) == 2


def test_a_study_that_was_deleted_and_one_of_its_name_have_two_runs(
    workdir: Path, store: Store
) -> None:
    storage = "sqlite:///optuna.db"
    for _ in range(2):
        study = optuna.create_study(study_name="study", storage=storage)
        study.optimize(tracked(quadratic), n_trials=1)
        optuna.delete_study(study_name="study", storage=storage)
    assert sorted(run.info.run_name for run in store.runs()) == [*["study"] * 2, *["trial=0"] * 2]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"experiment": "x" * 1000}, ArgumentError),
        ({"inline": True, "offline": True}, ArgumentError),
        ({"directory": "a\0b"}, ArgumentError),
        ({"tracking_uri": "nothing://nowhere"}, StoreError),
    ],
)
def test_a_wrong_argument_is_an_error_before_the_study(
    settings: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tracked(quadratic, **settings)


def test_what_mlflow_cannot_store_does_not_fail_the_trial(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("//", 0, 1)
        trial.suggest_categorical("text", ["x" * 10_000])
        trial.set_user_attr("object", object())
        return 1.0

    study = optuna.create_study(study_name="n" * 2000)
    study.optimize(tracked(objective), n_trials=1)
    assert study.trials[0].state == TrialState.COMPLETE
    run = family(store)[1][0]
    assert run.data.params["text"].startswith("xxx")
    assert run.data.tags["user_attrs.object"].startswith("<object object")
    assert "Trial 0 lacks in MLflow: param name '//' is not allowed" in caplog.text


def _texts(params: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in params.items()}


def test_the_code_in_the_documentation_runs(store: Store) -> None:
    run_as_script(python_block(ROOT / "docs/studies.md", "import tracked"))
    assert len(family(store, "quadratic")[1]) == 20


PROGRAM = """
import sys, optuna
from tracker import tracked

def objective(trial):
    if trial.number == 7:
        raise KeyboardInterrupt
    return trial.suggest_float("x", 0, 1)

study = optuna.create_study(study_name="study", storage=sys.argv[1], load_if_exists=True)
study.optimize(tracked(objective, experiment="shared"), n_trials=4)
"""


def test_processes_that_share_a_study_have_one_run_of_it(
    deliverers: ForkServer, store: Store, workdir: Path
) -> None:
    storage = f"sqlite:///{workdir / 'optuna.db'}"
    optuna.create_study(study_name="study", storage=storage)
    programs = []
    for _ in range(2):  # the second one starts when the first has created the study's run
        environment = {"MLFLOW_TRACKING_URI": store.uri}
        programs.append(deliverers.start(PROGRAM, storage, folder=workdir, **environment))
        wait_for(lambda: store.runs("shared"), "the study's run", programs[0].output)
    for program in programs:
        program.wait_for_all()
    assert sorted(str(program.code) for program in programs) == ["-2", "0"]
    parent, children = family(store, "shared")
    trials = optuna.load_study(study_name="study", storage=storage).trials
    assert set(children) == set(range(8))
    for trial in trials:
        status = "KILLED" if trial.number == 7 else "FINISHED"
        assert children[trial.number].info.status == status
        assert children[trial.number].data.params == _texts(trial.params)
    assert parent.info.status in ("FINISHED", "KILLED")  # of the process that ended last
