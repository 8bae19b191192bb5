"""`mlflow run .` and a tracking server, end to end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import optim

from models import FashionCNN
from studies.train import main
from tests.helpers import Store, train_epoch
from tracker import RunManager, load_histograms

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def mlflow_run(folder: Path, uri: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `mlflow run` with this Python's programs first on the path."""
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": uri,
    }
    return subprocess.run(
        [str(programs / "mlflow"), "run", str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the files that `mlflow run` needs, without a repository or an environment."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("MLproject", "conda.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("tracker", "models", "studies"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("env_manager", ["local", "uv"])
def test_mlflow_run_makes_one_finished_run(
    store: Store, project: Path, env_manager: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENV_ROOT", str(tmp_path / "environments"))
    done = mlflow_run(
        project, store.uri, "--env-manager", env_manager, "-P", "lr=0.01", "-P", "epochs=1",
        "-P", "dataset=digits",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.01"
    assert run.data.params["epochs"] == "1"
    assert run.data.tags["mlflow.source.type"] == "PROJECT"
    assert [step for step, _ in store.history(run, "loss")] == [1]
    assert len(run.outputs.model_outputs) == 1


def test_mlflow_run_uses_its_run_as_that_of_the_study(store: Store, project: Path) -> None:
    done = mlflow_run(
        project, store.uri, "--env-manager", "local", "-e", "study", "-P", "sampler=tpe",
        "-P", "trials=3", "-P", "epochs=1", "-P", "dataset=digits", "-P", "workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = store.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    assert parent.data.tags["mlflow.project.entryPoint"] == "study"
    assert parent.data.params["sampler"] == "tpe"
    assert "study.html" in store.artifacts(parent)


def test_a_mistake_under_mlflow_run_fails_the_run_that_it_made(store: Store, project: Path) -> None:
    done = mlflow_run(project, store.uri, "--env-manager", "local", "-P", "lr=-1")
    assert done.returncode != 0
    assert "argument --lr: '-1' is not allowed; it must be a number above 0" in done.stderr
    assert store.run().info.status == "FAILED"


def test_a_server_stores_everything_that_a_file_does(server: str, loader: Any) -> None:
    torch.manual_seed(0)
    network = FashionCNN()
    with RunManager(tracking_uri=server, experiment="server") as manager:
        manager.begin_run({"lr": 0.1}, network, loader)
        manager.begin_epoch()
        train_epoch(network, loader, optim.SGD(network.parameters(), 0.1), manager)
        manager.end_epoch()
        manager.end_run()
    store = Store(server)
    (run,) = store.runs("server")
    assert run.info.status == "FINISHED"
    assert {"histograms.html", "samples.png", "epochs.csv"} <= store.artifacts(run)
    assert len(run.outputs.model_outputs) == 1
    weights = load_histograms(run.info.run_id, server).query("kind == 'weight'")
    assert weights["count"].sum() == sum(p.numel() for p in network.parameters())


def test_train_on_a_server(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dataset", "digits", "--epochs", "1", "--experiment", "trained on a server"]
    assert main([*options, "--tracking-uri", server]) == 0
    assert server in capsys.readouterr().out
    (run,) = Store(server).runs("trained on a server")
    assert run.info.status == "FINISHED"
