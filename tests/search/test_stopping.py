"""stop(), timeouts and callbacks, with the meaning that they have in Optuna."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.samplers import BruteForceSampler, GridSampler
from optuna.study import MaxTrialsCallback, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tests.helpers import Store
from tracker import ArgumentError, CallOrderError, Study, Trial
from tracker.search.plan import SLOT

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def quadratic(trial: Trial) -> float:
    return trial.suggest_float("x", -1.0, 1.0) ** 2


def make(objective: Any = quadratic, **settings: Any) -> Study:
    given: dict[str, Any] = {"sampler": "random", "trials": 8}
    return Study("study", objective, **given | settings)


def study_status(store: Store) -> str:
    (status,) = [run.info.status for run in store.runs() if "best_objective" in run.data.metrics]
    return str(status)


def test_a_callback_stops_the_study_which_is_finished_and_can_be_resumed(store: Store) -> None:
    seen: list[int] = []

    def callback(study: optuna.Study, trial: FrozenTrial) -> None:
        assert study.study_name == "study"
        assert study.trials[trial.number].state == trial.state == TrialState.COMPLETE
        assert study.best_value <= trial.values[0]
        seen.append(trial.number)
        trial.user_attrs.clear()  # a copy
        if trial.number == 2:
            study.stop()

    study = make()
    assert len(study.run(callbacks=[callback]).trials) == 3
    assert seen == [0, 1, 2]
    assert study_status(store) == "FINISHED"
    assert len(study.run(resume=True, callbacks=[callback]).trials) == 8
    assert seen == list(range(8))
    assert [trial.user_attrs[SLOT] for trial in study.trials] == list(range(8))


@pytest.mark.parametrize("ask", ["study", "trial"])
def test_an_objective_stops_the_study_and_its_own_trial_ends_as_usual(
    ask: str, store: Store
) -> None:
    def objective(trial: Trial) -> float:
        if trial.number == 1:
            (study.stop if ask == "study" else trial.study.stop)()
        return quadratic(trial)

    study = make(objective)
    assert [t.state for t in study.run().trials] == [TrialState.COMPLETE] * 2
    assert study_status(store) == "FINISHED"


def test_stop_needs_a_running_study(tracking_uri: str) -> None:
    study = make(trials=1)
    for _ in range(2):
        with pytest.raises(CallOrderError, match=r"stop\(\) needs a study that is running"):
            study.stop()
        study.run(resume=True)


def test_no_trial_starts_after_the_timeout(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr("tracker.search.stopping.time", fake)

    def objective(trial: Trial) -> float:
        clock.now += 4.0
        return quadratic(trial)

    study = make(objective)
    assert len(study.run(timeout=10).trials) == 3  # begun after 0, 4 and 8 seconds
    assert study_status(store) == "FINISHED"
    assert len(study.run(resume=True, timeout=1e9).trials) == 8


def test_callbacks_get_failed_and_pruned_trials_too(tracking_uri: str) -> None:
    def objective(trial: Trial) -> float:
        if trial.number == 0:
            raise RuntimeError("bad luck")
        if trial.number == 1:
            raise optuna.TrialPruned
        return 1.0

    states: list[str] = []
    study = make(objective, trials=3, offline=True)
    study.run(callbacks=[lambda _, trial: states.append(trial.state.name)])
    assert states == ["FAIL", "PRUNED", "COMPLETE"]


def test_an_exception_of_a_callback_ends_the_study_with_it(store: Store) -> None:
    def callback(study: optuna.Study, trial: FrozenTrial) -> None:
        raise ZeroDivisionError("in the callback")

    with pytest.raises(ZeroDivisionError, match="in the callback"):
        make().run(callbacks=[callback])
    assert study_status(store) == "FAILED"
    (_, parent) = sorted(store.runs(), key=lambda run: "best_objective" in run.data.metrics)
    assert "in the callback" in parent.data.tags["tracker.failure"]
    assert len(make().run(resume=True).trials) == 8


def test_callbacks_of_optuna_and_enqueued_trials_work(tracking_uri: str) -> None:
    def callback(study: optuna.Study, trial: FrozenTrial) -> None:
        if trial.number == 1:
            study.enqueue_trial({"x": 0.25})

    callbacks = [MaxTrialsCallback(4, states=(TrialState.COMPLETE,)), callback]
    trials = make(offline=True).run(callbacks=callbacks).trials
    assert len(trials) == 4
    assert trials[2].params == {"x": 0.25}


@pytest.mark.parametrize(
    "sampler", [GridSampler({"k": [1, 2, 3]}), lambda: BruteForceSampler()], ids=["grid", "brute"]
)
def test_a_sampler_that_has_tried_everything_ends_the_study(sampler: Any, store: Store) -> None:
    study = make(lambda trial: float(trial.suggest_int("k", 1, 3)), sampler=sampler, trials=9)
    assert sorted(trial.params["k"] for trial in study.run().trials) == [1, 2, 3]
    assert study_status(store) == "FINISHED"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "timeout=0 is not allowed; it must be above 0"),
        ({"timeout": "1h"}, "timeout='1h' is not allowed"),
        ({"timeout": True}, "timeout=True is not allowed"),
        ({"callbacks": [3]}, "callbacks contains 3; it must be a function"),
    ],
)
def test_wrong_limits_are_refused_before_anything_is_created(
    settings: dict[str, Any], message: str
) -> None:
    study = make()
    with pytest.raises(ArgumentError, match=message):
        study.run(**settings)
    assert study.trials == []


def stops_at_the_third(trial: Trial) -> float:
    done = trial.study.get_trials(states=(TrialState.COMPLETE,))
    assert trial.study.study_name == "study"
    assert trial.study.direction == StudyDirection.MINIMIZE
    assert trial.study.directions == [StudyDirection.MINIMIZE]
    if done:
        assert trial.study.best_value == min(each.values[0] for each in done)
        assert trial.study.best_params in [each.params for each in done]
    if len(done) >= 2:
        trial.study.stop()
    return quadratic(trial)


def test_an_objective_in_a_worker_sees_the_study_and_stops_it(tracking_uri: str) -> None:
    seen = Counter[int]()
    study = make(stops_at_the_third, trials=50, offline=True)
    trials = study.run(workers=2, callbacks=[lambda _, trial: seen.update([trial.number])]).trials
    assert 3 <= len(trials) <= 5
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert seen == Counter(range(len(trials)))
