"""What an epoch shows of its loop, with no line of the user's."""

from __future__ import annotations

import gc
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.helpers import Store
from tracker import RunManager, fit, run_epochs
from tracker.training import watch
from tracker.training.meters import EpochMeter
from tracker.training.networks import as_networks
from tracker.training.watch import LoopWatch, gradient_norm

SAMPLES = 12


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "perf_counter", clock)
    return clock


class Slow(Dataset[Any]):
    """Each sample takes a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.clock.now += 1
        return torch.full((4,), float(index)), index % 3


class Nested(IterableDataset[Any]):
    """Draws its samples from another loader."""

    def __init__(self, clock: Clock) -> None:
        self.inner = DataLoader(Slow(clock), 1)

    def __iter__(self) -> Iterator[Any]:
        for inputs, labels in self.inner:
            yield inputs[0], labels[0]


def network_of(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def train(
    network: nn.Module, loader: Iterable[Any], optimizer: optim.Optimizer, m: RunManager
) -> None:
    for inputs, labels in loader:
        loss = F.cross_entropy(network(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        m.track_loss(loss, inputs)


def watched(loader: Any, loop: Callable[[EpochMeter], None]) -> dict[str, float]:
    """The metrics of an epoch of `loop`."""
    watching = LoopWatch(None, loader)
    watching.begin()
    meter = EpochMeter(loader)
    loop(meter)
    try:
        return watching.end(meter)
    finally:
        watching.close()


# -- a manager ------------------------------------------------------------------------------------


def test_a_loop_without_a_further_line_has_metrics_in_groups(
    store: Store, clock: Clock, manager: RunManager, workdir: Path
) -> None:
    network = network_of(4, 8, 3)
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    schedule = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    loader = DataLoader(Slow(clock), 5)
    manager.begin_run({"lr": 1.0}, network, loader)
    norms = []
    for _ in range(2):
        manager.begin_epoch()
        clock.now += SAMPLES  # something else
        train(network, loader, optimizer, manager)
        grads = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        norms.append(float(grads.norm()))
        schedule.step()
        manager.end_epoch()
    manager.end_run()
    manager.save("table")

    run = store.run()
    assert store.history(run, "train/lr") == [(1, 1.0), (2, 0.5)]
    assert store.history(run, "system/data_wait") == [(1, 0.5), (2, 0.5)]
    assert store.history(run, "system/samples_per_second") == [(1, 0.5), (2, 0.5)]
    assert [value for _, value in store.history(run, "train/gradient_norm")] == pytest.approx(norms)
    plain = {"loss", "epoch_duration", "run_duration"}
    grouped = {"train/lr", "train/gradient_norm", "system/data_wait", "system/samples_per_second"}
    assert set(run.data.metrics) == plain | grouped
    tables = [Path("table.json").read_text(), store.text(run, "epochs.json", workdir)]
    for table in [manager.run_data, *map(json.loads, tables)]:
        assert not any("/" in column for row in table for column in row)  # no wider than before


def test_metrics_of_the_loop_can_be_switched_off(store: Store) -> None:
    network = network_of(4, 3)
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    with RunManager(model=False, loop_metrics=False) as m:
        m.begin_run({}, network, None)
        m.begin_epoch()
        train(network, [(torch.ones(2, 4), torch.tensor([0, 1]))], optimizer, m)
        m.end_epoch()
        m.log_epoch(next(fit(network, [], optimizer, F.cross_entropy, epochs=1)))
        m.end_run()
    assert set(store.run().data.metrics) == {"loss", "epoch_duration", "run_duration"}


def test_the_user_s_metrics_of_the_same_name_stay(store: Store, manager: RunManager) -> None:
    network = network_of(4, 3)
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    manager.begin_run({}, network, None)
    manager.begin_epoch()
    train(network, [(torch.ones(2, 4), torch.tensor([0, 1]))], optimizer, manager)
    manager.end_epoch({"train/lr": 7.0, "system": 3.0})
    manager.end_run()
    metrics = store.run().data.metrics
    assert (metrics["train/lr"], metrics["system"]) == (7.0, 3.0)
    assert not any(
        name.startswith("system/") for name in metrics
    )  # a file store has no room for it


def test_an_epoch_of_fit_is_logged_with_what_it_showed(
    store: Store, clock: Clock, manager: RunManager
) -> None:
    network = network_of(4, 3)
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loader = DataLoader(Slow(clock), 4)
    manager.begin_run({}, network, loader)
    for epoch in fit(
        network, loader, optimizer, F.cross_entropy, epochs=1, scheduler=schedule, val_loader=loader
    ):
        assert list(epoch.metrics) == ["loss", "val_loss", "epoch_duration"]
        manager.log_epoch(epoch)
    manager.end_run()
    metrics = store.run().data.metrics
    assert metrics.items() >= epoch.observed.items()
    assert epoch.observed == {
        "train/lr": 0.25,  # of the third and last step
        "system/data_wait": 1.0,
        "system/samples_per_second": 1.0,  # of the training alone
    }
    assert metrics["train/gradient_norm"] > 0


def test_a_resumed_epoch_counts_the_samples_of_this_process(clock: Clock) -> None:
    meter = EpochMeter()
    for _ in range(3):
        meter.add_loss(1.0, 10)
    watching = LoopWatch(None)
    watching.begin(2)
    clock.now += 5
    assert watching.end(meter) == {"system/samples_per_second": 2.0}
    watching.close()


# -- learning rates -------------------------------------------------------------------------------

ONE = [{"lr": 0.1}]
RATES = {
    "one group": ([ONE], {"train/lr": 0.1}),
    "groups": ([[{"lr": 0.1}, {"lr": 0.2}]], {"train/lr_0": 0.1, "train/lr_1": 0.2}),
    "named": (
        [[{"lr": 0.1, "name": "body"}, {"lr": 0.2, "name": "head 2"}]],
        {"train/lr_body": 0.1, "train/lr_head 2": 0.2},
    ),
    "partly named": (
        [[{"lr": 0.1, "name": "body"}, {"lr": 0.2}]],
        {"train/lr_0": 0.1, "train/lr_1": 0.2},
    ),
    "equal names": ([[{"lr": 0.1, "name": "a"}]] * 2, {"train/lr_0": 0.1, "train/lr_1": 0.1}),
    "names that MLflow refuses": (
        [[{"lr": 0.1, "name": "a@b"}, {"lr": 0.2, "name": "c/d"}]],
        {"train/lr_0": 0.1, "train/lr_1": 0.2},
    ),
    "two optimizers": ([ONE, [{"lr": 0.3}]], {"train/lr_0": 0.1, "train/lr_1": 0.3}),
    "a tensor": ([[{"lr": torch.tensor(0.5)}]], {"train/lr": 0.5}),
    "none": ([[{"lr": None}]], {}),
    "a group for each parameter": (
        [[{"lr": 0.1 + number} for number in range(40)]],
        {"train/lr_lowest": 0.1, "train/lr_highest": 39.1},
    ),
}


class Still(optim.Optimizer):
    """Changes nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(("optimizers", "expected"), RATES.values(), ids=RATES)
