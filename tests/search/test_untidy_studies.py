"""Whatever a study or an objective hands over is taken or refused in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest

from tests.helpers import Store
from tracker import ArgumentError, Study
from tracker.search.trial import Trial

REFUSED: list[tuple[str, Any]] = [
    ("name", "half of a character: \ud800"),
    ("name", 3),
    ("space", "abc"),
    ("space", {"a": ["x" * 6_001]}),
    ("sampler", []),
    ("direction", None),
    ("direction", 3),
    ("metric", None),
    ("metric", 3),
    ("register", 3),
    ("fixed", "abc"),
    ("storage", 3),
    ("grace_seconds", "60"),
    ("directory", 3),
]


def good(trial: Trial) -> float:
    return float(trial.params["a"])


@pytest.mark.parametrize(("argument", "value"), REFUSED)
def test_a_setting_of_a_wrong_type_is_refused_when_it_is_given(argument: str, value: Any) -> None:
    settings: dict[str, Any] = {"name": "s", "space": {"a": [1, 2]}, "sampler": "grid"}
    with pytest.raises(ArgumentError):
        Study(objective=good, **(settings | {argument: value}))


@pytest.mark.parametrize(
    "call",
    [
        lambda trial: trial.suggest_float("x@y", 0.0, 1.0),
        lambda trial: trial.suggest_float(3, 0.0, 1.0),
        lambda trial: trial.set_constraint("c@", 1.0),
        lambda trial: trial.set_constraint("c", "x"),
        lambda trial: trial.report("x", 1),
        lambda trial: trial.report(1.0, 0.5),
        lambda trial: trial.report(1.0, -1),
    ],
)
def test_a_mistake_of_the_objective_ends_its_run_and_leaves_nothing_behind(
    call: Any, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    study = Study("s", lambda trial: call(trial) or 1.0, space={"a": [1]}, sampler="grid")
    with pytest.raises(ArgumentError):
        study.run()
    assert {run.info.status for run in store.runs()} == {"FAILED"}
    assert caplog.messages == []


def test_numbers_of_numpy_are_steps_and_workers(store: Store) -> None:
    def objective(trial: Trial) -> float:
        trial.report(np.float32(1.0), np.int64(1))  # type: ignore[arg-type]
        return 1.0

    study = Study("s", objective, space={"a": [1]}, sampler="grid")
    (trial,) = study.run(workers=np.int64(1)).trials  # type: ignore[arg-type]
    assert trial.intermediate_values == {1: 1.0}
    assert trial.state == optuna.trial.TrialState.COMPLETE
