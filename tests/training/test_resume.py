"""A run that was interrupted continues as if it had never stopped."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import Store
from tests.programs import ForkServer
from tracker import Keep, RunManager, StoreError
from tracker.cli import main as tracker_command

PROGRAM = """
import os, signal, sys
import torch, torch.nn.functional as F
from torch.utils.data import DataLoader
from tests.helpers import Pictures
from models import FashionCNN
from tracker import Keep, RunManager, set_seed
out, epochs, die, resumed, lr = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
set_seed(7)
network = FashionCNN()
loader = DataLoader(Pictures(), batch_size=50, shuffle=True)
optimizer = torch.optim.Adam(network.parameters(), lr=float(lr))
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
settings = {"batch_loss": True, "model": False, "checkpoints": Keep(last=2)}
manager = RunManager.resume(resumed, **settings) if resumed else RunManager(**settings)
manager.begin_run({"lr": lr, "epochs": epochs}, network, loader)
if manager.checkpoint is not None:
    manager.checkpoint.restore(network=network, optimizer=optimizer, scheduler=scheduler)
while manager.epoch_count < epochs:
    manager.begin_epoch()
    batches = loader
    if manager.checkpoint is not None and manager.checkpoint.position:
        batches = manager.rest_of_epoch()
    for batch in batches:
        images, labels = batch
        preds = network(images)
        loss = F.cross_entropy(preds, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        manager.track_loss(loss, batch)
        manager.track_num_correct(preds, labels)
        if die == f"step {manager.step}":
            manager.save_checkpoint(optimizer=optimizer, scheduler=scheduler)
            manager.run.flush(60)
            os.kill(os.getpid(), signal.SIGKILL)
    manager.end_epoch()
    scheduler.step()
    manager.save_checkpoint(optimizer=optimizer, scheduler=scheduler)
    if die == f"epoch {manager.epoch_count}":
        manager.run.flush(60)
        os.kill(os.getpid(), signal.SIGKILL)
manager.end_run()
torch.save(network.state_dict(), out)
"""


class Training:
    """Runs PROGRAM in separate processes, in one folder."""

    def __init__(self, server: ForkServer, folder: Path, **environment: str) -> None:
        self.server, self.folder, self.environment = server, folder, environment
        folder.mkdir(exist_ok=True)

    def run(self, epochs: int, *, die: str = "", resumed: str = "", lr: str = "0.01") -> Any:
        """Train, and return the final weights; None if the process has to die."""
        out = self.folder / "weights.pt"
        arguments = (str(out), str(epochs), die, resumed, lr)
        program = self.server.start(PROGRAM, *arguments, folder=self.folder, **self.environment)
        assert program.wait() == (-signal.SIGKILL if die else 0), program.output()
        return None if die else torch.load(out, weights_only=True)


@pytest.fixture
def training(tracking_uri: str, tmp_path: Path, deliverers: ForkServer) -> Training:
    environment = {"MLFLOW_TRACKING_URI": tracking_uri, "TRACKER_INLINE": "1"}
    return Training(deliverers, tmp_path, **environment)


SERIES = ("loss", "accuracy", "batch_loss")


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, deliverers: ForkServer
) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, str]]:
    """Weights, metrics and params of four epochs in one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    environment = {"MLFLOW_TRACKING_URI": uri, "TRACKER_INLINE": "1"}
    weights = Training(deliverers, folder, **environment).run(4)
    store = Store(uri)
    run = store.run()
    return weights, {name: store.history(run, name) for name in SERIES}, run.data.params


@pytest.mark.parametrize("die", ["epoch 2", "step 12"])
def test_a_killed_and_resumed_training_equals_an_uninterrupted_one(
    store: Store, tmp_path: Path, training: Training, uninterrupted: Any, die: str
) -> None:
    training.run(4, die=die)
    assert tracker_command(["sync"]) == 0
    killed = store.run()
    assert killed.info.status == "FAILED"

    resumed_weights = training.run(4, resumed=killed.info.run_id)

    weights, metrics, params = uninterrupted
    assert resumed_weights.keys() == weights.keys()
    assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)
    run = store.run()
    assert run.info.status == "FINISHED"
    assert "tracker.failure" not in run.data.tags
    assert {name: store.history(run, name) for name in SERIES} == metrics
    assert len(metrics["batch_loss"]) == 20
    assert [step for step, _ in store.history(run, "epoch_duration")] == [1, 2, 3, 4]
    assert run.data.params == params
    table = store.text(run, "epochs.csv", tmp_path).splitlines()
    assert [line.split(",")[0] for line in table] == ["epoch", "1", "2", "3", "4"]
    artifacts = store.artifacts(run)
    assert len([path for path in artifacts if path.startswith("histograms/")]) == 4
    kept = {path.split("/")[1] for path in artifacts if "checkpoints/" in path}
    assert kept == {"00000015", "00000020"}


