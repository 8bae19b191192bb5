"""Studies in one process: budgets, statuses, what MLflow shows, and mistakes."""

from __future__ import annotations

import io
import json
import math
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow.pytorch
import optuna
import pandas as pd
import pytest
import torch
from mlflow.entities import Run as MlflowRun
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from torch import nn

from tests.helpers import Store
from tracker import ArgumentError, RunBuilder, StoreError, Study, Trial, start_run
from tracker.cli import main
from tracker.search.channel import Ended, Verdict
from tracker.search.cli import mirror_study
from tracker.search.plan import SOURCE, STARTED, times
from tracker.search.session import Search
from tracker.search.storage import Storage
from tracker.search.stored_study import STUDY, load

SPACE = {"lr": [0.1, 0.01], "size": [16, 32], "shuffle": [True, False]}


def loss(trial: Trial) -> float:
    return float(trial.params["lr"] * trial.params["size"])


def quadratic(trial: Trial) -> float:
    x = trial.suggest_float("x", -1.0, 1.0)
    return (x - 0.3) ** 2


def family(store: Store) -> tuple[MlflowRun, dict[int, MlflowRun]]:
    """Return the study's run, and its trials' runs by number."""
    runs = store.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert all(c.data.tags["mlflow.parentRunId"] == parent.info.run_id for c in children)
    by_number = {int(run.data.tags["optuna.trial"]): run for run in children}
    assert len(by_number) == len(children)
    return parent, by_number