def test_each_group_of_each_optimizer_has_a_curve(
    optimizers: list[list[dict[str, Any]]], expected: dict[str, float]
) -> None:
    network = nn.ParameterList()
    steps: list[optim.Optimizer] = []
    for groups in optimizers:
        given = []
        for group in groups:
            network.append(nn.Parameter(torch.zeros(1)))
            given.append({"params": [network[len(network) - 1]], **group})
        steps.append(Still(given, {}))
    other = Still([nn.Parameter(torch.zeros(1))], {"lr": 9.0})  # of another network
    watching = LoopWatch(network)
    for _ in range(2):
        watching.begin()
        for optimizer in [*steps, other]:
            optimizer.step()
            for group in optimizer.param_groups:  # as a scheduler would after the step
                if isinstance(group["lr"], float):
                    group["lr"] += 100
        assert watching.end(EpochMeter()) == pytest.approx(expected)
        for optimizer in steps:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], float):
                    group["lr"] -= 100
    watching.begin()
    assert watching.end(EpochMeter()) == {}  # no step in this epoch
    watching.close()


def test_a_curve_keeps_its_name_if_another_optimizer_pauses_or_comes_later() -> None:
    network = network_of(2, 3, 4)
    body = optim.SGD(network[0].parameters(), 0.1)
    watching, found = LoopWatch(network), []

    def epoch(*optimizers: optim.Optimizer) -> None:
        watching.begin()
        for optimizer in optimizers:
            optimizer.step()
        found.append(watching.end(EpochMeter()))

    epoch(body)
    head = optim.SGD(network[1].parameters(), 0.2)
    epoch(body, head)
    epoch(head)
    head.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3})
    epoch(head, body)
    del body
    epoch(head, optim.SGD(network[0].parameters(), 0.4))
    assert found == [
        {"train/lr": 0.1},
        {"train/lr": 0.1, "train/lr_1": 0.2},
        {"train/lr_1": 0.2},
        {"train/lr": 0.1, "train/lr_1": 0.2, "train/lr_2": 0.3},
        {"train/lr_1": 0.2, "train/lr_2": 0.3, "train/lr_0": 0.4},
    ]


