"""RunManager: what arrives in MLflow from the tutorial's loop."""

from __future__ import annotations

import copy
import csv
import json
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler

from models import FashionCNN
from tests.helpers import Pictures, Store, train_epoch
from tracker import (
    ArgumentError,
    CallOrderError,
    NonFiniteLossError,
    RunBuilder,
    RunManager,
    StoreError,
    evaluate,
    fit,
    start_run,
)


def get_num_correct(preds: torch.Tensor, labels: torch.Tensor) -> int:
    return int(preds.argmax(dim=1).eq(labels).sum().item())


# -- the tutorial ------------------------------------------------------------------------------


def test_get_runs_returns_every_combination_with_the_first_name_slowest() -> None:
    runs = RunBuilder.get_runs(OrderedDict(lr=[0.01, 0.001], batch_size=[100, 1000]))
    assert [tuple(run) for run in runs] == [(0.01, 100), (0.01, 1000), (0.001, 100), (0.001, 1000)]
    assert runs[0].lr == 0.01
    assert type(runs[0]).__name__ == "Run"
    assert str(runs[0]) == "Run(lr=0.01, batch_size=100)"


def test_get_runs_refuses_a_name_that_is_not_a_python_name() -> None:
    with pytest.raises(ArgumentError, match="params has a name that is not allowed"):
        RunBuilder.get_runs({"batch size": [1]})


@pytest.mark.parametrize("value", [0.01, "adam"])
def test_get_runs_refuses_a_value_that_is_not_a_list(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"params\['x'\]=.* must be a list of values"):
        RunBuilder.get_runs({"x": value})


def tutorial(train_set: Any, epochs: int, manager: RunManager | None) -> tuple[Any, list[Any]]:
    """The tutorial's loop over a grid; returns the last network and hand-computed rows."""
    params = OrderedDict(lr=[0.01], batch_size=[100, 300], shuffle=[True])
    rows = []
    torch.manual_seed(50)
    for run in RunBuilder.get_runs(params):
        network = FashionCNN()
        loader = DataLoader(train_set, batch_size=run.batch_size, shuffle=run.shuffle)
        optimizer = optim.Adam(network.parameters(), lr=run.lr)
        if manager:
            manager.begin_run(run, network, loader)
        for _ in range(epochs):
            total_loss, total_correct, seen = 0.0, 0, 0
            if manager:
                manager.begin_epoch()
            for batch in loader:
                images, labels = batch
                preds = network(images)
                loss = F.cross_entropy(preds, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total_loss += loss.item() * len(images)
                total_correct += get_num_correct(preds, labels)
                seen += len(images)
                if manager:
                    manager.track_loss(loss, batch)
                    manager.track_num_correct(preds, labels)
            if manager:
                manager.end_epoch()
                assert manager.epoch_loss == pytest.approx(total_loss, rel=1e-9)
                assert manager.epoch_num_correct == total_correct
            rows.append((total_loss / seen, total_correct / seen))
        if manager:
            manager.end_run()
    return network, rows


def test_the_tutorial_loop_logs_the_same_loss_and_accuracy_as_a_hand_computation(
    train_set: Any, store: Store, tmp_path: Path
) -> None:
    manager = RunManager(model=False)
    _, rows = tutorial(train_set, 2, manager)
    manager.save("results")

    first, second = store.runs()
    found = [
        (loss, accuracy)
        for run in (first, second)
        for (_, loss), (_, accuracy) in zip(
            store.history(run, "loss"), store.history(run, "accuracy"), strict=True
        )
    ]
    np.testing.assert_allclose(found, rows, atol=1e-6, rtol=0)
    assert [step for step, _ in store.history(first, "loss")] == [1, 2]
    assert first.info.status == second.info.status == "FINISHED"
    assert first.data.tags["tracker.session"] == second.data.tags["tracker.session"]
    assert (first.data.params["batch_size"], second.data.params["batch_size"]) == ("100", "300")
    assert manager.run_count == 2
    assert manager.epoch_count == 2
    table = pd.read_csv("results.csv")
    assert list(table.columns) == [
        *("run", "epoch", "loss", "accuracy", "epoch duration", "run duration"),
        *("lr", "batch_size", "shuffle"),
    ]
    np.testing.assert_allclose(table[["loss", "accuracy"]], rows, atol=1e-6, rtol=0)
    assert json.loads(Path("results.json").read_text()) == manager.run_data


def test_tracking_does_not_change_the_trained_weights_by_a_bit(
    train_set: Any, store: Store
) -> None:
    plain, _ = tutorial(train_set, 1, None)
    with RunManager(model=False, batch_loss=True) as manager:
        tracked, _ = tutorial(train_set, 1, manager)
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, tracked.state_dict()[name]), name


