"""The contestants. All have the tutorial's methods, so one loop drives them.

`begin_run` returns an object whose `flush` waits for the contestant's background work.
"""

# ruff: noqa: D102 - tracker/manager.py documents the methods

from __future__ import annotations

import io
import time
from collections import OrderedDict
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from mlflow import MlflowClient
from torch import Tensor, nn

from tracker import RunBuilder, RunManager

HAS_TENSORBOARD = find_spec("tensorboard") is not None
BATCH = 100
RUN = RunBuilder.get_runs({"lr": [0.001], "batch_size": [BATCH]})[0]


def tracker(folder: Path, **settings: Any) -> RunManager:
    """Make the tracker's manager, with a store in `folder` and no progress bar."""
    uri = f"sqlite:///{folder / 'tracker.db'}"
    with redirect_stderr(io.StringIO()):
        return RunManager(tracking_uri=uri, directory=folder / "journal", **settings)


class Bare:
    """No tracking: the loop sums the loss on the device and reads it once per epoch."""

    def begin_run(self, run: Any, network: nn.Module, loader: Any) -> Bare:
        self.loader = loader
        return self

    def begin_epoch(self) -> None:
        self.total: Any = 0.0

    def track_loss(self, loss: Tensor, batch: Any) -> None:
        self.total += loss.detach()

    def track_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Do nothing: this loop does not track accuracy."""

    def end_epoch(self) -> None:
        self.loss = float(self.total) / len(self.loader)

    def flush(self, timeout: float) -> None:
        """Do nothing: there is no background work."""

    def end_run(self) -> None:
        pass


class PlainMlflow(Bare):
    """The bare loop, and one `log_metric` per epoch to a SQLite file."""

    def __init__(self, folder: Path) -> None:
        self._client = MlflowClient(f"sqlite:///{folder / 'plain.db'}")

    def begin_run(self, run: Any, network: nn.Module, loader: Any) -> Bare:
        self._run_id = self._client.create_run("0").info.run_id
        for name, value in run._asdict().items():
            self._client.log_param(self._run_id, name, value)
        self._epoch = 0
        return super().begin_run(run, network, loader)

    def end_epoch(self) -> None:
        super().end_epoch()
        self._epoch += 1
        self._client.log_metric(self._run_id, "loss", self.loss, step=self._epoch)

    def end_run(self) -> None:
        self._client.set_terminated(self._run_id)


class MlflowEachStep(PlainMlflow):
    """Also one `log_metric` per step, in this thread or in one of MLflow's."""

    def __init__(self, folder: Path, *, synchronous: bool) -> None:
        super().__init__(folder)
        self._synchronous = synchronous
        self._step = 0
        self._last: Any = None

    def track_loss(self, loss: Tensor, batch: Any) -> None:
        super().track_loss(loss, batch)
        self._step += 1
        self._last = self._client.log_metric(
            self._run_id, "batch_loss", loss.item(), step=self._step, synchronous=self._synchronous
        )

    def flush(self, timeout: float) -> None:
        if self._last is not None:  # the calls are processed in order
            self._last.wait()


class TutorialRunManager:
    """deeplizard's RunManager on TensorBoard, without displaying its table."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.make_writer = SummaryWriter
        self.folder = folder
        self.run_count = 0
        self.run_data: list[dict[str, Any]] = []

    def begin_run(self, run: Any, network: nn.Module, loader: Any) -> TutorialRunManager:
        self.run_start_time = time.time()
        self.run_params, self.network, self.loader = run, network, loader
        self.run_count += 1
        self.epoch_count = 0
        self.tb = self.make_writer(self.folder / f"tutorial-{self.run_count}")
        images, _ = next(iter(self.loader))
        self.tb.add_image("images", torchvision.utils.make_grid(images))
        self.tb.add_graph(self.network, images)
        return self

    def end_run(self) -> None:
        self.tb.close()

    def begin_epoch(self) -> None:
        self.epoch_start_time = time.time()
        self.epoch_count += 1
        self.epoch_loss = 0.0
        self.epoch_num_correct = 0

    def end_epoch(self) -> None:
        results: OrderedDict[str, float] = OrderedDict(run=self.run_count, epoch=self.epoch_count)
        results["loss"] = self.epoch_loss / len(self.loader.dataset)
        results["accuracy"] = self.epoch_num_correct / len(self.loader.dataset)
        results["epoch duration"] = time.time() - self.epoch_start_time
        results["run duration"] = time.time() - self.run_start_time
        self.tb.add_scalar("Loss", results["loss"], self.epoch_count)
        self.tb.add_scalar("Accuracy", results["accuracy"], self.epoch_count)
        for name, param in self.network.named_parameters():
            self.tb.add_histogram(name, param, self.epoch_count)
            self.tb.add_histogram(f"{name}.grad", param.grad, self.epoch_count)
        self.run_data.append(results | self.run_params._asdict())
        pd.DataFrame(self.run_data)

    def track_loss(self, loss: Tensor, batch: Any) -> None:
        self.epoch_loss += loss.item() * batch[0].shape[0]

    @torch.no_grad()
    def track_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        self.epoch_num_correct += int(preds.argmax(dim=1).eq(labels).sum().item())

    def flush(self, timeout: float) -> None:
        self.tb.flush()