def params(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


def make(objective: Callable[[Trial], Any] = loss, **settings: Any) -> Study:
    given = {"space": SPACE, "sampler": "grid"} if "sampler" not in settings else {}
    return Study("study", objective, **{**given, **settings})


# -- grids and budgets -------------------------------------------------------------------------


def test_a_grid_runs_the_points_of_run_builder_in_order(tracking_uri: str) -> None:
    study = make().run()
    assert params(study) == [run._asdict() for run in RunBuilder.get_runs(SPACE)]
    assert [type(value) for value in study.trials[0].params.values()] == [float, int, bool]


def test_each_trial_is_a_child_of_the_study_s_run(store: Store) -> None:
    study = make().run()
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "study"
    assert set(children) == set(range(8))
    for trial in study.trials:
        run = children[trial.number]
        assert run.info.status == "FINISHED"
        assert run.data.params == {name: str(value) for name, value in trial.params.items()}
        assert run.data.metrics["objective"] == trial.value
        assert run.data.tags["optuna.state"] == "COMPLETE"
        assert run.info.start_time >= parent.info.start_time
    best = study.best_trial
    assert parent.data.tags["best.trial"] == str(best.number)
    assert json.loads(parent.data.tags["best.params"]) == best.params
    assert parent.data.tags["best.run"] == children[best.number].info.run_id
    assert parent.data.metrics["best_objective"] == best.value


def test_tables_agree_with_optuna_and_mlflow(store: Store, workdir: Path) -> None:
    study = make(metric="loss").run()
    parent, children = family(store)
    csv = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    rows = json.loads(store.text(parent, "trials.json", workdir))
    for trial, (_, row), in_json in zip(study.trials, csv.iterrows(), rows, strict=True):
        assert row["trial"] == in_json["trial"] == trial.number
        assert row["loss"] == in_json["loss"] == trial.value
        assert row["loss"] == children[trial.number].data.metrics["objective"]
        assert {name: row[name] for name in SPACE} == trial.params
        assert {name: in_json[name] for name in SPACE} == trial.params
    assert "plotly" in store.text(parent, "study.html", workdir)


def test_resuming_a_finished_study_changes_nothing(store: Store) -> None:
    make().run()
    before = {run.info.run_id: run.to_dictionary() for run in store.runs()}
    study = make().run(resume=True)
    assert len(study.trials) == 8
    assert {run.info.run_id for run in store.runs()} == set(before)


def test_a_grown_grid_runs_only_its_new_points(tracking_uri: str) -> None:
    make().run()
    grown = {"lr": [0.1, 0.05, 0.01], "size": [16, 32], "shuffle": [True, False]}
    study = make(space=grown, sampler="grid").run(resume=True)
    assert len(study.trials) == 12
    assert len({tuple(each.values()) for each in params(study)}) == 12
    assert params(study)[:8] == [run._asdict() for run in RunBuilder.get_runs(SPACE)]
    assert {each["lr"] for each in params(study)[8:]} == {0.05}


def test_the_budget_counts_all_runs_of_a_study(tracking_uri: str) -> None:
    for trials, expected in ((3, 3), (3, 3), (7, 7), (5, 7)):
        study = make(quadratic, sampler="random", trials=trials).run(resume=True)
        assert len(study.trials) == expected
    assert [trial.user_attrs["tracker:slot"] for trial in study.trials] == list(range(7))


def test_a_failed_trial_is_retried_with_the_same_values(store: Store) -> None:
    calls: Counter[str] = Counter()

    def flaky(trial: Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        calls[f"{x}"] += 1
        if trial.number == 1:
            raise RuntimeError("bad luck")
        return x

    study = make(flaky, sampler="random", trials=3, retries=2).run()
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.trials[1].params == study.trials[2].params
    assert sorted(calls.values()) == [1, 1, 2]
    _, children = family(store)
    assert children[1].info.status == "FAILED"
    assert children[1].data.tags["tracker.failure"].startswith("RuntimeError: bad luck")
    assert "in flaky" in children[1].data.tags["tracker.failure"]


def test_a_slot_is_abandoned_after_its_retries(store: Store) -> None:
    def fails(trial: Trial) -> float:
        if trial.params["lr"] == 0.1:
            raise RuntimeError("never")
        return 1.0

    study = make(fails, space={"lr": [0.1, 0.01]}, sampler="grid", retries=2).run()
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL", "FAIL", "COMPLETE"]
    assert (
        make(fails, space={"lr": [0.1, 0.01]}, sampler="grid", retries=2).run(resume=True).trials
        == study.trials
    )
    parent, _ = family(store)
    assert parent.info.status == "FINISHED"


def test_an_objective_can_define_the_space_by_running(store: Store) -> None:
    def objective(trial: Trial) -> float:
        if trial.suggest_categorical("optimizer", ["sgd", "adam"]) == "sgd":
            return trial.suggest_float("momentum", 0, 0.9)
        return float(trial.suggest_int("warmup", 1, 100, log=True))

    for sampler in ("random", "tpe", "qmc", "gp", "cmaes"):
        study = Study(sampler, objective, sampler=sampler, trials=6).run()
        assert len(study.trials) == 6
        for trial in study.trials:
            other = "momentum" if trial.params["optimizer"] == "sgd" else "warmup"
            assert list(trial.params) == ["optimizer", other]
    run = next(run for run in store.runs() if "optimizer" in run.data.params)
    assert len(run.data.params) == 2


# -- reproducibility ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    ["tpe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random", "qmc"))],
)
def test_a_study_run_in_parts_equals_one_run_at_once(sampler: str, tracking_uri: str) -> None:
    def objective(trial: Trial) -> float:
        x = trial.suggest_float("x", -1, 1)
        k = trial.suggest_int("k", 1, 64, log=True)
        return x * x + k / 64 + float(torch.rand(()))

    results = []
    for name, parts in (("whole", (20,)), ("a", (5, 20)), ("b", (15, 20))):
        for trials in parts:
            study = Study(name, objective, sampler=sampler, trials=trials, seed=0).run(resume=True)
        results.append([(trial.params, trial.value) for trial in study.trials])
    assert results[0] == results[1] == results[2]
    other = Study("other", objective, sampler=sampler, trials=20, seed=1).run()
    assert params(other) != [each for each, _ in results[0]]


def test_a_trial_s_seed_follows_from_the_study_s_seed_and_the_slot(tracking_uri: str) -> None:
    seen: dict[str, list[tuple[int, float]]] = {}

    def objective(trial: Trial) -> float:
        seen.setdefault(name, []).append((trial.seed, float(torch.rand(()))))
        return 0.0

    for name in ("first", "second"):
        Study(name, objective, space={"lr": [1, 2, 3]}, sampler="grid", seed=4).run()
    assert seen["first"] == seen["second"]
    assert len(set(seen["first"])) == 3


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize(
    "sampler",
    ["random", "qmc", "tpe", "cmaes", pytest.param("gp", marks=pytest.mark.slow)],
)
def test_interruptions_do_not_change_suggestions(
    sampler: str, declared: bool, tracking_uri: str
) -> None:
    """Neither those of the interrupted trials nor those of later ones."""

    def objective(trial: Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        if trial.number in stops:
            stops.remove(trial.number)
            raise KeyboardInterrupt
        y = trial.suggest_float("y", 0, 1)
        return (x - 0.3) ** 2 + (y - trial.suggest_float("z", 0, 1)) ** 2

    between = FloatDistribution(0, 1)
    results = []
    for stops in (set[int](), {1, 2, 4, 15}):
        study = Study(
            f"stops {len(stops)}",
            objective,
            space={"x": between, "y": between} if declared else None,
            sampler=sampler,
            trials=20,
            offline=True,
        )
        while stops:
            with pytest.raises(KeyboardInterrupt):
                study.run(resume=True)
        trials = study.run(resume=True).trials
        done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        assert len(done) == 20
        results.append([t.params for t in sorted(done, key=lambda t: t.user_attrs["tracker:slot"])])
    assert results[0] == results[1]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_an_enqueued_trial_is_retried_after_an_interruption(
    sampler: str, tracking_uri: str
) -> None:
    def objective(trial: Trial) -> float:
        if trial.number in (1, 2):
            raise KeyboardInterrupt
        return trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1)

    study = make(objective, sampler=sampler, trials=1)
    study.run().enqueue_trial({"x": 0.25})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            study.run(resume=True)
    trials = study.run(resume=True).trials
    assert [t.state.name for t in trials] == ["COMPLETE", "FAIL", "FAIL", "COMPLETE"]
    assert trials[3].params["x"] == 0.25
    assert len(study.run(resume=True).trials) == 4


# -- statuses ----------------------------------------------------------------------------------


def test_a_pruned_trial_is_killed_and_tagged_and_the_saving_is_shown(
    store: Store, workdir: Path
) -> None:
    def objective(trial: Trial) -> float:
        for step in range(1, 11):
            trial.report(trial.params["x"] * step, step)
            if trial.should_prune():
                raise optuna.TrialPruned()
        return float(trial.params["x"])

    study = make(
        objective, space={"x": list(range(1, 13))}, sampler="grid", pruner="median", steps=10
    ).run()
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE] * 5 + [TrialState.PRUNED] * 7
    parent, children = family(store)
    pruned = children[7]
    assert pruned.info.status == "KILLED"
    assert pruned.data.tags["optuna.state"] == "PRUNED"
    assert pruned.data.tags["tracker.pruned"].startswith("The median pruner stopped it at step 1")
    assert store.history(pruned, "intermediate_value") == [(1, 8.0)]
    assert study.trials[7].intermediate_values == {1: 8.0}
    assert store.history(children[0], "intermediate_value") == [
        (step, float(step)) for step in range(1, 11)
    ]
    assert parent.data.tags["tracker.saved"] == "63 of 120"
    assert "63 of 120" in store.text(parent, "study.html", workdir)


