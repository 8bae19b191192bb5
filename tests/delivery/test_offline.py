"""Offline runs: after `tracker sync` they equal runs that were tracked online."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import Run as MlflowRun

from tests.helpers import Store
from tests.programs import ForkServer, Program
from tracker import ArgumentError, RunManager, start_run
from tracker.cli import main as tracker_command

PROJECT = Path(__file__).parents[2]

PROGRAM = """
import sys, warnings
import torch, torch.nn.functional as F
from torch.utils.data import DataLoader
from tests.helpers import Pictures
from models import FashionCNN
from tracker import RunBuilder, RunManager, set_seed, start_run
set_seed(3)
with start_run(params={"search": "grid"}, experiment="offline", name="parent") as parent:
    with RunManager(experiment="offline", parent=parent, batch_loss=True) as manager:
        for run in RunBuilder.get_runs({"lr": [0.1, 0.01]}):
            network = FashionCNN()
            loader = DataLoader(Pictures(), batch_size=50, shuffle=True)
            optimizer = torch.optim.SGD(network.parameters(), run.lr)
            manager.begin_run(run, network, loader)
            for _ in range(2):
                manager.begin_epoch()
                for batch in loader:
                    preds = network(batch[0])
                    loss = F.cross_entropy(preds, batch[1])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    manager.track_loss(loss, batch)
                    manager.track_num_correct(preds, batch[1])
                manager.end_epoch({"val_loss": float("nan")})
                manager.save_checkpoint(optimizer=optimizer)
            manager.run.log_image("first", batch[0][0], step=1)
            manager.run.log_text("a note", "notes/text.txt")
            manager.run.log_tags({"mood": "fine"})
            manager.end_run()
    parent.log_metrics({"best": 0.5})
    parent.flush(240)  # on a busy machine the end of the program does not wait long enough
"""
VOLATILE = {"epoch_duration", "run_duration", "system/data_wait", "system/samples_per_second"}


def train(
    trainers: ForkServer, tracking_uri: str | None, folder: Path, *, offline: bool = False
) -> Program:
    """Run the program in `folder`; without a URI, MLflow's default applies."""
    folder.mkdir(exist_ok=True)
    uri = {"MLFLOW_TRACKING_URI": tracking_uri or ""}
    mode = {"TRACKER_INLINE": "0", "TRACKER_OFFLINE": str(int(offline))}
    program = trainers.run(PROGRAM, folder=folder, **uri, **mode)
    assert program.code == 0, program.output()
    return program


def content(path: str, text: bytes) -> str:
    """Return a digest of an artifact without its times, which differ from run to run."""
    if path.startswith(("epochs.", "checkpoints/")):
        text = re.sub(rb"[\d.e-]+|sha256.*", b"#", text) if path.endswith(("csv", "json")) else b""
    if path == "histograms.html":
        text = b""
    return hashlib.sha256(text).hexdigest()


def plain(path: str) -> str:
    """Return a path without the time and the random name that an image by step has."""
    return re.sub(r"[%+]\d+[%+][0-9a-f-]+", "", path).replace("+", "%")


def summary(store: Store, run: MlflowRun, into: Path) -> dict[str, Any]:
    """Everything that a run logged, except what differs from run to run."""
    tags = {
        name: value
        for name, value in run.data.tags.items()
        if not name.startswith(("tracker.", "mlflow.source", "mlflow.parent", "mlflow.log-model"))
    }
    into.mkdir(exist_ok=True)
    artifacts = {
        plain(path): content(
            path,
            Path(store.client.download_artifacts(run.info.run_id, path, str(into))).read_bytes(),
        )
        for path in store.artifacts(run)
    }
    names = sorted(name for name in run.data.metrics if not name.startswith("system/"))
    models = run.outputs.model_outputs if run.outputs else []
    return {
        "name": run.info.run_name if "lr" in run.info.run_name else "parent",
        "status": run.info.status,
        "params": run.data.params,
        "tags": tags,
        "steps": {name: [step for step, _ in store.history(run, name)] for name in names},
        "values": {
            name: [repr(value) for _, value in store.history(run, name)]
            for name in names
            if name not in VOLATILE
        },
        "artifacts": artifacts,
        "inputs": [
            (each.dataset.name, each.dataset.digest, each.dataset.profile)
            for each in run.inputs.dataset_inputs
        ],
        "models": len(models),
    }


def times(store: Store, run: MlflowRun) -> list[int]:
    """The times of a run's start, the points of one metric, and its end."""
    points = store.client.get_metric_history(run.info.run_id, "batch_loss")
    return [run.info.start_time, *(p.timestamp for p in points), run.info.end_time]


