"""A study whose workers are killed, terminated and suspended while its storage restarts.

Results are read from Optuna's storage and from MLflow, after everything has ended.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import closing, suppress

import psutil
import pytest
from optuna.trial import TrialState

from tests.helpers import Store
from tests.postgres import PostgresServer
from tests.programs import wait_for
from tests.search.conftest import Start, workers_of
from tracker.search.plan import SLOT
from tracker.search.storage import Storage
from tracker.search.stored_study import load

PROGRAM = """
import sys, time
from tracker import Study

def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    for step in range(1, 4):
        time.sleep(0.2)  # so that the study outlives the blows, on any machine
        trial.report(x * step, step)
    if x < 0.1:
        raise RuntimeError("too small")
    return x

if __name__ == "__main__":
    storage, trials = sys.argv[1:]
    Study(
        "chaos", objective, sampler="random", trials=int(trials), storage=storage, seed=1,
        retries=1, grace_seconds=4,
    ).run(workers=4, resume=True)
"""
GRACE = 4.0
TRIALS = 80
BLOWS = ["kill", "kill", "kill", "terminate", "terminate", "suspend", "suspend", "restart"]


def check(url: str, store: Store) -> None:
    """Check that the budget is exact, nothing runs, and MLflow mirrors Optuna one to one."""
    with closing(Storage(url)) as storage:
        record = load(storage, "chaos")
        trials = storage.optuna.get_all_trials(record.study_id)
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.FAIL}
    slots = Counter(t.user_attrs[SLOT] for t in trials if t.state == TrialState.COMPLETE)
    assert set(slots.values()) <= {1}
    failed = {t.user_attrs[SLOT] for t in trials} - set(slots)
    for slot in failed:  # the objective raises there, whatever process runs it
        ends = [t.user_attrs["tracker:ended"]["why"] for t in trials if t.user_attrs[SLOT] == slot]
        assert ends.count("failed") == 2
    assert set(slots) | failed == set(range(TRIALS))
    for trial in trials:  # suggestions follow from the slot alone
        same = [t.params for t in trials if t.user_attrs[SLOT] == trial.user_attrs[SLOT]]
        assert all(params in ({}, same[-1]) for params in same)

    def parent_has_ended() -> bool:
        parents = [r for r in store.runs() if r.data.tags.get("tracker.run") == record.key]
        return [r.info.status for r in parents] not in ([], ["RUNNING"])

    # The keeper may outlive the search, which waits for it for a minute.
    wait_for(parent_has_ended, "the end of the study's run")
    runs = store.runs()
    (parent,) = [r for r in runs if r.data.tags.get("tracker.run") == record.key]
    assert parent.info.status == "FINISHED"
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    by_trial = {int(run.data.tags["optuna.trial"]): run for run in children}
    assert len(by_trial) == len(children) == len(trials)
    for trial in trials:
        run = by_trial[trial.number]
        assert run.data.tags["optuna.state"] == trial.state.name
        if trial.state == TrialState.COMPLETE:
            assert run.info.status == "FINISHED"
            assert run.data.metrics["objective"] == trial.value
            assert run.data.params == {"x": str(trial.params["x"])}
        else:
            assert run.info.status in ("FAILED", "KILLED")
            assert run.data.tags["tracker.failure"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_no_trial_is_lost_or_repeated_whatever_happens_to_the_workers(
    kind: str, start: Start, request: pytest.FixtureRequest, store: Store
) -> None:
    url, server = "journal:///chaos.journal", None
    if kind == "postgresql":
        url = request.getfixturevalue("database")
        server = request.getfixturevalue("postgres")
        assert isinstance(server, PostgresServer)
    chance = random.Random(kind)
    search = start(PROGRAM, url, TRIALS)

    wait_for(lambda: len(workers_of(search)) == 4, "four workers", search.output)
    suspended: list[tuple[float, psutil.Process]] = []
    blows = chance.sample(BLOWS, len(BLOWS))
    restarts = 0
    while not search.ended():
        for until, worker in list(suspended):
            if time.monotonic() > until:
                with suppress(psutil.NoSuchProcess):  # killed meanwhile
                    worker.resume()
                suspended.remove((until, worker))
        idle = {worker.pid for _, worker in suspended}
        running = [worker for worker in workers_of(search) if worker.pid not in idle]
        if blows and len(running) > 1:
            blow, victim = blows.pop(), chance.choice(running)
            with suppress(psutil.NoSuchProcess):
                if blow == "kill":
                    victim.kill()
                elif blow == "terminate":
                    victim.terminate()
                elif blow == "suspend":
                    victim.suspend()
                    suspended.append((time.monotonic() + 1.5 * GRACE, victim))
                elif server is not None:
                    server.restart(down_seconds=1.0)
                    restarts += 1
        time.sleep(chance.uniform(0.5, 2.5))
    assert search.code == 0, search.output()
    assert restarts == (server is not None)
    check(url, store)