def test_nan_fails_the_trial_but_not_the_study(store: Store) -> None:
    study = make(lambda trial: math.nan if trial.number == 0 else 1.0, retries=3).run()
    assert [t.state.name for t in study.trials] == ["FAIL"] + ["COMPLETE"] * 7
    parent, children = family(store)
    assert children[0].info.status == "FAILED"
    assert "NaN" in children[0].data.tags["tracker.failure"]
    assert parent.info.status == "FINISHED"


@pytest.mark.parametrize("returned", [None, "low", [1.0, 2.0], torch.ones(3)])
def test_an_objective_that_does_not_return_a_number_ends_the_study(
    returned: Any, store: Store
) -> None:
    with pytest.raises(ArgumentError, match="The objective returned"):
        make(lambda trial: returned).run()
    parent, children = family(store)
    assert parent.info.status == "FAILED"
    assert [run.info.status for run in children.values()] == ["FAILED"]
    assert len(make(loss).run(resume=True).trials) == 9  # the mistake does not use up the budget


def test_ctrl_c_kills_the_running_trial_and_resuming_retries_it(store: Store) -> None:
    def objective(trial: Trial) -> float:
        if trial.number == 2:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        make(objective).run()
    parent, children = family(store)
    assert parent.info.status == "KILLED"
    assert [run.info.status for run in children.values()] == ["FINISHED", "FINISHED", "KILLED"]
    study = make(loss).run(resume=True)
    assert study.trials[2].params == study.trials[3].params
    assert Counter(t.state.name for t in study.trials) == {"COMPLETE": 8, "FAIL": 1}
    parent, _ = family(store)
    assert parent.info.status == "FINISHED"
    assert not parent.data.tags.get("tracker.failure")


def test_an_enqueued_trial_is_scheduled_and_then_run(store: Store) -> None:
    make(quadratic, sampler="random", trials=1).run()
    there = Storage()
    optuna.load_study(study_name="study", storage=there.optuna).enqueue_trial({"x": 0.25})
    mirror_study(there, load(there, "study"), None, Path(".tracker"))
    _, children = family(store)
    assert children[1].info.status == "SCHEDULED"
    study = make(quadratic, sampler="random", trials=1).run(resume=True)
    assert study.trials[1].params == {"x": 0.25}
    _, children = family(store)
    assert children[1].info.status == "FINISHED"
    assert len(children) == 2


