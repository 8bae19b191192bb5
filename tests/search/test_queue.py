"""Enqueued trials fill slots of the budget first, each once."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from tests.helpers import Store
from tracker import ArgumentError, Study, Trial
from tracker.search.channel import Ended, Task
from tracker.search.plan import SLOT
from tracker.search.reap import reap
from tracker.search.session import QUEUED, Search
from tracker.search.storage import Storage
from tracker.search.stored_study import load

SPACE = {"x": FloatDistribution(0.0, 1.0), "k": [1, 2, 3]}


def objective(trial: Trial) -> float:
    return float(trial.params["x"] * trial.params["k"])


def make(objective: Any = objective, **settings: Any) -> Study:
    given: dict[str, Any] = {"space": SPACE, "sampler": "random", "trials": 4, "offline": True}
    return Study("study", objective, **given | settings)


def test_a_study_can_be_made_and_looked_at_without_running_a_trial(
    workdir: Path, tracking_uri: str
) -> None:
    before = sorted(workdir.iterdir())
    study = make()
    assert study.trials == []
    study.enqueue_trial({"x": 0.25})
    study.enqueue_trial({"x": 0.5, "k": 2}, user_attrs={"memo": "tried"})
    assert [trial.state for trial in study.trials] == [TrialState.WAITING] * 2
    assert [trial.number for trial in study.trials] == [0, 1]
    assert study.trials[1].user_attrs["memo"] == "tried"
    assert sorted(workdir.iterdir()) == before
    study.run()
    assert study.trials == make().trials
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4


@pytest.mark.parametrize("storage", ["journal:///j", "sqlite:///s.db"])
@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "qmc"])
def test_enqueued_trials_fill_slots_of_the_budget_first(
    storage: str, sampler: str, tracking_uri: str
) -> None:
    study = make(sampler=sampler, storage=storage)
    study.enqueue_trial({"x": np.float64(0.25)})
    study.enqueue_trial({"x": 0.5, "k": 2}, {"memo": "tried"})
    trials = study.run().trials
    assert [trial.user_attrs[SLOT] for trial in trials] == [0, 1, 2, 3]
    assert trials[0].params["x"] == 0.25
    assert trials[1].params == {"x": 0.5, "k": 2}
    assert trials[1].user_attrs["memo"] == "tried"
    assert len({trial.params["x"] for trial in trials}) == 4


def test_enqueued_hyperparameters_may_be_suggested_by_the_objective(tracking_uri: str) -> None:
    def defines(trial: Trial) -> float:
        assert trial.suggest_categorical("kind", ["a", "b"]) == "b" or trial.number > 0
        return trial.suggest_float("y", 0, 1) + trial.params["x"]

    study = make(defines)
    study.enqueue_trial({"kind": "b", "y": 0.75})
    first = study.run().trials[0]
    assert first.params["kind"] == "b"
    assert first.params["y"] == 0.75


def test_a_program_that_starts_again_enqueues_its_trials_once(tracking_uri: str) -> None:
    """Interrupted twice: in an enqueued trial, and in one of the sampler's."""
    calls: Counter[int] = Counter()

    def interrupted(trial: Trial) -> float:
        calls[trial.number] += 1
        if trial.number in (1, 4):
            raise KeyboardInterrupt
        return objective(trial)

    def program() -> optuna.Study:
        study = make(interrupted)
        for x in (0.25, 0.5, 0.25):
            study.enqueue_trial({"x": x}, {"memo": str(x)})
        return study.run(resume=True)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            program()
    trials = program().trials
    assert program().trials == trials
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert Counter(trial.params["x"] for trial in done if "memo" in trial.user_attrs) == {
        0.25: 2,
        0.5: 1,
    }
    assert sorted(trial.user_attrs[SLOT] for trial in done) == [0, 1, 2, 3]
    assert len(trials) == 6
    assert max(calls.values()) == 1
    for trial in trials:  # a repeated trial keeps its attributes
        assert trial.user_attrs.get("memo", str(trial.params["x"])) == str(trial.params["x"])


def test_trials_beyond_the_budget_run_in_addition_until_it_grows(tracking_uri: str) -> None:
    study = make(trials=2)
    for x in (0.1, 0.2, 0.3):
        study.enqueue_trial({"x": x})
    trials = study.run().trials
    assert [trial.params["x"] for trial in trials] == [0.1, 0.2, 0.3]
    assert [trial.user_attrs[SLOT] for trial in trials] == [0, 1, QUEUED]
    assert len(make(trials=4).run(resume=True).trials) == 5


