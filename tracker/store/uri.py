"""Tracking URIs: which one is meant, and what is wrong with it: MLflow's rules, without MLflow."""

from __future__ import annotations

import http.client
import os
import sqlite3
import ssl
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path

from tracker.errors import StoreError
from tracker.redaction import public_uri

ANSWER_SECONDS = 3.0
"""A server that does not answer a health check by then counts as down."""

_DATABASES = ("postgresql", "mysql", "sqlite", "mssql")  # mlflow.store.db.db_types, 3.17
_OTHERS = ("http", "https", "file", "databricks", "databricks-uc", "uc")


def resolve(uri: str | None) -> str:
    """`uri`, or the one that MLflow itself would use, with relative paths made absolute.

    A program may change its directory, and another process deliver what it tracked.
    """
    if uri is None:
        mlflow = sys.modules.get("mlflow.tracking")  # the program may have set it there
        uri = str(mlflow.get_tracking_uri()) if mlflow else _mlflow_default()
    if uri.startswith("sqlite:///") and ":memory:" not in uri:
        query = urllib.parse.urlsplit(uri).query
        return f"sqlite:///{local_path(uri).absolute()}{query and '?'}{query}"
    if is_file_store(uri):
        return local_path(uri).absolute().as_uri()
    return uri


def _mlflow_default() -> str:
    """mlflow.get_tracking_uri() of 3.17, without the seconds that importing it takes."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if any(Path("mlruns").glob("[0-9]*/meta.yaml")):
        return Path("mlruns").absolute().as_uri()
    return "sqlite:///mlflow.db"


def check(uri: str) -> None:
    """Raise StoreError, in one sentence, where `uri` cannot be meant; asks no server."""
    problem = None
    scheme = uri.partition(":")[0].partition("+")[0]
    if is_http(uri):
        try:
            problem = None if urllib.parse.urlsplit(uri).hostname else "it names no host"
        except ValueError as error:
            problem = str(error)
    elif uri.startswith("sqlite:"):
        problem = _why_not_sqlite(local_path(uri))
    elif is_file_store(uri):
        problem = _why_not_writable(local_path(uri), folder=True)
    elif scheme not in (*_DATABASES, *_OTHERS) and uri not in _OTHERS:
        others = entry_points(group="mlflow.tracking_store").names
        if scheme not in others:
            problem = f"MLflow knows {', '.join(sorted({*_DATABASES, *_OTHERS, *others}))}"
    if problem is not None:
        raise StoreError(f"tracking_uri={public_uri(uri)!r} cannot be opened: {problem}.")


def check_there(uri: str, wanted: str) -> None:
    """Raise StoreError where the file or folder of `uri`, which has `wanted`, does not exist.

    MLflow would make an empty store there, and find nothing in it.
    """
    is_sqlite = uri.startswith("sqlite:") and ":memory:" not in uri
    if (is_sqlite or is_file_store(uri)) and not local_path(uri).exists():
        raise StoreError(
            f"tracking_uri={public_uri(uri)!r} does not exist, and so has not {wanted}."
        )


def is_http(uri: str) -> bool:
    """Whether a server is at `uri`."""
    return uri.startswith(("http://", "https://"))


def is_file_store(uri: str) -> bool:
    """Whether `uri` is a folder of MLflow's file store."""
    return uri.startswith("file:") or (":" not in uri and uri not in _OTHERS)


def local_path(uri: str) -> Path:
    """The file or folder of a `sqlite:` or `file:` URI, relative where that is."""
    path = urllib.parse.unquote(urllib.parse.urlsplit(uri).path)
    # sqlite:///relative.db and sqlite:////absolute.db; file:///absolute and file:relative
    return Path(path.removeprefix("/") if uri.startswith("sqlite:") else path)


def unreachable_reason(uri: str) -> str | None:
    """Why the server at `uri` does not answer; None if it does, with whatever answer."""
    try:
        parts = urllib.parse.urlsplit(uri)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"answers {error.code}" if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        # It answers; whether its certificate will do is MLflow's to say, by its own settings.
        return None if isinstance(reason, ssl.SSLError) else str(reason) or type(reason).__name__
    return None


def _why_not_writable(path: Path, *, folder: bool) -> str | None:
    for place in (path, *path.absolute().parents):
        if place.exists():
            if place.is_dir() != (folder or place != path):
                return f"{place} is {'not ' if folder or place != path else ''}a folder"
            return None if _is_writable(place) else f"{place} is not writable"
    return None


def _is_writable(place: Path) -> bool:
    if not place.is_dir():
        return os.access(place, os.W_OK)
    try:
        with tempfile.TemporaryFile(dir=place):  # os.access tells root that /proc is writable
            return True
    except OSError:
        return False


def _why_not_sqlite(path: Path) -> str | None:
    if problem := _why_not_writable(path, folder=False):
        return problem
    if path.exists():
        # Through SQLite: opened and closed by others, a file loses the locks of this process on it.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as db:
                db.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError:
            return f"{path} is not a SQLite file"
    return None