def test_enqueued_trials_do_not_count_for_the_budget(tracking_uri: str) -> None:
    study = make(quadratic, sampler="random", trials=2).run()
    study.enqueue_trial({"x": 0.25})
    for trials, complete in ((2, 3), (4, 5)):
        make(quadratic, sampler="random", trials=trials).run(resume=True)
        states = [trial.state for trial in study.get_trials()]
        assert states.count(TrialState.COMPLETE) == complete
        assert TrialState.RUNNING not in states


# -- the mirror --------------------------------------------------------------------------------


def test_mirroring_writes_what_is_missing_and_nothing_else(store: Store) -> None:
    def objective(trial: Trial) -> float:
        trial.report(float(trial.number), 1)
        if trial.number in (3, 5):
            raise RuntimeError("no")
        return float(trial.number)

    make(objective).run()
    storage = Storage()
    record = load(storage, "study")
    assert mirror_study(storage, record, None, Path(".tracker"))[0] == 0
    _, children = family(store)
    store.client.delete_run(children[2].info.run_id)
    store.client.delete_run(children[5].info.run_id)
    store.client.set_terminated(children[3].info.run_id, "FINISHED")
    store.client.set_terminated(children[4].info.run_id, "RUNNING")
    assert mirror_study(storage, record, None, Path(".tracker"))[0] > 0
    _, mended = family(store)
    failed = {number for number, run in mended.items() if run.info.status == "FAILED"}
    assert failed == {3, 5}
    assert {run.info.status for run in mended.values()} == {"FINISHED", "FAILED"}
    for number in failed:  # written by the trial or the mirror
        assert "RuntimeError: no" in mended[number].data.tags["tracker.failure"]
    assert mended[2].data.metrics == children[2].data.metrics
    assert mended[2].data.params == children[2].data.params
    assert mirror_study(storage, record, None, Path(".tracker"))[0] == 0


@pytest.mark.slow
def test_an_offline_study_can_be_mirrored_before_and_after_its_runs_are_synced(
    store: Store,
) -> None:
    program = (
        "from tracker import Study\n"
        "Study('study', lambda trial: trial.params['lr'], space={'lr': [1, 2]}, sampler='grid',"
        " offline=True).run()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert store.runs() == []
    storage = Storage()
    record = load(storage, "study")
    mirror_study(
        storage, record, None, Path(".tracker")
    )  # too early: its runs are still in their journal
    assert main(["sync"]) == 0
    mirror_study(storage, record, None, Path(".tracker"))
    assert mirror_study(storage, record, None, Path(".tracker"))[0] == 0
    parent, children = family(store)
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in children.values()] == ["FINISHED"] * 2


# -- models, checkpoints, replays --------------------------------------------------------------


def training(trial: Trial, *, stop: dict[int, int] | None = None) -> float:
    """Train a tiny network for four epochs; `stop` holds the last epoch of trials, by number."""
    network = nn.Linear(4, 1)
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True)), 8, shuffle=True
    )
    optimizer = torch.optim.Adam(network.parameters(), trial.params["lr"])
    with trial.manager() as manager:
        manager.begin_run(trial.params, network, loader)
        if manager.checkpoint is not None:
            manager.checkpoint.restore(network=network, optimizer=optimizer)
        while manager.epoch_count < 4:
            manager.begin_epoch()
            for batch in loader:
                loss = nn.functional.mse_loss(network(batch[0]), batch[1])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                manager.track_loss(loss, batch)
            manager.end_epoch()
            manager.save_checkpoint(optimizer=optimizer)
            if stop is not None and stop.get(trial.number) == manager.epoch_count:
                raise RuntimeError("cut off")
        manager.end_run()
    WEIGHTS.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    return float(manager.run_data[-1]["loss"])


WEIGHTS: list[torch.Tensor] = []


def test_only_the_best_model_is_kept_and_registered_with_its_origin(store: Store) -> None:
    study = make(
        training,
        space={"lr": [0.0001, 0.1, 0.001]},
        sampler="grid",
        register="tiny",
        alias="best",
    ).run()
    assert study.best_trial.number == 1
    parent, children = family(store)
    version = store.client.get_model_version_by_alias("tiny", "best")
    assert version.run_id == children[1].info.run_id
    assert version.tags["optuna.trial"] == "1"
    assert version.tags["tracker.study"] == "study"
    models = store.client.search_logged_models([parent.info.experiment_id])
    assert [model.source_run_id for model in models] == [children[1].info.run_id]
    assert len(list((Path("mlruns") / "models").glob("*/artifacts/MLmodel"))) <= 1
    loaded = mlflow.pytorch.load_model("models:/tiny@best")
    assert loaded(torch.ones(2, 4)).shape == (2, 1)


