"""Studies that are killed, interrupted, suspended or cut off, and the searches that continue them.

Real processes and real signals; results are read from Optuna's storage and from MLflow.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from tests.helpers import Store
from tests.postgres import PostgresServer
from tests.programs import Program, wait_for
from tests.search.conftest import Start, workers_of
from tracker.cli import main
from tracker.search.cli import reap_study
from tracker.search.leases import PREFIX
from tracker.search.plan import SLOT
from tracker.search.storage import Storage
from tracker.search.stored_study import load

SEARCH = """
import sys, time
from pathlib import Path
from tracker import Study

def objective(trial):
    for step in range(1, 100_000):
        trial.report(1.0, step)
        if Path(f"go{trial.params['x']}").exists() or Path("go").exists():
            return float(trial.params["x"])
        time.sleep(0.02)

if __name__ == "__main__":
    storage, workers, grace, points = sys.argv[1:]
    Study(
        "study", objective, space={"x": list(range(int(points)))}, sampler="grid",
        storage=storage, grace_seconds=float(grace),
    ).run(workers=int(workers), resume=True)
"""
JOURNAL = "journal:///studies.journal"
POINTS = 4

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

Search = Callable[..., Program]


@pytest.fixture
def search(start: Start) -> Search:
    """Starts a search of the study `study`, whose trials run until the file `go` exists."""

    def search(
        storage: str = JOURNAL, *, workers: int = 1, grace: float = 60.0, points: int = POINTS
    ) -> Program:
        return start(SEARCH, storage, workers, grace, points)

    return search


def trials(url: str = JOURNAL) -> list[FrozenTrial]:
    """The study's trials so far; empty before the study exists."""
    with closing(Storage(url)) as storage, suppress(KeyError):
        study_id = storage.optuna.get_study_id_from_name("study")
        return list(storage.optuna.get_all_trials(study_id))
    return []


def wait_for_reports(count: int, url: str = JOURNAL) -> None:
    """Wait until `count` trials are running and have reported."""

    def are_reporting() -> bool:
        running = [trial for trial in trials(url) if trial.state == TrialState.RUNNING]
        return sum(trial.last_step is not None for trial in running) == count

    wait_for(are_reporting, f"reports of {count} trials")


def states(found: Sequence[FrozenTrial]) -> Counter[str]:
    """How many trials are in which state."""
    return Counter(trial.state.name for trial in found)


def completed_slots(url: str = JOURNAL) -> Counter[int]:
    """How often each slot of the study is complete."""
    return Counter(t.user_attrs[SLOT] for t in trials(url) if t.state == TrialState.COMPLETE)


def statuses(store: Store) -> tuple[str, Counter[str]]:
    """The status of the study's run, and how many of its trials' runs have which status."""
    runs = store.runs()
    if not runs:
        return "", Counter()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    numbers = [run.data.tags["optuna.trial"] for run in children]
    assert len(numbers) == len(set(numbers))
    return parent.info.status, Counter(run.info.status for run in children)


def wait_for_statuses(store: Store, study: str, runs: Counter[str]) -> None:
    """Wait for the delivery, which continues after the end of a program that has no time left."""
    wait_for(
        lambda: statuses(store) == (study, runs),
        f"the status {study} and the runs {dict(runs)}",
        lambda: str(statuses(store)),
    )


def finish(search: Search, store: Store, url: str = JOURNAL) -> None:
    """Continue the study to its end: each point complete once, one run per trial."""
    Path("go").touch()
    assert search(url).wait() == 0
    assert completed_slots(url) == dict.fromkeys(range(POINTS), 1)
    assert TrialState.RUNNING.name not in states(trials(url))
    wait_for(lambda: statuses(store)[0] == "FINISHED", "the end of the study's run")
    _, runs = statuses(store)
    assert runs["FINISHED"] == POINTS
    assert sum(runs.values()) == len(trials(url))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_study_leaves_nothing_running(workers: int, search: Search, store: Store) -> None:
    program = search(workers=workers)
    wait_for_reports(workers)
    wait_for(lambda: bool(store.runs()), "the study's run")
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    wait_for(lambda: states(trials()) == Counter(FAIL=workers), "the trials' failure")
    wait_for(lambda: statuses(store) == ("FAILED", Counter(FAILED=workers)), "the runs' failure")
    finish(search, store)


