"""The cost of each part of tracking alone: histograms, and the calls of a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measuring import Work, compare, goal, seconds, shuffled, table
from bench.peers import BATCH, HAS_TENSORBOARD, RUN, tracker
from models import FashionCNN
from tracker.capture.histograms import histograms
from tracker.capture.network_histograms import network_histograms

GOAL_MS = 0.6


def tensors(rounds: int, folder: Path) -> None:
    """Print the cost of histograms of all weights and gradients of two networks."""
    from torchvision.models import resnet18

    works = _histogram_works(FashionCNN(), torch.randn(8, 1, 28, 28), folder)
    cnn = compare(works, 20 * rounds)
    row = {name: median(seconds(work) for _ in range(20 * rounds)) for name, work in works.items()}
    resnet = compare(_histogram_works(resnet18(), torch.randn(2, 3, 64, 64), folder), rounds)
    title = "All weights and gradients: once after other work, with cold caches, and in a row."
    columns = ["histograms", "CNN, cold, ms", "CNN, in a row, ms", "ResNet-18, cold, ms"]
    rows = [
        [n, f"{cnn[n] * 1e3:.2f}", f"{row[n] * 1e3:.2f}", f"{resnet[n] * 1e3:.1f}"] for n in cnn
    ]
    table(title, columns, rows)
    goal("tracker histograms(), CNN, cold, ms", next(iter(cnn.values())) * 1e3, GOAL_MS)
    goal("the same in a row, ms", next(iter(row.values())) * 1e3, GOAL_MS)


def _histogram_works(network: nn.Module, inputs: Tensor, folder: Path) -> dict[str, Work]:
    """Several histogram functions on a network's weights and gradients; the tracker's first."""
    network(inputs).square().mean().backward()
    tensors = [t.detach() for p in network.parameters() for t in (p, p.grad) if t is not None]
    works: dict[str, Work] = {
        "tracker histograms()": lambda: histograms(tensors),
        "tracker network_histograms()": lambda: network_histograms(network, 1),
        "torch.histc, 64 bins": lambda: [torch.histc(t, 64) for t in tensors],
        "numpy.histogram, 64 bins": lambda: [np.histogram(t.numpy(), 64) for t in tensors],
    }
    if HAS_TENSORBOARD:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "histograms")

        def add_histograms() -> None:
            for tensor in tensors:
                writer.add_histogram("tensor", tensor)
            writer.flush()  # or its thread would slow down the next contestant

        works["TensorBoard add_histogram, flush"] = add_histograms
    return works


def calls(rounds: int, folder: Path) -> None:
    """Print the cost of calls in the loop: after a step, with cold caches, and in a row."""
    # Inline delivery: only the journal's thread runs beside the loop.
    manager = tracker(folder, inline=True)
    each = tracker(folder, inline=True, batch_loss=True)
    network: nn.Module = FashionCNN()
    optimizer = torch.optim.Adam(network.parameters(), lr=RUN.lr)
    batch = images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    runs = [one.begin_run(RUN, network, [batch]) for one in (manager, each)]
    for one in (manager, each):
        one.begin_epoch()
    total, appended = torch.zeros(()), []
    preds, loss = torch.zeros(()), torch.zeros(())  # of the current step, below
    works: dict[str, Any] = {
        "tracker track_loss": lambda: manager.track_loss(loss, batch),
        "tracker track_num_correct": lambda: manager.track_num_correct(preds, labels),
        "track_loss, batch_loss=True": lambda: each.track_loss(loss, batch),
        "run.log_metrics of one number": lambda: runs[0].log_metrics({"x": 0.5}, len(after)),
        "list.append": lambda: appended.append(0.5),
        "bare total.add_(loss.detach())": lambda: total.add_(loss.detach()),
        "tutorial loss.item()": lambda: loss.item(),
        "tutorial argmax, eq, sum, .item()": lambda: preds.argmax(1).eq(labels).sum().item(),
    }
    for who in ("tracker", "tutorial"):
        first, second = [work for name, work in works.items() if name.startswith(who)]
        works[f"{who}, both"] = partial(lambda first, second: (first(), second()), first, second)
    after: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(20 * rounds):
        for name in shuffled(list(works)):
            preds = network(images)
            loss = F.cross_entropy(preds, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after[name].append(seconds(works[name]))
    repeated = compare(works, 5 * rounds, 200)
    for one in (manager, each):
        one.close()
    rows = [[n, f"{median(after[n]) * 1e6:.1f}", f"{repeated[n] * 1e6:.2f}"] for n in works]
    table("Calls of the loop, on the CPU.", ["calls", "after a step, µs", "in a row, µs"], rows)