def test_a_run_has_params_metrics_tags_pictures_histograms_data_set_and_model(
    store: Store, network: FashionCNN, loader: Any, tmp_path: Path
) -> None:
    manager = RunManager(batch_loss=True)
    (grid,) = RunBuilder.get_runs({"lr": [0.01]})
    optimizer = optim.SGD(network.parameters(), lr=grid.lr)
    manager.begin_run(grid, network, loader)
    for _ in range(2):
        manager.begin_epoch()
        train_epoch(network, loader, optimizer, manager)
        manager.end_epoch({"val_loss": 0.5, "val_accuracy": 0.25})
    manager.end_run()

    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "lr=0.01"
    assert run.data.params == {
        "lr": "0.01",
        "batch_size": "100",
        "model": "FashionCNN",
        "dataset": "pictures",
        "device": "cpu",
        "seed": "0",
        "epochs": "2",
    }
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "epoch_duration", "run_duration"):
        assert [step for step, _ in store.history(run, name)] == [1, 2], name
    first, second = (value for _, value in store.history(run, "run_duration"))
    assert 0 < first < second
    assert all(0 < value < second for _, value in store.history(run, "epoch_duration"))
    assert [step for step, _ in store.history(run, "batch_loss")] == [1, 2, 3, 4, 5, 6]
    assert store.artifacts(run) == {
        *("samples.png", "network/layers.csv", "network/graph.svg"),
        *("histograms/000001.json", "histograms/000002.json", "histograms.html"),
        *("epochs.csv", "epochs.json"),
    }
    epochs = list(csv.DictReader(store.text(run, "epochs.csv", tmp_path).splitlines()))
    assert [float(row["loss"]) for row in epochs] == [v for _, v in store.history(run, "loss")]
    layers = store.text(run, "network/layers.csv", tmp_path).splitlines()
    assert layers[-1].split(",")[-2] == str(sum(p.numel() for p in network.parameters()))
    tags = run.data.tags
    assert {"tracker.command", "tracker.version", "tracker.torch", "tracker.mlflow"} <= set(tags)
    assert tags["tracker.device"] == "cpu"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "pictures"
    assert len(dataset.dataset.digest) == 32
    assert json.loads(dataset.dataset.profile)["samples"] == 250
    (output,) = run.outputs.model_outputs
    assert store.client.get_logged_model(output.model_id).status == "READY"


def test_a_run_has_the_git_commit_and_whether_the_tree_is_dirty(
    manager: RunManager, store: Store, network: FashionCNN, loader: Any
) -> None:
    manager.begin_run({}, network, loader)
    tags = store.run().data.tags
    if "mlflow.source.git.commit" in tags:  # an unpacked archive has none
        assert len(tags["mlflow.source.git.commit"]) == 40
        assert tags["tracker.git.dirty"] in ("true", "false")


def test_an_experiment_and_tags_can_be_given(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    with RunManager(experiment="grid", tags={"team": "vision"}, model=False) as manager:
        manager.begin_run({}, network, loader)
        manager.end_run()
    (run,) = store.runs("grid")
    assert run.data.tags["team"] == "vision"


def test_the_experiment_is_read_from_the_environment(
    store: Store, network: FashionCNN, loader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
    with RunManager(model=False) as manager:
        manager.begin_run({}, network, loader)
        manager.end_run()
    assert len(store.runs("from the environment")) == 1


def test_mlflow_s_own_functions_can_log_to_the_run_by_its_id(
    manager: RunManager, store: Store, network: FashionCNN, loader: Any
) -> None:
    run = manager.begin_run({}, network, loader)
    assert run.run_id == manager.run_id
    store.client.log_metric(run.run_id, "own", 1.0)
    manager.end_run()
    assert store.run().data.metrics["own"] == 1.0
    assert run.run_id == store.run().info.run_id


# -- mistakes in the tutorial's own manager ----------------------------------------------------


def track(manager: RunManager, loader: Any, with_batch: bool = True) -> tuple[float, float]:
    """Track an epoch without training; returns the loss and accuracy over the samples seen."""
    losses, right, seen = 0.0, 0, 0
    generator = torch.Generator().manual_seed(2)
    manager.begin_epoch()
    for batch in loader:
        _, labels = batch
        preds = torch.rand(len(labels), 10, generator=generator)
        loss = F.cross_entropy(preds, labels)
        manager.track_loss(loss, batch) if with_batch else manager.track_loss(loss)
        manager.track_num_correct(preds, labels)
        losses += loss.item() * len(labels)
        right += get_num_correct(preds, labels)
        seen += len(labels)
    manager.end_epoch()
    return losses / seen, right / seen


@pytest.mark.parametrize("with_batch", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 100},
        {"batch_size": 100, "drop_last": True},
        {"batch_size": 30, "sampler": SubsetRandomSampler(range(70))},
    ],
    ids=["a smaller last batch", "drop_last", "a sampler"],
)
def test_metrics_are_means_over_the_samples_that_were_trained_on(
    manager: RunManager,
    store: Store,
    network: FashionCNN,
    options: dict[str, Any],
    with_batch: bool,
) -> None:
    loader = DataLoader(Pictures(), **options)
    manager.begin_run({}, network, loader)
    loss, accuracy = track(manager, loader, with_batch)
    metrics = store.run().data.metrics
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)
    assert metrics["accuracy"] == pytest.approx(accuracy, abs=1e-12)