@pytest.mark.parametrize(
    ("workers", "number"), [(2, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGTERM)]
)
def test_ctrl_c_or_sigterm_ends_the_running_trials_as_interrupted(
    workers: int, number: signal.Signals, search: Search, store: Store
) -> None:
    program = search(workers=workers)
    wait_for_reports(workers)
    os.kill(program.pid, number)
    assert program.wait() != 0
    reasons = [trial.user_attrs["tracker:ended"]["why"] for trial in trials()]
    assert reasons == ["interrupted"] * workers
    wait_for_statuses(store, "KILLED", Counter(KILLED=workers))
    finish(search, store)


def test_a_second_ctrl_c_ends_trials_that_do_not_react(search: Search, store: Store) -> None:
    program = search(workers=2)
    wait_for_reports(2)
    for worker in workers_of(program):
        worker.suspend()
    os.kill(program.pid, signal.SIGINT)
    time.sleep(1.0)
    assert not program.ended()
    os.kill(program.pid, signal.SIGINT)
    assert program.wait() != 0
    reasons = [trial.user_attrs["tracker:ended"]["why"] for trial in trials()]
    assert reasons == ["interrupted"] * 2
    wait_for_statuses(store, "KILLED", Counter(KILLED=2))
    finish(search, store)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_terminal_is_handled_by_the_search_while_its_processes_start(
    number: signal.Signals, search: Search, store: Store
) -> None:
    program = search(workers=2)
    wait_for(
        lambda: program.children("keeper") and workers_of(program), "the keeper and the workers"
    )
    os.killpg(program.pid, number)
    assert program.wait() != 0
    assert program.output().count("Traceback") == 1  # the search's own
    status, runs = statuses(store)
    assert status == "KILLED"
    assert runs.keys() <= {"KILLED"}  # a worker may have begun a trial by then
    finish(search, store)


def test_a_worker_that_was_suspended_too_long_loses_its_trial_and_continues(
    search: Search, store: Store
) -> None:
    program = search(workers=2, grace=3.0)
    wait_for_reports(2)
    late = workers_of(program)[0]
    late.suspend()
    wait_for(lambda: states(trials())["FAIL"], "a failed trial")
    wait_for_reports(2)  # a new worker has taken its place
    late.resume()
    Path("go").touch()
    assert program.wait() == 0
    assert states(trials()) == {"COMPLETE": POINTS, "FAIL": 1}
    wait_for_statuses(store, "FINISHED", Counter(FINISHED=POINTS, FAILED=1))


def test_a_search_that_was_suspended_too_long_loses_its_trial(search: Search, store: Store) -> None:
    late = search(grace=3.0)
    wait_for_reports(1)
    with closing(Storage(JOURNAL)) as storage, storage.lock():  # not while it holds a lock
        appends = storage.optuna._backend._lock  # type: ignore[attr-defined]
        appends.acquire()
        psutil.Process(late.pid).suspend()
        appends.release()
    other = search(grace=3.0)
    wait_for(lambda: states(trials())["FAIL"], "a failed trial")
    psutil.Process(late.pid).resume()
    Path("go").touch()
    assert [other.wait(), late.wait()] == [0, 0]
    assert completed_slots() == dict.fromkeys(range(POINTS), 1)
    status, runs = statuses(store)
    assert status == "FINISHED"
    assert runs["FINISHED"] == POINTS
    assert sum(runs.values()) == len(trials())


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_searches_that_share_a_storage_share_the_budget(
    kind: str, search: Search, store: Store, request: pytest.FixtureRequest
) -> None:
    url = JOURNAL if kind == "journal" else request.getfixturevalue("database")
    Path("go").touch()
    programs = [search(url, workers=workers, points=24) for workers in (1, 2)]
    assert [program.wait() for program in programs] == [0, 0]
    found = trials(url)
    assert Counter(trial.user_attrs[SLOT] for trial in found) == dict.fromkeys(range(24), 1)
    assert states(found) == {"COMPLETE": 24}
    wait_for_statuses(store, "FINISHED", Counter(FINISHED=24))


