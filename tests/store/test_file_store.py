"""MLflow's file store, which is in maintenance mode: every method works, none is crash-safe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mlflow.entities import Run as MlflowRun
from torch import nn

from tests.helpers import Pictures, Store
from tracker import Run, RunManager, load_histograms, load_trained, start_run
from tracker.training.loop import fit

pytestmark = pytest.mark.parametrize("tracking_uri", ["file"], indirect=True)


class Method(NamedTuple):
    """A call that logs something, and a check that the store has it."""

    log: Callable[[Run], Any]
    stored: Callable[[Store, MlflowRun], bool]


def log_artifact(run: Run) -> None:
    Path("notes.txt").write_text("hello")
    run.log_artifact("notes.txt", "folder")


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))


METHODS = {
    "params": Method(
        lambda run: run.log_params({"lr": 0.1}), lambda _, run: run.data.params["lr"] == "0.1"
    ),
    "metrics": Method(
        lambda run: [run.log_metrics({"loss": 1 / step}, step) for step in (1, 2)],
        lambda store, run: store.history(run, "loss") == [(1, 1.0), (2, 0.5)],
    ),
    "tags": Method(
        lambda run: run.log_tags({"note": "x"}), lambda _, run: run.data.tags["note"] == "x"
    ),
    "text": Method(
        lambda run: run.log_text("hello", "a/b.txt"),
        lambda store, run: "a/b.txt" in store.artifacts(run),
    ),
    "image": Method(
        lambda run: run.log_image("first.png", torch.rand(3, 8, 8)),
        lambda store, run: "first.png" in store.artifacts(run),
    ),
    "artifact": Method(log_artifact, lambda store, run: "folder/notes.txt" in store.artifacts(run)),
    "data set": Method(
        lambda run: run.log_dataset(Pictures(10)),
        lambda _, run: len(run.inputs.dataset_inputs) == 1,
    ),
    "histograms": Method(
        lambda run: run.log_histograms(network(), 1),
        lambda store, run: set(load_histograms(run.info.run_id, store.uri)["step"]) == {1},
    ),
    "checkpoint": Method(
        lambda run: run.log_checkpoint(3, network=network(), epoch=1),
        lambda store, run: "checkpoints/00000003/state.json" in store.artifacts(run),
    ),
    "model": Method(
        lambda run: run.log_model(network(), torch.zeros(2, 1, 28, 28)),
        lambda store, run: (
            "1.weight"
            in load_trained(f"runs:/{run.info.run_id}/model", store.uri).program.state_dict
        ),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_of_a_run_works_on_the_file_store(store: Store, name: str) -> None:
    with start_run() as run:
        METHODS[name].log(run)
    stored = store.run()
    assert stored.info.status == "FINISHED"
    assert METHODS[name].stored(store, stored)


def test_a_run_manager_works_on_the_file_store(store: Store, loader: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with RunManager(batch_loss=True) as manager:
        manager.begin_run({"lr": 0.1}, model, loader)
        for epoch in fit(model, loader, optimizer, nn.functional.cross_entropy, epochs=2):
            manager.log_epoch(epoch)
        manager.end_run()
    run = store.run()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in store.history(run, "loss")] == [1, 2]
    assert {"epochs.csv", "histograms.html", "samples.png"} <= store.artifacts(run)


def test_a_run_continues_on_the_file_store(store: Store, loader: Any) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for part in (1, 2):
        manager = RunManager() if part == 1 else RunManager.resume(store.run().info.run_id)
        with manager:
            manager.begin_run({"lr": 0.1}, model, loader)
            if manager.checkpoint is not None:
                manager.checkpoint.restore(network=model, optimizer=optimizer)
            done = manager.epoch_count
            for epoch in fit(
                model, loader, optimizer, nn.functional.cross_entropy, epochs=part, done=done
            ):
                manager.log_epoch(epoch)
                manager.save_checkpoint(optimizer=optimizer)
            manager.end_run()
    assert [step for step, _ in store.history(store.run(), "loss")] == [1, 2]
