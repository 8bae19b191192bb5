"""The training loop computes what the same lines written by hand would."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from tracker import ArgumentError, Epoch, RunManager, evaluate, fit, run_epochs

patient = settings(deadline=None, max_examples=25)

Array = npt.NDArray[np.float64]
Batches = list[tuple[Tensor, Tensor]]


def lines(*sizes: int, seed: int = 0) -> Batches:
    """Batches of points near a plane, in float64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in sizes]
    return [(x, x.sum(1, keepdim=True) + 0.1 * torch.sin(9 * x[:, :1])) for x in inputs]


def clouds(*sizes: int) -> Batches:
    """Batches of points of three classes."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 2, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def sgd(network: nn.Module, rate: float = 0.1) -> SGD:
    return SGD(network.parameters(), lr=rate)


def plane() -> nn.Linear:
    network = nn.Linear(2, 1).double()
    nn.init.constant_(network.weight, 0.5)
    nn.init.zeros_(network.bias)
    return network


class Descent:
    """Least squares by gradient descent, with derivatives computed by hand."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.weight, self.bias = np.full((2, 1), 0.5), 0.0
        self.gradient = np.zeros((2, 1))

    def step(self, inputs: Array, targets: Array) -> float:
        """Take a step, and return the loss before it."""
        error = inputs @ self.weight + self.bias - targets
        self.gradient = 2 * inputs.T @ error / len(inputs)
        self.weight = self.weight - self.rate * self.gradient
        self.bias -= self.rate * 2 * error.mean()
        return float(np.square(error).mean())

    def loss(self, batches: Batches) -> float:
        inputs, targets = (np.concatenate(part) for part in zip(*batches, strict=True))
        return float(np.square(inputs @ self.weight + self.bias - targets).mean())


# -- what fit computes ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
@patient
def test_training_equals_a_computation_by_hand(sizes: list[int], epochs: int) -> None:
    """Batches of unequal sizes: the loss of an epoch is the mean over its samples."""
    batches, held_out = lines(*sizes), lines(7, 2, seed=1)
    network, by_hand = plane(), Descent(rate=0.05)
    training = fit(
        network,
        batches,
        sgd(network, 0.05),
        F.mse_loss,
        epochs=epochs,
        val_loader=held_out,
    )

    for number, epoch in enumerate(training, start=1):
        losses = [by_hand.step(x.numpy(), y.numpy()) for x, y in batches]
        assert epoch.number == number
        np.testing.assert_allclose(epoch.batch_losses, losses)
        assert epoch.metrics["loss"] == pytest.approx(np.average(losses, weights=sizes))
        assert epoch.metrics["val_loss"] == pytest.approx(by_hand.loss(held_out))
        np.testing.assert_allclose(network.weight.detach(), by_hand.weight.T)
        np.testing.assert_allclose(network.bias.detach(), [by_hand.bias])
    assert number == epochs


def test_a_scheduler_steps_after_each_batch() -> None:
    batches = lines(5, 3)
    network, by_hand = plane(), Descent(rate=0.1)
    optimizer = sgd(network)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))

    for _ in fit(network, batches, optimizer, F.mse_loss, epochs=2, scheduler=scheduler):
        pass

    for step, (inputs, targets) in enumerate(batches * 2):
        by_hand.rate = 0.1 / (1 + step)
        by_hand.step(inputs.numpy(), targets.numpy())
    np.testing.assert_allclose(network.weight.detach(), by_hand.weight.T)


def test_the_last_step_s_gradients_are_available_after_each_epoch() -> None:
    batches = lines(5, 3)
    network, by_hand = plane(), Descent(rate=0.1)

    for _ in fit(
        network,
        batches,
        sgd(network),
        F.mse_loss,
        epochs=3,
        val_loader=lines(4, seed=1),
    ):
        for inputs, targets in batches:
            by_hand.step(inputs.numpy(), targets.numpy())
        assert network.weight.grad is not None
        np.testing.assert_allclose(network.weight.grad, by_hand.gradient.T)