def test_resuming_delivers_the_killed_process_s_journal_and_tags_a_changed_hyperparameter(
    store: Store, tmp_path: Path, training: Training
) -> None:
    training.run(2, die="epoch 1")
    assert store.run().info.status == "RUNNING"

    training.run(2, resumed=store.run().info.run_id, lr="0.5")  # without `tracker sync` before

    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.01"
    assert run.data.tags["tracker.param.lr"] == "0.5"
    assert run.data.tags["tracker.resumed"] == "true"
    assert list((tmp_path / ".tracker").iterdir()) == []


def test_a_missing_run_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="could not read run 0000"):
        RunManager.resume("0000")


def test_a_run_without_a_checkpoint_starts_again(store: Store, loader: Any, network: Any) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        manager.end_run()
    with RunManager.resume(store.run().info.run_id, model=False) as manager:
        assert manager.checkpoint is None
        manager.begin_run({"lr": 1.0}, network, loader)
        assert manager.epoch_count == 0
        manager.end_run()
    assert store.run().info.status == "FINISHED"


def test_a_run_is_not_resumed_while_its_process_is_alive(
    store: Store, loader: Any, network: Any
) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        with pytest.raises(StoreError, match="is still running, in process"):
            RunManager.resume(manager.run_id or "")
        manager.end_run()


def test_studies_train_continues_a_run(store: Store, tmp_path: Path) -> None:
    from studies.train import main

    arguments = ["--dataset", "digits", "--epochs"]
    assert main([*arguments, "1"]) == 0
    first = store.run()
    assert main([*arguments, "2", "--resume", first.info.run_id]) == 0
    run = store.run()
    assert [step for step, _ in store.history(run, "val_loss")] == [1, 2]
    assert run.data.params["epochs"] == "1"
    assert run.data.tags["tracker.param.epochs"] == "2"


def test_a_run_started_by_mlflow_run_is_resumed_with_the_same_options(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies.train import main

    text = tmp_path / "some words.txt"
    text.write_text("the cat sat on a mat and saw that it was good, or was it not? " * 60)
    run_id = store.client.create_run("0").info.run_id
    asked = {"dataset": f"'{text}'", "prime": "'the cat'", "hidden": "8", "lr": "2e-3"}
    for name, value in asked.items():  # `mlflow run` logs its parameters with quotes
        store.client.log_param(run_id, name, value)
    arguments = ["--model", "char-lstm", "--dataset", str(text), "--prime", "the cat"]
    arguments += ["--hidden", "8", "--batch-size", "4", "--length", "20", "--lr", "2e-3"]
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main([*arguments, "--epochs", "1"]) == 0
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert main([*arguments, "--epochs", "2", "--resume", run_id]) == 0
    assert [step for step, _ in store.history(store.run(), "val_loss")] == [1, 2]


def test_a_run_that_is_running_elsewhere_is_not_resumed(store: Store) -> None:
    run_id = store.client.create_run("0").info.run_id
    with pytest.raises(StoreError, match=r"is RUNNING\. End its process, then upload its journal"):
        RunManager.resume(run_id)


def test_a_checkpoint_that_does_not_fit_on_the_disk_replaces_none(
    store: Store, loader: Any, network: Any
) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        for epoch in (1, 2):
            manager.begin_epoch()
            manager.track_loss(torch.tensor(1.0), 1)
            manager.end_epoch()
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if epoch == 2:  # a full disk
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            manager.save_checkpoint()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        manager.end_run()
    kept = {path for path in store.artifacts(store.run()) if path.endswith("tensors.pt")}
    assert kept == {"checkpoints/00000001/tensors.pt"}


def test_checkpoints_are_saved_before_the_best_metric_exists(
    store: Store, loader: Any, network: Any
) -> None:
    with RunManager(model=False, checkpoints=Keep(best="val_loss")) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        manager.begin_epoch()
        for _ in range(2):
            manager.track_loss(torch.tensor(1.0), 1)
            manager.save_checkpoint()
        manager.end_epoch({"val_loss": 0.5})
        manager.save_checkpoint()
        manager.end_run()
    kept = {path.split("/")[1] for path in store.artifacts(store.run()) if "tensors" in path}
    assert kept == {"00000002"}


def test_resuming_ignores_another_offline_run_in_the_folder(
    store: Store, tmp_path: Path, loader: Any, network: Any
) -> None:
    program = "from tracker import start_run\nwith start_run(offline=True): pass"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    with RunManager(model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        manager.end_run()
    with RunManager.resume(store.run().info.run_id, model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        manager.end_run()
    assert len(list((tmp_path / ".tracker").iterdir())) == 1
