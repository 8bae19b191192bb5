"""A whole study that is killed, interrupted, stopped or cut off, and what goes on with it.

Real processes, real signals; what is asserted is read from Optuna's storage and from MLflow.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from tests.helpers import Store
from tests.postgres import PostgresServer
from tracker.search.leases import PREFIX
from tracker.search.plan import SLOT
from tracker.search.record import load
from tracker.search.storage import Storage
from tracker.search.upkeep import reap_study

PROGRAM = """
import signal, sys, time
from pathlib import Path
from tracker import Study

def objective(trial):
    for step in range(1, 100_000):
        trial.report(1.0, step)
        if Path(f"go{trial.params['x']}").exists() or Path("go").exists():
            return float(trial.params["x"])
        time.sleep(0.02)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's shell may ignore it
    storage, grace = sys.argv[1], float(sys.argv[3])
    workers, points = int(sys.argv[2]), int(sys.argv[4])
    Study(
        "study", objective, space={"x": list(range(points))}, sampler="grid", storage=storage,
        grace_seconds=grace,
    ).run(workers=workers, resume=True)
"""
JOURNAL = "journal:///studies.journal"
Start = Callable[..., subprocess.Popen[bytes]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def start(workdir: Path, tracking_uri: str) -> Iterator[Start]:
    """Start the program above; it and its children are gone when the test ends."""
    (workdir / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[bytes]] = []

    def start(
        storage: str = JOURNAL,
        *,
        workers: int = 1,
        grace: float = 30.0,
        points: int = 4,
        **more: Any,
    ) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "TRACKER_INLINE": "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        arguments = [storage, str(workers), str(grace), str(points)]
        command = [sys.executable, "program.py", *arguments]
        process = subprocess.Popen(command, env=environment, **more)
        started.append(process)
        return process

    yield start
    for process in started:
        family: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        for member in (process, *family):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def children(process: subprocess.Popen[bytes], what: str) -> list[psutil.Process]:
    """The children of a search whose command line has `what` in it."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if what in " ".join(child.cmdline()):
                found.append(child)
    return found


def trials(url: str = JOURNAL) -> list[FrozenTrial]:
    """The study's trials now; none as long as there is no study."""
    storage = Storage(url)
    try:
        with suppress(KeyError):
            study_id = storage.optuna.get_study_id_from_name("study")
            return storage.optuna.get_all_trials(study_id)
        return []
    finally:
        storage.close()