def test_a_frozen_parameter_is_not_an_error(manager: RunManager, store: Store, loader: Any) -> None:
    network = FashionCNN()
    network.conv1.requires_grad_(False)
    manager.begin_run({}, network, loader)
    manager.begin_epoch()
    train_epoch(network, loader, optim.SGD(network.out.parameters(), 0.1), manager)
    manager.end_epoch()
    manager.end_run()
    assert store.run().info.status == "FINISHED"


class Noisy(Pictures):
    """A data set whose samples draw from every random generator."""

    def __getitem__(self, index: int) -> Any:
        import random

        image, label = super().__getitem__(index)
        return image + torch.rand(1) + random.random() + np.random.rand(), label


def test_begin_run_changes_neither_order_nor_generators_nor_buffers(manager: RunManager) -> None:
    import random

    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(4 * 26 * 26, 10),
    )
    network[1].eval()  # a frozen batch norm in a network that trains
    loader = DataLoader(Noisy(), batch_size=100, shuffle=True)
    buffers = copy.deepcopy(dict(network.named_buffers()))
    modes = [module.training for module in network.modules()]
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    expected = [labels for _, labels in loader]
    drawn = (torch.rand(3), np.random.rand(3), random.random())

    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    manager.begin_run({}, network, loader)
    found = [labels for _, labels in loader]

    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.rand(3), drawn[0])
    assert (np.random.rand(3) == drawn[1]).all()
    assert random.random() == drawn[2]
    assert all(torch.equal(buffers[name], buffer) for name, buffer in network.named_buffers())
    assert [module.training for module in network.modules()] == modes


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from Pictures(50)


def test_the_pictures_of_a_stream_do_not_consume_it(
    manager: RunManager, store: Store, network: FashionCNN
) -> None:
    loader = DataLoader(Stream(), batch_size=20)
    manager.begin_run({}, network, loader)
    loss, _ = track(manager, loader)
    assert store.run().data.metrics["loss"] == pytest.approx(loss, abs=1e-6)
    manager.end_run()
    assert {"samples.png", "network/graph.svg"} <= store.artifacts(store.run())


@pytest.mark.cuda
def test_a_network_on_a_gpu_with_a_loader_on_the_cpu_is_tracked_without_waiting(
    manager: RunManager, store: Store, loader: Any
) -> None:
    network = FashionCNN().cuda()
    manager.begin_run({}, network, loader)
    manager.begin_epoch()
    for number, (images, labels) in enumerate(loader):
        preds = network(images.cuda())
        loss = F.cross_entropy(preds, labels.cuda())
        loss.backward()
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the graph is logged
        manager.track_loss(loss, (images, labels))
        manager.track_num_correct(preds, labels.cuda())
        torch.cuda.set_sync_debug_mode("default")
    manager.end_epoch()
    manager.end_run()
    assert store.run().data.params["device"] == "cuda:0"
    assert store.run().info.status == "FINISHED"


# -- fit ---------------------------------------------------------------------------------------


