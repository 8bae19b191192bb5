"""Names that MLflow refuses: found early, and renamed on request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name, _validate_param_name, _validate_tag_name

from models import find
from models.recipe import Source
from studies import training
from tests.helpers import Store
from tracker import ArgumentError, Keep, RunManager, start_run
from tracker.validation import Renamer

REFUSED = ["AR@100", "top5%", "a//b", "../up", "/abs", "a/", "x" * 251, "tab\t", "f1(macro)"]


def test_names_are_renamed_in_metrics_params_and_tags(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    params = {name: str(number) for number, name in enumerate(REFUSED)}
    with start_run(rename=True, params=params, tags=params) as run:
        for step in range(3):
            run.log_metrics({name: float(number) for number, name in enumerate(REFUSED)}, step)
    found = store.run()
    stored = ["AR_at_100", "top5_", "a/b", "__/up", "abs", "a", "x" * 250, "tab_", "f1_macro_"]
    assert found.data.metrics == {name: float(number) for number, name in enumerate(stored)}
    assert found.data.params == {name: str(number) for number, name in enumerate(stored)}
    assert found.data.params.items() <= found.data.tags.items()
    assert caplog.text.count("The metric 'AR@100' is stored as 'AR_at_100'.") == 1
    assert caplog.text.count("The param 'AR@100' is stored as 'AR_at_100'.") == 1


def test_names_that_become_the_same_are_numbered(store: Store) -> None:
    with start_run(rename=True) as run:
        for step in range(2):
            run.log_metrics({"a@b": 1.0, "a_at_b": 2.0, "a_at_b!": 3.0, "a_at_b?": 4.0}, step)
    metrics = {"a_at_b": 1.0, "a_at_b_2": 2.0, "a_at_b_": 3.0, "a_at_b__2": 4.0}
    assert store.run().data.metrics == metrics


@given(st.lists(st.text() | st.text("ab@/._?", max_size=6), max_size=30))
@example(["a" * 260, "a" * 261, "a" * 249 + "//", "a/" * 130, "a/" * 131])
@example(["..", "../..", "...", "a/..", "a/../b", "a/...b"])
def test_a_renamed_name_is_allowed_and_unique(names: list[str]) -> None:
    stored: dict[str, str] = {}
    name_of = Renamer()
    for name in names:
        try:
            stored[name] = name_of(name, "metric")
        except ArgumentError:
            assert not name.strip("/.") or set(name) <= {"/", "."}
            continue
        for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
            validate(stored[name])
        assert name_of(name, "metric") == stored[name]
    assert len(set(stored.values())) == len(stored)


def test_a_name_that_cannot_be_stored_says_what_renames_it(store: Store) -> None:
    with start_run() as run:
        for log in (run.log_metrics, run.log_params, run.set_tags):
            with pytest.raises(ArgumentError, match="rename=True would store it as 'AR_at_100'"):
                log({"AR@100": 1.0})
    for arguments in ({"params": {"AR@100": 1}}, {"tags": {"AR@100": 1}}):
        with pytest.raises(ArgumentError, match="'AR@100' is not allowed"):
            start_run(**arguments)
    assert len(store.runs()) == 1


def epoch(manager: RunManager, metrics: dict[str, float]) -> None:
    manager.begin_epoch()
    manager.track_loss(torch.tensor(1.0), 1)
    manager.end_epoch(metrics)


def test_a_manager_renames_in_mlflow_and_keeps_the_names_in_its_tables(store: Store) -> None:
    network, loader = torch.nn.Linear(1, 1), [torch.rand(1, 1)]
    settings: dict[str, Any] = {"rename": True, "model": False, "histograms": False}
    with RunManager(checkpoints=Keep(best="AR@100", mode="max"), **settings) as manager:
        manager.begin_run({"lr@0": 0.1}, network, loader)
        for value in (0.75, 0.5, 0.25):
            epoch(manager, {"AR@100": value})
            manager.save_checkpoint()
        manager.end_run()
        manager.save("results")
    run = store.run()
    assert store.history(run, "AR_at_100") == [(1, 0.75), (2, 0.5), (3, 0.25)]
    assert run.data.params["lr_at_0"] == "0.1"
    assert list(pd.read_csv("results.csv")["AR@100"]) == [0.75, 0.5, 0.25]
    kept = {path.split("/")[1] for path in store.artifacts(run, "checkpoints")}
    assert kept == {"00000001", "00000003"}


def test_a_manager_renames_in_a_run_that_it_joins(store: Store) -> None:
    with start_run() as run:
        manager = RunManager(run=run, rename=True, model=False, histograms=False)
        manager.begin_run({"lr@0": 0.1}, torch.nn.Linear(1, 1), [torch.rand(1, 1)])
        epoch(manager, {"AR@100": 0.5})
        manager.end_run()
    assert store.run().data.metrics["AR_at_100"] == 0.5


def test_what_is_known_at_the_beginning_is_refused_there(store: Store) -> None:
    with pytest.raises(ArgumentError, match="metric name 'AR@100' is not allowed"):
        RunManager(checkpoints=Keep(best="AR@100"))
    recipe = find("fashion-mlp")
    params = recipe.defaults()
    task = training.Task.of("fashion-mlp", params, Source("digits", "nowhere", 0), None)
    task = replace(task, recipe=replace(recipe, metrics={"AR@100": "maximize"}))
    with RunManager() as manager:
        with pytest.raises(ArgumentError, match="metric name 'AR@100' is not allowed"):
            training.begin(
                manager, task, epochs=1, device=torch.device("cpu"), params={}, final=False
            )
        assert manager.run_count == 0
    assert store.runs() == []
