"""Loops as people write them round the tutorial's RunManager, each with what MLflow has afterwards.

A pattern is a function that trains with a manager and returns the metrics that its last epoch must
have, computed by hand. All of them share one store.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Subset, TensorDataset
from tqdm import tqdm

from tests.helpers import Store
from tracker import ArgumentError, RunBuilder, RunManager

Make = Callable[..., RunManager]
Pattern = Callable[[Make], dict[str, float]]

DATA = TensorDataset(
    torch.rand(20, 4, generator=torch.Generator().manual_seed(1)),
    torch.randint(3, (20,), generator=torch.Generator().manual_seed(2)),
)
LOADER = DataLoader(DATA, 8)
TEST = DataLoader(Subset(DATA, range(6)), 4)
RUN = OrderedDict(lr=0.1, batch_size=8)
PATTERNS: dict[str, Pattern] = {}


def pattern(function: Pattern) -> Pattern:
    PATTERNS[function.__name__] = function
    return function


class Sums:
    """Loss and accuracy of an epoch by hand."""

    def __init__(self) -> None:
        self.loss = self.correct = self.samples = 0.0

    def add(self, loss: Tensor, preds: Tensor, labels: Tensor) -> None:
        self.loss += loss.item() * len(labels)
        self.correct += preds.argmax(1).eq(labels).sum().item()
        self.samples += len(labels)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        loss, accuracy = self.loss / self.samples, self.correct / self.samples
        return {f"{prefix}loss": loss, f"{prefix}accuracy": accuracy}


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def steps(network: nn.Module, loader: Any = LOADER) -> Iterator[tuple[Any, Tensor, Tensor, Tensor]]:
    """Train with SGD; yields (batch, loss, preds, labels) of each step."""
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    for batch in loader:
        inputs, labels = batch
        preds = network(inputs)
        loss = F.cross_entropy(preds, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield batch, loss, preds, labels


def epoch(m: Any, network: nn.Module, loader: Any = LOADER) -> Sums:
    """The body of the tutorial's epoch."""
    sums = Sums()
    for batch, loss, preds, labels in steps(network, loader):
        m.track_loss(loss, batch)
        m.track_num_correct(preds, labels)
        sums.add(loss, preds, labels)
    return sums


@torch.no_grad()
def evaluated(m: Any, network: nn.Module, part: str, loader: Any = TEST) -> Sums:
    sums = Sums()
    for inputs, labels in loader:
        preds = network(inputs)
        loss = F.cross_entropy(preds, labels)
        getattr(m, f"track_{part}_loss")(loss)
        getattr(m, f"track_{part}_num_correct")(preds, labels)
        sums.add(loss, preds, labels)
    return sums


def one_run(m: Any, *arguments: Any, **named: Any) -> dict[str, float]:
    """A run of one epoch, begun with these arguments."""
    network = net()
    m.begin_run(RUN, network, *arguments, **named)
    m.begin_epoch()
    sums = epoch(m, network)
    m.end_epoch()
    m.end_run()
    return sums.metrics()


# -- arguments of begin_run --------------------------------------------------------------------


@pattern
def a_device_by_position(make: Make) -> dict[str, float]:
    return one_run(make(), LOADER, torch.device("cpu"))


@pattern
def a_device_and_a_test_loader_by_name(make: Make) -> dict[str, float]:
    return one_run(make(), LOADER, device="cpu", test_loader=TEST)


@pattern
def a_test_loader_by_position(make: Make) -> dict[str, float]:
    return one_run(make(), LOADER, TEST)


@pattern
def a_name_and_a_comment(make: Make) -> dict[str, float]:
    return one_run(make(), LOADER, "baseline", comment="-first", epochs=1)