def test_fit_under_a_manager_logs_each_epoch_and_the_validation(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    with RunManager(model=False, batch_loss=True) as manager:
        manager.begin_run({"lr": 0.1}, network, loader)
        for epoch in fit(
            network, manager.progress(loader), optimizer, F.cross_entropy,
            epochs=2, val_loader=loader, accuracy=True,
        ):  # fmt: skip
            manager.log_epoch(epoch)
        last = evaluate(network, loader, F.cross_entropy, accuracy=True)
    run = store.run()
    assert run.info.status == "FINISHED"
    assert [step for step, _ in store.history(run, "val_loss")] == [1, 2]
    assert run.data.metrics["val_loss"] == pytest.approx(last["loss"], abs=1e-6)
    assert run.data.metrics["val_accuracy"] == pytest.approx(last["accuracy"])
    assert len(store.history(run, "batch_loss")) == 6
    assert [row["epoch"] for row in manager.run_data] == [1, 2]


# -- statuses ----------------------------------------------------------------------------------


def test_an_exception_in_the_with_block_ends_the_run_as_failed_with_the_reason(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    def broken() -> None:
        with RunManager(model=False) as manager:
            manager.begin_run({}, network, loader)
            manager.begin_epoch()
            raise RuntimeError("the loss went up in smoke")

    with pytest.raises(RuntimeError, match="smoke"):
        broken()
    run = store.run()
    assert run.info.status == "FAILED"
    assert run.data.tags["tracker.failure"].startswith("RuntimeError: the loss went up in smoke")
    assert "in broken" in run.data.tags["tracker.failure"]
    assert run.data.params["epochs"] == "0"


def test_ctrl_c_in_the_with_block_ends_the_run_as_killed(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    def interrupted() -> None:
        with RunManager(model=False) as manager:
            manager.begin_run({}, network, loader)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert store.run().info.status == "KILLED"


def test_a_run_that_is_open_when_the_next_begins_fails_and_says_where(
    manager: RunManager, store: Store, network: FashionCNN, loader: Any
) -> None:
    manager.begin_run({"n": 1}, network, loader)
    manager.begin_epoch()
    manager.begin_run({"n": 2}, network, loader)
    manager.end_run()
    abandoned, second = store.runs()
    assert (abandoned.info.status, second.info.status) == ("FAILED", "FINISHED")
    assert "within epoch 1" in abandoned.data.tags["tracker.failure"]
    assert "end_run() was never called" in abandoned.data.tags["tracker.failure"]


def test_end_run_within_an_epoch_ends_the_run_as_failed(
    manager: RunManager, store: Store, network: FashionCNN, loader: Any
) -> None:
    manager.begin_run({}, network, loader)
    manager.begin_epoch()
    manager.end_run()
    assert store.run().info.status == "FAILED"


def test_a_manager_that_is_garbage_collected_closes_its_run(
    tracking_uri: str, store: Store, network: FashionCNN, loader: Any
) -> None:
    manager = RunManager(model=False)
    manager.begin_run({}, network, loader)
    del manager
    assert store.run().info.status == "FAILED"
    assert list(Path(".tracker").iterdir()) == []


# -- bad input ---------------------------------------------------------------------------------


def test_a_method_called_out_of_order_names_the_one_to_call_first(
    manager: RunManager, network: FashionCNN, loader: Any
) -> None:
    with pytest.raises(CallOrderError, match=r"begin_epoch\(\) was called without a run; call beg"):
        manager.begin_epoch()
    with pytest.raises(CallOrderError, match=r"end_run\(\) was called without a run"):
        manager.end_run()
    manager.begin_run({}, network, loader)
    with pytest.raises(CallOrderError, match=r"end_epoch\(\) was called outside an epoch"):
        manager.end_epoch()
    with pytest.raises(CallOrderError, match=r"track_loss\(\) was called outside an epoch"):
        manager.track_loss(torch.tensor(1.0))
    with pytest.raises(CallOrderError, match="track_num_correct"):
        manager.track_num_correct(torch.rand(2, 2), torch.tensor([0, 1]))
    manager.begin_epoch()
    with pytest.raises(CallOrderError, match=r"begin_epoch\(\) was called within epoch 1"):
        manager.begin_epoch()
    manager.end_epoch()
    manager.end_run()


def test_labels_of_the_wrong_shape_are_refused(
    manager: RunManager, network: FashionCNN, loader: Any
) -> None:
    manager.begin_run({}, network, loader)
    manager.begin_epoch()
    with pytest.raises(ArgumentError, match=r"preds has the shape \(4, 3\) and labels \(4, 2\)"):
        manager.track_num_correct(torch.rand(4, 3), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"bad*name": 1}, r"param name 'bad\*name' is not allowed; allowed are"),
        ({"text": "x" * 6001}, "param 'text' has 6,001 characters; MLflow keeps 6,000"),
        (3, "run=3 has no hyperparameters"),
    ],
)
def test_a_hyperparameter_that_is_refused_leaves_no_run_and_no_journal(
    manager: RunManager,
    store: Store,
    network: FashionCNN,
    loader: Any,
    run: Any,
    message: str,
) -> None:
    with pytest.raises(ArgumentError, match=message):
        manager.begin_run(run, network, loader)
    assert store.runs() == []
    assert not Path(".tracker").exists() or list(Path(".tracker").iterdir()) == []


