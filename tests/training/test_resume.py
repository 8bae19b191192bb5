"""A run that was cut off goes on as if it had never stopped."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import Store
from tracker import Keep, RunManager, StoreError
from tracker.cli import main as tracker_command

PROJECT = Path(__file__).parents[2]

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


def train(folder: Path, epochs: int, die: str = "", resumed: str = "", lr: str = "0.01") -> Any:
    """Train in a process of its own; returns the final weights, None where it was to die."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    out = folder / "weights.pt"
    env = os.environ | {
        "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, str(program), str(out), str(epochs), die, resumed, lr],
        env=env,
        check=False,
        timeout=200,
    )
    assert done.returncode == (-signal.SIGKILL if die else 0)
    return None if die else torch.load(out, weights_only=True)


def values(store: Store, run: Any, name: str) -> list[tuple[int, float]]:
    return store.history(run, name)


@pytest.mark.parametrize("die", ["epoch 2", "step 12"])
def test_two_epochs_then_killed_then_resumed_equal_four_epochs_straight(
    store: Store, tmp_path: Path, die: str
) -> None:
    (tmp_path / "straight").mkdir()
    (tmp_path / "resumed").mkdir()
    whole = train(tmp_path / "straight", 4)
    (straight,) = store.runs()

    train(tmp_path / "resumed", 4, die=die)
    assert tracker_command(["sync"]) == 0  # in-line: nobody else tells of its end
    (killed,) = [run for run in store.runs() if run.info.run_id != straight.info.run_id]
    assert killed.info.status == "FAILED"

    weights = train(tmp_path / "resumed", 4, resumed=killed.info.run_id)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[name], whole[name]) for name in whole)

    runs = store.runs()
    assert len(runs) == 2
    (resumed,) = [run for run in runs if run.info.run_id == killed.info.run_id]
    assert resumed.info.status == "FINISHED"
    assert "tracker.failure" not in resumed.data.tags
    for name in ("loss", "accuracy", "batch_loss"):
        assert values(store, resumed, name) == values(store, straight, name), name
    assert len(values(store, resumed, "batch_loss")) == 20
    assert [step for step, _ in values(store, resumed, "epoch_duration")] == [1, 2, 3, 4]
    assert resumed.data.params == straight.data.params
    table = store.text(resumed, "epochs.csv", tmp_path).splitlines()
    assert [line.split(",")[0] for line in table] == ["epoch", "1", "2", "3", "4"]
    names = [path for path in store.artifacts(resumed) if path.startswith("histograms/")]
    assert len(names) == 4
    kept = {path.split("/")[1] for path in store.artifacts(resumed) if "checkpoints/" in path}
    assert kept == {"00000015", "00000020"}


def test_a_changed_hyperparameter_is_recorded_and_not_refused(store: Store, tmp_path: Path) -> None:
    train(tmp_path, 2, die="epoch 1")
    assert tracker_command(["sync"]) == 0
    train(tmp_path, 2, resumed=store.run().info.run_id, lr="0.5")
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.01"
    assert run.data.tags["tracker.param.lr"] == "0.5"
    assert run.data.tags["tracker.resumed"] == "true"


def test_what_the_killed_process_left_is_delivered_before(store: Store, tmp_path: Path) -> None:
    train(tmp_path, 2, die="epoch 1")
    run_id = store.run().info.run_id
    assert store.run().info.status == "RUNNING"
    train(tmp_path, 2, resumed=run_id)  # without `tracker sync` in between
    assert store.run().info.status == "FINISHED"
    assert list((tmp_path / ".tracker").iterdir()) == []


def test_a_run_that_does_not_exist(store: Store) -> None:
    with pytest.raises(StoreError, match="could not read run 0000"):
        RunManager.resume("0000")


def test_a_run_without_a_checkpoint_begins_anew(store: Store, loader: Any, network: Any) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        manager.end_run()
    with RunManager.resume(store.run().info.run_id, model=False) as manager:
        assert manager.checkpoint is None
        manager.begin_run({"lr": 1.0}, network, loader)
        assert manager.epoch_count == 0
        manager.end_run()
    assert store.run().info.status == "FINISHED"


def test_a_run_that_still_goes_on_is_not_resumed(store: Store, loader: Any, network: Any) -> None:
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


def test_a_run_of_mlflow_run_goes_on_with_the_options_that_began_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from studies.train import main

    text = tmp_path / "some words.txt"
    text.write_text("the cat sat on a mat and saw that it was good, or was it not? " * 60)
    run_id = store.client.create_run("0").info.run_id
    asked = {"dataset": f"'{text}'", "prime": "'the cat'", "hidden": "8", "lr": "2e-3"}
    for name, value in asked.items():  # as `mlflow run` logs what it was given: with quotes
        store.client.log_param(run_id, name, value)
    arguments = ["--model", "char-lstm", "--dataset", str(text), "--prime", "the cat"]
    arguments += ["--hidden", "8", "--batch-size", "4", "--length", "20", "--lr", "2e-3"]
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    assert main([*arguments, "--epochs", "1"]) == 0
    monkeypatch.delenv("MLFLOW_RUN_ID")
    assert main([*arguments, "--epochs", "2", "--resume", run_id]) == 0
    assert [step for step, _ in store.history(store.run(), "val_loss")] == [1, 2]


def test_a_run_that_goes_on_elsewhere_is_not_resumed(store: Store) -> None:
    run_id = store.client.create_run("0").info.run_id
    with pytest.raises(StoreError, match=r"is RUNNING\. End its process, then upload its journal"):
        RunManager.resume(run_id)


def test_a_checkpoint_that_found_no_room_costs_none_that_is_there(
    store: Store, loader: Any, network: Any
) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({"lr": 1.0}, network, loader)
        for epoch in (1, 2):
            manager.begin_epoch()
            manager.track_loss(torch.tensor(1.0), 1)
            manager.end_epoch()
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            if epoch == 2:  # a disk that takes no more
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
            manager.save_checkpoint()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        manager.end_run()
    kept = {path for path in store.artifacts(store.run()) if path.endswith("tensors.pt")}
    assert kept == {"checkpoints/00000001/tensors.pt"}


def test_the_best_by_a_metric_before_there_is_one(store: Store, loader: Any, network: Any) -> None:
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


def test_an_offline_run_in_the_folder_is_none_of_its_concern(
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