def test_a_database_outage_costs_no_trial(
    search: Search, store: Store, database: str, postgres: PostgresServer
) -> None:
    program = search(database, workers=2)
    wait_for_reports(2, database)
    postgres.stop("immediate")
    Path("go0").touch()  # one trial ends during the outage
    time.sleep(10.0)
    assert not program.ended()
    postgres.start()
    Path("go").touch()
    assert program.wait() == 0
    assert states(trials(database)) == {"COMPLETE": POINTS}
    wait_for_statuses(store, "FINISHED", Counter(FINISHED=POINTS))


def test_reap_fails_the_trials_of_a_lost_machine(
    search: Search, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    program = search(workers=2, grace=3.0)
    wait_for_reports(2)
    wait_for(lambda: statuses(store)[1] == Counter(RUNNING=2), "two RUNNING runs")
    program.kill_all()
    with closing(Storage(JOURNAL)) as storage:
        record = load(storage, "study")
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        for name, info in attrs.items():
            if name.startswith(PREFIX):  # pretend that another machine ran it
                elsewhere = {**info, "place": "another machine"}
                storage.optuna.set_study_user_attr(record.study_id, name, elsewhere)
    assert states(trials()) == {"RUNNING": 2}
    assert main(["reap", "--study", "study", "--grace-seconds", "2"]) == 0
    assert "failed 2 lost trials" in capsys.readouterr().out
    assert states(trials()) == {"FAIL": 2}
    wait_for_statuses(store, "FAILED", Counter(FAILED=2))
    finish(search, store)


def test_reap_leaves_a_living_search_alone(search: Search, store: Store) -> None:
    program = search(grace=6.0)
    wait_for_reports(1)
    with closing(Storage(JOURNAL)) as storage:
        assert reap_study(storage, load(storage, "study"), grace=0.5) == []
    Path("go").touch()
    assert program.wait() == 0
    assert states(trials()) == {"COMPLETE": POINTS}


TRAINING = """
import os, signal, sys
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tracker import Study, fit

def objective(trial):
    network = nn.Linear(4, 1)
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), 8, shuffle=True)
    optimizer = torch.optim.Adam(network.parameters(), trial.params["lr"])
    with trial.manager(model=False) as manager:
        manager.begin_run(trial.params, network, loader)
        if manager.checkpoint is not None:
            manager.checkpoint.restore(network=network, optimizer=optimizer)
        for epoch in fit(
            network, loader, optimizer, nn.functional.mse_loss, epochs=4, done=manager.epoch_count
        ):
            with open("epochs", "a") as log:
                log.write(f"{trial.params['lr']} {epoch.number}\\n")
            manager.log_epoch(epoch)
            manager.save_checkpoint(optimizer=optimizer)
            if epoch.number == 3 and Path("kill").exists():
                Path("kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        manager.end_run()
    torch.save(network.state_dict(), f"weights-{trial.params['lr']}.pt")
    return epoch.metrics["loss"]

if __name__ == "__main__":
    Study(
        sys.argv[1], objective, space={"lr": [0.1, 0.01]}, sampler="grid", storage=sys.argv[2],
    ).run(workers=2)
"""


def test_a_trial_whose_process_was_killed_continues_from_its_checkpoint(
    start: Start, store: Store
) -> None:
    weights = []
    for name in ("whole", "study"):
        if name == "study":
            Path("kill").touch()
            Path("epochs").unlink()
        assert start(TRAINING, name, JOURNAL).wait() == 0
        weights.append([torch.load(f"weights-{lr}.pt") for lr in (0.1, 0.01)])
    assert states(trials()) == {"COMPLETE": 2, "FAIL": 1}
    epochs = Path("epochs").read_text().splitlines()
    assert max(Counter(epochs).values()) <= 2
    assert len(epochs) <= 2 * 4 + 1
    for first, second in zip(*weights, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
