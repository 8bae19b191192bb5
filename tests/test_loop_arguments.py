"""`begin_run` sorts what copies of the tutorial pass, and names what it has no use for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.helpers import Store
from tracker import ArgumentError, RunManager
from tracker.loop_arguments import LoopArguments


class Rows(Dataset[Any]):
    """A data set that must not be read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a sample is drawn")


NET = nn.Linear(4, 3)
TRAIN, VAL, TEST = (DataLoader(Rows(name), 2) for name in ("train", "val", "test"))


def sort(*arguments: Any, **named: Any) -> tuple[LoopArguments, set[str]]:
    """The sorted arguments after `run`, and what was said."""
    said: set[str] = set()
    network, loader, *more = (*arguments, None, None)[: max(2, len(arguments))]
    return LoopArguments.of(network, loader, tuple(more), named, said), said


USES: list[tuple[tuple[Any, ...], dict[str, Any], dict[str, str]]] = [
    ((NET, TRAIN), {}, {"training": "train"}),
    ((TRAIN, NET), {}, {"training": "train"}),
    ((TRAIN, "cpu", NET), {}, {"training": "train"}),
    ((NET, TRAIN, TEST), {}, {"training": "train", "test": "test"}),
    ((NET, TRAIN, VAL, TEST), {}, {"training": "train", "validation": "val", "test": "test"}),
    ((NET, TRAIN, "cpu", TEST), {}, {"training": "train", "test": "test"}),
    ((NET, TRAIN, VAL), {"test_loader": TEST}, {"validation": "val", "test": "test"}),
    ((NET, TRAIN, TEST), {"val_loader": VAL}, {"validation": "val", "test": "test"}),
    ((NET, TRAIN), {"valid_loader": VAL}, {"validation": "val"}),
    ((NET, TRAIN), {"validation_set": VAL.dataset}, {"validation": "val"}),
    ((NET, TRAIN), {"dev_loader": VAL}, {"validation": "val"}),
    ((NET, TRAIN), {"testloader": TEST, "device": "cpu"}, {"test": "test"}),
    ((NET, TRAIN), {"valData": VAL, "data_test": TEST}, {"validation": "val", "test": "test"}),
    ((NET, TRAIN), {"test_loader": [(torch.ones(2), 1)]}, {"training": "train"}),
    ((NET,), {"train_loader": TRAIN}, {"training": "train"}),
    ((), {"model": NET, "dataloader": TRAIN, "testset": TEST}, {"training": "train"}),
    ((NET, "cpu", TRAIN), {}, {"training": "train"}),
    ((NET, torch.device("cpu"), None), {}, {}),
]


@pytest.mark.parametrize(("arguments", "named", "expected"), USES, ids=range(len(USES)))
def test_each_argument_is_taken_for_what_it_is(
    arguments: tuple[Any, ...], named: dict[str, Any], expected: dict[str, str]
) -> None:
    found, said = sort(*arguments, **named)
    names = {context: dataset.name for context, dataset in found.datasets.items()}
    assert expected.items() <= names.items()
    assert found.network is NET
    assert said == set()


@pytest.mark.parametrize(
    ("arguments", "named", "sentence"),
    [
        (
            (NET, TRAIN, "baseline"),
            {},
            "begin_run() has no use for argument 4 ('baseline', not a device).",
        ),
        (
            (NET, TRAIN, nn.MSELoss(), TEST, VAL, TEST),
            {"epochs": 3, "eval_metrics": ["a"], "latest_files": ["b"], "train_loader": TRAIN},
            "begin_run() has no use for argument 4 (a MSELoss), epochs (3), eval_metrics (a list), "
            "latest_files (a list), "
            "train_loader (a DataLoader), argument 7 (a DataLoader).",
        ),
        (
            (NET, TRAIN),
            {"device_ids": [0, 1], "num_devices": 2, "device_name": "a card"},
            "begin_run() has no use for device_ids (a list), num_devices (2), "
            "device_name ('a card').",
        ),
        (
            (NET, TRAIN, "cuda:0"),
            {},
            "begin_run() was given the device cuda:0, but the network is on cpu.",
        ),
    ],
)
def test_what_has_no_use_is_named_in_one_sentence(
    arguments: tuple[Any, ...], named: dict[str, Any], sentence: str
) -> None:
    assert sort(*arguments, **named)[1] == {sentence}


@pytest.mark.parametrize("device", ["cudaa:0", 0.5, "gpu"])
def test_a_device_argument_that_is_not_a_device_is_refused(device: Any) -> None:
    with pytest.raises(ArgumentError, match=f"^device={device!r} is not a device; allowed are"):
        sort(NET, TRAIN, device=device)


