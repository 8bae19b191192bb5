"""The cost of tracking, and of its peers, in one process.

python -m bench.overhead [--only training|histograms|calls|start]

Machines are noisy: contestants take turns in a random order, and only ratios within one run are
comparable. "bare loop again" shows how far from 1.00 is just noise.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.measuring import Turn, goal, machine, seconds, shuffled, table
from models import FashionCNN
from studies.arguments import RAW, positive_int

Batches = Sequence[tuple[Tensor, Tensor]]

EPOCH, BATCH = 600, 100  # steps, and images per step: the tutorial's 60,000
LEAD = 100  # unmeasured steps, half a second, to get background work going
START_EPOCHS = 4  # about ten seconds
DRAIN_SECONDS = 60.0
GOAL_RATIO = 1.03
TRACKER = "tracker RunManager"
EACH_STEP = "tracker RunManager, batch_loss=True"
QUESTIONS = ("training", "histograms", "calls", "start")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="bench.overhead", description=__doc__, formatter_class=RAW
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, metavar="N", help="turns of each; default: 5"
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=EPOCH,
        metavar="N",
        help=f"steps per epoch; default: {EPOCH}",
    )
    parser.add_argument("--only", choices=QUESTIONS, help="print one table; default: all")
    given = parser.parse_args()
    os.environ |= {"MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name in ("TRACKER_INLINE", "TRACKER_OFFLINE"):  # measure the tracker's defaults
        os.environ.pop(name, None)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")  # the tutorial's
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(1)
    # MLflow creates ./mlruns here. Removed at exit, after the tracker has finished with it.
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    os.chdir(folder.name)
    from bench import parts, peers  # they import mlflow, which reads the environment

    print(f"{machine('torch', 'mlflow', threads=1)}; medians of {given.rounds} rounds")
    if not peers.HAS_TENSORBOARD:
        print("skipped: TensorBoard and the tutorial's RunManager; tensorboard is not installed")
    if find_spec("pytorch_lightning") is None:
        print("skipped: Lightning; pytorch-lightning is not installed")
    at = Path(folder.name)
    ask = {
        "training": lambda: training(given.rounds, given.steps, at),
        "histograms": lambda: parts.tensors(given.rounds, at),
        "calls": lambda: parts.calls(given.rounds, at),
        "start": lambda: start(min(given.rounds, 3), given.steps, at),
    }
    for question in [given.only] if given.only else QUESTIONS:
        ask[question]()


class Lane:
    """A contestant with the tutorial's methods, and the network that it trains."""

    def __init__(self, manager: Any) -> None:
        torch.manual_seed(0)  # the same weights, hence the same work, for all
        self.network: nn.Module = FashionCNN()
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.manager = manager

    def begin_run(self, loader: Any) -> None:
        """Begin a run and its first epoch."""
        from bench.peers import RUN

        self.run = self.manager.begin_run(RUN, self.network, loader)
        self.manager.begin_epoch()

    def train(self, batches: Batches) -> None:
        """Run the tutorial's loop."""
        for batch in DataLoader(cast(Any, batches), batch_size=None, collate_fn=list):
            images, labels = batch
            preds = self.network(images)
            loss = F.cross_entropy(preds, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.manager.track_loss(loss, batch)
            self.manager.track_num_correct(preds, labels)

    def turn(self, lead: Batches, batches: Batches) -> Turn:
        """Measure the end of an epoch, the beginning of the next, and its steps.

        Background work slows down the steps it overlaps with, which is measured; what remains of it
        after the last step is awaited but not measured.

        Args:
            lead: Batches to train on before the measurement.
            batches: Batches to train on during the measurement.
        """
        self.train(lead)
        started, cpu = time.perf_counter(), time.process_time()
        self.manager.end_epoch()
        self.manager.begin_epoch()
        epoch = time.perf_counter() - started
        self.train(batches)
        took = Turn(time.perf_counter() - started, time.process_time() - cpu, epoch)
        self.run.flush(DRAIN_SECONDS)
        return took

    def end_run(self) -> None:
        """End the last epoch and the run."""
        self.manager.end_epoch()
        self.manager.end_run()


def data(steps: int) -> tuple[Any, Batches]:
    """Return a loader for the managers, and its batches as a list for the loop."""
    torch.manual_seed(0)
    labels = torch.randint(10, (steps * BATCH,))
    images = torch.randn(10, 1, 28, 28)[labels] + 4 * torch.randn(len(labels), 1, 28, 28)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    return DataLoader(TensorDataset(images, labels), BATCH), batches


def training(rounds: int, steps: int, folder: Path) -> None:
    """Print the cost of an epoch of the tutorial's loop with each contestant."""
    from bench import peers

    loader, batches = data(steps)
    lead = batches[:LEAD]
    lanes: dict[str, Any] = {
        "bare loop": Lane(peers.Bare()),
        "bare loop again": Lane(peers.Bare()),
        TRACKER: Lane(peers.tracker(folder)),
        EACH_STEP: Lane(peers.tracker(folder, batch_loss=True)),
        "MLflow log_metric per epoch": Lane(peers.PlainMlflow(folder)),
        "MLflow log_metric per step": Lane(peers.MlflowEachStep(folder, synchronous=True)),
        "the same, synchronous=False": Lane(peers.MlflowEachStep(folder, synchronous=False)),
    }
    if peers.HAS_TENSORBOARD:
        lanes["tutorial RunManager, TensorBoard"] = Lane(peers.TutorialRunManager(folder))
    ours = [lane for lane in lanes.values() if isinstance(lane, Lane)]
    if find_spec("pytorch_lightning") is not None:
        lightning = importlib.import_module("bench.lightning_peer").Lightning
        for every in (50, 1):
            lanes[f"Lightning, MLFlowLogger every {every}"] = lightning(folder, every)

    begun = {id(lane): seconds(partial(lane.begin_run, loader)) for lane in ours}
    for lane in lanes.values():  # warm up: create the store, start the uploader, import modules
        lane.turn(lead, batches[:1])
    took: dict[str, list[Turn]] = {name: [] for name in lanes}
    beside = 0.0
    for _ in range(rounds):
        for name in shuffled(list(lanes)):
            before = _cpu_of_others()
            took[name].append(lanes[name].turn(lead, batches))
            beside += (_cpu_of_others() - before) if name == EACH_STEP else 0.0
    ended = {id(lane): seconds(lane.end_run) for lane in ours}

    rows, found = [], {}
    for name, lane in lanes.items():
        pairs = list(zip(took[name], took["bare loop"], strict=True))
        low, found[name], high = np.percentile(
            [a.seconds / b.seconds for a, b in pairs], [25, 50, 75]
        )
        row = [name, f"{median(turn.seconds for turn in took[name]) / steps * 1e6:,.0f}"]
        row += [f"{found[name]:.3f}x", f"{low:.2f}-{high:.2f}"]
        row += [f"{median(a.cpu / b.cpu for a, b in pairs):.3f}x"]
        row += [f"{median(turn.epoch for turn in took[name]) * 1e3:,.1f}"]
        row += [
            f"{when[id(lane)] * 1e3:,.0f}" if id(lane) in when else "" for when in (begun, ended)
        ]
        rows.append(row)
    table(
        f"Training the tutorial's CNN, batch {BATCH}: an epoch of {steps} steps, including "
        "`epoch`, the end of one epoch and the beginning of the next.\n`half`: the middle half of "
        "the ratios. `CPU`: of all threads of this process, relative to the bare loop.",
        [
            *("training", "µs/step", "to bare", "half", "CPU", "epoch, ms"),
            *("begin_run, ms", "end_run, ms"),
        ],
        rows,
    )
    share = beside / rounds / (steps + len(lead))
    print(
        f"The tracker's second process used {share * 1e6:,.0f} µs of CPU per step with batch_loss."
    )
    goal(f"{EACH_STEP}, to bare", found[EACH_STEP], GOAL_RATIO)


def _cpu_of_others() -> float:
    """CPU seconds that this process's children have used so far."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return float(sum(spent.user + spent.system for spent in times))


def start(rounds: int, steps: int, folder: Path) -> None:
    """Print the cost of a short training from its start, with a new store and second process."""
    from bench import peers

    loader, batches = data(steps)
    bare, ours = "a new program, bare loop", f"a new program, {EACH_STEP}"
    took: dict[str, list[tuple[float, float, float]]] = {bare: [], ours: []}
    for number in range(rounds):
        for name in shuffled([bare, ours]):
            new = folder / f"start-{number}"
            lane = Lane(peers.Bare() if name == bare else peers.tracker(new, batch_loss=True))
            begin = seconds(partial(lane.begin_run, loader))
            loop = seconds(partial(lane.train, [*batches] * START_EPOCHS))
            took[name].append((begin, loop, seconds(lane.end_run)))
    rows = []
    for name, times in took.items():
        begin, loop, end = (median(column) for column in zip(*times, strict=True))
        ratio = median(a[1] / b[1] for a, b in zip(times, took[bare], strict=True))
        row = [name, f"{begin * 1e3:,.0f}", f"{loop:.2f}", f"{ratio:.3f}x", f"{end * 1e3:,.0f}"]
        rows.append(row)
    table(
        f"The first {START_EPOCHS * steps:,} steps, while the second process starts, imports "
        "mlflow and creates the store.",
        ["start", "begin_run, ms", "steps, s", "to bare", "end_run, ms"],
        rows,
    )


if __name__ == "__main__":
    main()