def wait_until(true: Callable[[], bool], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def reporting(count: int, url: str = JOURNAL) -> Callable[[], bool]:
    """Whether `count` trials run and have reported."""
    return lambda: (
        sum(t.state == TrialState.RUNNING and t.last_step is not None for t in trials(url)) == count
    )


def statuses(store: Store) -> tuple[str, Counter[str]]:
    """The status of the study's run, and how many of its trials' have which."""
    runs = store.runs()
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    if not runs:
        return "", Counter()
    assert len(parents) == 1
    numbers = [run.data.tags["optuna.trial"] for run in runs if run is not parents[0]]
    assert len(numbers) == len(set(numbers))
    return parents[0].info.status, Counter(r.info.status for r in runs if r is not parents[0])


def finish(start: Start, store: Store, url: str = JOURNAL, *, points: int = 4) -> None:
    """Go on with the study to its end: each point complete once, one run a trial."""
    Path("go").touch()
    assert start(url, workers=1, points=points).wait(120) == 0
    found = trials(url)
    done = Counter(t.user_attrs[SLOT] for t in found if t.state == TrialState.COMPLETE)
    assert done == dict.fromkeys(range(points), 1)
    assert not any(t.state == TrialState.RUNNING for t in found)
    status, runs = statuses(store)
    assert status == "FINISHED"
    assert runs["FINISHED"] == points
    assert sum(runs.values()) == len(found)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_study_that_is_killed_leaves_nothing_that_runs(
    workers: int, start: Start, store: Store
) -> None:
    process = start(workers=workers)
    wait_until(reporting(workers))
    wait_until(lambda: bool(store.runs()))
    process.kill()
    process.wait()
    wait_until(lambda: all(t.state == TrialState.FAIL for t in trials()))
    wait_until(lambda: statuses(store) == ("FAILED", Counter(FAILED=workers)))
    finish(start, store)


def test_ctrl_c_ends_the_running_trials_cleanly(start: Start, store: Store) -> None:
    process = start(workers=2)
    wait_until(reporting(2))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert [t.user_attrs["tracker:ended"]["why"] for t in trials()] == ["interrupted"] * 2
    assert statuses(store) == ("KILLED", Counter(KILLED=2))
    finish(start, store)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigterm_is_ctrl_c(workers: int, start: Start, store: Store) -> None:
    process = start(workers=workers)
    wait_until(reporting(workers))
    process.terminate()
    assert process.wait(60) != 0
    assert statuses(store) == ("KILLED", Counter(KILLED=workers))
    finish(start, store)


def test_a_second_ctrl_c_ends_them_at_once(start: Start, store: Store) -> None:
    process = start(workers=2)
    wait_until(reporting(2))
    for worker in children(process, "spawn_main"):
        worker.suspend()  # it will not end by itself
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert [t.user_attrs["tracker:ended"]["why"] for t in trials()] == ["interrupted"] * 2
    assert statuses(store) == ("KILLED", Counter(KILLED=2))
    finish(start, store)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_terminal_s_signal_while_processes_still_start_is_left_to_the_search(
    number: signal.Signals, start: Start, store: Store
) -> None:
    with Path("errors").open("wb") as errors:
        process = start(workers=2, start_new_session=True, stderr=errors)
    for what in ("keeper_process", "spawn_main"):
        wait_until(lambda what=what: bool(children(process, what)))  # type: ignore[misc]
    os.killpg(process.pid, number)
    assert process.wait(60) != 0
    assert Path("errors").read_text().count("Traceback") == 1  # the search's own
    assert statuses(store) == ("KILLED", Counter())
    finish(start, store)


def test_a_worker_that_was_stopped_too_long_gives_its_trial_up_and_goes_on(
    start: Start, store: Store
) -> None:
    process = start(workers=2, grace=3.0)
    wait_until(reporting(2))
    late = children(process, "spawn_main")[0]
    late.suspend()
    wait_until(lambda: any(t.state == TrialState.FAIL for t in trials()))
    wait_until(reporting(2))  # a new worker has its place
    late.resume()
    Path("go").touch()
    assert process.wait(120) == 0
    assert Counter(t.state.name for t in trials()) == {"COMPLETE": 4, "FAIL": 1}
    assert statuses(store) == ("FINISHED", Counter(FINISHED=4, FAILED=1))


def test_a_search_that_was_stopped_too_long_gives_its_trial_up(start: Start, store: Store) -> None:
    late = start(grace=3.0)
    wait_until(reporting(1))
    psutil.Process(late.pid).suspend()
    other = start(grace=3.0)
    wait_until(lambda: any(t.state == TrialState.FAIL for t in trials()))
    psutil.Process(late.pid).resume()
    Path("go").touch()
    assert other.wait(120) == 0
    assert late.wait(120) == 0
    found = trials()
    done = Counter(t.user_attrs[SLOT] for t in found if t.state == TrialState.COMPLETE)
    assert done == dict.fromkeys(range(4), 1)
    status, runs = statuses(store)
    assert status == "FINISHED"
    assert runs["FINISHED"] == 4
    assert sum(runs.values()) == len(found)


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_searches_that_share_a_storage_share_the_budget(
    kind: str, start: Start, store: Store, request: pytest.FixtureRequest
) -> None:
    url = JOURNAL if kind == "journal" else request.getfixturevalue("database")
    Path("go").touch()
    searches = [start(url, workers=workers, points=24) for workers in (1, 1, 2)]
    assert [process.wait(180) for process in searches] == [0, 0, 0]
    found = trials(url)
    assert Counter(t.user_attrs[SLOT] for t in found) == dict.fromkeys(range(24), 1)
    assert {t.state for t in found} == {TrialState.COMPLETE}
    assert statuses(store) == ("FINISHED", Counter(FINISHED=24))


def test_a_database_that_is_gone_for_half_a_minute_costs_no_trial(
    start: Start, store: Store, database: str, postgres: PostgresServer
) -> None:
    process = start(database, workers=2, grace=60.0)
    wait_until(reporting(2, database))
    postgres.stop("immediate")
    Path("go0").touch()  # one ends meanwhile
    time.sleep(30.0)
    assert process.poll() is None
    postgres.start()
    Path("go").touch()
    assert process.wait(120) == 0
    found = trials(database)
    assert [t.state for t in found] == [TrialState.COMPLETE] * 4
    assert statuses(store) == ("FINISHED", Counter(FINISHED=4))


def test_reap_cleans_up_after_a_machine_that_was_lost(start: Start, store: Store) -> None:
    process = start(workers=2, grace=3.0)
    wait_until(reporting(2))
    wait_until(lambda: statuses(store)[1] == Counter(RUNNING=2))
    family = psutil.Process(process.pid).children(recursive=True)
    for member in (psutil.Process(process.pid), *family):
        member.kill()
    process.wait()
    storage = Storage(JOURNAL)
    record = load(storage, "study")
    attrs = storage.optuna.get_study_user_attrs(record.study_id)
    for name, info in attrs.items():
        if name.startswith(PREFIX):  # its machine was another one
            elsewhere = {**info, "place": "another machine"}
            storage.optuna.set_study_user_attr(record.study_id, name, elsewhere)
    assert {t.state for t in trials()} == {TrialState.RUNNING}
    command = [sys.executable, "-m", "studies", "reap", "--study", "study", "--grace-seconds", "2"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "2 trials were lost" in done.stdout
    assert {t.state for t in trials()} == {TrialState.FAIL}
    assert statuses(store) == ("FAILED", Counter(FAILED=2))
    finish(start, store)


def test_reap_leaves_a_search_alone_that_lives(start: Start, store: Store) -> None:
    process = start(grace=6.0)
    wait_until(reporting(1))
    storage = Storage(JOURNAL)
    try:
        assert reap_study(storage, load(storage, "study"), grace=0.5) == []
    finally:
        storage.close()
    Path("go").touch()
    assert process.wait(120) == 0
    assert Counter(t.state.name for t in trials()) == {"COMPLETE": 4}


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


def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(
    workdir: Path, store: Store
) -> None:
    (workdir / "training.py").write_text(TRAINING)
    environment = {
        **os.environ,
        "TRACKER_INLINE": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    weights = []
    for name in ("whole", "study"):
        if name == "study":
            Path("kill").touch()
            Path("epochs").unlink()
        command = [sys.executable, "training.py", name, JOURNAL]
        assert subprocess.run(command, env=environment, check=False).returncode == 0
        weights.append([torch.load(f"weights-{lr}.pt") for lr in (0.1, 0.01)])
    assert Counter(trial.state.name for trial in trials()) == {"COMPLETE": 2, "FAIL": 1}
    assert max(Counter(Path("epochs").read_text().splitlines()).values()) <= 2
    assert len(Path("epochs").read_text().splitlines()) <= 2 * 4 + 1
    for first, second in zip(*weights, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
