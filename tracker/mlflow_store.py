"""Every call of MLflow's client: runs, batches, artifacts, models, statuses.

With `export.py` and `testing.py` the only module that imports mlflow. MLflow's errors are
translated here into StoreError; nothing above knows them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import ssl
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

import mlflow
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from tracker.environment import public_uri
from tracker.errors import RefusedError, StoreError

T = TypeVar("T")
logger = logging.getLogger(__name__)

RUN_TAG = "tracker.run"
_REFUSAL = "INVALID_PARAMETER_VALUE"  # not RESOURCE_DOES_NOT_EXIST: it may be the wrong store
_ANSWER_SECONDS = 3.0  # a server that does not answer a health check by then counts as down
_LIMIT = {"metrics": 1000, "params": 100, "tags": 100}  # a request of log_batch holds no more


@contextmanager
def _translated(doing: str) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # MLflow's file store raises plain ones
        refused = isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError)) or (
            isinstance(error, MlflowException) and error.error_code == _REFUSAL
        )
        kind = RefusedError if refused else StoreError
        raise kind(f"MLflow could not {doing}: {_first_line(error)}") from error


class MlflowStore:
    """A tracking store: a SQLite file, a server, a `file:` folder or another URI MLflow knows."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        """Open the store at `tracking_uri`, by default the one that MLflow itself would use.

        Raises StoreError, in one sentence, where it cannot be opened or written.
        """
        self.tracking_uri = _absolute(tracking_uri or mlflow.get_tracking_uri())
        with _first_to_open(self.tracking_uri):
            _check_uri(self.tracking_uri)
            opted_in = _is_file_store(self.tracking_uri) and _opt_in_to_file_store()
            try:
                self._create_sqlite()
                self._client = MlflowClient(self.tracking_uri)
                self._client.search_experiments(max_results=1)
            except Exception as error:  # what a third party's store raises on a bad URI
                raise StoreError(
                    f"tracking_uri={public_uri(self.tracking_uri)!r} cannot be opened: "
                    f"{_first_line(error)}"
                ) from error
        if opted_in:
            logger.warning(
                "MLflow keeps its file store (%s) in maintenance only; sqlite:///mlflow.db is "
                "what it recommends.",
                self.tracking_uri,
            )

    def answers(self) -> bool:
        """Whether a server, if the store is one, is there to answer."""
        return not _is_http(self.tracking_uri) or _why_silent(self.tracking_uri) is None

    def experiment_id(self, name: str | None) -> str:
        """The experiment called `name`, made if need be; None is what MLflow would use.

        That is MLFLOW_EXPERIMENT_NAME, else MLFLOW_EXPERIMENT_ID, else `Default`.
        """
        name = name or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        by_id = os.environ.get("MLFLOW_EXPERIMENT_ID") if name is None else None
        name = name or "Default"
        with _translated(f"open the experiment {by_id or name!r}"):
            if by_id is not None:
                experiment = self._client.get_experiment(by_id)
            elif (found := self._client.get_experiment_by_name(name)) is not None:
                experiment = found
            else:
                try:
                    return self._client.create_experiment(name, self._artifacts_of(name))
                except MlflowException:  # perhaps another process was faster
                    if (found := self._client.get_experiment_by_name(name)) is None:
                        raise
                    experiment = found
        if experiment.lifecycle_stage != "active":
            raise StoreError(
                f"experiment={experiment.name!r} was deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, "
                "or choose another name."
            )
        return str(experiment.experiment_id)

    def _create_sqlite(self) -> None:
        """Make a new SQLite store, whose `Default` experiment keeps its artifacts beside it."""
        folder = self._artifacts_folder()
        if folder is None or _local_path(self.tracking_uri).exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        SqlAlchemyStore(self.tracking_uri, str(folder)).engine.dispose()

    def _artifacts_folder(self) -> Path | None:
        """The folder of a SQLite store's artifacts; None where the store itself knows.

        MLflow would take `mlruns` below the current directory, wherever that is.
        """
        if not self.tracking_uri.startswith("sqlite:"):
            return None
        return _local_path(self.tracking_uri).absolute().parent / "mlruns"

    def _artifacts_of(self, experiment: str) -> str | None:
        folder = self._artifacts_folder()
        if folder is None:
            return None
        return (folder / re.sub(r"[^\w.\-]", "_", experiment)).as_uri()

    def begin_run(
        self,
        *,
        experiment: str | None,
        name: str | None,
        start_time: int,
        tags: Mapping[str, str],
        adopt: str | None,
    ) -> str:
        """Create a run and return its id.

        `adopt` is the id of a run that was made for us, by `mlflow run`: it is taken, with the
        name and tags it has, unless a run of ours has taken it before.
        """
        if adopt is not None:
            with _translated(f"find the run {adopt} of MLFLOW_RUN_ID"):
                had = self._client.get_run(adopt).data.tags
            if RUN_TAG not in had:
                self.log_batch(adopt, tags={k: v for k, v in tags.items() if k not in had})
                return adopt
        experiment_id = self.experiment_id(experiment)
        with _translated("create a run"):
            run = self._client.create_run(experiment_id, start_time, dict(tags), name)
        return str(run.info.run_id)

    def run_name(self, run_id: str) -> str:
        """The name of a run, which MLflow chose where none was given."""
        with _translated(f"read run {run_id}"):
            return str(self._client.get_run(run_id).info.run_name)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log metrics (name, value, step, milliseconds) and tags, in requests MLflow accepts."""
        with _translated(f"log to run {run_id}"):
            for points in _in_groups(metrics, _LIMIT["metrics"]):
                self._client.log_batch(
                    run_id, metrics=[Metric(n, v, at, step) for n, v, step, at in points]
                )
            for pairs in _in_groups((tags or {}).items(), _LIMIT["tags"]):
                self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in pairs])

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log params. MLflow never changes one: a new value goes to the tag `tracker.param.NAME`.

        That happens in a run that `mlflow run` made, with `device=auto` as it was asked for.
        """
        with _translated(f"log the params of run {run_id}"):
            had = self._client.get_run(run_id).data.params
            new = [Param(k, v) for k, v in params.items() if k not in had]
            for some in _in_groups(new, _LIMIT["params"]):
                self._client.log_batch(run_id, params=list(some))
        changed = {k: v for k, v in params.items() if k in had and not _same(had[k], v)}
        self.log_batch(run_id, tags={f"tracker.param.{k}": v for k, v in changed.items()})

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Upload a file, or a folder's content, into `folder` of the run's artifacts."""
        with _translated(f"store the artifact {path.name} of run {run_id}"):
            if path.is_dir():
                self._client.log_artifacts(run_id, str(path), folder)
            else:
                self._client.log_artifact(run_id, str(path), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Upload `text` as the artifact `name`."""
        with _translated(f"store the artifact {name} of run {run_id}"):
            self._client.log_text(run_id, text, name)

    def log_dataset(self, run_id: str, dataset: Mapping[str, str], context: str) -> None:
        """Record a data set (fields of mlflow.entities.Dataset) as an input of the run."""
        entity = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", context)])
        with _translated(f"record the data set of run {run_id}"):
            self._client.log_inputs(run_id, [entity])

    def log_model(self, run_id: str, folder: Path, name: str, step: int) -> str:
        """Upload a model that mlflow saved to `folder`, as the run's output; returns its id."""
        with _translated(f"store the model of run {run_id}"):
            run = self._client.get_run(run_id)
            logged = self._client.create_logged_model(
                run.info.experiment_id, name, run_id, params=run.data.params
            )
            model = Model.load(str(folder))
            model.run_id, model.model_id, model.model_uuid = (
                run_id,
                logged.model_id,
                logged.model_id,
            )
            model.artifact_path = logged.artifact_location
            model.save(str(folder / "MLmodel"))
            self._client.log_model_artifacts(logged.model_id, str(folder))
            self._client.finalize_logged_model(logged.model_id, "READY")
            self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        return str(logged.model_id)

    def end_run(self, run_id: str, status: str, end_time: int) -> None:
        """Give the run its final status, at `end_time` in milliseconds."""
        with _translated(f"end the run {run_id}"), _no_url_on_stdout():
            self._client.set_terminated(run_id, status, end_time)

    def download(self, run_id: str, folder: str, into: Path) -> Path:
        """Download a folder of the run's artifacts; StoreError where there is none."""
        with _translated(f"download {folder} of run {run_id}"):
            if not self._client.list_artifacts(run_id, folder):
                raise StoreError(f"run_id={run_id!r} has no artifacts in {folder!r}.")
            return Path(self._client.download_artifacts(run_id, folder, str(into)))


def _in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _same(had: str, new: str) -> bool:
    """Whether two spellings are one value: `1e-2` and `0.01`, `true` and `True`."""
    if had.lower() == new.lower():
        return True
    try:
        return float(had) == float(new)
    except ValueError:
        return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _absolute(uri: str) -> str:
    """A relative path in `uri` made absolute: a program may change its directory."""
    if uri.startswith("sqlite:///") and ":memory:" not in uri:
        return f"sqlite:///{_local_path(uri).absolute()}"
    if _is_file_store(uri):
        return _local_path(uri).absolute().as_uri()
    return uri


def _is_file_store(uri: str) -> bool:
    return uri.startswith("file:") or (":" not in uri and uri not in ("databricks", "uc"))


def _opt_in_to_file_store() -> bool:
    """MLflow asks for this before it opens one; returns whether it had not been done."""
    had = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return not had


@contextmanager
def _no_url_on_stdout() -> Iterator[None]:
    """MLflow prints a server's URL, password and all, when a run ends."""
    name = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _is_http(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _why_silent(uri: str) -> str | None:
    """Why the server at `uri` does not answer; None if it does, with whatever answer."""
    try:
        parts = urllib.parse.urlsplit(uri)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=_ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        return f"answers {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # It answers; whether its certificate will do is MLflow's to say, by its own settings.
        return None if isinstance(reason, ssl.SSLError) else str(reason)
    return None


@contextmanager
def _first_to_open(uri: str) -> Iterator[None]:
    """One process at a time: two that migrate one fresh SQLite file break it for good."""
    if not uri.startswith("sqlite:"):
        yield
        return
    whose = f"{Path.home()} {_local_path(uri).resolve()}"
    name = f"tracker-{hashlib.sha256(whose.encode()).hexdigest()[:16]}.lock"
    with FileLock(Path(tempfile.gettempdir()) / name):
        yield


def _local_path(uri: str) -> Path:
    path = urllib.parse.unquote(urllib.parse.urlsplit(uri).path)
    # sqlite:///relative.db and sqlite:////absolute.db; file:///absolute and file:relative
    return Path(path.removeprefix("/") if uri.startswith("sqlite:") else path)


def _check_uri(uri: str) -> None:
    """Say in one sentence what MLflow would say in many, or only after minutes of retries."""
    problem = None
    if _is_http(uri):
        problem = _why_silent(uri)
    elif uri.startswith("sqlite:"):
        problem = _why_not_sqlite(_local_path(uri))
    elif _is_file_store(uri):
        problem = _why_not_writable(_local_path(uri), folder=True)
    if problem is not None:
        raise StoreError(f"tracking_uri={public_uri(uri)!r} cannot be opened: {problem}.")


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
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
                return f"{path} is not a SQLite file"
    return None