def compare(online: Store, offline: Store, into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = online.runs("offline"), offline.runs("offline")
    assert len(mine) == len(theirs) == 3
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert summary(online, one, into / f"a{number}") == summary(
            offline, other, into / f"b{number}"
        )
    parent, *children = theirs
    assert all(c.data.tags["mlflow.parentRunId"] == parent.info.run_id for c in children)
    assert "mlflow.parentRunId" not in parent.data.tags
    for run in children:
        moments = times(offline, run)
        assert moments == sorted(moments)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", offline.uri)
        (output,) = run.outputs.model_outputs
        loaded = mlflow.pytorch.load_model(f"models:/{output.model_id}")
        assert loaded(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def check_offline_equals_online(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch, trainers: ForkServer
) -> None:
    done = train(trainers, f"sqlite:///{tmp_path / 'online.db'}", tmp_path / "online")
    late = ("upload delayed", "the upload is slow")
    lines = done.stderr.splitlines()
    warnings = [line for line in lines if not any(text in line for text in late)]
    assert warnings == ["val_loss is nan at step 1."] * 2  # and a delay, on a busy machine
    assert list((tmp_path / "online" / ".tracker").iterdir()) == []

    done = train(trainers, None, tmp_path / "there", offline=True)
    journal = next((tmp_path / "there" / ".tracker").iterdir())
    assert "Finish it with: tracker sync" in done.stderr
    assert {path.name for path in (tmp_path / "there").iterdir()} == {".tracker"}

    assert tracker_command(["sync", str(journal.parent), "--tracking-uri", uri]) == 0
    assert list(journal.parent.iterdir()) == []
    compare(
        Store(f"sqlite:///{tmp_path / 'online.db'}"), Store(uri), tmp_path / "files", monkeypatch
    )


def test_offline_then_synced_to_a_file_equals_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainers: ForkServer
) -> None:
    (tmp_path / "files").mkdir()
    check_offline_equals_online(
        tmp_path, f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}", monkeypatch, trainers
    )


@pytest.mark.slow
def test_offline_then_synced_to_a_server_equals_online(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, trainers: ForkServer
) -> None:
    (tmp_path / "files").mkdir()
    check_offline_equals_online(tmp_path, server, monkeypatch, trainers)


def test_status_lists_unfinished_uploads_until_sync_finishes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], trainers: ForkServer
) -> None:
    assert tracker_command(["status"]) == 0
    assert capsys.readouterr().out == "Everything is uploaded.\n"
    program = "from tracker import start_run\nwith start_run(offline=True): pass"
    assert trainers.run(program).code == 0
    (journal,) = (tmp_path / ".tracker").iterdir()
    assert tracker_command(["status"]) == 0
    assert capsys.readouterr().out == (
        f".tracker/{journal.name}\n"
        "  unfinished: 2 records of 1 run to upload\n"
        f"  to sqlite:///{tmp_path / 'mlflow.db'}\n"
    )
    assert tracker_command(["sync"]) == 0
    assert capsys.readouterr().out == "Uploaded 2 records of 1 run.\n"
    assert tracker_command(["sync"]) == 0
    assert capsys.readouterr().out == "Uploaded 0 records of 0 runs.\n"


def test_variables_choose_the_delivery_if_no_argument_does(
    monkeypatch: pytest.MonkeyPatch, tracking_uri: str
) -> None:
    monkeypatch.setenv("TRACKER_OFFLINE", "maybe")
    with pytest.raises(ArgumentError, match="TRACKER_OFFLINE='maybe' is not allowed; it must be"):
        start_run()
    monkeypatch.setenv("TRACKER_OFFLINE", "False")
    with start_run() as run:
        assert run.run_id is not None
    monkeypatch.setenv("TRACKER_OFFLINE", "true")
    with start_run(inline=True) as run:  # an argument comes before the environment
        assert run.run_id is not None
    with pytest.raises(ArgumentError, match="exclude each other"):
        RunManager(inline=True, offline=True)


def test_a_password_is_not_stored_and_sync_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = (
        "from tracker import start_run\n"
        "with start_run(offline=True, tracking_uri='http://me:hunter2@127.0.0.1:9',"
        " params={'key': 'sk-hunter2hunter2hunter2', 'lr': 1}, tags={'api_key': 'hunter2'}): pass"
    )
    command = [sys.executable, "-c", program, "--token", "hunter2"]
    done = subprocess.run(command, check=True, timeout=600, capture_output=True, text=True)
    (journal,) = (tmp_path / ".tracker").iterdir()
    assert "The secret in tag 'api_key' is stored as ***" in done.stderr
    for path in journal.rglob("*"):
        if path.is_file():
            kept = path.read_bytes().replace(json.dumps(program)[1:-1].encode(), b"")
            assert b"hunter2" not in kept.replace(program.encode(), b""), path
    assert tracker_command(["sync"]) == 2
    assert (
        "belongs to http://me:***@127.0.0.1:9, whose secret is not stored; add --tracking-uri"
        in (capsys.readouterr().err)
    )
    assert journal.exists()


def test_status_imports_neither_torch_nor_mlflow_nor_optuna() -> None:
    program = (
        "import sys\nfrom tracker.cli import main\nmain(['status'])\n"
        "print({'torch', 'mlflow', 'optuna'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600
    )
    assert done.stdout == "Everything is uploaded.\nset()\n"


def test_help_lists_the_commands_for_studies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tracker_command(["--help"])
    assert {"sync", "status", "mirror", "reap"} <= set(re.findall(r"\w+", capsys.readouterr().out))
