"""What is logged in a process other than the one that began a run: refused with what to do."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.helpers import Store
from tests.programs import ForkServer
from tracker import ArgumentError, RunManager, Study, Trial, start_run

SENDERS: dict[str, Callable[[Any], object]] = {
    "pickle": pickle.dumps,
    "spawn": ForkingPickler.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "in an object": lambda tracked: pickle.dumps(Logging(tracked)),
    "in a network": lambda tracked: copy.deepcopy(Holder(tracked)),
}
RUN = "a Run cannot be copied or sent to another process; send its run_id, and begin a run of its "
RUN += "own there with start_run(parent=run_id)."
MANAGER = "a RunManager cannot be copied or sent to another process; make one there, with "
MANAGER += "RunManager(parent=run_id)."
TRIAL = "a Trial cannot be copied or sent to another process; send its params, and report in the "
TRIAL += "objective's own process."


class Logging(Dataset[Any]):
    """A data set whose workers would log."""

    def __init__(self, tracked: Any) -> None:
        self.tracked = tracked


class Holder(nn.Module):
    """A network that logs by itself."""

    def __init__(self, tracked: Any) -> None:
        super().__init__()
        self.tracked = tracked


@pytest.mark.parametrize("way", SENDERS)
def test_what_must_stay_in_its_process_says_what_to_send_instead(way: str, store: Store) -> None:
    send = SENDERS[way]

    def objective(trial: Trial) -> float:
        for tracked, message in ((trial, TRIAL), (trial.run, RUN), (trial.manager(), MANAGER)):
            with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
                send(tracked)
        return 1.0

    with start_run() as run, RunManager(model=False) as manager:
        for _ in range(2):
            for tracked, message in ((run, RUN), (manager, MANAGER)):
                with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
                    send(tracked)
            manager.begin_run({}, nn.Linear(2, 1), [])
    Study("s", objective, trials=1, sampler="random", experiment="s").run()

    assert [run.info.status for run in store.runs("s")] == ["FINISHED"] * 2


def _objective(run: Any, trial: Trial) -> float:
    return 1.0


def test_an_objective_that_holds_a_run_is_refused_before_its_study_begins(store: Store) -> None:
    with start_run() as run:
        study = Study("s", partial(_objective, run), trials=1, experiment="s")
        with pytest.raises(ArgumentError, match=r"cannot run in another process \(a Run cannot be"):
            study.run(workers=2)

    assert store.runs("s") == []


def test_a_study_can_be_sent() -> None:
    study = Study("s", torch.nn.functional.relu, trials=1)

    assert isinstance(pickle.loads(pickle.dumps(study)), Study)


FORK = """
import os, sys
from torch import nn
from tracker import CallOrderError, RunManager, start_run

run = start_run(name="parent")
manager = RunManager(model=False)
manager.begin_run({"process": "parent"}, nn.Linear(2, 1), [])
manager.begin_epoch()
manager.track_loss(1.0, 2)
sys.stdout.flush()
child = os.fork()
if child == 0:
    calls = {
        "log_metrics": lambda: run.log_metrics({"x": 1.0}),
        "log_text": lambda: run.log_text("text", "a.txt"),
        "begin_epoch": manager.begin_epoch,
        "end_epoch": manager.end_epoch,
        "save_checkpoint": manager.save_checkpoint,
        "end_run": manager.end_run,
        "run": lambda: manager.run,
    }
    for name, call in calls.items():
        try:
            call()
        except CallOrderError as error:
            print(name, error)
    run.end()
    with start_run(name="child", parent=run):
        pass
    manager.begin_run({"process": "child"}, nn.Linear(2, 1), [])
    manager.begin_epoch()
    manager.track_loss(3.0, 2)
    manager.end_epoch()
    manager.end_run()
    manager.close()
    sys.exit()
os.waitpid(child, 0)
manager.end_epoch()
manager.end_run()
run.end()
manager.close()
"""


def test_a_forked_process_is_told_to_begin_its_own_run_and_can(
    deliverers: ForkServer, store: Store
) -> None:
    program = deliverers.run(FORK)

    assert program.wait() == 0, program.output()
    lines = program.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        *("log_metrics", "log_text", "begin_epoch", "end_epoch", "save_checkpoint"),
        *("end_run", "run"),
    ]
    for line in lines:
        assert "forked process" in line
        assert ("start_run(parent=run)" in line) or ("call begin_run() here first" in line)
    runs = {run.info.run_name: run for run in store.runs()}
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ["parent", "child", "process=parent", "process=child"], "FINISHED"
    )
    assert runs["process=parent"].data.metrics["loss"] == 1.0
    assert runs["process=child"].data.metrics["loss"] == 3.0
    assert runs["child"].data.tags["mlflow.parentRunId"] == runs["parent"].info.run_id
