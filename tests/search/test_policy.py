"""Which exceptions end a study, and that they arrive with their traceback."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.helpers import Store
from tracker import ArgumentError, Study, Trial
from tracker.errors import MissingError, TrackerError
from tracker.search.plan import ENDED
from tracker.search.policy import packed, unpacked


def failing(error: Exception | None, at: tuple[int, ...]) -> Any:
    """An objective that raises in the trials with these numbers."""

    def objective(trial: Trial) -> float:
        if error is not None and trial.number in at:
            raise error
        return float(trial.number)

    return objective


def states(study: Study) -> dict[str, int]:
    return dict(Counter(trial.state.name for trial in study.trials))


class CustomError(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "at", "catch", "ends_at"),
    [
        # By default: mistakes of the program in the first trials, until one has ended well.
        (ImportError("no"), (0, 1), None, 0),
        (MissingError("no"), (0, 1), None, 0),
        (TypeError("no"), (0,), None, 0),
        (NameError("no"), (0,), None, 0),
        (AttributeError("no"), (0,), None, 0),
        (TypeError("no"), (1,), None, None),
        (TypeError("no"), (3, 4), None, None),
        (RuntimeError("no"), (0, 1, 2), None, None),
        (ValueError("no"), (0, 1, 2), None, None),
        (ArgumentError("no"), (3,), None, 3),
        # As in Optuna.
        (RuntimeError("no"), (2,), (), 2),
        (CustomError("no"), (2,), (KeyError, RuntimeError), 2),
        (CustomError("no"), (0, 1, 2), ValueError, None),
        (CustomError("no"), (0, 1, 2), [KeyError, CustomError], None),
        (TypeError("no"), (0, 1), (Exception,), None),
        (ArgumentError("no"), (0, 3), Exception, None),
        (optuna.TrialPruned(), (0, 2), (), None),
    ],
)
def test_an_exception_ends_the_study_or_fails_its_trial(
    error: Exception, at: tuple[int, ...], catch: Any, ends_at: int | None, tracking_uri: str
) -> None:
    error.__dict__.pop("__notes__", None)
    study = Study("study", failing(error, at), sampler="random", trials=5, offline=True)
    if ends_at is None:
        study.run(catch=catch)
        why = "PRUNED" if isinstance(error, optuna.TrialPruned) else "FAIL"
        assert states(study) == {why: len(at), "COMPLETE": 5 - len(at)}
        return
    with pytest.raises(type(error), match="no") as raised:
        study.run(catch=catch)
    assert raised.value is error
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * ends_at + ["FAIL"]
    # The mistake is corrected: it has not cost anything of the budget.
    Study("study", failing(None, ()), sampler="random", trials=5, offline=True).run(resume=True)
    assert states(study) == {"FAIL": 1, "COMPLETE": 5}


def test_the_first_trials_are_those_of_this_run(tracking_uri: str) -> None:
    Study("study", failing(None, ()), sampler="random", trials=4, offline=True).run()
    study = Study(
        "study", failing(TypeError("new"), (4,)), sampler="random", trials=6, offline=True
    )
    with pytest.raises(TypeError, match="new"):
        study.run(resume=True)
    assert states(study) == {"COMPLETE": 4, "FAIL": 1}


def test_a_mistake_is_not_retried_and_says_what_to_do(store: Store) -> None:
    study = Study("study", failing(TypeError("no"), (0,)), sampler="random", trials=5, retries=3)
    with pytest.raises(TypeError) as raised:
        study.run()
    assert raised.value.__notes__ == [
        "Trial 0 ended the study, as every trial would probably meet this error; with "
        "run(catch=TypeError) it only fails its trial."
    ]
    assert raised.traceback[-1].name == "objective"
    runs = store.runs()
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]
    assert all("TypeError: no" in run.data.tags["tracker.failure"] for run in runs)
    assert all("in objective" in run.data.tags["tracker.failure"] for run in runs)


@pytest.mark.parametrize("catch", [3, "ValueError", [ValueError, 3], KeyboardInterrupt])
def test_what_is_caught_must_be_exceptions(catch: Any) -> None:
    study = Study("study", failing(None, ()), trials=1)
    with pytest.raises(ArgumentError, match=r"catch=.* it must be a subclass of Exception"):
        study.run(catch=catch)


# -- workers ---------------------------------------------------------------------------------------


class FragileError(Exception):
    """Cannot be made from its arguments, as unpickling does."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


@pytest.mark.parametrize(
    ("error", "kind"), [(KeyError("k"), KeyError), (FragileError(1, 2), TrackerError)]
)
def test_an_exception_of_a_worker_arrives(error: Exception, kind: type[Exception]) -> None:
    try:
        raise error
    except Exception as caught:  # noqa: BLE001 - as a worker does
        arrived = unpacked(*packed(caught))
    assert type(arrived) is kind
    if kind is KeyError:
        assert "test_an_exception_of_a_worker_arrives" in arrived.__notes__[0]
    else:
        assert str(arrived) == "FragileError: 1 and 2"


def misspelled(trial: Trial) -> float:
    return trial.sugest_float("x", 0, 1)  # type: ignore[attr-defined, no-any-return]


def test_a_mistake_in_a_worker_ends_the_study_with_its_traceback(
    tracking_uri: str, workdir: Path
) -> None:
    study = Study("study", misspelled, sampler="random", trials=50, offline=True)
    with pytest.raises(AttributeError, match="sugest_float") as raised:
        study.run(workers=2)
    first, second = raised.value.__notes__
    assert "with run(catch=AttributeError)" in first
    assert 'return trial.sugest_float("x", 0, 1)' in second
    assert len(study.trials) <= 3
    assert all(trial.user_attrs[ENDED]["why"] != "failed" for trial in study.trials)
