"""A trial as one of Optuna's: its properties and attributes, as MLflow and the tables show them."""

from __future__ import annotations

import io
import json
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from mlflow.entities import Run as MlflowRun
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, TrialState

from tests.helpers import Store
from tracker import Study, Trial
from tracker.search.cli import mirror_study
from tracker.search.storage import Storage
from tracker.search.stored_study import load
from tracker.search.tables import attribute_tags

ATTRIBUTES: dict[str, Any] = {
    "memo": "a text",
    "epochs": 3,
    "share": 0.5,
    "sizes": [1, {"a": None}],
    "AR@100": True,
    "api_token": "s3cret",
    "url": "http://me:s3cret@host/",
}
TAGS = {
    "user_attrs.memo": "a text",
    "user_attrs.epochs": "3",
    "user_attrs.share": "0.5",
    "user_attrs.sizes": '[1, {"a": null}]',
    "user_attrs.AR_at_100": "true",
    "user_attrs.api_token": "***",
    "user_attrs.url": "http://me:***@host/",
}


def children(store: Store) -> dict[int, MlflowRun]:
    runs = [run for run in store.runs() if "optuna.trial" in run.data.tags]
    return {int(run.data.tags["optuna.trial"]): run for run in runs}


def tags_of(run: MlflowRun) -> dict[str, str]:
    return {k: v for k, v in run.data.tags.items() if k.startswith("user_attrs.")}


def in_the_storage(trial: BaseTrial) -> optuna.trial.FrozenTrial:
    (stored,) = optuna.load_study(study_name="study", storage=Storage().optuna).trials
    assert stored.number == trial.number
    return stored


def test_a_trial_has_the_properties_of_optuna_s(tracking_uri: str) -> None:
    """They are what Optuna stores."""
    distributions = {
        "x": FloatDistribution(0.0, 1.0),
        "k": CategoricalDistribution([1, "a"]),
        "n": IntDistribution(1, 9, log=True),
        "u": FloatDistribution(0.0, 2.0),
        "l": FloatDistribution(0.1, 1.0, log=True),
        "d": FloatDistribution(0.0, 1.0, step=0.25),
    }

    def objective(trial: Trial) -> float:
        assert isinstance(trial, BaseTrial)
        assert trial.distributions == {k: distributions[k] for k in ("x", "k")}
        assert trial.user_attrs == {"memo": "before"}
        trial.suggest_int("n", 1, 9, log=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trial.suggest_uniform("u", 0.0, 2.0)
            trial.suggest_loguniform("l", 0.1, 1.0)
            trial.suggest_discrete_uniform("d", 0.0, 1.0, 0.25)
        trial.set_user_attr("epochs", np.int64(3))
        trial.set_constraint("size", -1.0)
        trial.params.clear()  # a copy, as in Optuna
        stored = in_the_storage(trial)
        assert trial.distributions == stored.distributions == distributions
        assert trial.params == stored.params
        assert trial.user_attrs == {"memo": "before", "epochs": 3}
        assert trial.user_attrs.items() <= stored.user_attrs.items()
        assert trial.system_attrs == {"fixed_params": {"x": 0.5}}
        assert trial.constraints == stored.constraints == {"size": -1.0}
        assert isinstance(trial.datetime_start, datetime)
        assert trial.datetime_start == stored.datetime_start
        assert trial.study.study_name == "study"
        assert trial.study.direction == StudyDirection.MAXIMIZE
        return trial.params["x"]

    space: Any = {"x": FloatDistribution(0.0, 1.0), "k": [1, "a"]}
    study = Study("study", objective, space=space, trials=1, direction="maximize", offline=True)
    study.enqueue_trial({"x": 0.5}, {"memo": "before"})
    (trial,) = study.run().trials
    assert trial.state == TrialState.COMPLETE, trial.user_attrs["tracker:ended"]


def test_the_directions_of_several_objectives(tracking_uri: str) -> None:
    def objective(trial: Trial) -> list[float]:
        assert trial.study.directions == [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE]
        assert trial.study.metric_names == ["a", "b"]
        with pytest.raises(RuntimeError, match=r"use study\.directions"):
            trial.study.direction  # noqa: B018
        with pytest.raises(ValueError, match="No trials are completed yet"):
            trial.study.best_trial  # noqa: B018
        return [1.0, 2.0]

    directions = ["minimize", "maximize"]
    Study("study", objective, trials=1, direction=directions, metric=["a", "b"], offline=True).run()


def test_user_attributes_are_tags_and_columns_without_secrets(store: Store, workdir: Path) -> None:
    def objective(trial: Trial) -> float:
        if trial.number == 0:
            for name, value in ATTRIBUTES.items():
                trial.set_user_attr(name, value)
        else:
            trial.set_user_attr("late", "x")
        return 1.0

    study = Study("study", objective, trials=3)
    study.enqueue_trial({}, {"late": "before"})
    study.enqueue_trial({}, {"early": [1]})
    assert ATTRIBUTES.items() <= study.run().trials[0].user_attrs.items()
    runs = children(store)
    assert tags_of(runs[0]) == {**TAGS, "user_attrs.late": "before"}
    assert tags_of(runs[1]) == {"user_attrs.early": "[1]", "user_attrs.late": "x"}
    assert tags_of(runs[2]) == {"user_attrs.late": "x"}
    (parent,) = [run for run in store.runs() if "best_objective" in run.data.metrics]
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)), dtype=str)
    for name, text in TAGS.items():
        assert table[name].fillna("").tolist() == [text, "", ""]
    assert table["user_attrs.late"].tolist() == ["before", "x", "x"]
    assert not any(column.startswith("user_attrs.tracker") for column in table.columns)
    assert "s3cret" not in store.text(parent, "trials.json", workdir)


def test_the_mirror_restores_attributes_and_changes_none(store: Store) -> None:
    def objective(trial: Trial) -> float:
        for name, value in ATTRIBUTES.items():
            trial.set_user_attr(name, value)
        return 1.0

    Study("study", objective, trials=2).run()
    storage = Storage()
    record = load(storage, "study")
    assert mirror_study(storage, record, None, Path(".tracker"))[0] == 0
    runs = children(store)
    store.client.delete_tag(runs[0].info.run_id, "user_attrs.memo")
    store.client.set_tag(runs[0].info.run_id, "user_attrs.epochs", "mine")
    store.client.delete_run(runs[1].info.run_id)
    assert mirror_study(storage, record, None, Path(".tracker"))[0] > 0
    runs = children(store)
    assert tags_of(runs[0]) == {**TAGS, "user_attrs.epochs": "mine"}
    assert tags_of(runs[1]) == TAGS
    storage.close()


def test_long_and_hostile_attributes_become_tags_that_mlflow_takes(store: Store) -> None:
    attributes = {"long": "x" * 50_000, "a//../b": "y", "\ud800": "\ud800", "": 1, "é" * 300: 2}

    def objective(trial: Trial) -> float:
        for name, value in attributes.items():
            trial.run.set_tags(attribute_tags({name: value}))
        return 1.0

    Study("study", objective, trials=1).run()
    (run,) = children(store).values()
    assert run.info.status == "FINISHED"
    assert run.data.tags["user_attrs.long"].startswith("xxx")
    assert len(tags_of(run)) >= 4
    assert json.loads(run.data.tags["user_attrs." + "é" * 239]) == 2
