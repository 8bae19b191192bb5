"""SQLite files as tracking stores: created once, with their artifacts next to them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tracker.store.uri import local_path, sqlite_uri


def create_sqlite(uri: str) -> None:
    """Create the store at a `sqlite:` URI, unless the file exists.

    Two processes that migrate one fresh file break it for good: each creates its own, and the
    first to be ready is linked into place.
    """
    path = local_path(uri)
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        fresh = Path(folder) / path.name
        SqlAlchemyStore(sqlite_uri(fresh), _artifacts(uri).as_uri()).engine.dispose()
        try:
            os.link(fresh, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links; the moment between is short
            if not path.exists():
                fresh.rename(path)


def create_experiment(uri: str, name: str) -> str:
    """Create an experiment with its artifacts in a folder named by its id, next to the store.

    MLflow would use `mlruns` below the current directory.

    Args:
        uri: The store's `sqlite:` URI.
        name: The experiment's name.

    Returns:
        Its id.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    return str(SqlAlchemyStore(uri, str(_artifacts(uri))).create_experiment(name))


def _artifacts(uri: str) -> Path:
    return local_path(uri).absolute().parent / "mlruns"