def test_accuracy_counts_each_sample_s_prediction_at_its_step() -> None:
    batches = clouds(40, 40, 7)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
    twin.load_state_dict(network.state_dict())
    optimizer = Adam(twin.parameters(), lr=0.1)

    for epoch in fit(
        network,
        batches,
        Adam(network.parameters(), lr=0.1),
        F.cross_entropy,
        epochs=3,
        val_loader=batches,
        accuracy=True,
    ):
        right = 0
        for inputs, labels in batches:
            scores = twin(inputs)
            right += (scores.argmax(1) == labels).sum().item()
            optimizer.zero_grad()
            F.cross_entropy(scores, labels).backward()
            optimizer.step()
        after = sum((twin(x).argmax(1) == y).sum().item() for x, y in batches)
        assert epoch.metrics["accuracy"] == right / 87
        assert epoch.metrics["val_accuracy"] == after / 87


def test_only_the_requested_metrics_are_computed() -> None:
    network = nn.Linear(2, 3)
    optimizer = sgd(network)
    batches = clouds(4, 4)

    def keys(**options: Any) -> list[str]:
        (epoch,) = fit(network, batches, optimizer, F.cross_entropy, epochs=1, **options)
        return list(epoch.metrics)

    assert keys() == ["loss", "epoch_duration"]
    assert keys(accuracy=True) == ["loss", "accuracy", "epoch_duration"]
    assert keys(val_loader=batches) == ["loss", "val_loss", "epoch_duration"]
    assert keys(val_loader=batches, accuracy=True) == [
        *("loss", "accuracy", "val_loss", "val_accuracy", "epoch_duration"),
    ]


def test_batch_times_and_epoch_durations_are_recorded() -> None:
    network = plane()
    before, started = time.time(), time.perf_counter()
    epochs = list(fit(network, lines(4, 4, 1), sgd(network), F.mse_loss, epochs=2))
    took, after = time.perf_counter() - started, time.time()

    times = [int(before * 1000), *(at for each in epochs for at in each.batch_times), after * 1000]
    assert times == sorted(times)
    assert [len(each.batch_times) for each in epochs] == [3, 3]
    assert all(each.metrics["epoch_duration"] > 0 for each in epochs)
    assert sum(each.metrics["epoch_duration"] for each in epochs) <= took


def test_the_next_epoch_does_not_change_the_previous_result() -> None:
    network = plane()
    training = fit(network, lines(4, 4), sgd(network), F.mse_loss, epochs=2)

    first = next(training)
    losses, metrics = first.batch_losses.tolist(), dict(first.metrics)
    second = next(training)

    assert isinstance(first, Epoch)
    assert first.batch_losses.tolist() == losses
    assert first.metrics == metrics
    assert second.metrics["loss"] < first.metrics["loss"]


# -- samplers that are told the epoch ------------------------------------------------------------


class Shuffled(DistributedSampler[Any]):
    """The share of one of two ranks, in a different order in each epoch."""

    def __init__(self) -> None:
        super().__init__(NUMBERS, num_replicas=2, rank=1, shuffle=True)


class ShuffledBatches(BatchSampler):
    """A batch sampler that must be told the epoch itself."""

    def __init__(self) -> None:
        self.shares = Shuffled()
        super().__init__(self.shares, 2, drop_last=False)
        self.sampler = range(8)

    def set_epoch(self, epoch: int) -> None:
        self.shares.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return BatchSampler(self.shares, 2, drop_last=False).__iter__()


NUMBERS = TensorDataset(torch.arange(8.0).reshape(8, 1))
LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "sampler": lambda: DataLoader(NUMBERS, batch_size=2, sampler=Shuffled()),
    "batch_sampler": lambda: DataLoader(NUMBERS, batch_sampler=ShuffledBatches()),
    "batch_sampler.sampler": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(Shuffled(), 2, drop_last=False)
    ),
}


