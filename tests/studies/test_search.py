"""`python -m studies.fashion_mnist`, `python -m studies`: studies from the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from studies.fashion_mnist import main
from studies.search import _without_resume, parse
from tests.helpers import Store
from tracker.cli import main as upkeep
from tracker.search.record import load
from tracker.search.storage import Storage

QUICK = ["--dataset", "digits", "--epochs", "1"]


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says of a mistake: one line, and an exit code of 2."""
    capsys.readouterr()  # what fixtures said
    try:
        code = main([*QUICK, *arguments])
    except SystemExit as exited:
        code = int(str(exited.code))
    said = capsys.readouterr().err
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sampler", "annealing"], "sampler='annealing' is not known"),
        (["--pruner", "luck"], "pruner='luck' is not known"),
        (["--trials", "0"], "argument --trials: '0' is not allowed"),
        (["--workers", "0"], "argument --workers: '0' is not allowed"),
        (["--lr", "0:0.1:log"], "argument --lr: '0' is not allowed; it must be a number above 0"),
        (["--lr", "0.1:0.01"], "LOW must not be above HIGH"),
        (["--lr", ""], "argument --lr: '' is not allowed"),
        (["--lr", "0.1:0.2:linear"], "it must be LOW:HIGH[:log]"),
        (["--sampler", "grid", "--lr", "0.1,0.1"], "space['lr'] has the value 0.1 twice"),
        (["--sampler", "grid", "--lr", "0.01:0.1"], "a grid needs a list or a step"),
        (["--metric", "luck"], "metric='luck' is not known; allowed: val_accuracy"),
        (["--storage", "mysql://me:secret@host/db"], "storage='mysql://me:***@host/db'"),
        (["--storage", "journal:///no\0file"], "cannot be opened"),
        (["--model", "resnet-0"], "model='resnet-0' is not known"),
        (["--alias", "best"], "alias='best' needs the name to register under"),
        (["--metric", "val_loss", "val_loss"], "has the same name twice"),
        (["--warm-start-study", "nothing"], "does not exist"),
        (["--replay", "0"], "does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_makes_no_study(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tracking_uri: str,
) -> None:
    assert said in sentence(capsys, *arguments)
    if Path("studies.journal").exists():
        assert Storage().optuna.get_all_studies() == []


def test_the_defaults_are_those_of_the_project_file() -> None:
    from mlflow.projects._project_spec import load_project

    parameters = load_project(str(Path(__file__).parents[2])).get_entry_point("study").parameters
    defaults = vars(parse([]))
    shown = {
        name: "auto" if value is None else str(value).lower() for name, value in defaults.items()
    }
    assert {name: shown[name] for name in parameters} == {
        name: str(parameter.default) for name, parameter in parameters.items()
    }


@pytest.mark.parametrize(
    ("words", "left"),
    [
        ("--resume --trials 3", "--trials 3"),
        ("--trials 3 --resume true", "--trials 3"),
        ("--resume=true --resume False --study true", "--study true"),
    ],
)
def test_what_trains_a_trial_again_does_not_go_on_with_the_study(words: str, left: str) -> None:
    assert _without_resume(words.split()) == left.split()


@pytest.mark.slow
def test_a_grid_then_more_of_it_then_its_mirror(
    store: Store, capsys: pytest.CaptureFixture[str], workdir: Path
) -> None:
    command = [*QUICK, "--sampler", "grid", "--batch-size", "500", "--shuffle", "true"]
    assert main(command) == 0
    assert "2 COMPLETE" in capsys.readouterr().out
    assert "exists in storage" in sentence(capsys, *command[len(QUICK) :])
    assert "has normalize=(not given), not True" in sentence(
        capsys, *command[len(QUICK) :], "--resume", "--normalize", "true"
    )
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--resume", "--lr", "0.01,0.001,0.1"]) == 0
    runs = store.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    assert list(table["lr"]) == [0.01, 0.001, 0.1]
    best = parent.data.tags["best.trial"]
    replay = parent.data.tags["tracker.replay"]
    assert replay.endswith(f"--replay {best}")
    assert upkeep(["mirror"]) == 0
    assert "0 things were missing" in capsys.readouterr().out
    assert main([*command, "--replay", best]) == 0
    value = load_value(int(best))
    assert f"[{value}]" in capsys.readouterr().out


def load_value(number: int) -> float:
    storage = Storage()
    study_id = load(storage, "fashion-mnist").study_id
    return float(storage.optuna.get_all_trials(study_id)[number].values[0])


@pytest.mark.slow
def test_several_metrics_are_several_objectives(store: Store) -> None:
    command = [*QUICK, "--sampler", "random", "--trials", "2", "--models", "none"]
    assert main([*command, "--metric", "val_accuracy", "val_loss"]) == 0
    children = [run for run in store.runs() if "mlflow.parentRunId" in run.data.tags]
    for run in children:
        assert {"objective.val_accuracy", "objective.val_loss"} <= set(run.data.metrics)


def test_upkeep_of_what_is_not_there_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert upkeep(["mirror", "--study", "nothing"]) == 2
    assert "storage='journal:///studies.journal' does not exist" in capsys.readouterr().err
    assert not Path("studies.journal").exists()


@pytest.mark.slow
def test_the_tutorial_s_grid_with_two_workers(store: Store, workdir: Path) -> None:
    command = [
        *(sys.executable, "-m", "studies.fashion_mnist", *QUICK),
        *("--sampler", "grid", "--workers", "2"),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TRACKER_INLINE": "0",
    }
    for more in ([], ["--resume"]):
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # nobody watches
        runs = store.runs()
        (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        children = {int(r.data.tags["optuna.trial"]): r for r in runs if r is not parent}
        assert [run.info.status for run in runs] == ["FINISHED"] * 9
        params = {
            tuple(run.data.params[name] for name in ("lr", "batch_size", "shuffle"))
            for run in children.values()
        }
        assert len(params) == 8
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    storage = Storage()
    found = storage.optuna.get_all_trials(load(storage, "fashion-mnist").study_id)
    for trial, (_, row) in zip(found, table.iterrows(), strict=True):
        assert row["val_accuracy"] == trial.value
        assert trial.value == children[trial.number].data.metrics["objective"]
        assert {name: row[name] for name in trial.params} == trial.params