def test_a_given_run_can_be_joined_after_a_hyperparameter_was_refused(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    with start_run(params={"lr": 1}) as run:
        manager = RunManager(run=run, model=False)
        with pytest.raises(ArgumentError, match="param 'lr' is '1' and cannot become '2'"):
            manager.begin_run({"lr": 2}, network, loader)
        manager.begin_run({"lr": 1}, network, loader)
        with pytest.raises(CallOrderError, match="this manager logs to one run"):
            manager.begin_run({"lr": 1}, network, loader)
    assert store.run().data.params["batch_size"] == "100"


def test_the_error_about_a_deleted_experiment_says_how_to_restore_it(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    gone = store.client.create_experiment("gone")
    store.client.delete_experiment(gone)
    with (
        RunManager(experiment="gone") as manager,
        pytest.raises(StoreError, match=f"is deleted; restore it .* --experiment-id {gone}"),
    ):
        manager.begin_run({}, network, loader)
    assert list(Path(".tracker").iterdir()) == []


def nan_epoch(manager: RunManager, network: nn.Module, loader: Any) -> None:
    manager.begin_run({}, network, loader)
    for value in (float("nan"), float("nan"), float("inf")):
        manager.begin_epoch()
        manager.track_loss(torch.tensor(value), 10)
        manager.end_epoch()
    manager.end_run()


def test_a_loss_that_is_not_finite_is_recorded_with_one_warning(
    manager: RunManager,
    store: Store,
    network: FashionCNN,
    loader: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "tracker"):
        nan_epoch(manager, network, loader)
    said = [one.getMessage() for one in caplog.records if one.name == "tracker.journal.writer"]
    assert said == ["loss is nan at step 1."]
    run = store.run()
    points = store.client.get_metric_history(run.info.run_id, "loss")
    assert np.isnan([p.value for p in points if p.step < 3]).all()
    assert run.info.status == "FINISHED"
    manager.save("results")
    back = pd.read_json("results.json")["loss"]
    assert np.isnan(back[:2]).all()
    assert np.isinf(back[2])


def test_stop_on_nonfinite_ends_the_run_at_the_first_nan(
    store: Store, network: FashionCNN, loader: Any
) -> None:
    with (
        pytest.raises(NonFiniteLossError, match="loss is nan in epoch 1"),
        RunManager(model=False, stop_on_nonfinite=True) as manager,
    ):
        nan_epoch(manager, network, loader)
    assert store.run().info.status == "FAILED"


def test_an_epoch_stays_open_if_its_metrics_are_refused(
    manager: RunManager, store: Store, network: FashionCNN, loader: Any
) -> None:
    manager.begin_run({}, network, loader)
    manager.begin_epoch()
    manager.track_loss(0.5, 4)
    with pytest.raises(ArgumentError, match="metric name 'val loss!' is not allowed"):
        manager.end_epoch({"val loss!": 1.0})
    manager.end_epoch({"val loss": 1.0})
    assert store.history(store.run(), "loss") == [(1, 0.5)]


def test_a_hyperparameter_with_the_name_of_a_metric_has_its_own_column(
    manager: RunManager, network: FashionCNN, loader: Any
) -> None:
    manager.begin_run({"loss": "mse"}, network, loader)
    manager.begin_epoch()
    manager.track_loss(0.5, 4)
    manager.end_epoch()
    assert manager.run_data[0]["loss"] == 0.5
    assert manager.run_data[0]["param loss"] == "mse"


def test_saving_to_a_folder_that_does_not_exist_is_an_error(manager: RunManager) -> None:
    with pytest.raises(ArgumentError, match="name='nowhere/results' cannot be written"):
        manager.save("nowhere/results")