class Pairs:
    """A loader of another kind, with batches (inputs, targets), that notes its samples."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.sampler, self.batch_sampler = loader.sampler, loader.batch_sampler
        self.loader, self.epochs = loader, list[list[int]]()

    def __iter__(self) -> Iterator[Any]:
        self.epochs.append([])
        for (numbers,) in self.loader:
            self.epochs[-1] += numbers.flatten().int().tolist()
            yield numbers, numbers


@pytest.mark.parametrize("done", [0, 1, 3])
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("loop", ["fit", "run_epochs", "progress"])
def test_samplers_shuffle_each_epoch_anew_as_in_a_loop_that_calls_set_epoch(
    loop: str, kind: str, done: int
) -> None:
    sampler, expected = Shuffled(), []
    for epoch in range(done, 4):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    assert len({tuple(order) for order in expected}) == len(expected)
    loader, network = Pairs(LOADERS[kind]()), nn.Linear(1, 1)

    def steps(number: int) -> Iterator[tuple[Tensor, int]]:
        for inputs, _ in loader:
            yield inputs.mean(), len(inputs)

    if loop == "run_epochs":
        epochs = run_epochs(steps, epochs=4, done=done, loader=loader)
    else:
        shown: Any = RunManager().progress(loader) if loop == "progress" else loader
        epochs = fit(network, shown, sgd(network), F.mse_loss, epochs=4, done=done)

    assert [epoch.number for epoch in epochs] == list(range(done + 1, 5))
    assert loader.epochs == expected


def test_a_loader_is_told_the_epoch_itself() -> None:
    class Streamed(list[Any]):
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    told: list[int] = []
    network = plane()
    list(fit(network, Streamed(lines(4)), sgd(network), F.mse_loss, epochs=3))

    assert told == [0, 1, 2]


# -- how fit ends --------------------------------------------------------------------------------


class Counted:
    """Batches that count how many were read."""

    def __init__(self, batches: Batches) -> None:
        self.batches, self.read = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.read += 1
            yield batch


def test_training_is_lazy() -> None:
    network, batches = plane(), Counted(lines(4, 4))

    training = fit(network, batches, sgd(network), F.mse_loss, epochs=3)
    assert batches.read == 0

    next(training)
    assert batches.read == 2


def test_break_stops_training() -> None:
    network, batches = plane(), Counted(lines(4, 4))

    for epoch in fit(network, batches, sgd(network), F.mse_loss, epochs=9):
        weight = network.weight.detach().clone()
        if epoch.number == 2:
            break

    assert batches.read == 4
    assert torch.equal(network.weight, weight)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"epochs": 0}, r"^epochs=0 is not allowed; .* at least 1\.$"),
        ({"epochs": -1}, r"^epochs=-1 is not allowed; .* at least 1\.$"),
        ({"epochs": 3, "done": -1}, r"^done=-1 is not allowed; .* at least 0\.$"),
    ],
)
def test_invalid_numbers_of_epochs_are_refused_at_once(
    numbers: dict[str, int], message: str
) -> None:
    network = plane()

    with pytest.raises(ArgumentError, match=message):
        fit(network, lines(4), sgd(network), F.mse_loss, **numbers)


def test_errors_of_the_network_are_passed_through() -> None:
    network = plane()
    wrong = [(torch.ones(4, 5, dtype=torch.float64), torch.ones(4, 1, dtype=torch.float64))]

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        list(fit(network, wrong, sgd(network), F.mse_loss, epochs=1))


def test_an_epoch_without_batches_has_only_a_duration() -> None:
    network = plane()

    (epoch,) = fit(network, [], sgd(network), F.mse_loss, epochs=1)

    assert list(epoch.metrics) == ["epoch_duration"]
    assert epoch.batch_losses.tolist() == epoch.batch_times == []


# -- modes ---------------------------------------------------------------------------------------


class Witness(nn.Module):
    """Records its modes, and whether gradients were enabled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm1d(1).double().eval()
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append((self.training, self.drop.training, torch.is_grad_enabled()))
        return self.frozen(self.drop(inputs.sum(1, keepdim=True) * self.scale))


def modes(network: nn.Module) -> list[bool]:
    return [module.training for module in network.modules()]


def test_training_keeps_each_module_s_mode_and_validation_uses_evaluation_mode() -> None:
    network = Witness()
    before = modes(network)
    assert len(set(before)) == 2  # one layer is frozen

    for _ in fit(
        network,
        lines(3, 3),
        sgd(network),
        F.mse_loss,
        epochs=2,
        val_loader=lines(2),
    ):
        assert modes(network) == before

    training, evaluating = (True, True, True), (False, False, False)
    assert network.seen == [training, training, evaluating] * 2


def test_a_network_in_evaluation_mode_is_trained_in_that_mode() -> None:
    network = Witness().eval()
    list(fit(network, lines(3), sgd(network), F.mse_loss, epochs=1))

    assert network.seen == [(False, False, True)]
    assert not any(modes(network))


