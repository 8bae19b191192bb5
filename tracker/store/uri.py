"""Tracking URIs: MLflow's rules for them, without importing MLflow."""

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

from tracker.errors import ArgumentError, StoreError
from tracker.redaction import public_uri

ANSWER_SECONDS = 3.0
"""A server that does not answer a health check within this time counts as down at first."""
LONGEST_ANSWER_SECONDS = 20.0
"""The longest such time, unless MLFLOW_HTTP_REQUEST_TIMEOUT says how long a request may take."""
_patience: dict[str, float] = {}  # seconds by URI, doubled after each time that was too short

_DATABASES = ("postgresql", "mysql", "sqlite", "mssql")  # mlflow.store.db.db_types, 3.17
_OTHERS = ("http", "https", "file", "databricks", "databricks-uc", "uc")


def resolve(uri: str | os.PathLike[str] | None) -> str:
    """Return a tracking URI with its relative path made absolute.

    A program may change its directory, and another process may deliver what it tracked.

    Args:
        uri: The URI or a path; None stands for the one that MLflow itself would use.

    Raises:
        ArgumentError: It is neither a text nor a path.
    """
    if isinstance(uri, os.PathLike):
        uri = os.fspath(uri)
    if uri is not None and not (isinstance(uri, str) and _is_utf8(uri)):
        raise ArgumentError(f"tracking_uri={uri!r} is not allowed; it must be a text or a path.")
    if uri is None:
        mlflow = sys.modules.get("mlflow.tracking")  # the program may have set it there
        uri = str(mlflow.get_tracking_uri()).strip() if mlflow else ""
        uri = uri or _mlflow_default()
    scheme, colon, rest = uri.strip().partition(":")
    uri = f"{scheme.lower()}:{rest}" if colon else scheme
    if uri.startswith("sqlite:///") and ":memory:" not in uri:
        query = uri.partition("?")[2]
        return f"{sqlite_uri(_at_home(local_path(uri)).absolute())}{query and '?'}{query}"
    if is_file_store(uri) and _file_problem(uri) is None:
        return _at_home(local_path(uri)).absolute().as_uri()
    return uri


def _is_utf8(text: str) -> bool:
    return text == text.encode(errors="ignore").decode()


def _at_home(path: Path) -> Path:
    """Replace `~` at the beginning of a path, which MLflow would take for a folder's name."""
    try:
        return path.expanduser()
    except RuntimeError:  # there is no such user
        return path


def _file_problem(uri: str) -> str | None:
    if not uri.removeprefix("file:").strip("/") and not uri.startswith(("file:/", "/")):
        return "it is empty"
    host = urllib.parse.urlsplit(uri).netloc
    if host not in ("", "localhost"):
        return f"{host!r} is in the place of a host; write file:{host} or file:///path"
    return None


def _mlflow_default() -> str:
    """`mlflow.get_tracking_uri()` of 3.17, without the seconds that importing it takes."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI", "").strip():
        return uri
    if any(Path("mlruns").glob("[0-9]*/meta.yaml")):
        return Path("mlruns").absolute().as_uri()
    return "sqlite:///mlflow.db"


def check_uri(uri: str) -> None:
    """Check that MLflow can open `uri`, as far as this machine knows; no server is asked.

    Raises:
        StoreError: The scheme is unknown, the URI names no host, or a path cannot be used.
    """
    problem = None
    scheme = uri.partition(":")[0].partition("+")[0]
    if is_http(uri):
        try:
            problem = None if urllib.parse.urlsplit(uri).hostname else "it names no host"
        except ValueError as error:
            problem = str(error)
    elif uri.startswith("sqlite:"):
        problem = _sqlite_problem(local_path(uri))
    elif is_file_store(uri):
        problem = _file_problem(uri) or _write_problem(local_path(uri), folder=True)
    elif scheme not in (*_DATABASES, *_OTHERS) and uri not in _OTHERS:
        plugins = entry_points(group="mlflow.tracking_store").names
        if scheme not in plugins:
            schemes = ", ".join(sorted({*_DATABASES, *_OTHERS, *plugins}))
            problem = f"its scheme must be one of {schemes}"
    if problem is not None:
        raise StoreError(f"tracking_uri={public_uri(uri)!r} cannot be opened: {problem}.")


def check_exists(uri: str, wanted: str) -> None:
    """Check that the file or folder of a local store exists.

    MLflow would create an empty store there and search that.

    Args:
        uri: A resolved tracking URI.
        wanted: What the store should hold, for the message.

    Raises:
        StoreError: It does not exist.
    """
    if is_local(uri) and not local_path(uri).exists():
        raise StoreError(
            f"tracking_uri={public_uri(uri)!r} does not exist, so it does not have {wanted}."
        )


def is_http(uri: str) -> bool:
    """Return whether `uri` is a server's."""
    return uri.startswith(("http://", "https://"))


