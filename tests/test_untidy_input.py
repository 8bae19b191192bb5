"""Whatever a loop hands over is taken or refused at the call, and every run gets its status."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Store
from tracker import ArgumentError, RunBuilder, RunManager, fit, start_run
from tracker.delivery.base import leave_all
from tracker.journal.records import Point
from tracker.run import Run

ODD_POINTS: dict[str, tuple[Any, Any, Any]] = {
    "int": (1, 1, 1000),
    "bool": (True, 1, 1000),
    "float32": (np.float32(1), 1, 1000),
    "decimal": (Decimal(1), 1, 1000),
    "array of one": (np.array([1.0]), 1, 1000),
    "tensor": (torch.tensor([1.0], requires_grad=True), 1, 1000),
    "numpy step": (1.0, np.int64(1), 1000),
    "tensor step": (1.0, torch.tensor(1), 1000),
    "whole step": (1.0, 1.0, 1000),
    "numpy whole step": (1.0, np.float32(1), 1000),
    "numpy time": (1.0, 1, np.int64(1000)),
    "whole time": (1.0, 1, 1000.0),
}
REFUSED_POINTS: dict[str, tuple[Any, Any, Any]] = {
    "text": ("1", 1, 1000),
    "two numbers": (np.ones(2), 1, 1000),
    "two numbers on a device": (torch.ones(2, device="meta"), 1, 1000),
    "complex": (1j, 1, 1000),
    "nothing": (None, 1, 1000),
    "no step": (1.0, None, 1000),
    "half a step": (1.0, 0.5, 1000),
    "a huge step": (1.0, 2**70, 1000),
    "no time": (1.0, 1, None),
    "a huge time": (1.0, 1, 2**70),
    "no name": (1.0, 1, 1000),
}


@dataclass
class Options:
    lr: float = 0.1
    act: Any = torch.relu


REFUSED_ARGUMENTS: list[tuple[str, Any]] = [
    ("name", 3),
    ("name", Path("x")),
    ("name", "x" * 251),
    ("name", "half of a character: \ud800"),
    ("name", "a\0b"),
    ("experiment", 3),
    ("experiment", b"x"),
    ("experiment", "x" * 501),
    ("experiment", "\ud800"),
    ("parent", 3),
    ("parent", ""),
    ("tags", "abc"),
    ("tracking_uri", 3),
    ("tracking_uri", b"x"),
    ("tracking_uri", "\ud800"),
    ("directory", 3),
    ("directory", "\ud800"),
    ("directory", "a\0b"),
]


REFUSED_CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("log_metrics", (3, 1)),
    ("set_tags", ("abc",)),
    ("log_params", ("abc",)),
    ("log_text", (3, "a.txt")),
    ("log_text", ("abc", 3)),
    ("log_text", ("abc", "a\0b")),
    ("log_artifact", (3,)),
    ("log_artifact", ("missing.txt",)),
    ("log_artifact", (".", "a\0b")),
    ("log_image", (torch.ones(3, 4, 4), 3)),
    ("log_histograms", ("network", 1)),
    ("log_histograms", (torch.nn.Linear(2, 2), "step")),
    ("log_histograms", (torch.nn.Linear(2, 2), None)),
    ("log_network", (3, None)),
    ("log_model", (3, None)),
]


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


PARAMS = {
    "mapping": {"lr": 0.1, "act": swish},
    "named tuple": RunBuilder.get_runs({"lr": np.array([0.1]), "act": [swish]})[0],
    "dataclass": Options(act=swish),
    "namespace": Namespace(lr=Decimal("0.1"), act=swish),
    "simple namespace": SimpleNamespace(lr=0.1, act=swish),
}


@pytest.mark.parametrize("kind", PARAMS)
def test_hyperparameters_come_in_many_kinds_and_without_addresses(kind: str, store: Store) -> None:
    with start_run(params=PARAMS[kind]):
        pass
    assert store.run().data.params == {"lr": "0.1", "act": "<function swish>"}


def test_what_holds_no_hyperparameters_is_refused_in_a_sentence(tracking_uri: str) -> None:
    for given in (3, "lr=0.1", [1], Options):
        with pytest.raises(ArgumentError, match=r"params=.* has no hyperparameters; it must be a"):
            start_run(params=given)


@pytest.mark.parametrize("kind", ODD_POINTS)
def test_a_number_of_any_type_is_converted_at_the_call(kind: str, store: Store) -> None:
    value, step, time = ODD_POINTS[kind]
    with warnings.catch_warnings(), start_run() as run:
        warnings.simplefilter("error")
        run.log_points([Point("x", value, step, time)])
        run.log_metrics({"y": value}, step)
        run.log_metrics({"later": 2.0}, 2)

    found = store.run()
    assert store.history(found, "x") == [(1, 1.0)]
    assert store.history(found, "y") == [(1, 1.0)]
    assert store.history(found, "later") == [(2, 2.0)]


@pytest.mark.parametrize("kind", REFUSED_POINTS)
def test_a_point_that_cannot_be_stored_is_refused_at_the_call(kind: str, store: Store) -> None:
    value, step, time = REFUSED_POINTS[kind]
    with start_run() as run:
        with pytest.raises(ArgumentError, match=r"^(metric|step|time)"):
            run.log_points([Point("" if kind == "no name" else "x", value, step, time)])
        run.log_metrics({"later": 2.0}, 2)

    assert store.run().data.metrics == {"later": 2.0}


@pytest.mark.parametrize(("argument", "value"), REFUSED_ARGUMENTS)
def test_a_wrong_argument_is_refused_before_anything_begins(
    argument: str, value: Any, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}.* is not (allowed|valid)"):
        start_run(**{argument: value})
    assert list(tmp_path.glob(".tracker/*")) == []


@pytest.mark.parametrize("argument", ["tags", "directory", "tensorboard", "tracking_uri"])
def test_a_manager_names_a_wrong_argument(argument: str, store: Store) -> None:
    with (
        pytest.raises(ArgumentError, match=f"^{argument}=3 is not allowed"),
        RunManager(**{argument: 3}) as manager,
    ):
        manager.begin_run({}, torch.nn.Linear(2, 2), [])


def test_a_wrong_argument_within_an_epoch_leaves_it_open(store: Store) -> None:
    network = torch.nn.Linear(2, 2)
    scores, labels = torch.eye(2), torch.tensor([0, 1])
    with RunManager() as manager:
        with pytest.raises(ArgumentError, match="network is a str"):
            manager.begin_run({}, "network", [])  # type: ignore[arg-type]
        manager.begin_run({}, network, [])
        manager.begin_epoch()
        for loss in ("x", "", [], {}, network, object()):
            with pytest.raises(ArgumentError, match=r"^loss "):
                manager.track_loss(loss, labels)  # type: ignore[arg-type]
        for wrong in (None, 3, [0, 1], network):
            with pytest.raises(ArgumentError, match="they must be tensors"):
                manager.track_num_correct(scores, wrong)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"metrics=3\.0 is not allowed"):
            manager.end_epoch(3.0)  # type: ignore[arg-type]
        manager.track_loss(1.0, labels)
        manager.track_num_correct(scores, labels)
        manager.end_epoch({"val_loss": 2})
        manager.end_run()
    assert {
        "loss": 1.0,
        "accuracy": 1.0,
        "val_loss": 2.0,
    }.items() <= store.run().data.metrics.items()


def test_a_metric_may_be_called_epoch(store: Store) -> None:
    network = torch.nn.Linear(2, 2)
    with RunManager() as manager:
        manager.begin_run({}, network, [])
        for _ in range(2):
            manager.begin_epoch()
            manager.track_loss(1.0, torch.ones(2))
            manager.save_checkpoint()
            manager.end_epoch({"epoch": 0.5, "run": 7.0})
        assert [row["epoch"] for row in manager.run_data] == [1, 2]
        assert [row["metric epoch"] for row in manager.run_data] == [0.5, 0.5]
        manager.end_run()
    run = store.run()
    assert run.data.metrics["epoch"] == 0.5
    resumed = RunManager.resume(run.info.run_id)
    assert resumed.checkpoint is not None


@pytest.mark.parametrize("row", [3, {"loss": 1.0}, {"epoch": 1, "phase": "warmup"}])
def test_a_row_of_the_epochs_table_holds_numbers(row: Any, store: Store) -> None:
    with start_run() as run, pytest.raises(ArgumentError):
        run.log_epoch(row)


def test_a_manager_may_outlive_the_run_that_it_logs_to(store: Store) -> None:
    def train() -> None:
        with RunManager(run=start_run()) as manager:
            manager.begin_run({}, torch.nn.Linear(2, 2), [])
            manager.begin_epoch()
            manager.run.end()
            raise KeyError("the user's")

    with pytest.raises(KeyError, match="the user's"):
        train()
    assert store.run().info.status == "FINISHED"


def test_a_grid_is_made_of_a_mapping() -> None:
    with pytest.raises(ArgumentError, match="params=3 is not allowed"):
        RunBuilder.get_runs(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [None, "3", 2.5, 0])
def test_the_number_of_epochs_is_an_integer(epochs: Any) -> None:
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with pytest.raises(ArgumentError, match=f"epochs={epochs} is not allowed"):
        list(fit(network, [], optimizer, torch.nn.functional.mse_loss, epochs=epochs))


@pytest.mark.parametrize(("verb", "arguments"), REFUSED_CALLS)
def test_a_call_with_a_wrong_argument_is_refused_in_a_sentence(
    verb: str, arguments: tuple[Any, ...], store: Store
) -> None:
    with start_run() as run, pytest.raises(ArgumentError):
        getattr(run, verb)(*arguments)
    assert store.run().info.status == "FINISHED"
    assert store.artifacts(store.run()) == set()


def test_the_working_folder_is_logged_without_the_journals(store: Store, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "train.py").write_text("print()")
    with start_run() as run:
        run.log_artifact(".", "all")
    logged = store.artifacts(store.run())
    assert [path for path in logged if "train.py" in path]
    assert [path for path in logged if ".tracker" in path] == []


def test_a_folder_that_cannot_be_read_is_named(store: Store, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "gone.py").symlink_to("missing.py")
    with start_run() as run, pytest.raises(ArgumentError, match="path='code' cannot be read"):
        run.log_artifact("code")


@pytest.mark.parametrize("argument", ["x" * 20_000, "caf\udce9.csv"], ids=["long", "not UTF-8"])
def test_any_command_line_can_be_tracked(
    argument: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "train.py", argument])
    monkeypatch.setattr("sys.argv", ["train.py", argument])
    with start_run() as run:
        run.log_dataset(TensorDataset(torch.ones(2)))
    tags = store.run().data.tags
    assert tags["tracker.command"].startswith("python train.py ")
    assert len(tags["tracker.command"]) <= 6_000
    assert store.run().inputs.dataset_inputs


@pytest.mark.parametrize("name", ["x" * 9_000, "half of a character: \ud800"])
def test_a_data_set_may_have_any_name(name: str, store: Store) -> None:
    class Named(TensorDataset):
        pass

    dataset = Named(torch.ones(4, 2))
    dataset.name = name
    with RunManager() as manager:
        manager.begin_run({}, torch.nn.Linear(2, 2), DataLoader(dataset))
        manager.end_run()
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["dataset"][:10] == name[:10]
    assert run.inputs.dataset_inputs[0].dataset.name[:10] == name[:10]


def test_an_exception_with_a_file_name_that_is_not_utf_8_is_the_reason(store: Store) -> None:
    run = start_run()
    with pytest.raises(FileNotFoundError), run:
        raise FileNotFoundError(os.fsdecode(b"caf\xe9.png"))

    ended = store.run()
    assert ended.info.status == "FAILED"
    assert ended.data.tags["tracker.failure"].startswith("FileNotFoundError: caf\\udce9.png")


@pytest.mark.parametrize("inline", [True, False])
def test_an_unreadable_journal_does_not_stop_training(
    inline: bool, tmp_path: Path, store: Store
) -> None:
    run = start_run(directory=tmp_path, inline=inline, offline=not inline)
    run.log_metrics({"a": 1.0}, 1)
    assert run._journal.flush(60)
    for path in tmp_path.glob("*/journal.sqlite*"):
        path.write_bytes(os.urandom(max(4096, path.stat().st_size)))

    run.log_metrics({"a": 2.0}, 2)
    run.deliver()
    assert run.run_id is None or inline
    run.flush(1)
    run.end()
    assert run.status == "FINISHED"
    leave_all()


@pytest.mark.parametrize("name", ["epochs", "model", "device", "dataset", "seed", "batch_size"])
@pytest.mark.parametrize("joined", [True, False])
def test_the_users_value_of_a_param_is_kept_and_ours_is_a_tag(
    name: str, joined: bool, store: Store
) -> None:
    network, loader = torch.nn.Linear(2, 1), DataLoader(TensorDataset(torch.ones(4, 2)), 2)
    run = start_run(params={name: "mine"}) if joined else None
    manager = RunManager(run=run, model=False)
    manager.begin_run({"lr": 1} if joined else {name: "mine"}, network, loader)
    manager.end_run()
    if run is not None:
        run.end()

    ended = store.run()
    assert ended.info.status == "FINISHED"
    assert ended.data.params[name] == "mine"
    assert ended.data.tags[f"tracker.fact.{name}"] != "mine"


def test_a_failure_at_the_end_leaves_the_run_with_its_status(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = RunManager()
    manager.begin_run({}, torch.nn.Linear(2, 1), [torch.ones(1, 2)])
    monkeypatch.setattr(Run, "log_model", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        manager.end_run()

    assert store.run().info.status == "FINISHED"