@pytest.mark.parametrize("given", [(NET, nn.ReLU()), [NET, nn.ReLU()], {"a": NET, "b": nn.ReLU()}])
def test_several_networks_are_the_parts_of_one(given: Any) -> None:
    found, said = sort(given, TRAIN)
    assert isinstance(found.network, (nn.ModuleList, nn.ModuleDict))
    assert next(iter(found.network.parameters())) is NET.weight
    assert said == set()


def test_the_data_sets_and_the_warning_reach_their_places(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with RunManager(model=False) as manager:
        for _ in range(2):
            manager.begin_run({"lr": 1}, NET, TRAIN, "cpu", VAL, TEST, name="baseline")
            manager.end_run()
    for run in store.runs():
        contexts = {i.tags[0].value: i.dataset.name for i in run.inputs.dataset_inputs}
        assert contexts == {"training": "train", "validation": "val", "test": "test"}
    assert caplog.messages == ["begin_run() has no use for name ('baseline')."]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"network": NET}, {"loader": TRAIN}, {"network": NET, "loader": None}],
    ids=["neither", "no loader", "no network", "None"],
)
def test_a_run_needs_neither_network_nor_loader(arguments: dict[str, Any], store: Store) -> None:
    batch = torch.rand(2, 4), torch.zeros(2, dtype=torch.int64)
    with RunManager(model=False) as manager:
        manager.begin_run(None, **arguments)
        manager.begin_epoch()
        manager.track_loss(0.5, batch)
        manager.track_num_correct(torch.eye(2), torch.tensor([0, 1]))
        manager.end_epoch()
        manager.end_run()
    run = store.run()
    assert run.info.status == "FINISHED"
    assert (run.data.metrics["loss"], run.data.metrics["accuracy"]) == (0.5, 1.0)
    assert ("model" in run.data.params) == ("network" in arguments)
    assert ("dataset" in run.data.params) == (arguments.get("loader") is not None)


@pytest.mark.parametrize("name", ["params", "hparams", "config", "args"])
def test_hyperparameters_may_have_another_name(name: str, store: Store) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run(**{name: {"lr": 0.5}}, network=NET, loader=TRAIN)
    assert store.run().data.params["lr"] == "0.5"


def test_a_network_in_place_of_hyperparameters_is_refused_in_one_line(store: Store) -> None:
    network = nn.Sequential(*(nn.Linear(100, 100) for _ in range(9)))
    with RunManager() as manager, pytest.raises(ArgumentError) as raised:
        manager.begin_run(network, DataLoader(TensorDataset(torch.ones(2))))
    assert str(raised.value).startswith("run=Sequential( ")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 160


# -- end_epoch ---------------------------------------------------------------------------------


def test_end_epoch_returns_the_metrics_that_it_logs(store: Store) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({}, NET, TRAIN)
        manager.begin_epoch()
        manager.track_loss(0.5, 4)
        found = manager.end_epoch({"f1": torch.tensor(0.25)}, {"auc": 0.75}, val_loss=0.125)
        manager.end_run()
    assert type(found) is dict
    assert {"loss": 0.5, "f1": 0.25, "auc": 0.75, "val_loss": 0.125}.items() <= found.items()
    assert set(found) == {"loss", "f1", "auc", "val_loss", "epoch_duration", "run_duration"}
    logged = store.run().data.metrics
    assert {name: value for name, value in logged.items() if "/" not in name} == found


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ((0.9,), "0.9"),
        ((0.3, 0.9), "0.3, 0.9"),
        (([0.3, 0.9],), "[0.3, 0.9]"),
        ((torch.tensor(0.5),), "tensor(0.5000)"),
        (("0.5",), "'0.5'"),
    ],
    ids=repr,
)
def test_numbers_without_names_are_refused_and_the_epoch_stays_open(
    given: tuple[Any, ...], shown: str, store: Store
) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({}, NET, TRAIN)
        manager.begin_epoch()
        with pytest.raises(ArgumentError) as raised:
            manager.end_epoch(*given)
        assert str(raised.value) == (
            f"metrics={shown} is not allowed; it must be a mapping of numbers by name, or numbers "
            "by name such as end_epoch(val_loss=0.3)."
        )
        assert set(manager.end_epoch(val_loss=0.3)) >= {"val_loss"}


def test_what_holds_no_numbers_is_named_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with RunManager(model=False) as manager:
        manager.begin_run({}, NET, TRAIN)
        for _ in range(2):
            manager.begin_epoch()
            manager.end_epoch(NET, 3, TEST, network=NET, f1=0.5)  # type: ignore[arg-type]
    assert store.history(store.run(), "f1") == [(1, 0.5), (2, 0.5)]
    assert caplog.messages == [
        "end_epoch() has no use for a Linear, 3, a DataLoader, network (a Linear); it takes a "
        "mapping of numbers by name."
    ]