@pattern
def everything_by_name(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(run=RUN, network=network, loader=LOADER)
    m.begin_epoch()
    sums = epoch(m, network)
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pattern
def loader_before_network(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, LOADER, network)  # type: ignore[arg-type]
    m.begin_epoch()
    sums = epoch(m, network)
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pattern
def only_hyperparameters(make: Make) -> dict[str, float]:
    m = make()
    m.begin_run(RUN)
    m.begin_epoch()
    sums = epoch(m, net())
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pattern
def two_networks_in_a_list(make: Make) -> dict[str, float]:
    m, generator, critic = make(), nn.Linear(2, 4), nn.Linear(4, 1)
    m.begin_run(RUN, [generator, critic], LOADER)  # type: ignore[arg-type]
    m.begin_epoch()
    losses = []
    for inputs, _ in LOADER:
        real, made = critic(inputs), critic(generator(torch.rand(len(inputs), 2)))
        losses.append((real.mean().item(), made.mean().item()))
    g_loss, d_loss = (sum(each) / len(losses) for each in zip(*losses, strict=True))
    m.end_epoch({"g_loss": g_loss}, d_loss=d_loss)
    m.end_run()
    return {"g_loss": g_loss, "d_loss": d_loss}


# -- hyperparameters ---------------------------------------------------------------------------


@pattern
def the_tutorial_s_grid(make: Make) -> dict[str, float]:
    m = make()
    for run in RunBuilder.get_runs(OrderedDict(lr=[0.1], batch_size=[8, 20])):
        network, loader = net(), DataLoader(DATA, run.batch_size)
        m.begin_run(run, network, loader)
        m.begin_epoch()
        sums = epoch(m, network, loader)
        m.end_epoch()
        m.end_run()
    assert m.run_count == 2
    return sums.metrics()


class OwnBuilder:
    """A copy of the tutorial's RunBuilder."""

    @staticmethod
    def get_runs(params: Any) -> list[Any]:
        Run = namedtuple("Run", params.keys())  # type: ignore[misc]
        return [Run(*values) for values in itertools.product(*params.values())]


@pattern
def a_builder_of_one_s_own(make: Make) -> dict[str, float]:
    m = make()
    for run in OwnBuilder.get_runs(OrderedDict(lr=[0.1, 0.2], shuffle=[False])):
        network = net()
        m.begin_run(run, network, LOADER)
        m.begin_epoch()
        sums = epoch(m, network)
        m.end_epoch()
        m.end_run()
        assert m.run_params.lr == run.lr
    return sums.metrics()


@pattern
def a_product_of_values_as_dicts(make: Make) -> dict[str, float]:
    with make() as m:
        for lr, size in itertools.product([0.1, 0.2], [8]):
            network = net()
            m.begin_run({"lr": lr, "batch_size": size}, network, LOADER)
            m.begin_epoch()
            sums = epoch(m, network)
            m.end_epoch()
            m.end_run()
    return sums.metrics()


@dataclass
class Config:
    lr: float = 0.1
    name: str = "small"


@pattern
def settings_of_several_kinds(make: Make) -> dict[str, float]:
    m = make()
    for run in (Config(), argparse.Namespace(lr=0.1), SimpleNamespace(lr=0.1), None):
        network = net()
        m.begin_run(run, network, LOADER)
        m.begin_epoch()
        sums = epoch(m, network)
        m.end_epoch()
        m.end_run()
    return sums.metrics()


@pattern
def a_run_for_each_fold(make: Make) -> dict[str, float]:
    m = make()
    for fold in range(3):
        held_out = list(range(fold, 20, 3))
        rest = [index for index in range(20) if index not in held_out]
        network, loader = net(), DataLoader(Subset(DATA, rest), 6)
        val_loader = DataLoader(Subset(DATA, held_out), 6)
        m.begin_run({"fold": fold}, network, loader, val_loader=val_loader)
        m.begin_epoch()
        sums = epoch(m, network, loader)
        val = evaluated(m, network, "val", val_loader)
        m.end_epoch()
        m.end_run()
    return sums.metrics() | val.metrics("val_")


# -- what end_epoch takes and returns ----------------------------------------------------------


@pattern
def the_best_weights_by_what_end_epoch_returns(make: Make) -> dict[str, float]:
    m, network, best, weights = make(), net(), 0.0, None
    m.begin_run(RUN, network, LOADER)
    for _ in range(3):
        m.begin_epoch()
        sums = epoch(m, network)
        results = m.end_epoch()
        if results["accuracy"] >= best:
            best, weights = results["accuracy"], copy.deepcopy(network.state_dict())
            torch.save(weights, "best.pt")
    m.end_run()
    assert weights is not None
    assert Path("best.pt").exists()
    return sums.metrics()


@pattern
def early_stopping_by_the_sum_of_losses(make: Make) -> dict[str, float]:
    m, network, last = make(), net(), float("inf")
    m.begin_run(RUN, network, LOADER)
    for _ in range(3):
        m.begin_epoch()
        sums = epoch(m, network)
        m.end_epoch()
        assert m.epoch_loss == pytest.approx(sums.loss)
        if m.epoch_loss > last:
            break
        last = m.epoch_loss
    m.end_run()
    return sums.metrics()


@pattern
def a_schedule_and_its_rate(make: Make) -> dict[str, float]:
    m, network = make(), net()
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    m.begin_run(RUN, network, LOADER)
    for number in range(3):
        m.begin_epoch(number)
        sums = epoch(m, network)
        optimizer.step()
        scheduler.step()
        m.end_epoch(rate=scheduler.get_last_lr()[0])
    m.end_run()
    return sums.metrics() | {"rate": 0.125}


@pattern
def numbers_without_names_are_corrected(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    sums = epoch(m, network)
    with pytest.raises(ArgumentError, match="numbers by name"):
        m.end_epoch(0.75, 0.5)  # type: ignore[arg-type]
    m.end_epoch(test_accuracy=0.75, f1=torch.tensor(0.5))
    m.end_run()
    return sums.metrics() | {"test_accuracy": 0.75, "f1": 0.5}


@pattern
def end_epoch_with_the_network(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    sums = epoch(m, network)
    m.end_epoch(network)  # type: ignore[arg-type]
    m.end_run()
    return sums.metrics()


# -- validation and test -----------------------------------------------------------------------


@pattern
def training_validation_and_test_in_an_epoch(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER, "cpu", LOADER, TEST)
    for _ in range(2):
        m.begin_epoch()
        sums = epoch(m, network)
        val = evaluated(m, network, "val", LOADER)
        test = evaluated(m, network, "test")
        m.end_epoch()
    m.end_run()
    return sums.metrics() | val.metrics("val_") | test.metrics("test_")


@pattern
def a_manager_each_for_training_and_validation(make: Make) -> dict[str, float]:
    train_m, val_m, network = make(), make(), net()
    train_m.begin_run({"part": "train"}, network, LOADER)
    val_m.begin_run({"part": "val"}, network, TEST)
    for _ in range(2):
        train_m.begin_epoch()
        epoch(train_m, network)
        train_m.end_epoch()
        val_m.begin_epoch()
        sums = Sums()
        with torch.no_grad():
            for batch in TEST:
                preds = network(batch[0])
                loss = F.cross_entropy(preds, batch[1])
                val_m.track_loss(loss, batch)
                val_m.track_num_correct(preds, batch[1])
                sums.add(loss, preds, batch[1])
        val_m.end_epoch()
    train_m.end_run()
    val_m.end_run()
    return sums.metrics()


# -- what is tracked of a batch ----------------------------------------------------------------


@pattern
def a_number_and_a_size(make: Make) -> dict[str, float]:
    m, network, sums = make(), net(), Sums()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    for (inputs, _), loss, preds, labels in steps(network):
        m.track_loss(loss.item(), inputs.size(0))
        m.track_num_correct(preds.detach().softmax(1), labels)
        sums.add(loss, preds, labels)
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pattern
def labels_before_scores_without_gradients(make: Make) -> dict[str, float]:
    m, network, sums = make(), net(), Sums()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    for batch, loss, preds, labels in steps(network):
        m.track_loss(loss, batch)
        with torch.no_grad():
            m.track_num_correct(labels, preds)
        sums.add(loss, preds, labels)
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pattern
def a_progress_bar_round_the_loader(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    sums = epoch(m, network, tqdm(LOADER, disable=True))
    m.end_epoch()
    m.end_run()
    return sums.metrics()


class OnDevice:
    """A loader that moves its batches, without the attributes of the one that it wraps."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.inner:
            yield [tensor.to("cpu") for tensor in batch]


@pattern
def a_loader_that_wraps_another(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, OnDevice(LOADER), OnDevice(TEST))
    m.begin_epoch()
    sums = epoch(m, network, OnDevice(LOADER))
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pattern
def one_logit(make: Make) -> dict[str, float]:
    m, network = make(), nn.Linear(4, 1)
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    right = 0
    for inputs, labels in LOADER:
        target = (labels > 0).float().unsqueeze(1)
        preds = network(inputs) - 0.2
        m.track_loss(F.binary_cross_entropy_with_logits(preds, target), inputs)
        m.track_num_correct(preds, target)
        right += int((preds > 0).eq(target > 0.5).sum())
    m.end_epoch()
    m.end_run()
    return {"accuracy": right / 20}


@pattern
def several_labels_for_each_sample(make: Make) -> dict[str, float]:
    m, network, right = make(), net(), 0
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    for inputs, labels in LOADER:
        target = torch.stack([labels > 0, labels > 1, labels < 9], 1).float()
        preds = network(inputs)
        m.track_loss(F.binary_cross_entropy_with_logits(preds, target), len(target))
        m.track_num_correct(preds.sigmoid(), target)
        right += int((preds > 0).eq(target > 0.5).sum())
    m.end_epoch()
    m.end_run()
    return {"accuracy": right / 60}


@pattern
def an_accuracy_of_one_s_own(make: Make) -> dict[str, float]:
    def within(preds: Tensor, values: Tensor) -> Tensor:
        return (preds - values).abs().lt(0.5).sum()

    m, network, near = make(accuracy=within), nn.Linear(4, 1), 0
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    for inputs, _ in LOADER:
        preds, values = network(inputs), inputs.sum(1, keepdim=True) / 4
        m.track_loss(F.mse_loss(preds, values), inputs)
        m.track_num_correct(preds, values)
        near += int((preds - values).abs().lt(0.5).sum())
    m.end_epoch()
    m.end_run()
    return {"accuracy": near / 20}


@pattern
def an_autoencoder_that_has_no_labels(make: Make) -> dict[str, float]:
    m, network, total = make(), nn.Linear(4, 4), 0.0
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    for inputs, _ in LOADER:
        loss = F.mse_loss(network(inputs), inputs)
        m.track_loss(loss)
        total += loss.item() * len(inputs)
    m.end_epoch()
    m.end_run()
    return {"loss": total / 20}


@pattern
def batches_that_are_mappings(make: Make) -> dict[str, float]:
    batches = [{"inputs": inputs, "labels": labels} for inputs, labels in LOADER]
    m, network, sums = make(), net(), Sums()
    m.begin_run(RUN, network, batches)
    m.begin_epoch()
    for batch in batches:
        preds = network(batch["inputs"])
        loss = F.cross_entropy(preds, batch["labels"])
        m.track_loss(loss, batch)
        m.track_num_correct(preds, batch["labels"])
        sums.add(loss, preds, batch["labels"])
    m.end_epoch()
    m.end_run()
    return sums.metrics()


# -- names, tables and tb ----------------------------------------------------------------------


@pattern
def tables_and_times(make: Make) -> dict[str, float]:
    m = make()
    metrics = one_run(m, LOADER)
    m.save("results")
    frame = pd.DataFrame(m.run_data)
    assert list(frame["accuracy"]) == [pytest.approx(metrics["accuracy"])]
    assert list(pd.read_csv("results.csv")["run"]) == [1]
    assert 0 <= time.time() - m.epoch_start_time <= time.time() - m.run_start_time < 600
    return metrics


@pattern
def the_later_versions_names(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER)
    while m.epoch.count < 2:
        m.begin_epoch()
        sums = epoch(m, network)
        assert m.epoch.loss / len(m.loader.dataset) == pytest.approx(sums.metrics()["loss"])
        m.end_epoch()
    m.end_run()
    assert m.run.params._asdict() == RUN
    assert [row["epoch"] for row in m.run.data] == [1, 2]
    return sums.metrics()


def add_to(tb: Any, network: nn.Module) -> None:
    tb.add_scalar("own", 0.5, 1)
    tb.add_scalars("both", {"a": 0.1, "b": 0.2}, 1)
    tb.add_histogram("weight", network.weight, 1)
    tb.add_image("picture", torch.rand(1, 4, 4))
    tb.add_pr_curve("curve", torch.tensor([0, 1]), torch.tensor([0.2, 0.9]))
    tb.flush()


@pattern
def additions_to_event_files(make: Make) -> dict[str, float]:
    m, network = make(tensorboard="events"), net()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    sums = epoch(m, network)
    add_to(m.tb, network)
    m.end_epoch()
    m.end_run()
    assert list(Path("events").iterdir())
    return sums.metrics()


@pattern
def additions_without_event_files(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    sums = epoch(m, network)
    add_to(m.tb, network)
    m.end_epoch()
    m.tb.close()
    m.end_run()
    return sums.metrics()


@pattern
def a_confusion_matrix_at_the_end(make: Make) -> dict[str, float]:
    m, network = make(), net()
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    sums = epoch(m, network)
    m.end_epoch()
    every = torch.cat([network(inputs) for inputs, _ in LOADER]).argmax(1)
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    for label, guess in zip(DATA.tensors[1], every, strict=True):
        matrix[label, guess] += 1
    m.run.log_text(str(matrix.tolist()), "confusion.txt")
    m.run.log_mistakes(network, LOADER, classes=["a", "b", "c"])
    m.end_run()
    return sums.metrics()


# -- subclasses --------------------------------------------------------------------------------


class WithDevice(RunManager):
    """Adds an argument and records to the tutorial's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.epoch_count = 0
        self.epoch_loss = 0
        self.run_data = []
        self.tb = None
        self.device: Any = None
        self.history: list[Any] = []

    def begin_run(self, run: Any, network: Any, loader: Any, device: str) -> Any:  # type: ignore[override]
        self.device = torch.device(device)
        return super().begin_run(run, network.to(device), loader)

    def begin_epoch(self) -> None:  # type: ignore[override]
        super().begin_epoch()
        self.epoch_loss = 0
        self.seen = 0

    def track_loss(self, loss: Any, batch: Any = None) -> None:
        super().track_loss(loss, batch)
        self.seen += len(batch[0])

    def end_epoch(self) -> dict[str, float]:  # type: ignore[override]
        duration = time.time() - self.epoch_start_time
        results = super().end_epoch({"seen": self.seen, "mean": self.epoch_loss / self.seen})
        self.history.append(OrderedDict(epoch=self.epoch_count, duration=duration, **results))
        return results


@pattern
def a_subclass_with_arguments_and_metrics_of_its_own(make: Make) -> dict[str, float]:
    m: Any = make(WithDevice)
    metrics = one_run(m, LOADER, "cpu")
    assert [row["epoch"] for row in m.history] == [1]
    return metrics | {"seen": 20.0, "mean": metrics["loss"]}


class ByHand(RunManager):
    """Adds up the losses by itself, as the tutorial's own class does."""

    def track_loss(self, loss: Any, batch: Any = None) -> None:
        self.epoch_loss += loss.item() * batch[0].shape[0]

    def track_num_correct(self, preds: Any, labels: Any) -> None:
        self.epoch_num_correct += self._get_num_correct(preds, labels)


@pattern
def a_subclass_that_adds_up_by_itself(make: Make) -> dict[str, float]:
    return one_run(make(ByHand), LOADER)


class HalfRight(RunManager):
    @torch.no_grad()
    def _get_num_correct(self, preds: Tensor, labels: Tensor) -> float:
        return len(labels) / 2


@pattern
def a_subclass_that_counts_otherwise(make: Make) -> dict[str, float]:
    return one_run(make(HalfRight), LOADER) | {"accuracy": 0.5}


class AppendsRows(RunManager):
    """Adds its own rows to `run_data`."""

    def end_epoch(self, *given: Any, **named: Any) -> dict[str, float]:
        results = super().end_epoch(*given, **named)
        self.run_data.append(OrderedDict(run=self.run_count, epoch=self.epoch_count, own=1.0))
        return results


@pattern
def a_subclass_that_appends_rows(make: Make) -> dict[str, float]:
    m = make(AppendsRows)
    metrics = one_run(m, LOADER)
    m.save("rows")
    assert list(pd.read_json("rows.json").columns)[-1] == "own"
    return metrics


@pattern
def gradients_accumulated_over_batches(make: Make) -> dict[str, float]:
    m, network, sums = make(batch_loss=True), net(), Sums()
    optimizer = optim.SGD(network.parameters(), lr=0.1)
    m.begin_run(RUN, network, LOADER)
    m.begin_epoch()
    for number, batch in enumerate(LOADER):
        preds = network(batch[0])
        loss = F.cross_entropy(preds, batch[1])
        (loss / 2).backward()
        m.track_loss(loss, batch)
        m.track_num_correct(preds, batch[1])
        sums.add(loss, preds, batch[1])
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    m.end_epoch()
    m.end_run()
    return sums.metrics()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_loop_as_people_write_it_is_tracked(
    name: str, shared_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared_store.uri)

    def make(kind: type[RunManager] = RunManager, **settings: Any) -> RunManager:
        return kind(experiment=name, model=False, histograms=False, **settings)

    expected = PATTERNS[name](make)

    runs = shared_store.runs(name)
    assert {run.info.status for run in runs} == {"FINISHED"}
    found = runs[-1].data.metrics
    assert {metric: found[metric] for metric in expected} == pytest.approx(expected, abs=1e-6)
