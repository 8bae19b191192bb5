"""What tracking costs beside its peers, all in one process: `python -m bench.overhead`.

The machines are noisy: contestants take turns of a tenth of a second, in an order that changes, and
only ratios within one run count. "bare loop again" shows how far from 1.00 is mere noise.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import platform
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models import FashionCNN
from studies.arguments import positive_int
from tracker import RunBuilder, RunManager
from tracker.histograms import histograms, network_histograms

T = TypeVar("T")
Batches = Sequence[tuple[Tensor, Tensor]]
Work = Callable[[], object]

EPOCH, BATCH = 600, 100  # steps, and images in each: the tutorial's 60,000
TURN = 20  # steps that a contestant trains before it is another one's turn
GOAL_RATIO, GOAL_MS = 1.05, 0.6
RUN = RunBuilder.get_runs({"lr": [0.001], "batch_size": [BATCH]})[0]
ORDER = random.Random(0)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="bench.overhead", description=__doc__)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--steps", type=positive_int, default=EPOCH, help="of training, a round")
    parser.add_argument("--only", choices=["training", "histograms", "calls"])
    given = parser.parse_args()
    os.environ |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"}
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")  # the tutorial's
    torch.set_num_threads(1)
    importing = seconds(lambda: importlib.import_module("mlflow"))
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    print(
        f"{date.today()}, {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"1 thread, Python {platform.python_version()}, torch {torch.__version__}, "
        f"MLflow {version('mlflow')}\n"
        f"medians of {given.rounds} rounds; importing mlflow, {importing:.1f} s, is in no figure"
    )
    if importlib.import_module("bench.peers").SummaryWriter is None:
        print("skipped: TensorBoard and the tutorial's RunManager; tensorboard is not installed")
    # MLflow makes ./mlruns, so the current directory is a temporary one too.
    with tempfile.TemporaryDirectory() as name, chdir(name):
        if given.only in (None, "training"):
            training(given.rounds, given.steps, Path(name))
        if given.only in (None, "histograms"):
            tensors(given.rounds, Path(name))
        if given.only in (None, "calls"):
            calls(given.rounds, Path(name))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table; all columns but the first hold numbers."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    rule = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    print(f"\n{title}\n")
    for first, *numbers in (columns, rule, *rows):
        right = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        print("|", " | ".join([first.ljust(widths[0]), *right]), "|", flush=True)


def goal(text: str, value: float, limit: float) -> None:
    """Print what is hoped for, and what it is."""
    verdict = "met" if value <= limit else "MISSED"
    print(f"goal: {text} <= {limit:.2f}: {value:.3f}, {verdict}", flush=True)


def seconds(work: Work, times: int = 1) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def shuffled(contestants: Sequence[T]) -> list[T]:
    """Another order for each turn: what comes and goes on the machine hits all alike."""
    return ORDER.sample(contestants, len(contestants))


def compare(works: dict[str, Work], rounds: int, times: int = 1) -> dict[str, float]:
    """Seconds that one call of each takes."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name in shuffled(list(works)):
            took[name].append(seconds(works[name], times))
    return {name: median(values[1:]) for name, values in took.items()}  # the first warms up


def manager_in(folder: Path) -> RunManager:
    """The tracker's, on a fresh store; it shows no progress, for none of the others does."""
    uri = f"sqlite:///{folder / 'tracker.db'}"
    with redirect_stderr(io.StringIO()):
        return RunManager(tracking_uri=uri, directory=folder / "journal")


