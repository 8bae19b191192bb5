"""SlotSampler: suggestions by a trial's number, and a budget that processes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from tests.programs import ForkServer
from tracker import ArgumentError, SlotSampler, Study


def objective(trial: Any) -> float:
    return float(trial.suggest_int("n", 0, 9)) + (trial.suggest_float("x", -1, 1) - 0.3) ** 2


def params(study: optuna.Study) -> list[dict[str, Any]]:
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("sampler", [RandomSampler(), RandomSampler, "random", "qmc"])
def test_suggestions_follow_from_the_number_with_any_threads(sampler: Any) -> None:
    studies = [optuna.create_study(sampler=SlotSampler(sampler, seed=3)) for _ in range(3)]
    studies[0].optimize(objective, n_trials=8)
    studies[1].optimize(objective, n_trials=8, n_jobs=2)
    for _ in range(8):
        studies[2].optimize(objective, n_trials=1)
    assert params(studies[0]) == params(studies[1]) == params(studies[2])
    other = optuna.create_study(sampler=SlotSampler(sampler, seed=4))
    other.optimize(objective, n_trials=8)
    assert params(other) != params(studies[0])


@pytest.mark.parametrize("sampler", [TPESampler(n_startup_trials=3), CmaEsSampler(), "tpe"])
def test_samplers_that_learn_suggest_what_they_do_in_a_study_of_ours(
    sampler: Any, tracking_uri: str
) -> None:
    study = optuna.create_study(sampler=SlotSampler(sampler, seed=5))
    study.optimize(objective, n_trials=8)
    ours = Study("study", objective, sampler=sampler, trials=8, seed=5, offline=True).run()
    assert params(study) == params(ours)


def test_the_budget_ends_the_study_and_is_used_up_once() -> None:
    study = optuna.create_study(
        sampler=SlotSampler(trials=5), pruner=optuna.pruners.HyperbandPruner()
    )
    study.optimize(objective, n_trials=3)
    study.optimize(objective, n_jobs=2)
    assert [trial.number for trial in study.trials if trial.state == TrialState.COMPLETE] == [
        *range(5)
    ]
    study.optimize(objective)  # the one trial that `optimize` begins has no place
    assert {trial.state for trial in study.trials[5:]} <= {TrialState.PRUNED}
    assert study.ask().number == len(study.trials) - 1


PROGRAM = """
import sys, optuna
from tracker import SlotSampler

def objective(trial):
    return trial.suggest_float("x", 0, 1)

sampler = SlotSampler("random", seed=1, trials=20)
optuna.load_study(study_name="study", storage=sys.argv[1], sampler=sampler).optimize(objective)
"""


def test_processes_share_a_budget(trainers: ForkServer, workdir: Path) -> None:
    storage = f"sqlite:///{workdir / 'optuna.db'}"
    study = optuna.create_study(study_name="study", storage=storage)
    programs = [trainers.start(PROGRAM, storage, folder=workdir) for _ in range(2)]
    assert [program.wait() for program in programs] == [0, 0], programs[0].output()
    alone = optuna.create_study(sampler=SlotSampler("random", seed=1, trials=20))
    alone.optimize(lambda trial: trial.suggest_float("x", 0, 1))
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert [trial.params for trial in complete] == params(alone)
    assert len(complete) == 20
    assert {trial.state for trial in study.trials[20:]} <= {TrialState.PRUNED}


@pytest.mark.parametrize(
    "settings",
    [
        *({"seed": -1}, {"seed": 1.5}, {"trials": 0}, {"trials": True}),
        *({"sampler": "grid"}, {"sampler": "unknown"}, {"sampler": 5}),
    ],
)
def test_a_wrong_argument_is_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(settings))):
        SlotSampler(**settings)
