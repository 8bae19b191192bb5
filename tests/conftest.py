from __future__ import annotations

import os

# Before torch is imported, for the programs that tests start too: several of them share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from models import FashionCNN, load
from tests.postgres import database, postgres  # noqa: F401 - fixtures
from tracker import RunManager

pytest_plugins = ["tracker.testing"]

CONTRACT = ("test_manager", "test_run", "test_export")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The modules in CONTRACT hold on either file-based store."""
    if metafunc.module.__name__ in CONTRACT and "tracking_uri" in metafunc.fixturenames:
        metafunc.parametrize("tracking_uri", ["sqlite", "file"], indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))  # two cores may be shared with others


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Journals and files with relative names go to the test's own folder, and nobody else's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKER_INLINE", "1")
    monkeypatch.delenv("TRACKER_OFFLINE", raising=False)
    return tmp_path


class Store:
    """What a test reads back from MLflow."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(uri)

    def runs(self, experiment: str = "Default") -> list[MlflowRun]:
        """The runs of an experiment, oldest first; none where there is no such experiment."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            return []
        return list(
            self.client.search_runs(
                [found.experiment_id], order_by=["attributes.start_time ASC"], max_results=1000
            )
        )

    def run(self) -> MlflowRun:
        """The only run there is."""
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


@pytest.fixture
def store(tracking_uri: str) -> Store:
    return Store(tracking_uri)


@pytest.fixture
def manager(tracking_uri: str) -> Iterator[RunManager]:
    """A manager that logs no models: they take most of a second, and have tests of their own."""
    with RunManager(model=False) as manager:
        yield manager


class Pictures(TensorDataset):
    """Random pictures with random labels, the same each time."""

    name = "pictures"

    def __init__(self, samples: int = 250) -> None:
        generator = torch.Generator().manual_seed(1)
        super().__init__(
            torch.rand(samples, 1, 28, 28, generator=generator),
            torch.randint(10, (samples,), generator=generator),
        )


@pytest.fixture
def loader() -> DataLoader[Any]:
    """250 pictures in batches of 100: the last has 50."""
    return DataLoader(Pictures(), batch_size=100, shuffle=True)


@pytest.fixture
def network() -> FashionCNN:
    torch.manual_seed(0)
    return FashionCNN()


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """The folder of real data sets, where this machine has one."""
    folder = os.environ.get("TRACKER_DATA_DIR")
    return Path(folder) if folder else None


@pytest.fixture(scope="session")
def train_set(data_dir: Path | None) -> Any:
    """Real pictures: Fashion-MNIST through torchvision where it is, else digits."""
    if data_dir is None:
        return load("digits", "nowhere").train
    import torchvision
    from torchvision import transforms

    return torchvision.datasets.FashionMNIST(
        str(data_dir), train=True, transform=transforms.ToTensor()
    )


def train_epoch(
    network: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, manager: RunManager
) -> None:
    """The inside of the tutorial's epoch."""
    for batch in loader:
        images, labels = batch
        preds = network(images)
        loss = F.cross_entropy(preds, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        manager.track_loss(loss, batch)
        manager.track_num_correct(preds, labels)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A real tracking server on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "server"
    folder.mkdir()
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("mlflow")), "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(folder / "artifacts")),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not answers(uri):
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield uri
    finally:
        process.terminate()
        process.wait(timeout=60)


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
