"""Each example runs unchanged, and its run has metrics and models that load."""

from __future__ import annotations

import re
import runpy
import sys
from typing import NamedTuple

import mlflow.pytorch
import pytest
import torch

from tests.helpers import Store
from tests.programs import ROOT

EXAMPLES = ROOT / "examples"


class Example(NamedTuple):
    """How to run an example quickly, and what it leaves."""

    experiment: str
    arguments: str
    metrics: set[str]
    models: dict[str, tuple[tuple[int, ...], ...]]
    """The shapes of the inputs of each model; those of tokens have two dimensions or fewer."""


CASES = {
    "mnist": Example(
        "mnist",
        "--epochs 1",
        {"batch_loss", "test_loss", "accuracy"},
        {"model": ((3, 1, 8, 8),)},
    ),
    "vae": Example("vae", "--epochs 1", {"loss"}, {"model": ((3, 1, 8, 8),)}),
    "dcgan": Example(
        "dcgan",
        "--epochs 1 --batch-size 256",
        {"loss_d", "loss_g"},
        {"generator": ((3, 16, 1, 1),), "discriminator": ((3, 1, 8, 8),)},
    ),
    "siamese": Example(
        "siamese", "--epochs 1", {"loss", "accuracy"}, {"model": ((3, 1, 8, 8), (3, 1, 8, 8))}
    ),
    "word_language_model": Example(
        "word language model",
        "--epochs 1 --batch-size 64 --size 8",
        {"loss", "perplexity"},
        {"model": ((20, 64), (2, 64, 8), (2, 64, 8))},
    ),
    "nanogpt": Example("nanogpt", "--steps 3", {"loss"}, {"model": ((3, 64),)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_example_is_tracked_and_its_models_can_be_loaded(
    name: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *case.arguments.split()])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")

    (run,) = store.runs(case.experiment)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"]
    assert run.data.metrics.keys() >= case.metrics
    for model, shapes in case.models.items():
        loaded = mlflow.pytorch.load_model(f"runs:/{run.info.run_id}/{model}")
        inputs = [
            torch.zeros(shape, dtype=torch.long if len(shape) == 2 else torch.float)
            for shape in shapes
        ]
        if len(inputs) == 3:  # the scores, and the state of an LSTM as a tuple
            inputs = [inputs[0], tuple(inputs[1:])]
        loaded(*inputs)


@pytest.mark.parametrize("name", CASES)
def test_an_example_has_as_many_added_lines_as_its_table_says(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    added = [line for line in lines if re.search(r"\btracker\b", line)]
    table = (EXAMPLES / "README.md").read_text()
    row = re.search(rf"^\| \[{name}\.py\]\({name}\.py\) \| .* \| (\d+) \| (\d+) \|$", table, re.M)
    assert row is not None
    ours, theirs = map(int, row.groups())
    assert len(added) == ours <= theirs


def test_the_example_of_optuna_is_tracked_in_three_changed_lines(store: Store) -> None:
    path = EXAMPLES / "optuna_simple.py"
    assert len(re.findall(r"^.*\btracked\b.*$", path.read_text(), re.M)) <= 3
    runpy.run_path(str(path), run_name="__main__")

    study, *trials = sorted(
        store.runs("optuna simple"), key=lambda run: "mlflow.parentRunId" in run.data.tags
    )
    assert {run.info.status for run in (study, *trials)} == {"FINISHED"}
    assert len(trials) == 30
    for run in trials:
        assert run.data.tags["mlflow.parentRunId"] == study.info.run_id
        x, y = float(run.data.params["x"]), int(run.data.params["y"])
        assert run.data.metrics["objective"] == x**2 + y
