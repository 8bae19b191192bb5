"""The training loop as a generator, without callbacks.

    for epoch in fit(network, loader, optimizer, F.cross_entropy, epochs=3):
        print(epoch.number, epoch.metrics)

The body of the loop does what should happen between two epochs: log, `break`, or step a scheduler
that counts epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tracker.errors import ArgumentError
from tracker.training.device import device_of, evaluation_mode
from tracker.training.meters import EpochMeter
from tracker.training.watch import LoopWatch, waited
from tracker.transfers import to_device

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Epoch:
    """The results of one epoch."""

    number: int
    """Counted from 1."""
    metrics: dict[str, float]
    """`loss`, `accuracy`, their `val_` counterparts, and `epoch_duration` in seconds."""
    batch_losses: npt.NDArray[np.float64]
    """Mean loss of each batch, shape (batches,); of this rank only."""
    batch_times: list[int]
    """When each batch was completed, in milliseconds since 1970."""
    observed: Mapping[str, float] = field(default_factory=dict)
    """Learning rates, speed, waiting for data and memory in training, named as a manager's."""


def fit(
    network: nn.Module,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss_fn: Loss,
    *,
    epochs: int,
    done: int = 0,
    device: torch.device | str | None = None,
    val_loader: Iterable[Any] | None = None,
    accuracy: bool = False,
    scores: Callable[[Tensor], Tensor] | None = None,
    scheduler: LRScheduler | None = None,
) -> Iterator[Epoch]:
    """Train `network` and yield after each epoch, with the last step's gradients in place.

    In a process group, loss and accuracy cover all ranks: one collective per epoch. All ranks must
    train the same number of epochs, and all or none with a `val_loader`.

    Args:
        network: Trained in its current modes (`train()`, `eval()`).
        loader: Batches of (inputs, targets). Samplers with `set_epoch`, such as DistributedSampler,
            are told each epoch.
        optimizer: Takes one step per batch.
        loss_fn: `loss_fn(outputs, targets)` returns the mean loss of a batch, a scalar.
        epochs: Number of epochs in total.
        done: Epochs already completed, when training is resumed.
        device: Where batches are moved; by default the network's device.
        val_loader: Evaluated after each epoch.
        accuracy: Also compute the accuracy: outputs are scores (N, classes, …) and targets are
            class numbers (N, …).
        scores: Turns outputs into such scores, if they are something else.
        scheduler: Takes one step per batch, as OneCycleLR requires.

    Raises:
        ArgumentError: `epochs` is below 1 or `done` below 0.
    """

    said: set[str] = set()

    def train(meter: EpochMeter) -> Iterator[None]:
        for outputs, targets in _forward(network, loader, device):
            loss = loss_fn(outputs, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            meter.add_loss(loss, len(targets))
            if accuracy:
                meter.add_correct(outputs if scores is None else scores(outputs), targets)
            yield

    def validate() -> Mapping[str, float]:
        if val_loader is None:
            return {}
        meter = EpochMeter(said=said)
        metrics = _evaluated(meter, network, val_loader, loss_fn, device, accuracy, scores)
        return {f"val_{name}": value for name, value in metrics.items()}

    numbers = _numbers(epochs, done)
    return _epochs(lambda number, meter: train(meter), validate, numbers, loader, network)


def run_epochs(
    train: Callable[[int], Iterable[tuple[Tensor, int]]],
    *,
    epochs: int,
    done: int = 0,
    validate: Callable[[], Mapping[str, float]] = dict,
    loader: Any = None,
) -> Iterator[Epoch]:
    """Train with custom steps and yield after each epoch, as `fit` does with the usual ones.

    Args:
        train: `train(number)` runs one epoch. After each step it yields the mean loss, which may
            stay on the device, and the number of samples.
        epochs: Number of epochs in total.
        done: Epochs already completed, when training is resumed.
        validate: Returns further metrics after an epoch.
        loader: What `train` draws from; its samplers with `set_epoch` are told each epoch.

    Raises:
        ArgumentError: `epochs` is below 1 or `done` below 0.
    """

    def add(number: int, meter: EpochMeter) -> Iterator[None]:
        for loss, samples in train(number):
            meter.add_loss(loss, samples)
            yield

    return _epochs(add, validate, _numbers(epochs, done), loader)


def _numbers(epochs: int, done: int) -> range:
    for name, value, least in (("epochs", epochs, 1), ("done", done, 0)):
        if not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}={value} is not allowed; it must be at least {least}.")
    return range(done + 1, epochs + 1)


def _epochs(
    train: Callable[[int, EpochMeter], Iterator[None]],
    validate: Callable[[], Mapping[str, float]],
    numbers: range,
    loader: Any,
    network: nn.Module | None = None,
) -> Iterator[Epoch]:
    said: set[str] = set()
    watch = LoopWatch(network, loader)
    try:
        for number in numbers:
            started = time.perf_counter()
            set_epoch(loader, number - 1)
            watch.begin()
            meter = EpochMeter(said=said)
            times = [time.time_ns() // 1_000_000 for _ in train(number, meter)]
            metrics = meter.compute()
            observed = watch.end(meter)
            metrics |= validate()
            metrics["epoch_duration"] = time.perf_counter() - started
            yield Epoch(number, metrics, meter.losses, times, observed)
    finally:
        watch.close()


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell a loader and its samplers which epoch begins, counted from 0 as in torch.

    Without it a DistributedSampler repeats the order of its first epoch.
    """
    for name in ("", "sampler", "batch_sampler", "batch_sampler.sampler"):
        try:
            part = attrgetter(name)(loader) if name else loader
        except AttributeError:
            continue
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(epoch)


def evaluate(
    network: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    device: torch.device | str | None = None,
    accuracy: bool = False,
    scores: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Compute the mean loss of `network` over `loader`, in evaluation mode.

    In a process group this is a collective: all ranks must call it, each with its share of the
    data, which may be empty. If the shares differ in their number of batches, pass the network
    inside DistributedDataParallel, whose own forward may wait for the other ranks.

    Args:
        network: Its modes are restored.
        loader: Batches of (inputs, targets).
        loss_fn: See `fit`, like the following ones.
        device: See `fit`.
        accuracy: See `fit`.
        scores: See `fit`.

    Returns:
        `loss` and, if requested, `accuracy`; empty without samples.
    """
    return _evaluated(EpochMeter(), network, loader, loss_fn, device, accuracy, scores)


@torch.no_grad()
def _evaluated(
    meter: EpochMeter,
    network: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    device: torch.device | str | None,
    accuracy: bool,
    scores: Callable[[Tensor], Tensor] | None,
) -> dict[str, float]:
    with evaluation_mode(network):
        for outputs, targets in _forward(network, loader, device):
            meter.add_loss(loss_fn(outputs, targets), len(targets))
            if accuracy:
                meter.add_correct(outputs if scores is None else scores(outputs), targets)
    return meter.compute()


def _forward(
    network: nn.Module, loader: Iterable[Any], device: torch.device | str | None
) -> Iterator[tuple[Any, Any]]:
    """The network's outputs and the targets of each batch, on the device."""
    target = device_of(network) if device is None else torch.device(device)
    for inputs, targets in waited(loader):
        outputs = network(to_device(inputs, target))
        yield outputs, to_device(targets, target)
