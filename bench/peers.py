"""Who is compared: all have the tutorial's verbs, so one loop drives them.

`begin_run` returns what waits, in `flush`, for all that the contestant does in the background.
"""

# ruff: noqa: D102 - the verbs are told of in tracker/manager.py

from __future__ import annotations

import io
import time
from collections import OrderedDict
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from tracker import RunBuilder, RunManager

try:
    import torchvision
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # the benchmark says that it goes without
    SummaryWriter = None

BATCH = 100
RUN = RunBuilder.get_runs({"lr": [0.001], "batch_size": [BATCH]})[0]


def tracker(folder: Path, **settings: Any) -> RunManager:
    """The tracker's, on a store in `folder`; it shows no progress, for none of the others does."""
    uri = f"sqlite:///{folder / 'tracker.db'}"
    with redirect_stderr(io.StringIO()):
        return RunManager(tracking_uri=uri, directory=folder / "journal", **settings)


class Bare:
    """No tracking: the loop's own sum of the loss, on the device, read once an epoch."""

    def begin_run(self, run: Any, network: nn.Module, loader: Any) -> Bare:
        self.loader = loader
        return self

    def begin_epoch(self) -> None:
        self.total: Any = 0.0

    def track_loss(self, loss: Tensor, batch: Any) -> None:
        self.total += loss.detach()

    def track_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        """Nothing: this loop does not ask."""

    def end_epoch(self) -> None:
        self.loss = float(self.total) / len(self.loader)

    def flush(self, timeout: float) -> None:
        """Nothing goes on in the background."""

    def end_run(self) -> None:
        pass


class PlainMlflow(Bare):
    """The bare loop, and one `log_metric` an epoch to a SQLite file."""

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
    """Also one `log_metric` a step: this thread waits for it, or another one of MLflow's does."""

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
        if self._last is not None:  # they are logged in order
            self._last.wait()


class TutorialRunManager:
    """deeplizard's RunManager on TensorBoard, without the display of its table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_count = 0
        self.run_data: list[dict[str, Any]] = []

    def begin_run(self, run: Any, network: nn.Module, loader: Any) -> TutorialRunManager:
        self.run_start_time = time.time()
        self.run_params, self.network, self.loader = run, network, loader
        self.run_count += 1
        self.epoch_count = 0
        self.tb = SummaryWriter(self.folder / f"tutorial-{self.run_count}")
        images, _ = next(iter(self.loader))
        self.tb.add_image("images", torchvision.utils.make_grid(images))
        self.tb.add_graph(self.network, images)
        return self

    def end_run(self) -> None:
        self.tb.close()

    def begin_epoch(self) -> None:
        self.epoch_start_time = time.time()
        self.epoch_count += 1
        self.epoch_loss = self.epoch_num_correct = 0

    def end_epoch(self) -> None:
        results = OrderedDict(run=self.run_count, epoch=self.epoch_count)
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
        pd.DataFrame.from_dict(self.run_data, orient="columns")

    def track_loss(self, loss: Tensor, batch: Any) -> None:
        self.epoch_loss += loss.item() * batch[0].shape[0]

    @torch.no_grad()
    def track_num_correct(self, preds: Tensor, labels: Tensor) -> None:
        self.epoch_num_correct += preds.argmax(dim=1).eq(labels).sum().item()

    def flush(self, timeout: float) -> None:
        self.tb.flush()
