"""Classes and functions that several test modules share; fixtures are in conftest.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from torch import nn
from torch.utils.data import TensorDataset

from tracker import RunManager


class Store:
    """Reads back from MLflow."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(uri)

    def runs(self, experiment: str = "Default") -> list[MlflowRun]:
        """The runs of an experiment, oldest first; empty if it does not exist."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return []
        return list(
            self.client.search_runs(
                [found.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000
            )
        )

    def run(self) -> MlflowRun:
        """The only run of the default experiment."""
        (run,) = self.runs()
        return run

    def history(self, run: MlflowRun, name: str) -> list[tuple[int, float]]:
        """(step, value) of each point of a metric, in order."""
        points = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in points)

    def artifacts(self, run: MlflowRun, folder: str | None = None) -> set[str]:
        """The paths of all the run's files."""
        found = set()
        for item in self.client.list_artifacts(run.info.run_id, folder):
            found |= self.artifacts(run, item.path) if item.is_dir else {item.path}
        return found

    def text(self, run: MlflowRun, path: str, into: Path) -> str:
        """The content of one of the run's files."""
        return Path(self.client.download_artifacts(run.info.run_id, path, str(into))).read_text(
            encoding="utf-8"
        )


class Training(NamedTuple):
    """A finished `studies.train`, and the store that has it."""

    store: Store
    run: MlflowRun
    output: str = ""
    """What the command printed."""

    @property
    def run_id(self) -> str:
        return str(self.run.info.run_id)

    @property
    def model(self) -> str:
        """The URI of the logged model."""
        return f"runs:/{self.run_id}/model"


def run_train(store: Store, *arguments: str) -> Training:
    """Run `studies.train` in this process; the run that it made or resumed."""
    from studies.train import main  # optuna comes with it

    assert main([*arguments, "--tracking-uri", store.uri]) == 0
    run = max(store.runs(), key=lambda run: run.info.end_time or 0)
    assert run.info.status == "FINISHED"
    return Training(store, run)


class Pictures(TensorDataset):
    """Random pictures with random labels, the same each time."""

    name = "pictures"

    def __init__(self, samples: int = 250) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.rand(samples, 1, 28, 28, generator=generator),
            torch.randint(10, (samples,), generator=generator),
        )


def train_epoch(
    network: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, manager: RunManager
) -> None:
    """The body of an epoch in the tutorial."""
    for batch in loader:
        images, labels = batch
        preds = network(images)
        loss = F.cross_entropy(preds, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        manager.track_loss(loss, batch)
        manager.track_num_correct(preds, labels)