@dataclass
class Lane:
    """A contestant and the network that it trains."""

    name: str
    manager: Any
    steps: list[float] = field(default_factory=list)
    """Seconds of one step, a turn each."""
    ends: list[float] = field(default_factory=list)
    """Seconds of begin_epoch and end_epoch, a round each."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)  # the same weights for all, hence the same work
        self.network: nn.Module = FashionCNN()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=RUN.lr)

    def begin_run(self, loader: Any) -> float:
        """Begin a run; returns the seconds that it took."""
        return seconds(lambda: self.manager.begin_run(RUN, self.network, loader))

    def train(self, batches: Batches) -> None:
        """One turn of the tutorial's loop."""
        started = time.perf_counter()
        for batch in batches:
            images, labels = batch
            preds = self.network(images)
            loss = F.cross_entropy(preds, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.manager.track_loss(loss, batch)
            self.manager.track_num_correct(preds, labels)
        self.steps.append((time.perf_counter() - started) / len(batches))


def epoch(lanes: Sequence[Lane], batches: Batches) -> None:
    """An epoch of each, turn by turn."""
    for lane in shuffled(lanes):
        lane.ends.append(seconds(lane.manager.begin_epoch))
    for start in range(0, len(batches), TURN):
        for lane in shuffled(lanes):
            lane.train(batches[start : start + TURN])
    for lane in shuffled(lanes):
        lane.ends[-1] += seconds(lane.manager.end_epoch)


def training(rounds: int, steps: int, folder: Path) -> None:
    """Epochs of the tutorial's loop under each contestant."""
    from bench import peers  # imports mlflow, for which `main` sets the environment first

    torch.manual_seed(0)
    labels = torch.randint(10, (steps * BATCH,))
    images = torch.randn(10, 1, 28, 28)[labels] + 4 * torch.randn(len(labels), 1, 28, 28)
    loader = DataLoader(TensorDataset(images, labels), BATCH)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    ours, bare = Lane("tracker RunManager", manager_in(folder)), Lane("bare loop", peers.Bare())
    lanes = [ours, bare, Lane("bare loop again", peers.Bare())]
    lanes.append(Lane("MLflow log_metric per epoch", peers.PlainMlflow(folder)))
    if peers.SummaryWriter is not None:
        lanes.append(Lane("tutorial RunManager, TensorBoard", peers.TutorialRunManager(folder)))

    first = []  # a run of one short epoch warms up
    for lane in lanes:
        first.append(lane.begin_run(loader))
        epoch([lane], batches[: 2 * TURN])
        first.append(seconds(lane.manager.end_run))
        lane.steps.clear()
        lane.ends.clear()
    began = [lane.begin_run(loader) for lane in lanes]
    for _ in range(rounds):
        epoch(lanes, batches)
    ended = [seconds(lane.manager.end_run) for lane in lanes]
    ours.manager.close()

    rows, found = [], {}
    bare_epoch = EPOCH * median(bare.steps) + median(bare.ends)
    for lane, begin, end in zip(lanes, began, ended, strict=True):
        ratios = [mine / theirs for mine, theirs in zip(lane.steps, bare.steps, strict=True)]
        low, middle, high = np.percentile(ratios, [25, 50, 75])
        ratio = middle + (median(lane.ends) - median(bare.ends)) / bare_epoch
        row = [lane.name, f"{ratio * bare_epoch / EPOCH * 1e6:,.0f}", f"{ratio:.3f}x"]
        row += [f"{low:.2f}-{high:.2f}"]
        rows.append(row + [f"{s * 1e3:,.1f}" for s in (median(lane.ends), begin, end)])
        found[lane.name] = ratio
    table(
        f"Training the tutorial's CNN, batch {BATCH}, {steps} steps a round. µs and ratio are of "
        f"an epoch of {EPOCH}\nsteps with its begin_epoch and end_epoch, `epoch`; begin_run and "
        "end_run stand apart.\n`turns`: half of all turns, steps alone, have ratios within these.",
        ["training", "µs/step", "to bare", "turns", "epoch, ms", "begin_run, ms", "end_run, ms"],
        rows,
    )
    print("The tracker's first run, which makes the store: ", end="")
    print(f"begin_run {first[0] * 1e3:,.0f} ms, end_run {first[1] * 1e3:,.0f} ms.")
    goal("tracker to bare", found[ours.name], GOAL_RATIO)


def tensors(rounds: int, folder: Path) -> None:
    """Histograms of all weights and gradients of two networks."""
    from torchvision.models import resnet18

    works = histogram_works(FashionCNN(), torch.randn(8, 1, 28, 28), folder)
    cnn = compare(works, 20 * rounds)
    row = {name: median(seconds(work) for _ in range(20 * rounds)) for name, work in works.items()}
    resnet = compare(histogram_works(resnet18(), torch.randn(2, 3, 64, 64), folder), rounds)
    title = "All weights and gradients: alone after other work, with cold caches, and in a row."
    columns = ["histograms", "CNN, cold, ms", "CNN, in a row, ms", "ResNet-18, cold, ms"]
    rows = [
        [n, f"{cnn[n] * 1e3:.2f}", f"{row[n] * 1e3:.2f}", f"{resnet[n] * 1e3:.1f}"] for n in cnn
    ]
    table(title, columns, rows)
    goal("tracker histograms(), CNN, cold, ms", next(iter(cnn.values())) * 1e3, GOAL_MS)
    goal("the same in a row, ms", next(iter(row.values())) * 1e3, GOAL_MS)


def histogram_works(network: nn.Module, inputs: Tensor, folder: Path) -> dict[str, Work]:
    """Ways to the histograms of `network` after a backward pass; the tracker's first."""
    from bench.peers import SummaryWriter

    network(inputs).square().mean().backward()
    given = [t.detach() for p in network.parameters() for t in (p, p.grad) if t is not None]
    works: dict[str, Work] = {
        "tracker histograms()": lambda: histograms(given),
        "tracker network_histograms()": lambda: network_histograms(network, 1),
        "torch.histc, 64 bins": lambda: [torch.histc(t, 64) for t in given],
        "numpy.histogram, 64 bins": lambda: [np.histogram(t.numpy(), 64) for t in given],
    }
    if SummaryWriter is not None:
        writer = SummaryWriter(folder / "histograms")
        # Flushed, for its thread would take from the time of what comes next.
        works["TensorBoard add_histogram, flush"] = lambda: [
            *(writer.add_histogram("tensor", t) for t in given),
            writer.flush(),
        ]
    return works


def calls(rounds: int, folder: Path) -> None:
    """What a step of the loop waits for: called after a step, with cold caches, and in a row."""
    lane = Lane("tracker", manager_in(folder))
    batch = images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    lane.begin_run([batch])
    lane.manager.begin_epoch()
    total = torch.zeros(())
    # `preds` and `loss` are those of the step below.
    works: dict[str, Work] = {
        "tracker track_loss": lambda: lane.manager.track_loss(loss, batch),
        "tracker track_num_correct": lambda: lane.manager.track_num_correct(preds, labels),
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
            preds = lane.network(images)
            loss = F.cross_entropy(preds, labels)
            lane.optimizer.zero_grad()
            loss.backward()
            lane.optimizer.step()
            after[name].append(seconds(works[name]))
    repeated = compare(works, 5 * rounds, 200)
    lane.manager.close()
    rows = [[n, f"{median(after[n]) * 1e6:.1f}", f"{repeated[n] * 1e6:.2f}"] for n in works]
    table("Calls of the loop, on the CPU.", ["calls", "after a step, µs", "in a row, µs"], rows)


if __name__ == "__main__":
    main()
