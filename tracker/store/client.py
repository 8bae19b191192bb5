"""Every call of MLflow's client: runs, batches, artifacts, models, statuses.

With `export.py` and `testing.py` the only module that imports mlflow. MLflow's errors are
translated here into StoreError; nothing above knows them.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import posixpath
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from tracker.errors import RefusedError, StoreError
from tracker.redaction import public_uri
from tracker.store import file_store
from tracker.store.uri import check, is_file_store, is_http, local_path, resolve, unreachable_reason
from tracker.validation import RUN_TAG

logger = logging.getLogger(__name__)

RECORD_TAG = "tracker.record"
PLACEHOLDER_TAG = "tracker.placeholder"
"""The tag of a run that gives way to another one with the same key."""
LATER = "tracker.param."
"""The tag of a param whose value MLflow keeps another one of begins with this."""
_LARGEST = sys.float_info.max
_REFUSAL = "INVALID_PARAMETER_VALUE"  # not RESOURCE_DOES_NOT_EXIST: it may be the wrong store


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Make MLflow's errors StoreErrors that tell what it could not do."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:  # MLflow's file store raises plain ones
        refused = (
            isinstance(error, (NotADirectoryError, IsADirectoryError, FileExistsError))
            or (isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG)
            or (isinstance(error, MlflowException) and error.error_code == _REFUSAL)
        )
        kind = RefusedError if refused else StoreError
        raise kind(f"MLflow could not {doing}: {_first_line(error)}") from error


class RunSnapshot(NamedTuple):
    """What is known of a run that is to be continued."""

    params: Mapping[str, str]
    """Where MLflow had another one first, what was logged after it."""
    status: str
    last_steps: Mapping[str, int]
    """The last step of each metric."""


class MlflowStore:
    """A tracking store: a SQLite file, a server, a `file:` folder or another URI MLflow knows."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        """Open the store at `tracking_uri`, by default the one that MLflow itself would use.

        Raises StoreError, in one sentence, where it cannot be opened or written.
        """
        self.tracking_uri = resolve(tracking_uri)
        check(self.tracking_uri)
        if (problem := self.unreachable_reason()) is not None:
            raise StoreError(
                f"tracking_uri={public_uri(self.tracking_uri)!r} cannot be opened: {problem}."
            )
        self._made: set[str] = set()  # runs of ours, which have no params but those we log
        opted_in = is_file_store(self.tracking_uri) and _opt_in_to_file_store()
        try:
            self._create_sqlite()
            self.client: MlflowClient = MlflowClient(self.tracking_uri)
            """MLflow's own client; its errors are translated by `translated`."""
            self.client.search_experiments(max_results=1)
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

    def unreachable_reason(self) -> str | None:
        """Why the server, if the store is one, is not there to answer; None if it is."""
        return unreachable_reason(self.tracking_uri) if is_http(self.tracking_uri) else None

    def experiment_id(self, name: str, by_id: str | None = None) -> str:
        """The experiment called `name`, made if need be, or the one with the id `by_id`."""
        with translated(f"open the experiment {by_id or name!r}"):
            if by_id is not None:
                experiment = self.client.get_experiment(by_id)
            elif (found := self.client.get_experiment_by_name(name)) is not None:
                experiment = found
            else:
                try:
                    return self.client.create_experiment(name, self._artifacts_of(name))
                except MlflowException:  # perhaps another process was faster
                    if (found := self.client.get_experiment_by_name(name)) is None:
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
        """Make a new SQLite store, whose `Default` experiment keeps its artifacts beside it.

        Two processes that migrate one fresh file break it for good: each makes its own, and the
        first to be ready is linked into place.
        """
        folder = self._artifacts_folder()
        if folder is None or (path := local_path(self.tracking_uri)).exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as own:
            fresh = Path(own) / path.name
            SqlAlchemyStore(f"sqlite:///{fresh}", str(folder)).engine.dispose()
            try:
                os.link(fresh, path)
            except FileExistsError:
                return
            except OSError:  # a file system without links; the moment between is short
                if not path.exists():
                    fresh.rename(path)

    def _artifacts_folder(self) -> Path | None:
        """The folder of a SQLite store's artifacts; None where the store itself knows.

        MLflow would take `mlruns` below the current directory, wherever that is.
        """
        if not self.tracking_uri.startswith("sqlite:"):
            return None
        return local_path(self.tracking_uri).absolute().parent / "mlruns"

    def _artifacts_of(self, experiment: str) -> str | None:
        folder = self._artifacts_folder()
        if folder is None:
            return None
        return (folder / re.sub(r"[^\w.\-]", "_", experiment)).as_uri()

    def begin_run(
        self,
        *,
        experiment_id: str,
        name: str | None,
        start_time: int,
        tags: Mapping[str, str],
        adopt: str | None = None,
        in_doubt: bool = False,
        keyed: bool = False,
        placeholder: bool = False,
    ) -> str:
        """Create a run, or take the one that exists.

        Args:
            experiment_id: The experiment that it belongs to.
            name: Its name; MLflow chooses one for None.
            start_time: Milliseconds since 1970.
            tags: Its tags; RUN_TAG holds its key.
            adopt: The id of a run that `mlflow run` created for this one. It is taken, with its
                name and tags, unless a run with another key has taken it before.
            in_doubt: The run may have been created before.
            keyed: Other processes may create a run under the key too: exactly one is kept.
            placeholder: Of two runs with the key, the other one is kept.

        Returns:
            The run's id.

        Raises:
            StoreError: The store cannot create it now.
        """
        key = tags[RUN_TAG]
        if adopt is not None:
            with translated(f"find the run {adopt} of MLFLOW_RUN_ID"):
                known = self.client.get_run(adopt).data.tags
            if known.get(RUN_TAG, key) == key:
                self.log_batch(adopt, tags={k: v for k, v in tags.items() if k not in known})
                return adopt
        only = self._only_run(key, experiment_id, placeholder=placeholder) if keyed else None
        if only is not None:
            return self._join(only, tags, placeholder=placeholder)
        if in_doubt and (run_id := self.find_run(key, experiment_id)) is not None:
            return run_id
        if in_doubt and (run_id := self._half_made(experiment_id, start_time, tags)) is not None:
            self.log_batch(run_id, tags=tags)
            return run_id
        marked = {**tags, PLACEHOLDER_TAG: "true"} if placeholder else dict(tags)
        with translated("create a run"), _without_retries():
            run = self.client.create_run(experiment_id, start_time, marked, name)
        run_id = str(run.info.run_id)
        self._made.add(run_id)
        only = self._only_run(key, experiment_id, placeholder=placeholder) if keyed else None
        if only is not None and only != run_id:
            return self._join(only, tags, placeholder=placeholder)
        return run_id

    def _join(self, run_id: str, tags: Mapping[str, str], *, placeholder: bool) -> str:
        """Take a run of another process with our key, unless ours is only its placeholder."""
        if not placeholder:
            self.reopen(run_id, tags)
        return run_id

    def _only_run(self, key: str, experiment_id: str, *, placeholder: bool) -> str | None:
        """Return the id of the run with `key`; of several, delete all but one.

        Processes that created one each at the same time keep the same, not a placeholder if
        possible. A placeholder alone is None to a run that is not: it creates its own, and then
        deletes the placeholder, whose metrics would else be logged twice.
        """
        with translated("look for a run"):
            found = self.client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{key}'")
            runs = sorted(found, key=lambda r: (PLACEHOLDER_TAG in r.data.tags, r.info.run_id))
            if runs and not placeholder and PLACEHOLDER_TAG in runs[0].data.tags:
                return None
            for run in runs[1:]:
                self.client.delete_run(run.info.run_id)
        return str(runs[0].info.run_id) if runs else None

    def _half_made(
        self, experiment_id: str, start_time: int, tags: Mapping[str, str]
    ) -> str | None:
        """The run that the file store was making, a tag at a time, when its process died."""
        with translated("look for a run"):
            at = f"attributes.start_time = {start_time}"
            found = self.client.search_runs([experiment_id], at)
        for run in found:
            had = {k: v for k, v in run.data.tags.items() if v}  # one that was cut off is empty
            if RUN_TAG not in had and had.items() <= tags.items():  # none has no name, but ours
                if is_file_store(self.tracking_uri):
                    file_store.complete_run(self._run_folder(run))
                return str(run.info.run_id)
        return None

    def _run_folder(self, run: Run) -> Path:
        return local_path(self.tracking_uri) / str(run.info.experiment_id) / str(run.info.run_id)

    def find_run(self, key: str, experiment_id: str | None = None) -> str | None:
        """The id of the run that was tracked under `key`, None where it is not here (yet)."""
        with translated("look for a run"):
            if experiment_id is None:
                ids = [e.experiment_id for e in self.client.search_experiments()]
            else:
                ids = [experiment_id]
            if is_file_store(self.tracking_uri):
                for each in ids:
                    file_store.remove_unborn_runs(local_path(self.tracking_uri) / str(each))
            found = self.client.search_runs(ids, f"tags.`{RUN_TAG}` = '{key}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def reopen(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Have a run that has ended go on."""
        with translated(f"continue the run {run_id}"):
            had = self.client.get_run(run_id).data.tags
            self.client.update_run(run_id, "RUNNING")
            if "tracker.failure" in had:
                self.client.delete_tag(run_id, "tracker.failure")
        self.log_batch(run_id, tags=tags)

    def past(self, run_id: str) -> RunSnapshot:
        """What a run holds that one which continues it must know."""
        with translated(f"read run {run_id}"):
            run = self.client.get_run(run_id)
            steps = {
                name: max(p.step for p in self.client.get_metric_history(run_id, name))
                for name in run.data.metrics
            }
        tags = run.data.tags
        later = {k.removeprefix(LATER): tags[k] for k in tags if k.startswith(LATER)}
        return RunSnapshot({**run.data.params, **later}, run.info.status, steps)

    def run_name(self, run_id: str) -> str:
        """The name of a run, which MLflow chose where none was given."""
        with translated(f"read run {run_id}"):
            return str(self.client.get_run(run_id).info.run_name)

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        in_doubt: bool = False,
    ) -> None:
        """Log metrics (name, value, step, milliseconds), params and tags, together.

        MLflow never changes a param: a new value goes to the tag `tracker.param.NAME`. That happens
        in a run that `mlflow run` made, with `device=auto` as it was asked for. `in_doubt` leaves
        out what is there already: SQL stores do that with metrics by themselves, the file store
        would keep them twice, and what is behind a server is not known.
        """
        params, tags = params or {}, tags or {}
        with translated(f"log to run {run_id}"), _without_retries():
            if in_doubt and not self.tracking_uri.startswith("sqlite:"):
                metrics = self._not_there(run_id, metrics)
            if params and (in_doubt or run_id not in self._made):
                had = self.client.get_run(run_id).data.params
                changed = {k: v for k, v in params.items() if not _same(had.get(k, v), v)}
                tags = {**tags, **{f"{LATER}{k}": v for k, v in changed.items()}}
                params = {k: v for k, v in params.items() if k not in had}
            self.client.log_batch(  # in as many requests as MLflow's limits ask for
                run_id,
                [Metric(n, v, at, step) for n, v, step, at in metrics],
                [Param(k, v) for k, v in params.items()],
                [RunTag(k, v) for k, v in tags.items()],
            )

    def _not_there(
        self, run_id: str, metrics: Sequence[tuple[str, float, int, int]]
    ) -> list[tuple[str, float, int, int]]:
        there = {
            (name, _comparable(point.value), point.step, point.timestamp)
            for name in {name for name, *_ in metrics}
            for point in self.client.get_metric_history(run_id, name)
        }
        return [m for m in metrics if (m[0], _comparable(m[1]), *m[2:]) not in there]

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Upload a file, or a folder's content, into `folder` of the run's artifacts."""
        with translated(f"store the artifact {path.name} of run {run_id}"):
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            else:
                self.client.log_artifact(run_id, str(path), folder)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        """Upload `text` as the artifact `name`."""
        with translated(f"store the artifact {name} of run {run_id}"):
            self.client.log_text(run_id, text, name)

    def log_dataset(self, run_id: str, dataset: Mapping[str, str], context: str) -> None:
        """Record a data set (fields of mlflow.entities.Dataset) as an input of the run."""
        entity = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", context)])
        with translated(f"record the data set of run {run_id}"):
            self.client.log_inputs(run_id, [entity])

    def log_model(
        self, run_id: str, folder: Path, name: str, step: int, record: str, *, in_doubt: bool
    ) -> str:
        """Upload a model that mlflow saved to `folder`, as the run's output; returns its id.

        `record` names this model for good: with `in_doubt`, one that was begun is completed.
        """
        model = _model(folder)
        with translated(f"store the model of run {run_id}"), _without_retries():
            if in_doubt and is_file_store(self.tracking_uri):
                file_store.mend_model(local_path(self.tracking_uri), run_id, RECORD_TAG, record)
            run = self.client.get_run(run_id)
            logged = self._logged_model(run, name, record) if in_doubt else None
            if logged is None:
                logged = self.client.create_logged_model(
                    run.info.experiment_id,
                    name,
                    run_id,
                    tags={RECORD_TAG: record},
                    params=run.data.params,
                )
            model.run_id, model.model_id, model.model_uuid = (
                run_id,
                logged.model_id,
                logged.model_id,
            )
            model.artifact_path = logged.artifact_location
            fresh = folder.with_name(f"{folder.name}.MLmodel")  # who dies here leaves a whole one
            model.save(str(fresh))
            fresh.replace(folder / "MLmodel")
            self.client.log_model_artifacts(logged.model_id, str(folder))
            self.client.finalize_logged_model(logged.model_id, "READY")
            outputs = run.outputs.model_outputs if run.outputs else []
            if logged.model_id not in [output.model_id for output in outputs]:
                self.client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        return str(logged.model_id)

    def _logged_model(self, run: Run, name: str, record: str) -> LoggedModel | None:
        """The model that was begun for `record`, perhaps without its tag: see `_half_made`."""
        query = f"source_run_id = '{run.info.run_id}'"
        for model in self.client.search_logged_models([run.info.experiment_id], query):
            if model.tags.get(RECORD_TAG) == record:
                return model
            cut_off = not any(model.tags.values())  # before its tag, or within it
            if model.name == name and cut_off and model.status == "PENDING":
                self.client.log_model_params(model.model_id, run.data.params)
                self.client.set_logged_model_tags(model.model_id, {RECORD_TAG: record})
                return model
        return None

    def delete_artifact(self, run_id: str, path: str) -> None:
        """Delete a file or folder of the run's artifacts, if it is there."""
        with translated(f"delete the artifact {path} of run {run_id}"):
            root = self.client.get_run(run_id).info.artifact_uri
            parent = posixpath.dirname(path) or None
            if path in [item.path for item in self.client.list_artifacts(run_id, parent)]:
                get_artifact_repository(root, self.tracking_uri).delete_artifacts(path)

    def end_run(self, run_id: str, status: str, end_time: int) -> None:
        """Give the run its final status, at `end_time` in milliseconds."""
        with translated(f"end the run {run_id}"), _quiet(), self._guarded(run_id):
            self.client.set_terminated(run_id, status, end_time)
        self._made.discard(run_id)

    def _guarded(self, run_id: str) -> AbstractContextManager[None]:
        if is_file_store(self.tracking_uri):
            return file_store.guarded(local_path(self.tracking_uri), run_id)
        return nullcontext()

    def mend(self, run_ids: Iterable[str]) -> None:
        """Mend what a killed process left half-written of runs that only we write."""
        if is_file_store(self.tracking_uri):
            for run_id in run_ids:
                file_store.mend_run(local_path(self.tracking_uri), run_id)

    def download(self, run_id: str, path: str, into: Path) -> Path:
        """Download a file or folder of the run's artifacts; StoreError where there is none."""
        if path not in self.artifacts(run_id, posixpath.dirname(path) or None):
            raise StoreError(f"run_id={run_id!r} has no artifact {path!r}.")
        with translated(f"download {path} of run {run_id}"), _quiet():
            return Path(self.client.download_artifacts(run_id, path, str(into)))

    def download_model(self, model_uri: str, into: Path) -> Path:
        """Download a logged or registered model; StoreError where there is none."""
        with translated(f"find the model {model_uri!r}"), _quiet():
            found = download_artifacts(
                artifact_uri=self._model_place(model_uri),
                dst_path=str(into),
                tracking_uri=self.tracking_uri,
                registry_uri=self.tracking_uri,
            )
        if not Path(found, "MLmodel").is_file():
            raise StoreError(f"model={model_uri!r} is no model.")
        return Path(found)

    def _model_place(self, model_uri: str) -> str:
        """The URI of a model's files.

        MLflow 3.17 looks for `models:/` in the tracking URI of the process, and for the models of
        `runs:/` too, whatever URI its download is told.
        """
        scheme, _, path = model_uri.partition(":/")
        name, _, rest = path.partition("/")
        if scheme == "runs":
            experiment = self.client.get_run(name).info.experiment_id
            query = f"source_run_id = '{name}'"
            found = self.client.search_logged_models([experiment], query)  # the last one first
            places = [model.artifact_location for model in found if model.name == rest]
            if not places:
                raise StoreError(
                    f"MLflow could not find the model {model_uri!r}: the run has no such model."
                )
            return str(places[0])
        if scheme == "models" and "@" in name:
            name, _, alias = name.partition("@")
            rest = str(self.client.get_model_version_by_alias(name, alias).version)
        if scheme == "models" and rest:
            place = str(self.client.get_model_version_download_uri(name, rest))
            # A version that was registered by its URI alone.
            is_model = place.startswith(("models:/", "runs:/"))
            return self._model_place(place) if is_model else place
        if scheme == "models":
            return str(self.client.get_logged_model(name).artifact_location)
        raise StoreError(
            f"model={model_uri!r} is not allowed; it must be runs:/RUN_ID/model, "
            "models:/NAME@ALIAS or models:/NAME/1."
        )

    def artifacts(self, run_id: str, folder: str | None = None) -> list[str]:
        """The paths in one folder of the run's artifacts, by name."""
        with translated(f"list the artifacts of run {run_id}"):
            return sorted(item.path for item in self.client.list_artifacts(run_id, folder))


