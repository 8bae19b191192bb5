"""Studies whose workers are killed, stopped and cut off from their storage, in real processes.

What is asserted is read from Optuna's storage and from MLflow, when all is over.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Run as MlflowRun
from optuna.trial import TrialState

from tests.helpers import Store
from tests.postgres import PostgresServer
from tracker.search.plan import SLOT
from tracker.search.record import load
from tracker.search.storage import Storage

PROGRAM = """
import os, sys, time
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
    storage, sampler, trials, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    Study(
        "chaos", objective, sampler=sampler, trials=trials, storage=storage, seed=1, retries=1,
        grace_seconds=4,
    ).run(workers=workers, resume=True)
"""
GRACE = 4.0


@pytest.fixture
def start(workdir: Path, tracking_uri: str) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the program above; it and its children are gone when the test ends."""
    (workdir / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[bytes]] = []

    def start(
        storage: str, trials: int, workers: int, sampler: str = "random"
    ) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TRACKER_INLINE": "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "program.py", storage, sampler, str(trials), str(workers)],
            env=environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            family = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            continue
        for member in (process, *family):
            member.kill()
        process.wait()


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The workers of a search."""
    found = []
    for child in psutil.Process(process.pid).children():
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def finished(url: str) -> int:
    """How many trials of the study have ended."""
    storage = Storage(url)
    try:
        study_id = load(storage, "chaos").study_id
        states = [trial.state for trial in storage.optuna.get_all_trials(study_id, deepcopy=False)]
        return sum(state.is_finished() for state in states)
    finally:
        storage.close()


def wait_until(true: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def check(url: str, store: Store, trials: int) -> None:
    """The budget is exact, nothing runs, and MLflow mirrors Optuna one to one."""
    storage = Storage(url)
    record = load(storage, "chaos")
    found = storage.optuna.get_all_trials(record.study_id)
    storage.close()
    assert {trial.state for trial in found} <= {TrialState.COMPLETE, TrialState.FAIL}
    slots = Counter(t.user_attrs[SLOT] for t in found if t.state == TrialState.COMPLETE)
    assert set(slots.values()) <= {1}
    failed = {t.user_attrs[SLOT] for t in found} - set(slots)
    for slot in failed:  # the objective fails there, whoever runs it
        ends = [t.user_attrs["tracker:ended"]["why"] for t in found if t.user_attrs[SLOT] == slot]
        assert ends.count("failed") == 2
    assert set(slots) | failed == set(range(trials))
    for trial in found:  # what is suggested follows from the slot alone
        same = [t.params for t in found if t.user_attrs[SLOT] == trial.user_attrs[SLOT]]
        assert all(params in ({}, same[-1]) for params in same)

    def parent_of() -> MlflowRun:
        (parent,) = [r for r in store.runs() if r.data.tags.get("tracker.run") == record.key]
        return parent

    # The keeper may outlive the search, which waits for it for a minute.
    wait_until(lambda: parent_of().info.status != "RUNNING", 300)
    parent, runs = parent_of(), store.runs()
    assert parent.info.status == "FINISHED"
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1
    by_trial = {int(run.data.tags["optuna.trial"]): run for run in children}
    assert len(by_trial) == len(children) == len(found)
    for trial in found:
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
    kind: str,
    start: Callable[..., subprocess.Popen[bytes]],
    request: pytest.FixtureRequest,
    store: Store,
) -> None:
    trials = 200
    if kind == "journal":
        url, server = "journal:///chaos.journal", None
    else:
        url = request.getfixturevalue("database")
        server = request.getfixturevalue("postgres")
    chance = random.Random(kind)
    process = start(url, trials, 4)
    wait_until(lambda: len(workers(process)) == 4)
    stopped: list[tuple[float, psutil.Process]] = []
    restarts = 0
    blows = ["kill", "kill", "kill", "term", "term", "stop", "stop", "restart"] * 2
    chance.shuffle(blows)
    while process.poll() is None:
        for until, worker in list(stopped):
            if time.monotonic() > until:
                with suppress(psutil.NoSuchProcess):  # killed meanwhile
                    worker.resume()
                stopped.remove((until, worker))
        if blows and len(workers(process)) - len(stopped) > 1:
            blow = blows.pop()
            idle = {worker.pid for _, worker in stopped}
            victim = chance.choice([w for w in workers(process) if w.pid not in idle])
            if blow == "kill":
                victim.kill()
            elif blow == "term":
                victim.terminate()
            elif blow == "stop" and not stopped:
                victim.suspend()
                stopped.append((time.monotonic() + 1.5 * GRACE, victim))
            elif blow == "restart" and server is not None:
                assert isinstance(server, PostgresServer)
                server.restart(down_seconds=1.0)
                restarts += 1
        time.sleep(chance.uniform(0.5, 2.5))
    assert process.returncode == 0
    assert server is None or restarts > 0
    check(url, store, trials)