def test_models_that_the_objective_logs_itself_are_kept(store: Store) -> None:
    def objective(trial: Trial) -> float:
        network = nn.Linear(2, 1)
        for name in ("model", "mine"):
            assert trial.run.log_model(network, torch.ones(2, 2), name)
        return float(trial.params["x"])

    make(objective, space={"x": [2, 1, 3]}, sampler="grid").run()
    parent, children = family(store)
    models = store.client.search_logged_models([parent.info.experiment_id])
    logged = Counter(model.name for model in models)
    assert logged == {"mine": 3, "model": 1}
    (best,) = [model for model in models if model.name == "model"]
    assert best.source_run_id == children[1].info.run_id


def test_the_best_model_is_on_disk_before_the_study_knows_the_trial(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = []
    finish = Search.finish

    def watched(search: Search, number: int, ended: Ended) -> Verdict:
        (file,) = Path(".tracker").glob("*/journal.sqlite")
        with closing(sqlite3.connect(file)) as db:
            (count,) = db.execute("SELECT count(*) FROM records WHERE kind = 'model'").fetchone()
        logged.append(count)
        return finish(search, number, ended)

    monkeypatch.setattr(Search, "finish", watched)
    make(training, space={"lr": [0.1, 0.0001]}, sampler="grid").run()
    assert logged == [1, 0]  # the second is worse


def test_a_study_that_registers_nothing_says_why(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    make(register="tiny").run()
    assert "register='tiny' has registered nothing: the best trial logged no model" in caplog.text


def test_many_hyperparameters_leave_a_tag_that_is_json(store: Store) -> None:
    space = {f"name_{number}": ["x" * 100] for number in range(60)}
    make(lambda trial: 1.0, space=space, sampler="grid").run()
    parent, _ = family(store)
    assert json.loads(parent.data.tags["best.params"]) == "see best.json"


def test_a_registered_model_is_kept_when_a_better_one_follows(store: Store) -> None:
    for rates in ([0.00001], [0.00001, 0.1]):
        make(training, space={"lr": rates}, sampler="grid", register="tiny").run(resume=True)
    for version in ("1", "2"):
        assert mlflow.pytorch.load_model(f"models:/tiny/{version}")(torch.ones(2, 4)).shape == (
            2,
            1,
        )


def test_a_retried_trial_continues_from_its_checkpoint(store: Store) -> None:
    WEIGHTS.clear()
    space = {"lr": [0.01]}
    make(training, space=space, sampler="grid", models="none").run()

    def cut_off(trial: Trial) -> float:
        return training(trial, stop={0: 3})

    again = Study(
        "again", cut_off, space=space, sampler="grid", models="none", retries=1, experiment="again"
    )
    study = again.run()
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE"]
    assert torch.equal(WEIGHTS[0], WEIGHTS[1])
    whole = next(run for run in store.runs() if "optuna.trial" in run.data.tags)
    retried = next(run for run in store.runs("again") if run.data.tags.get("optuna.trial") == "1")
    assert store.history(whole, "loss") == store.history(retried, "loss")
    assert not list(Path(".tracker").glob("checkpoints/*"))


def test_a_trial_continued_from_its_checkpoint_is_pruned_as_without_interruption(
    store: Store,
) -> None:
    """Its best report is an early one; without it, the pruner would compare another value."""

    def objective(trial: Trial) -> float:
        network = nn.Linear(1, 1)
        value = 0.0
        with trial.manager(model=False) as manager:
            manager.begin_run(trial.params, network, [torch.zeros(1)])
            while manager.epoch_count < 4:
                manager.begin_epoch()
                value = 0.5 if trial.params["x"] < 6 else {1: 0.1}.get(manager.epoch_count, 0.9)
                trial.report(value, manager.epoch_count)
                if trial.should_prune():
                    raise optuna.TrialPruned()
                manager.end_epoch()
                manager.save_checkpoint()
                if trial.number == 5 and manager.epoch_count == stops_at:
                    raise RuntimeError("cut off")
            manager.end_run()
        return value

    results = []
    for stops_at in (-1, 1, 2):
        name = f"stops at {stops_at}"
        study = Study(
            name,
            objective,
            space={"x": [1, 2, 3, 4, 5, 6]},
            sampler="grid",
            pruner="median",
            steps=4,
            retries=1,
            experiment=name,
            models="none",
        ).run()
        last = study.trials[-1]
        (run,) = [
            r for r in store.runs(name) if r.data.tags.get("optuna.trial") == str(last.number)
        ]
        history = store.history(run, "intermediate_value")
        assert dict(history) == last.intermediate_values
        results.append((last.state, last.intermediate_values, history))
    assert results[0] == results[1] == results[2]


def test_replaying_a_trial_repeats_its_training(store: Store) -> None:
    WEIGHTS.clear()
    study = make(training, space={"lr": [0.01, 0.1]}, sampler="grid", models="none")
    first = study.run()
    assert study.replay(1) == [first.trials[1].value]
    assert torch.equal(WEIGHTS[1], WEIGHTS[2])
    assert len(first.get_trials()) == 2
    (replay,) = [run for run in store.runs() if "tracker.replays" in run.data.tags]
    assert replay.info.status == "FINISHED"
    assert "mlflow.parentRunId" not in replay.data.tags
    with pytest.raises(StoreError, match="has no trial 7; it has 0 to 1"):
        study.replay(7)


# -- several objectives, constraints, warm starts ----------------------------------------------


def test_several_objectives_have_a_pareto_front(store: Store, workdir: Path) -> None:
    def objective(trial: Trial) -> Sequence[float]:
        width = trial.params["width"]
        return 1 / width, width

    study = make(
        objective,
        space={"width": [1, 2, 4]},
        sampler="grid",
        direction=["minimize", "minimize"],
        metric=["error", "parameters"],
    ).run()
    assert len(study.best_trials) == 3
    parent, children = family(store)
    assert parent.data.tags["best.trial"] == "0, 1, 2"
    assert children[2].data.metrics["objective.error"] == 0.25
    assert children[2].data.metrics["objective.parameters"] == 4
    assert [each["values"] for each in json.loads(store.text(parent, "best.json", workdir))] == [
        [1.0, 1.0],
        [0.5, 2.0],
        [0.25, 4.0],
    ]


def test_an_infeasible_trial_is_never_the_best(store: Store) -> None:
    def objective(trial: Trial) -> float:
        trial.set_constraint("size", trial.params["size"] - 3)
        return -float(trial.params["size"])

    study = make(objective, space={"size": [1, 2, 3, 4]}, sampler="grid").run()
    assert study.best_trial.number == 2
    parent, children = family(store)
    assert parent.data.tags["best.trial"] == "2"
    assert children[3].data.metrics["constraint.size"] == 1


def test_a_study_can_start_with_the_trials_of_another(store: Store) -> None:
    first = Study("first", loss, space=SPACE, sampler="grid").run()
    second = Study("second", loss, space={**SPACE, "lr": [0.1, 0.5]}, sampler="grid")
    second.warm_start_from_study("first")
    study = second.run()
    assert Counter("tracker:source" in t.user_attrs for t in study.trials) == {True: 4, False: 4}
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 8
    for trial in study.trials:
        if source := trial.user_attrs.get(SOURCE):
            before = first.trials[int(source.removeprefix("study first trial "))]
            assert STARTED in trial.user_attrs  # Optuna's times have no zone
            assert times(trial) == times(before)
    names = {run.data.tags.get("tracker.source") for run in store.runs()}
    assert "study first trial 0" in names
    second.run(resume=True)
    assert len(study.get_trials()) == 8


def test_a_warm_start_from_a_missing_store_creates_nothing(
    workdir: Path, tracking_uri: str
) -> None:
    study = make(tracking_uri="sqlite:///none.db")
    study.warm_start_from_runs("old", "loss")
    with pytest.raises(StoreError, match=r"none.db' does not exist, so it does not"):
        study.run()
    make().run()
    again = make()
    again.warm_start_from_study("study", "journal:///./studies.journal")
    with pytest.raises(ArgumentError, match="study='study' cannot start with its own trials"):
        again.run(resume=True)
    assert not (workdir / "none.db").exists()


def test_a_study_can_start_with_runs_of_an_experiment(store: Store) -> None:
    for lr, value in (("0.1", 3.0), ("0.5", 1.0), ("7", 0.0)):
        with start_run(params={"lr": lr, "size": 16, "shuffle": "true"}, experiment="old") as run:
            run.log_metrics({"val_loss": value})
    study = make()
    study.warm_start_from_runs("old", "val_loss")
    result = study.run()
    (imported,) = [t for t in result.trials if "tracker:source" in t.user_attrs]
    assert imported.params == {"lr": 0.1, "size": 16, "shuffle": True}
    assert imported.value == 3.0
    assert len(result.trials) == 8


def test_a_resumed_study_does_not_import_its_own_trials(store: Store) -> None:
    with start_run(params={"x": 0.5}, experiment="Default") as run:
        run.log_metrics({"objective": 1.0})
    for _ in range(2):
        study = Study(
            "study", quadratic, space={"x": FloatDistribution(-1, 1)}, sampler="random", trials=2
        )
        study.warm_start_from_runs("Default", "objective")
        assert len(study.run(resume=True).trials) == 3


# -- mistakes ----------------------------------------------------------------------------------


def test_a_password_appears_in_no_message_and_no_store(database: str, store: Store) -> None:
    secret = database.replace("postgres@", "postgres:hunter2@")
    study = make(storage=secret)
    study.run()
    with pytest.raises(ArgumentError, match="already exists in storage") as raised:
        study.run()
    storage = Storage(database)
    (stored,) = storage.optuna.get_all_studies()
    storage.close()
    texts = [str(raised.value), str(stored.user_attrs)]
    texts += [str(run.to_dictionary()) for run in store.runs()]
    assert not any("hunter2" in text for text in texts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "annealing"}, "sampler='annealing' is unknown; allowed: grid, tpe"),
        ({"sampler": "tpe"}, "trials is required: sampler='tpe' has no natural end"),
        ({"sampler": "tpe", "trials": 0}, "trials=0 is not allowed; it must be at least 1"),
        ({"sampler": "grid"}, "sampler='grid' needs a space"),
        ({"sampler": "grid", "space": {"lr": []}}, r"space\['lr'\] is empty"),
        ({"sampler": "grid", "space": {"lr": [1, 1]}}, r"space\['lr'\] contains 1 twice"),
        (
            {"sampler": "grid", "space": {"lr": FloatDistribution(0, 1)}},
            "is continuous; a grid needs a list or a step",
        ),
        ({"pruner": "luck"}, "pruner='luck' is unknown; allowed: none, median, hyperband"),
        ({"direction": "up"}, "direction='up' is not allowed; it must be minimize or maximize"),
        ({"direction": ["minimize", 1]}, "direction=1 is not allowed"),
        ({"direction": []}, "direction is empty; it must be minimize, maximize or a list"),
        ({"metric": ["a", "b"]}, "must have one name for each of"),
        ({"metric": "loss?"}, r"objective name 'loss\?' is not allowed"),
        (
            {"direction": ["minimize"] * 2, "metric": ["a", "a"]},
            r"metric=\['a', 'a'\] contains a name twice",
        ),
        ({"sampler": "grid", "space": {"x:?": [1]}}, r"space name 'x:\?' is not allowed"),
        (
            {"direction": ["minimize"] * 2, "metric": ["a", "b"], "pruner": "median"},
            "one objective",
        ),
        ({"retries": -1}, "retries=-1 is not allowed"),
        ({"storage": "mysql://x/y"}, "storage='mysql://x/y' is not supported; allowed are journal"),
        ({"storage": "sqlite://"}, "does not name a file"),
        ({"models": "some"}, "models='some' is not allowed; it must be best, all or none"),
        ({"alias": "best"}, "alias='best' needs register=NAME"),
        ({"register": "a/b"}, "register='a/b' is not allowed; it must be a name without / : and '"),
        (
            {"register": "a", "alias": "latest"},
            "alias='latest' is not allowed; it must consist of letters",
        ),
        ({"register": "a", "alias": "v7"}, "alias='v7' is not allowed"),
        ({"register": "a", "models": "none"}, "register='a' needs one best model; models='none'"),
        (
            {"register": "a", "direction": ["minimize"] * 2, "metric": ["a", "b"]},
            "register='a' needs one best model; with several objectives there is none",
        ),
        ({"grace_seconds": 0}, "grace_seconds=0 is not allowed; it must be above 0"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence_and_creates_nothing(
    settings: dict[str, Any], message: str, workdir: Path, tracking_uri: str
) -> None:
    before = sorted(workdir.iterdir())
    with pytest.raises(ArgumentError, match=message) as raised:
        make(**settings)
    assert "\n" not in str(raised.value)
    assert sorted(workdir.iterdir()) == before


def test_the_number_of_workers_is_checked(workdir: Path, tracking_uri: str) -> None:
    before = sorted(workdir.iterdir())
    with pytest.raises(ArgumentError, match="workers=0 is not allowed; it must be at least 1"):
        make().run(workers=0)
    assert sorted(workdir.iterdir()) == before


def test_an_existing_study_is_resumed_only_on_request_and_with_its_settings(
    tracking_uri: str,
) -> None:
    stored = {"space": SPACE, "sampler": "grid", "fixed": {"data": "digits"}}
    study = make(**stored).run()
    with pytest.raises(ArgumentError, match="study='study' already exists in storage"):
        make(**stored).run()
    for changed, message in (
        ({"space": {**SPACE, "lr": [0.3]}}, "another space: 'lr' was .* and is now"),
        ({"space": {"lr": [0.1, 0.01]}}, "another space: 'size' is missing"),
        ({"space": {**SPACE, "new": [1]}}, "another space: 'new' is new"),
        ({"seed": 5}, "has seed=0, not 5"),
        ({"sampler": "random", "trials": 5}, "has sampler='grid', not 'random'"),
        ({"direction": "maximize"}, "has directions="),
        ({"experiment": "other"}, "has experiment=None, not 'other'"),
        ({"fixed": {"data": "mnist"}}, "has data='digits', not 'mnist'; resume it with the stored"),
        ({"fixed": {}}, "has data='digits', not .not given."),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(**stored | changed).run(resume=True)
    assert len(study.get_trials()) == 8


def test_an_invalid_range_ends_the_study(tracking_uri: str) -> None:
    for objective in (
        lambda trial: trial.suggest_float("lr", 1.0, 0.1),
        lambda trial: trial.suggest_float("lr", 0.0, 0.1, log=True),
        lambda trial: trial.suggest_categorical("lr", []),
        lambda trial: trial.suggest_float("x", 0, 1) + trial.suggest_int("x", 0, 1),
    ):
        with pytest.raises(ArgumentError, match="cannot be suggested"):
            Study("bad", objective, sampler="random", trials=2).run(resume=True)


def test_a_value_of_the_space_must_lie_in_the_suggested_range(tracking_uri: str) -> None:
    def narrower(trial: Trial) -> float:
        return trial.suggest_float("x", 0.0, 0.2) + trial.suggest_float("x", 0.0, 0.05)

    study = Study("study", narrower, space={"x": [0.1]}, sampler="grid")
    with pytest.raises(ArgumentError, match=r"'x' is already 0\.1, which is not in Float"):
        study.run()


def test_an_empty_study_of_plain_optuna_keeps_its_direction(tracking_uri: str) -> None:
    with closing(Storage()) as storage:
        storage.optuna.create_new_study([StudyDirection.MAXIMIZE], "study")
        several = {"direction": ["maximize", "minimize"], "metric": ["a", "b"]}
        for settings in ({"direction": "minimize"}, several):
            with pytest.raises(ArgumentError, match=r"has direction=.*, not .*minimize"):
                make(**settings).run()
            assert (
                optuna.load_study(study_name="study", storage=storage.optuna).metric_names is None
            )
    assert make(direction="maximize").run().best_value == 3.2


def test_a_study_with_settings_of_a_newer_version_is_refused(tracking_uri: str) -> None:
    make().run()
    with closing(Storage()) as storage:
        study_id = load(storage, "study").study_id
        stored = storage.optuna.get_study_user_attrs(study_id)[STUDY]
        storage.optuna.set_study_user_attr(study_id, STUDY, {**stored, "novelty": 1})
    with pytest.raises(StoreError, match="'study' has settings of a newer version: novelty"):
        make().run(resume=True)


class Broken(optuna.samplers.RandomSampler):
    error: Exception | None = None

    def sample_independent(self, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return super().sample_independent(*arguments)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_an_error_of_the_sampler_ends_the_study_and_costs_no_slot(
    kind: type[Exception], store: Store
) -> None:
    space, sampler = {"x": FloatDistribution(0.0, 1.0)}, Broken()
    study = Study("study", lambda t: float(t.params["x"]), space=space, sampler=sampler, trials=3)
    sampler.error = kind("this sampler is broken")
    with pytest.raises(kind, match="this sampler is broken"):
        study.run()
    parent, children = family(store)
    assert parent.info.status == "FAILED"
    assert children[0].data.tags["tracker.failure"].endswith("suggested: this sampler is broken")
    sampler.error = None
    states = Counter(trial.state for trial in study.run(resume=True).trials)
    assert states == {TrialState.FAIL: 1, TrialState.COMPLETE: 3}
    assert family(store)[0].info.status == "FINISHED"


def test_an_unusable_store_creates_no_study(workdir: Path) -> None:
    with pytest.raises(StoreError, match="tracking_uri"):
        make(tracking_uri="nonsense://x").run()
    (workdir / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot be opened"):
        make(storage="sqlite:///folder").run()
    assert not Path("studies.journal").exists()
