"""The training loop: generators, no callbacks. They know neither MLflow nor Optuna.

    for epoch in fit(network, loader, optimizer, F.cross_entropy, epochs=3):
        print(epoch.number, epoch.metrics)

What should happen between two epochs (a log line, `break`, the step of a scheduler that counts
epochs) stands in the body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from tracker.errors import ArgumentError
from tracker.training.device import device_of, evaluation_mode
from tracker.training.meters import EpochMeter

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Epoch:
    """What one epoch of `fit` came to."""

    number: int
    """From 1."""
    metrics: dict[str, float]
    """`loss`, `accuracy`, their `val_` counterparts, `epoch_duration` in seconds."""
    batch_losses: npt.NDArray[np.float64]
    """The mean loss of each batch, in order; of this process alone, where several train."""
    batch_times: list[int]
    """When each of them was done, in milliseconds since 1970."""


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

    Batches are (inputs, targets). Both go to `device`, by default where the network is, and
    `loss_fn(outputs, targets)` is the mean over the batch. With `accuracy`, outputs are scores
    (N, classes, …), or `scores` makes such scores of them, and targets class numbers (N, …). The
    network trains in the mode, of `train()` and `eval()`, that it is in. `scheduler` steps after
    each batch, as OneCycleLR wants it. `done` of the epochs were done before: a run that is
    continued has `epochs` in all. Raises ArgumentError for epochs < 1 or done < 0.

    In a process group, loss and accuracy are those of all ranks together, summed once an epoch.
    All ranks must run it, for as many epochs, and with a `val_loader` or without one alike.
    """

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
        found = evaluate(
            network, val_loader, loss_fn, device=device, accuracy=accuracy, scores=scores
        )
        return {f"val_{name}": value for name, value in found.items()}

    return _epochs(lambda number, meter: train(meter), validate, _numbers(epochs, done))


def run_epochs(
    train: Callable[[int], Iterable[tuple[Tensor, int]]],
    *,
    epochs: int,
    done: int = 0,
    validate: Callable[[], Mapping[str, float]] = dict,
) -> Iterator[Epoch]:
    """Train by steps of one's own and yield after each epoch, as `fit` does for the usual ones.

    `train(number)` is a pass over the data in epoch `number`: it yields after each step the mean
    loss, which may stay on the device, and the number of samples. `validate()` gives the metrics
    after an epoch. Raises ArgumentError for epochs < 1 or done < 0.
    """

    def add(number: int, meter: EpochMeter) -> Iterator[None]:
        for loss, samples in train(number):
            meter.add_loss(loss, samples)
            yield

    return _epochs(add, validate, _numbers(epochs, done))


def _numbers(epochs: int, done: int) -> range:
    if epochs < 1:
        raise ArgumentError(f"epochs={epochs} is not allowed; it must be at least 1.")
    if done < 0:
        raise ArgumentError(f"done={done} is not allowed; it must be at least 0.")
    return range(done + 1, epochs + 1)


def _epochs(
    train: Callable[[int, EpochMeter], Iterator[None]],
    validate: Callable[[], Mapping[str, float]],
    numbers: range,
) -> Iterator[Epoch]:
    for number in numbers:
        started = time.perf_counter()
        meter = EpochMeter()
        times = [time.time_ns() // 1_000_000 for _ in train(number, meter)]
        metrics = meter.compute() | dict(validate())
        metrics["epoch_duration"] = time.perf_counter() - started
        yield Epoch(number, metrics, meter.losses, times)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Iterable[Any],
    loss_fn: Loss,
    *,
    device: torch.device | str | None = None,
    accuracy: bool = False,
    scores: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """`loss` and, if asked for, `accuracy` of `network` over `loader`, as in `fit`.

    The network is in evaluation mode meanwhile, and gets its modes back.

    In a process group it is a collective: all ranks must call, each with its share of the data,
    which may be empty, and get the metrics of the whole. Shares of unequal numbers of batches
    need the network that DistributedDataParallel wraps: its own forward may wait for the others.
    """
    meter = EpochMeter()
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
    place = device_of(network) if device is None else torch.device(device)
    for inputs, targets in loader:
        outputs = network(inputs.to(place, non_blocking=True))
        yield outputs, targets.to(place, non_blocking=True)