def test_modes_are_restored_after_an_error() -> None:
    network = Witness()
    before = modes(network)

    def fail(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ArithmeticError("no loss today")

    with pytest.raises(ArithmeticError, match="no loss today"):
        evaluate(network, lines(3), fail)
    assert modes(network) == before
    assert torch.is_grad_enabled()


# -- evaluate ------------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_all_samples() -> None:
    network, batches = plane(), lines(8, 8, 3)
    expected = Descent(rate=0.0).loss(batches)

    assert evaluate(network, batches, F.mse_loss) == {"loss": pytest.approx(expected)}


def test_evaluation_computes_loss_and_accuracy_over_all_samples() -> None:
    batches = clouds(8, 3)
    network = nn.Linear(2, 3)

    result = evaluate(network, batches, F.cross_entropy, accuracy=True)

    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert result == {
        "loss": pytest.approx(F.cross_entropy(network(inputs), labels).item(), rel=1e-5),
        "accuracy": (network(inputs).argmax(1) == labels).sum().item() / 11,
    }


def test_segmentation_accuracy_is_per_pixel() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(size, 3, 4, 5, generator=generator),
            torch.randint(3, (size, 4, 5), generator=generator),
        )
        for size in (6, 1)
    ]

    result = evaluate(nn.Identity(), batches, F.cross_entropy, accuracy=True)

    inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert result["accuracy"] == (inputs.argmax(1) == labels).sum().item() / labels.numel()
    assert result["loss"] == pytest.approx(F.cross_entropy(inputs, labels).item(), rel=1e-5)


def test_evaluation_does_not_change_the_network() -> None:
    network = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)).double()
    network[0].weight.grad = torch.ones(1, 2, dtype=torch.float64)
    state = {name: value.clone() for name, value in network.state_dict().items()}

    evaluate(network, lines(8, 3), F.mse_loss)

    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert torch.equal(network[0].weight.grad, torch.ones(1, 2, dtype=torch.float64))
    assert network[1].training


def test_evaluating_an_empty_loader_returns_no_metrics() -> None:
    assert evaluate(plane(), [], F.mse_loss, accuracy=True) == {}


# -- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")], ids=str)
def test_batches_are_moved_to_the_network_s_or_the_given_device(device: Any) -> None:
    network, batches = plane(), lines(4)

    result = evaluate(network, batches, F.mse_loss, device=device)

    assert result == evaluate(network, batches, F.mse_loss)


@pytest.mark.parametrize("device", [None, "meta"])
def test_the_device_of_a_network_without_parameters_can_be_given(device: str | None) -> None:
    places: set[str] = set()

    class Nowhere(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            places.add(inputs.device.type)
            return torch.zeros(len(inputs))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        places.add(targets.device.type)
        return outputs.mean()

    assert evaluate(Nowhere(), lines(4), loss, device=device) == {"loss": 0.0}
    assert places == {device or "cpu"}


def on_gpu(batches: Iterable[Any]) -> Batches:
    return [(inputs.cuda(), targets.cuda()) for inputs, targets in batches]


@pytest.mark.cuda
def test_training_on_a_gpu_equals_training_on_the_cpu() -> None:
    network, there = plane(), plane().cuda()
    options: dict[str, Any] = {"epochs": 3, "val_loader": lines(7, 2, seed=1)}
    here = fit(network, lines(5, 3), sgd(network), F.mse_loss, **options)
    away = fit(there, lines(5, 3), sgd(there), F.mse_loss, **options)

    for one, other in zip(here, away, strict=True):
        np.testing.assert_allclose(one.batch_losses, other.batch_losses)
        assert one.metrics["val_loss"] == pytest.approx(other.metrics["val_loss"])


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_waits_for_the_gpu() -> None:
    network = nn.Linear(2, 3).cuda()
    batches = on_gpu(clouds(8, 8, 8))
    steps: list[Tensor] = []

    def watched() -> Iterator[Any]:
        yield batches[0]  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        steps.append(outputs)
        return F.cross_entropy(outputs, targets)

    (epoch,) = fit(network, watched(), sgd(network), loss, epochs=1, accuracy=True)

    assert len(steps) == 4
    assert np.isfinite(epoch.batch_losses).all()