def is_database(uri: str) -> bool:
    """Return whether `uri` is a SQL database's, which this process opens itself."""
    return uri.partition(":")[0].partition("+")[0] in _DATABASES


def is_local(uri: str) -> bool:
    """Return whether `uri` is a file or a folder of this machine."""
    return is_file_store(uri) or (uri.startswith("sqlite:") and ":memory:" not in uri)


def is_file_store(uri: str) -> bool:
    """Return whether `uri` is a folder of MLflow's file store."""
    return uri.startswith("file:") or (":" not in uri and uri not in _OTHERS)


def local_path(uri: str) -> Path:
    """Return the path in a `sqlite:` or `file:` URI, relative if it is relative there."""
    if uri.startswith("sqlite:"):  # sqlite:///relative.db and sqlite:////absolute.db
        path = uri.partition("?")[0].removeprefix("sqlite:").removeprefix("///")
        return Path(urllib.parse.unquote(path))  # as SQLAlchemy 2.1 does
    if not uri.startswith("file:"):
        return Path(uri)
    return Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path))


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file, whatever characters its path has."""
    return f"sqlite:///{str(path).replace('%', '%25').replace('?', '%3F')}"


def unreachable_reason(uri: str) -> str | None:
    """Return why the server at `uri` does not answer; None if it answers anything.

    A server that was too slow has twice as long the next time, as a request has.
    """
    seconds = _patience.get(uri, ANSWER_SECONDS)
    try:
        parts = urllib.parse.urlsplit(uri)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=seconds).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answers {error.code}" if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            _patience[uri] = min(2 * seconds, _longest_answer_seconds())
        # It answers. Whether its certificate is valid depends on MLflow's own settings.
        return None if isinstance(reason, ssl.SSLError) else str(reason) or type(reason).__name__
    return None


def wait_for_answer(uri: str) -> None:
    """Ask a server until it answers, fails at once, or has had all the time of a request."""
    while is_http(uri) and unreachable_reason(uri) is not None:
        seconds = _patience.get(uri, ANSWER_SECONDS)
        if seconds == ANSWER_SECONDS or seconds >= _longest_answer_seconds():
            return


def _longest_answer_seconds() -> float:
    try:
        seconds = float(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", LONGEST_ANSWER_SECONDS))
    except ValueError:  # MLflow will say so
        return LONGEST_ANSWER_SECONDS
    return max(ANSWER_SECONDS, seconds)


def _write_problem(path: Path, *, folder: bool) -> str | None:
    """Return why a file or folder cannot be written or created at `path`."""
    for place in (path, *path.absolute().parents):
        if place.exists():
            wants_folder = folder or place != path
            if place.is_dir() != wants_folder:
                return f"{place} is {'not ' if wants_folder else ''}a folder"
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


def _sqlite_problem(path: Path) -> str | None:
    if problem := _write_problem(path, folder=False):
        return problem
    if path.exists():
        # Through SQLite: closing the file otherwise would drop this process's locks on it.
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as db:
                db.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError:
            return f"{path} is not a SQLite file"
    return None
