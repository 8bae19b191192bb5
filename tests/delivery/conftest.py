from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.delivery.world import World
from tests.programs import ForkServer


@pytest.fixture
def world(
    tmp_path: Path, _sqlite_template: Path, trainers: ForkServer, deliverers: ForkServer
) -> Callable[..., World]:
    """Creates worlds: `world()` with a new SQLite store, `world(uri=…)` with that store."""
    count = 0

    def make(name: str = "", uri: str = "") -> World:
        nonlocal count
        folder = tmp_path / f"world-{count}"
        count += 1
        store = folder / "store"
        store.mkdir(parents=True)
        (folder / "tmp").mkdir()
        if not uri:
            uri = f"sqlite:///{store / 'mlflow.db'}"
            shutil.copyfile(_sqlite_template, store / "mlflow.db")
            with closing(sqlite3.connect(store / "mlflow.db")) as db, db:
                artifacts = (store / "mlruns" / "0").as_uri()
                db.execute("UPDATE experiments SET artifact_location = ?", (artifacts,))
        return World(folder, uri, trainers, deliverers, name)

    return make
