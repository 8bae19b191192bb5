"""A failure in one trial ends that trial, and neither its search nor other trials."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from tests.programs import wait_for
from tests.search.conftest import Start
from tracker import Study, Trial
from tracker.search.channel import Task
from tracker.search.config import StudyConfig
from tracker.search.executors.base import TrialSpec
from tracker.search.executors.processes import ProcessExecutor
from tracker.search.interrupts import Interrupts
from tracker.search.leases import PREFIX
from tracker.search.plan import ENDED, MOST_DEATHS
from tracker.search.session import Answer, Search
from tracker.search.storage import Storage
from tracker.search.stored_study import open_study

pytestmark = pytest.mark.timeout(120)

SPACE = {"x": [1, 2, 3]}


def stores_a_set(trial: Trial) -> float:
    if trial.number == 1:
        trial.set_user_attr("what", {1, 2})
    return float(trial.params["x"])


def reports_with_two_objectives(trial: Trial) -> list[float]:
    if trial.number == 1:
        trial.report(1.0, 1)  # Optuna supports this for one objective only
        trial.should_prune()
        trial.set_user_attr("what", 1)
    return [1.0, 2.0]


def abandon(trial: Trial) -> bool:
    """Fail trial 1 as another search would."""
    if trial.number != 1:
        return False
    storage = Storage()
    (other,) = [t for t in storage.optuna.get_all_trials(0) if t.number == 1]
    storage.optuna.set_trial_user_attr(other._trial_id, ENDED, {"why": "lost"})
    storage.optuna.set_trial_state_values(other._trial_id, TrialState.FAIL)
    storage.close()
    return True


def sets_a_constraint_too_late(trial: Trial) -> float:
    if abandon(trial):
        trial.set_constraint("size", 1.0)
    return float(trial.params["x"])


def sets_an_attribute_too_late(trial: Trial) -> float:
    if abandon(trial):
        trial.set_user_attr("what", 1)
    return float(trial.params["x"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("objective", [stores_a_set, reports_with_two_objectives])
def test_a_failing_request_fails_only_its_trial(
    objective: Callable[[Trial], Any], workers: int, tracking_uri: str
) -> None:
    count = 2 if objective is reports_with_two_objectives else 1
    study = Study(
        "study",
        objective,
        space=SPACE,
        sampler="grid",
        direction=["minimize"] * count,
        metric=["a", "b"][:count],
        offline=True,
    ).run(workers=workers, catch=Exception)
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    ended = study.trials[1].user_attrs[ENDED]
    assert ended["why"] == "failed"
    assert "Error: " in ended["reason"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("objective", [sets_a_constraint_too_late, sets_an_attribute_too_late])
def test_requests_of_an_abandoned_trial_fail_and_its_slot_is_tried_again(
    objective: Callable[[Trial], Any], workers: int, tracking_uri: str
) -> None:
    study = Study("study", objective, space=SPACE, sampler="grid", offline=True).run(
        workers=workers
    )
    done = [t.params["x"] for t in study.trials if t.state == TrialState.COMPLETE]
    assert sorted(done) == SPACE["x"]
    assert len(study.trials) == 4


def dies(trial: Trial) -> float:
    if trial.params["x"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return float(trial.params["x"])


@pytest.mark.slow
def test_a_slot_that_kills_its_workers_is_abandoned_with_a_warning(
    caplog: pytest.LogCaptureFixture, tracking_uri: str
) -> None:
    study = Study("study", dies, space=SPACE, sampler="grid", offline=True).run(workers=2)
    states = Counter((t.params["x"], t.state.name) for t in study.trials)
    assert states == {(1, "COMPLETE"): 1, (2, "FAIL"): MOST_DEATHS, (3, "COMPLETE"): 1}
    reason = (
        "Its process was killed by SIGKILL. Slot 1 is abandoned: its worker died or hung 5 times."
    )
    last = max(t.number for t in study.trials if t.state == TrialState.FAIL)
    assert study.trials[last].user_attrs[ENDED]["reason"] == reason
    assert f"Trial {last} of study study: {reason}" in caplog.text


def reports_often(trial: Trial) -> float:
    end = time.monotonic() + (0.0 if trial.params["x"] == 1 else 3.0)
    step = 0
    while time.monotonic() < end:
        step += 1
        trial.report(1.0, step)
        time.sleep(0.01)
    return 1.0


class CountingSearch(Search):
    """Counts how often a trial is claimed."""

    claims = 0

    def claim(self) -> Task | Answer:
        self.claims += 1
        return super().claim()


@pytest.mark.slow
def test_an_idle_worker_does_not_claim_a_trial_at_each_message_of_another(
    workdir: Path, tracking_uri: str
) -> None:
    storage = Storage()
    config = StudyConfig(name="study", spaces=({"x": [1, 2]},), sampler="grid", models="none")
    record = open_study(storage, config, resume=False)
    search = CountingSearch(storage, record, grace=60.0)
    search.enter()
    spec = TrialSpec(
        record=record,
        objective=reports_often,
        directory=workdir,
        tracking_uri=None,
        mode="offline",
        environment={},
    )
    ProcessExecutor(spec, [None, None]).run(search, Interrupts(print))
    assert search.plan.is_finished
    storage.close()
    assert search.claims < 20


def test_a_search_shows_that_it_lives_whatever_its_own_thread_does(tracking_uri: str) -> None:
    config = StudyConfig(name="study", spaces=({"x": [1]},), sampler="grid", models="none")
    with closing(Storage()) as storage:
        record = open_study(storage, config, resume=False)
        search = Search(storage, record, grace=0.3)
        search.enter()

        def beat() -> int:
            attrs = storage.optuna.get_study_user_attrs(record.study_id)
            return int(attrs[f"{PREFIX}{search.id}"]["beat"])

        with search.beating():  # while a sampler computes
            wait_for(lambda: beat() >= 3, "three beats")


KILLED = """
import os, signal, sys
from tracker import Study

def objective(trial):
    if len(sys.argv) > 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return trial.params["x"]

Study("study", objective, space={"x": [1, 2]}, sampler="grid", offline=True).run(resume=True)
"""


@pytest.mark.slow
def test_repeated_kills_of_the_search_do_not_abandon_a_slot(
    start: Start, tracking_uri: str
) -> None:
    for _ in range(MOST_DEATHS + 1):
        assert start(KILLED, "kill").wait() == -signal.SIGKILL
    assert start(KILLED).wait() == 0
    storage = Storage()
    states = Counter(t.state.name for t in storage.optuna.get_all_trials(0))
    storage.close()
    assert states == {"FAIL": MOST_DEATHS + 1, "COMPLETE": 2}


@pytest.mark.parametrize("is_interrupted", [True, False])
def test_a_signal_that_also_ends_the_process_that_forks_workers_is_an_interruption(
    is_interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts = Interrupts(print)
    nothing: Any = None
    executor = ProcessExecutor(nothing, [None, None])

    def start() -> None:
        if is_interrupted:
            interrupts._interrupt(signal.SIGTERM, None)
        raise EOFError

    monkeypatch.setattr(executor, "_start_workers", start)
    with nullcontext() if is_interrupted else pytest.raises(EOFError):
        executor.run(nothing, interrupts)
