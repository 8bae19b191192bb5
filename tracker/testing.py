"""Pytest fixtures for code that uses the tracker.

In `conftest.py`: pytest_plugins = ["tracker.testing"]
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store: migrating it takes a second, copying it milliseconds."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    folder = tmp_path_factory.mktemp("template")
    store = SqlAlchemyStore(f"sqlite:///{folder / 'mlflow.db'}", str(folder / "mlruns"))
    store.engine.dispose()
    return folder / "mlflow.db"


@pytest.fixture
def tracking_uri(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The URI of a fresh tracking store for one test.

    During the test MLFLOW_TRACKING_URI is set to it, and the variables that choose an experiment or
    a run are unset. The store is a SQLite file, or MLflow's file store if the fixture is
    parametrised indirectly with "file".
    """
    folder = tmp_path_factory.mktemp("store")
    kind = getattr(request, "param", "sqlite")
    if kind not in ("sqlite", "file"):
        raise ValueError(f"tracking_uri has the parameter {kind!r}; allowed: 'sqlite', 'file'.")
    if kind == "file":
        uri = f"file://{folder / 'mlruns'}"
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    else:
        database = folder / "mlflow.db"
        shutil.copyfile(request.getfixturevalue("_sqlite_template"), database)
        with closing(sqlite3.connect(database)) as db, db:
            artifacts = (folder / "mlruns" / "0").as_uri()
            db.execute("UPDATE experiments SET artifact_location = ?", (artifacts,))
        uri = f"sqlite:///{database}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("TRACKER_INLINE", "1")  # everything is in the store when the run has ended
    others = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID", "TRACKER_OFFLINE")
    for name in others:
        monkeypatch.delenv(name, raising=False)
    return uri
