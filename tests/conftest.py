from __future__ import annotations

import logging
import os

# Before torch is imported, and for the programs that tests start: many of them share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from models import FashionCNN, load
from tests.faults import TrackingServer
from tests.helpers import Pictures, Store, Training, run_train
from tests.postgres import database, postgres  # noqa: F401 - fixtures
from tests.programs import ForkServer
from tracker import RunManager

pytest_plugins = ["tracker.testing"]


def pytest_sessionstart() -> None:
    """Spare the collector all that torch and MLflow have created: half a million objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="this machine has no CUDA device"))
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the test's own folder, so that journals and relative paths are inside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKER_INLINE", "1")
    monkeypatch.delenv("TRACKER_OFFLINE", raising=False)
    logging.root.setLevel(logging.WARNING)  # importing mlflow.pytorch sets it to ERROR
    return tmp_path


@pytest.fixture(scope="session")
def trainers() -> Iterator[ForkServer]:
    """Forks trainings and searches; it has imported torch and Optuna, but not MLflow."""
    server = ForkServer("tracker.manager", "tracker.search.study", "models")
    yield server
    server.close()


@pytest.fixture(scope="session")
def deliverers() -> Iterator[ForkServer]:
    """Forks `tracker sync` and programs that deliver in-line; it has imported MLflow too."""
    server = ForkServer("tracker.manager", "tracker.delivery.leftovers", "tests.helpers", "models")
    yield server
    server.close()


@pytest.fixture
def store(tracking_uri: str) -> Store:
    return Store(tracking_uri)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store for trainings that several tests read; other runs may be in it too."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where a new database has its artifacts
        store = Store(f"sqlite:///{folder / 'mlflow.db'}")
        assert store.runs() == []
    return store


@pytest.fixture(scope="session")
def on_digits(shared_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """`studies.train` with its default recipe on the digits, two epochs; only to be read."""
    arguments = ["--dataset", "digits", "--epochs", "2", "--shuffle", "false"]
    arguments += ["--lr", "0.005", "--seed", "3"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setenv("TRACKER_INLINE", "1")
        patch.chdir(tmp_path_factory.mktemp("on_digits"))
        return run_train(shared_store, *arguments)._replace(output=output.getvalue())


@pytest.fixture
def manager(tracking_uri: str) -> Iterator[RunManager]:
    """A manager that logs no models, which take most of a second."""
    with RunManager(model=False) as manager:
        yield manager


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
    """The folder of real data sets, None if this machine has none."""
    folder = os.environ.get("TRACKER_DATA_DIR")
    return Path(folder) if folder else None


@pytest.fixture(scope="session")
def train_set(data_dir: Path | None) -> Any:
    """Real pictures: Fashion-MNIST through torchvision if it is available, else digits."""
    if data_dir is None:
        return load("digits", "nowhere").train
    import torchvision
    from torchvision import transforms

    return torchvision.datasets.FashionMNIST(
        str(data_dir), train=True, transform=transforms.ToTensor()
    )


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """A real tracking server on loopback, shared by the session; it takes seconds to start."""
    with TrackingServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(tracking_server: TrackingServer) -> str:
    """The URI of the session's tracking server: use an experiment that no other test uses."""
    return tracking_server.uri
