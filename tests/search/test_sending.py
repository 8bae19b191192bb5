"""Objectives of notebooks, lambdas and closures run in workers; what cannot is refused."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from optuna.trial import TrialState

from tests.helpers import Store
from tests.search.conftest import Start
from tracker import ArgumentError, Study, Trial
from tracker.cli import main
from tracker.search.cli import mirror_study
from tracker.search.policy import packed, unpacked
from tracker.search.sending import dumps, pack
from tracker.search.storage import Storage
from tracker.search.stored_study import load

NUMBER = 7


def plain(trial: Any, number: int = 0) -> float:
    return float(number)


class Method:
    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, trial: Any) -> float:
        return float(self.number)


def closure(number: int) -> Callable[[Any], float]:
    def inner(trial: Any) -> float:
        return float(number)

    return inner


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (plain, 0),
        (partial(plain, number=3), 3),
        (Method(4), 4),
        (Method(5).__call__, 5),
        (closure(6), 6),
        (lambda trial: NUMBER, 7),
        (partial(closure(8)), 8),
        (partial(lambda trial, number: number, number=9), 9),
    ],
)
def test_any_function_arrives(objective: Any, value: float) -> None:
    received, catch = pickle.loads(pack(objective, (KeyError,)))
    assert received(None) == value
    assert catch == (KeyError,)


def test_what_a_module_has_is_sent_by_name() -> None:
    assert pickle.loads(dumps(plain)) is plain


def test_an_exception_of_a_local_class_arrives_as_that_class() -> None:
    class LocalError(Exception):
        pass

    assert type(unpacked(*packed(LocalError("why")))) is LocalError


LOCK = threading.Lock()


@pytest.mark.parametrize(
    "objective",
    [partial(plain, number=LOCK), lambda trial: LOCK, (lambda lock: lambda t: lock)(LOCK)],
)
def test_what_cannot_be_sent_is_refused_before_anything_is_created(
    objective: Any, workdir: Path
) -> None:
    study = Study("study", objective, sampler="random", trials=1)
    with pytest.raises(ArgumentError, match=r"another process \(cannot pickle .*lock") as raised:
        study.run(workers=2)
    assert "\n" not in str(raised.value)
    assert list(workdir.iterdir()) == []


def test_workers_run_a_closure_and_know_its_exceptions(tracking_uri: str) -> None:
    class LocalError(Exception):
        pass

    us = os.getpid()

    def objective(trial: Trial) -> float:
        if trial.params["x"] == 2:
            raise LocalError
        return float(os.getpid() != us)

    study = Study("study", objective, space={"x": [1, 2, 3]}, sampler="grid", offline=True)
    done = study.run(workers=2, catch=LocalError).trials
    assert [trial.value for trial in done] == [1.0, None, 1.0]
    assert done[1].state == TrialState.FAIL


def fails() -> None:
    raise OSError("not on this machine")


class Unloadable:
    """Is sent, and cannot be loaded."""

    def __call__(self, trial: Trial) -> float:
        return 1.0

    def __reduce__(self) -> Any:
        return fails, ()


def test_an_objective_that_a_worker_cannot_load_ends_the_study_with_its_traceback(
    tracking_uri: str,
) -> None:
    study = Study("study", Unloadable(), sampler="random", trials=2, offline=True)
    with pytest.raises(OSError, match="not on this machine") as raised:
        study.run(workers=2)
    assert "in fails" in raised.value.__notes__[0]
    assert study.trials == []


GUARDED = """
from tracker import Study

if __name__ == "__main__":
    def objective(trial):
        return trial.params["x"]

    study = Study("s", objective, space={"x": [1, 2]}, sampler="grid", offline=True)
    assert study.run(workers=2).best_value == 1
"""


def test_a_script_may_define_its_objective_in_the_block_that_workers_skip(start: Start) -> None:
    program = start(GUARDED)
    assert program.wait() == 0, program.output()


CELLS = [
    """
import os
from tracker import Study

OFFSET = 10

class OddError(Exception):
    pass

def shifted(x):
    return x + OFFSET

def objective(trial):
    if trial.params["x"] == 3:
        raise OddError("odd")
    assert os.getpid() != PID
    return shifted(trial.params["x"])

PID = os.getpid()
""",
    """
study = Study("s", objective, space={"x": [1, 2, 3, 4]}, sampler="grid", offline=True)
study.run(workers=2, catch=OddError)
""",
    """
try:
    Study("t", objective, space={"x": [3]}, sampler="grid", offline=True).run(workers=2, catch=())
except OddError as error:
    print("raised", error)
""",
]


def test_a_notebook_searches_with_two_workers_and_an_objective_of_a_cell(
    store: Store, workdir: Path
) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=240).execute(cwd=str(workdir))
    printed = [o.text for o in notebook.cells[2].outputs if o.get("name") == "stdout"]
    assert printed == ["raised odd\n"]

    with closing(Storage()) as storage:
        mirror_study(storage, load(storage, "s"), None, Path(".tracker"))
        mirror_study(storage, load(storage, "t"), None, Path(".tracker"))
    assert main(["sync"]) == 0
    runs = [run for run in store.runs() if "optuna.trial" in run.data.tags]
    values = sorted(r.data.metrics["objective"] for r in runs if r.info.status == "FINISHED")
    assert values == [11.0, 12.0, 14.0]