def test_the_curves_of_several_networks_have_their_names() -> None:
    networks = as_networks({"G": network_of(2, 3), "D": network_of(3, 1)})
    watching = LoopWatch(networks)
    watching.begin()
    rates = {"D": 0.2, "G": 0.1}
    optimizers = [optim.SGD(networks.parts[name].parameters(), rates[name]) for name in rates]
    for optimizer in optimizers:
        optimizer.step()
    assert watching.end(EpochMeter()) == {"train/lr_D": 0.2, "train/lr_G": 0.1}


def test_the_rates_of_a_network_that_replaces_another_are_seen(
    store: Store, manager: RunManager
) -> None:
    manager.begin_run({}, network_of(4, 3))
    for rate, sizes in ((0.5, (4, 3)), (0.25, (4, 2, 3))):
        manager.network = network_of(*sizes)
        optimizer = optim.SGD(manager.network.parameters(), rate)
        manager.begin_epoch()
        manager.network(torch.rand(2, 4)).sum().backward()
        optimizer.step()
        manager.track_loss(1.0, 2)
        manager.end_epoch()
    manager.end_run()
    assert store.history(store.run(), "train/lr") == [(1, 0.5), (2, 0.25)]


def test_a_custom_step_has_the_rates_of_its_own_thread() -> None:
    network = network_of(4, 3)
    optimizer = optim.SGD(network.parameters(), lr=0.25)
    elsewhere = Still([nn.Parameter(torch.zeros(1))], {"lr": 9.0})

    def step(number: int) -> Iterator[tuple[Tensor, int]]:
        optimizer.step()
        thread = threading.Thread(target=elsewhere.step)
        thread.start()
        thread.join()
        yield torch.tensor(1.0), 10

    (epoch,) = run_epochs(step, epochs=1)
    assert epoch.observed["train/lr"] == 0.25
    assert "system/data_wait" not in epoch.observed


# -- waiting for data -----------------------------------------------------------------------------


def over(loader: Iterable[Any], clock: Clock, most: int = 99) -> Callable[[EpochMeter], None]:
    """A loop that spends as long on a batch as its samples take to be loaded."""

    def loop(meter: EpochMeter) -> None:
        for number, (inputs, _) in enumerate(loader, 1):
            clock.now += len(inputs)
            meter.add_loss(1.0, len(inputs))
            if number == most:
                break

    return loop


def test_a_loop_waits_for_half_of_the_time_if_loading_takes_as_long_as_training(
    clock: Clock,
) -> None:
    loaders = {
        "plain": DataLoader(Slow(clock), 5),
        "nested": DataLoader(Nested(clock), 5),
        "one at a time": DataLoader(Slow(clock), 1),
    }
    for name, loader in loaders.items():
        for most in (2, 99):
            metrics = watched(loader, over(loader, clock, most))
            assert metrics["system/data_wait"] == 0.5, name


def test_time_until_a_loader_fails_is_waiting(clock: Clock) -> None:
    class Failing(Slow):
        def __getitem__(self, index: int) -> Any:
            if index == 8:
                raise OSError("no such file")
            return super().__getitem__(index)

    loader = DataLoader(Failing(clock), 4)

    def loop(meter: EpochMeter) -> None:
        with pytest.raises(OSError, match="no such file"):
            over(loader, clock)(meter)

    for _ in range(2):  # the next epoch is measured, too
        assert watched(loader, loop)["system/data_wait"] == 0.5


def test_a_loader_that_is_not_torch_s_has_no_wait(clock: Clock) -> None:
    batches = [(torch.zeros(4, 4), torch.zeros(4))] * 3
    assert "system/data_wait" not in watched(batches, over(batches, clock))
    validation = DataLoader(Slow(clock), 6)

    def loop(meter: EpochMeter) -> None:
        over(batches, clock)(meter)
        list(validation)  # two batches for three steps: not those of the loop

    assert "system/data_wait" not in watched(batches, loop)


def test_fit_measures_the_wait_for_any_loader(clock: Clock) -> None:
    def batches() -> Iterator[Any]:
        for _ in range(3):
            clock.now += 1
            yield torch.zeros(4, 4), torch.zeros(4, dtype=torch.long)

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return batches()

    network = network_of(4, 3)
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    (epoch,) = fit(network, Stream(), optimizer, F.cross_entropy, epochs=1)
    assert epoch.observed["system/data_wait"] == 1.0