def _model(folder: Path) -> Model:
    try:
        return Model.load(str(folder))
    except Exception as error:  # what YAML raises, and MLflow on what that made of the file
        raise RefusedError(f"{folder.name} is not a model: {_first_line(error)}") from error


def _comparable(value: float) -> float | str:
    """A metric's value as it compares after MLflow stored it: NaN equal, infinity cut."""
    return "nan" if math.isnan(value) else max(-_LARGEST, min(value, _LARGEST))


def _same(had: str, new: str) -> bool:
    """Whether two spellings are one value: `1e-2` and `0.01`, `true` and `True`."""
    if had.lower() == new.lower():
        return True
    try:
        return float(had) == float(new)
    except ValueError:
        return False


def _first_line(error: Exception) -> str:
    """What an error says, without the passwords of the URLs that MLflow names."""
    return public_uri(next(iter(str(error).strip().splitlines()), type(error).__name__))


def _opt_in_to_file_store() -> bool:
    """MLflow asks for this before it opens one; returns whether it had not been done."""
    had = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return not had


def _quiet() -> AbstractContextManager[None]:
    """MLflow prints a server's URL, password and all, when a run ends, and bars for downloads."""
    return _setting(
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    )


def _without_retries() -> AbstractContextManager[None]:
    """MLflow's client sends again what was carried out but not answered: two runs for one."""
    return _setting(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")


@contextmanager
def _setting(**wanted: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