@pytest.mark.parametrize("skip_if_exists", [False, True])
def test_equal_trials_run_as_often_as_they_are_enqueued_unless_skipped(
    skip_if_exists: bool, tracking_uri: str
) -> None:
    study = make(trials=3)
    for _ in range(2):
        study.enqueue_trial({"x": 0.25, "k": 1}, skip_if_exists=skip_if_exists)
    trials = study.run().trials
    assert sum(trial.params["x"] == 0.25 for trial in trials) == (1 if skip_if_exists else 2)
    study.enqueue_trial({"k": 1, "x": 0.25}, skip_if_exists=True)  # the order does not matter
    assert len(study.run(resume=True).trials) == 3


def test_searches_that_share_a_study_claim_each_enqueued_trial_once(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three dies with a trial, and one in the middle of a claim."""
    study = make(trials=6)
    for x in (0.125, 0.25, 0.5):
        study.enqueue_trial({"x": x})
    monkeypatch.setattr("tracker.search.study.Study._run", lambda *_: None)
    study.run()
    with closing(Storage()) as storage:
        record = load(storage, "study")
        searches = [Search(storage, record, grace=60.0) for _ in range(4)]
        for search in searches:
            search.enter()
        with monkeypatch.context() as patch:

            def die(*_: Any) -> bool:
                raise KeyboardInterrupt

            patch.setattr(storage.optuna, "set_trial_state_values", die)
            with pytest.raises(KeyboardInterrupt):
                searches[0].claim()
        assert isinstance(searches[1].claim(), Task)
        reap(storage, record, {searches[0].id, searches[1].id})
        ours, tasks = searches[2:], list[Task]()
        for turn in range(20):
            search = ours[turn % 2]
            task = search.claim()
            if isinstance(task, Task):
                tasks.append(task)
                search.finish(task.number, Ended("COMPLETE", [1.0]))
        trials = search.trials()
    assert sorted(task.slot for task in tasks) == list(range(6))
    done = Counter(trial.params["x"] for trial in trials if trial.state == TrialState.COMPLETE)
    assert {x: done[x] for x in (0.125, 0.25, 0.5)} == {0.125: 1, 0.25: 1, 0.5: 1}
    assert done.total() == 6
    assert not any(trial.state == TrialState.WAITING for trial in trials)


def dies_once(trial: Trial) -> float:
    trial.folder.mkdir(parents=True, exist_ok=True)
    if trial.number == 1 and not (trial.folder / "died").exists():
        (trial.folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return objective(trial)


def test_an_enqueued_trial_whose_worker_dies_is_repeated(store: Store) -> None:
    study = make(dies_once, trials=3, offline=False)
    for x in (0.25, 0.5):
        study.enqueue_trial({"x": x})
    trials = study.run(workers=2).trials
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert sorted(trial.user_attrs[SLOT] for trial in done) == [0, 1, 2]
    assert len(trials) == 4
    xs = {trial.user_attrs[SLOT]: trial.params["x"] for trial in done}
    assert xs[0] == 0.25
    assert xs[1] == 0.5
    statuses = Counter(run.info.status for run in store.runs())
    assert statuses == {"FINISHED": 4, "FAILED": 1}


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, ([0.1],), r"params=\[0\.1\]"),
        ({}, ({"x": 2.0},), r"params\['x'\]=2\.0 is not in FloatDistribution"),
        ({}, ({"k": 7},), r"params\['k'\]=7 is not in Categorical"),
        ({}, ({"other": [1]},), r"params\['other'\]=\[1\] is not allowed; allowed are numbers"),
        ({}, ({"x": 0.5}, {"memo": object()}), "user_attrs=.* is not JSON"),
        (
            {"space": {"k": [1, 2]}, "sampler": "grid", "trials": None},
            ({"k": 1},),
            "enqueue_trial is not allowed with sampler='grid'",
        ),
    ],
)
def test_what_cannot_be_enqueued_is_refused_at_once(
    settings: dict[str, Any], arguments: tuple[Any, ...], message: str
) -> None:
    study = make(**settings)
    with pytest.raises(ArgumentError, match=message):
        study.enqueue_trial(*arguments)
    assert study.trials == []