def test_other_threads_and_processes_load_without_being_measured(clock: Clock) -> None:
    loader = DataLoader(Slow(clock), 5, num_workers=1, timeout=60)

    def loop(meter: EpochMeter) -> None:
        thread = threading.Thread(target=list, args=[DataLoader(Slow(clock), 5)])
        thread.start()
        thread.join()
        over(loader, clock)(meter)

    assert watched(loader, loop)["system/data_wait"] == 0.0  # the worker's clock is its own


def test_epochs_that_are_open_at_once_wait_for_the_same_data(clock: Clock) -> None:
    loader = DataLoader(Slow(clock), 5)
    inner: dict[str, float] = {}

    def loop(meter: EpochMeter) -> None:
        inner.update(watched(loader, over(loader, clock)))
        clock.now += 2 * SAMPLES

    outer = watched(loader, loop)
    assert (inner["system/data_wait"], outer["system/data_wait"]) == (0.5, 0.25)


def test_guessed_sizes_give_no_speed(clock: Clock) -> None:
    def loop(meter: EpochMeter) -> None:
        clock.now += 1
        meter.add_loss(1.0)

    assert watched(None, loop) == {}
    assert watched(DataLoader(Slow(clock), 5), loop) == {"system/samples_per_second": 5.0}


# -- the end --------------------------------------------------------------------------------------


def nothing_is_watched() -> bool:
    gc.collect()
    return not watch._threads and not watch._watched and watch._hook is None


def test_nothing_is_watched_once_a_run_ends_or_its_manager_is_dropped(store: Store) -> None:
    assert nothing_is_watched()
    network = network_of(4, 3)
    manager = RunManager(model=False)
    manager.begin_run({}, network, None)
    manager.begin_epoch()
    assert not nothing_is_watched()
    manager.end_run()  # within the epoch
    assert nothing_is_watched()
    manager.begin_run({}, network, None)
    manager.begin_epoch()
    del manager
    assert nothing_is_watched()
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    epochs = fit(network, [], optimizer, F.cross_entropy, epochs=2)
    next(epochs)
    assert not nothing_is_watched()
    del epochs
    assert nothing_is_watched()


# -- gradients and memory -------------------------------------------------------------------------

NUMBERS = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5)


@given(st.lists(NUMBERS, min_size=1, max_size=4), st.sampled_from(["float32", "float64"]))
@settings(deadline=None, max_examples=30)
def test_the_norm_is_that_of_all_gradients_together(rows: list[list[float]], dtype: str) -> None:
    network = nn.ParameterList(torch.zeros(len(row), dtype=getattr(torch, dtype)) for row in rows)
    for parameter, row in zip(network, rows, strict=True):
        parameter.grad = torch.tensor(row, dtype=parameter.dtype)
    norm = gradient_norm(network)
    assert norm is not None
    expected = math.sqrt(sum(value**2 for row in rows for value in row))
    assert float(norm) == pytest.approx(expected, rel=1e-4, abs=1e-20)


def test_sparse_and_short_gradients_have_a_norm_and_missing_ones_none() -> None:
    network = nn.Embedding(5, 2, sparse=True)
    assert gradient_norm(network) is None
    network(torch.tensor([1, 1])).sum().backward()
    assert float(gradient_norm(network) or 0) == pytest.approx(math.sqrt(8))
    half = nn.ParameterList([torch.zeros(4, dtype=torch.float16)])
    half[0].grad = torch.full((4,), 6e4, dtype=torch.float16)
    assert float(gradient_norm(half) or 0) == pytest.approx(1.2e5, rel=1e-2)


def test_gradients_that_were_set_to_zero_have_no_norm(store: Store, manager: RunManager) -> None:
    network = network_of(4, 3)
    optimizer = optim.SGD(network.parameters(), lr=1.0)
    manager.begin_run({}, network, None)
    for to_none in (True, False):
        manager.begin_epoch()
        train(network, [(torch.ones(2, 4), torch.tensor([0, 1]))], optimizer, manager)
        optimizer.zero_grad(set_to_none=to_none)
        manager.end_epoch()
    manager.end_run()
    assert "train/gradient_norm" not in store.run().data.metrics


@pytest.mark.cuda
def test_the_peak_memory_of_a_gpu_is_read_and_not_reset() -> None:
    network = network_of(4, 3).cuda()
    torch.zeros(10**7, device="cuda")
    peak = torch.cuda.max_memory_allocated()
    watching = LoopWatch(network)
    watching.begin()
    metrics = watching.end(EpochMeter())
    watching.close()
    assert metrics["system/torch_peak_memory_megabytes"] == peak / 1e6 > 40
    assert torch.cuda.max_memory_allocated() == peak
