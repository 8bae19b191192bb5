"""`python -m studies.search`: studies from the command line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from studies.search import _without_resume, main, parse
from tests.helpers import Store
from tracker.cli import main as tracker
from tracker.search.storage import Storage
from tracker.search.stored_study import load

QUICK = ["--dataset", "digits", "--epochs", "1"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message for invalid arguments: one line, and an exit code of 2."""
    capsys.readouterr()  # discard what fixtures printed
    try:
        code = main([*QUICK, *arguments])
    except SystemExit as exited:
        code = int(str(exited.code))
    message = capsys.readouterr().err
    assert code == 2, message
    assert len(message.splitlines()) == 1, message
    return message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "annealing"], "sampler='annealing' is "),
        (["--pruner", "luck"], "pruner='luck' is "),
        (["--trials", "0"], "argument --trials: '0' is not allowed"),
        (["--workers", "0"], "argument --workers: '0' is not allowed"),
        (["--lr", "0:0.1:log"], "argument --lr: '0' is not allowed; it must be a number above 0"),
        (["--lr", "0.1:0.01"], "LOW must not be above HIGH"),
        (["--lr", ""], "argument --lr: '' is not allowed"),
        (["--lr", "0.1:0.2:linear"], "it must be LOW:HIGH[:log]"),
        (["--sampler", "grid", "--lr", "0.1,0.1"], "space['lr'] contains 0.1 twice"),
        (["--sampler", "grid", "--lr", "0.01:0.1"], "a grid needs a list or a step"),
        (["--metric", "luck"], "metric='luck' is unknown; allowed: val_accuracy"),
        (["--storage", "mysql://me:secret@host/db"], "storage='mysql://me:***@host/db'"),
        (["--storage", "journal:///no\0file"], "cannot be opened"),
        (["--model", "resnet-0"], "model='resnet-0' is unknown"),
        (["--alias", "best"], "alias='best' needs "),
        (["--metric", "val_loss", "val_loss"], "contains a name twice"),
        (["--warm-start-study", "nothing"], "does not exist"),
        (["--replay", "0"], "does not exist"),
    ],
)
def test_a_mistake_is_reported_in_one_sentence_and_makes_no_study(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tracking_uri: str,
) -> None:
    assert message in refusal(capsys, *arguments)
    if Path("studies.journal").exists():
        assert Storage().optuna.get_all_studies() == []


def test_the_defaults_are_those_of_the_project_file() -> None:
    from mlflow.projects._project_spec import load_project

    parameters = load_project(str(Path(__file__).parents[2])).get_entry_point("study").parameters
    defaults = vars(parse([]))
    assert {name: defaults[name] for name in parameters} == {
        name: parameter.default for name, parameter in parameters.items()
    }


@pytest.mark.parametrize(
    ("command", "replayed"),
    [
        ("--resume --trials 3", "--trials 3"),
        ("--trials 3 --resume true", "--trials 3"),
        ("--resume=true --resume False --study true", "--study true"),
    ],
)
def test_the_command_that_replays_a_trial_does_not_resume_the_study(
    command: str, replayed: str
) -> None:
    assert _without_resume(command.split()) == replayed.split()


@pytest.mark.slow
def test_a_grid_is_resumed_extended_mirrored_and_replayed(
    store: Store, capsys: pytest.CaptureFixture[str], workdir: Path
) -> None:
    command = [*QUICK, "--sampler", "grid", "--batch-size", "500", "--shuffle", "true"]
    assert main(command) == 0
    assert "2 COMPLETE" in capsys.readouterr().out
    assert "exists in storage" in refusal(capsys, *command[len(QUICK) :])
    assert "has normalize=(not given), not True" in refusal(
        capsys, *command[len(QUICK) :], "--resume", "--normalize", "true"
    )
    assert main([*command, "--resume", "--lr", "0.01,0.001,0.1"]) == 0
    runs = store.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    table = pd.read_csv(io.StringIO(store.text(parent, "trials.csv", workdir)))
    assert list(table["lr"]) == [0.01, 0.001, 0.1]
    best = parent.data.tags["best.trial"]
    assert parent.data.tags["tracker.replay"].endswith(f"--replay {best}")
    capsys.readouterr()
    assert tracker(["mirror"]) == 0
    assert [run.info.run_id for run in store.runs()] == [run.info.run_id for run in runs]
    assert main([*command, "--replay", best]) == 0
    storage = Storage()
    trials = storage.optuna.get_all_trials(load(storage, "fashion-cnn").study_id)
    assert f"[{trials[int(best)].values[0]}]" in capsys.readouterr().out


@pytest.mark.slow
def test_several_metrics_are_several_objectives(store: Store) -> None:
    command = [*QUICK, "--sampler", "random", "--trials", "2", "--models", "none"]
    assert main([*command, "--metric", "val_accuracy", "val_loss"]) == 0
    children = [run for run in store.runs() if "mlflow.parentRunId" in run.data.tags]
    assert len(children) == 2
    for run in children:
        assert {"objective.val_accuracy", "objective.val_loss"} <= set(run.data.metrics)


def test_mirroring_a_storage_that_does_not_exist_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert tracker(["mirror", "--study", "nothing"]) == 2
    assert "storage='journal:///studies.journal' does not exist" in capsys.readouterr().err
    assert not Path("studies.journal").exists()


@pytest.mark.slow
def test_the_tutorial_s_grid_with_two_workers(store: Store, workdir: Path) -> None:
    command = [
        *(sys.executable, "-m", "studies.search", *QUICK),
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
        assert done.stderr == ""  # no progress bar without a terminal
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
    trials = storage.optuna.get_all_trials(load(storage, "fashion-cnn").study_id)
    for trial, (_, row) in zip(trials, table.iterrows(), strict=True):
        assert row["val_accuracy"] == trial.value
        assert trial.value == children[trial.number].data.metrics["objective"]
        assert {name: row[name] for name in trial.params} == trial.params
