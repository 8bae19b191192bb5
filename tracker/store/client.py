"""MLflow's client as the tracker uses it: explicit run ids, and errors as StoreError.

Models are in `models.py`, searches in `runs.py`. MLflow's errors are translated in `guards.py`;
nothing above this folder knows them.
"""

from __future__ import annotations

import logging
import os
import posixpath
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from tracker.errors import GoneError, RefusedError, StoreError, first_line
from tracker.redaction import public_uri
from tracker.store.doubt import MetricPoint, without_logged
from tracker.store.guards import all_pages, quiet, translated, without_retries
from tracker.store.listing import check_listing
from tracker.store.models import ModelStore
from tracker.store.sqlite import create_experiment, create_sqlite
from tracker.store.uri import check_uri, is_file_store, is_http, resolve, unreachable_reason
from tracker.validation import RUN_TAG

logger = logging.getLogger(__name__)

PLACEHOLDER_TAG = "tracker.placeholder"
"""The tag of a run that another run with the same key replaces."""
LATER_PARAM = "tracker.param."
"""MLflow never changes a param: a later value of NAME goes to the tag `tracker.param.NAME`."""


class MlflowStore:
    """A tracking store: a SQLite file, a server, a `file:` folder or another URI MLflow knows."""

    def __init__(self, tracking_uri: str | None = None) -> None:
        """Open a store.

        Args:
            tracking_uri: By default the one that MLflow itself would use.

        Raises:
            StoreError: The store cannot be opened or written.
        """
        self.tracking_uri = resolve(tracking_uri)
        check_uri(self.tracking_uri)
        if (reason := self.unreachable_reason()) is not None:
            raise StoreError(self._cannot_be_opened(reason))
        self._created: set[str] = set()  # runs whose only params are those logged here
        warn = is_file_store(self.tracking_uri) and _allow_file_store()
        try:
            with warnings.catch_warnings():  # `-W error` would raise SQLAlchemy's deprecations
                warnings.simplefilter("ignore", DeprecationWarning)
                if self._is_sqlite():
                    create_sqlite(self.tracking_uri)
                self.client: MlflowClient = MlflowClient(self.tracking_uri)
                """MLflow's own client; wrap its calls in `translated`."""
                self.client.search_experiments(max_results=1)
        except Exception as error:  # a third party's store may raise anything on a bad URI
            raise StoreError(self._cannot_be_opened(first_line(error))) from error
        self.models = ModelStore(self.client, self.tracking_uri)
        if warn:
            logger.warning(
                "MLflow's file store (%s) is in maintenance mode and not crash-safe: killing a "
                "process can damage a run. MLflow recommends sqlite:///mlflow.db.",
                self.tracking_uri,
            )

    def _cannot_be_opened(self, reason: str) -> str:
        return f"tracking_uri={public_uri(self.tracking_uri)!r} cannot be opened: {reason}."

    def unreachable_reason(self) -> str | None:
        """Return why the store's server does not answer; None if it does, or is not a server."""
        return unreachable_reason(self.tracking_uri) if is_http(self.tracking_uri) else None

    def _is_sqlite(self) -> bool:
        return self.tracking_uri.startswith("sqlite:")

    # -- experiments and runs ----------------------------------------------------------------

    def experiment_id(self, name: str, by_id: str | None = None) -> str:
        """Return the id of an experiment.

        Args:
            name: The experiment's name; it is created if it does not exist.
            by_id: Its id, used instead of the name.

        Raises:
            GoneError: The experiment is deleted, or `by_id` does not exist.
        """
        with translated(f"open the experiment {by_id or name!r}"):
            experiment = (
                self.client.get_experiment_by_name(name)
                if by_id is None
                else self.client.get_experiment(by_id)
            )
            if experiment is None:
                try:
                    if self._is_sqlite():
                        return create_experiment(self.tracking_uri, name)
                    return str(self.client.create_experiment(name))
                except MlflowException:  # another process may have been faster
                    experiment = self.client.get_experiment_by_name(name)
                    if experiment is None:
                        raise
        if experiment.lifecycle_stage != "active":
            raise GoneError(
                f"experiment={experiment.name!r} is deleted; restore it with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, "
                "or choose another name."
            )
        return str(experiment.experiment_id)

    def check_experiment(self, name: str, by_id: str) -> None:
        """Raise RefusedError if the experiment with the id has another name."""
        with translated(f"open the experiment {by_id!r}"):
            actual = self.client.get_experiment(by_id).name
        if actual != name:
            raise RefusedError(
                f"MLFLOW_EXPERIMENT_ID={by_id!r} is the experiment {actual!r}, but "
                f"MLFLOW_EXPERIMENT_NAME={name!r}; they must agree."
            )

    def experiment_ids(self) -> list[str]:
        """Return the ids of all experiments that are not deleted."""
        with translated("list the experiments"):
            experiments = all_pages(self.client.search_experiments)
            return [str(experiment.experiment_id) for experiment in experiments]

    def begin_run(
        self,
        *,
        experiment_id: str,
        name: str | None,
        start_time: int,
        tags: Mapping[str, str],
        in_doubt: bool = False,
        keyed: bool = False,
        placeholder: bool = False,
    ) -> str:
        """Create a run, or use the one that exists.

        Args:
            experiment_id: The experiment of the run.
            name: The run's name; None lets MLflow choose one.
            start_time: Milliseconds since 1970.
            tags: The run's tags, with its key under RUN_TAG.
            in_doubt: An earlier attempt may have created the run.
            keyed: Other processes may create a run under the key too: exactly one is kept.
            placeholder: Of two runs with the key, the other one is kept.

        Returns:
            The run's id.

        Raises:
            StoreError: The store cannot be used.
        """
        key = tags[RUN_TAG]
        if keyed:
            # A process knows whether it has created a run, but not what others did meanwhile.
            look = in_doubt or placeholder
            found = self._only_run(key, experiment_id, placeholder=placeholder) if look else None
        else:
            found = self.find_run(key, experiment_id) if in_doubt else None
        if found is not None:
            return self._join(found, tags, placeholder=placeholder) if keyed else found
        marked = {**tags, PLACEHOLDER_TAG: "true"} if placeholder else dict(tags)
        with translated("create a run"), without_retries():
            run = self.client.create_run(experiment_id, start_time, marked, name)
        run_id = str(run.info.run_id)
        self._created.add(run_id)
        only = self._only_run(key, experiment_id, placeholder=placeholder) if keyed else None
        if only is not None and only != run_id:
            return self._join(only, tags, placeholder=placeholder)
        return run_id

    def adopt_run(
        self,
        run_id: str,
        tags: Mapping[str, str],
        experiment: str | None,
        experiment_id: str | None,
        *,
        keyed: bool,
    ) -> bool:
        """Continue a run that exists, with the name and tags it has.

        Args:
            run_id: The run's id, mostly of MLFLOW_RUN_ID.
            tags: More tags, with the key under RUN_TAG.
            experiment: The name of the experiment that the run must be in; None for any.
            experiment_id: The id of that experiment; None for any.
            keyed: Other processes may use the key too: one that has it already may have ended, and
                the run of a study may be in another experiment than its trials.

        Returns:
            Whether it is ours: False if a run of another key has used it before.

        Raises:
            StoreError: It does not exist, or is in another experiment.
        """
        with translated(f"find the run {run_id} of MLFLOW_RUN_ID"):
            run = self.client.get_run(run_id)
            theirs = run.data.tags
            if theirs.get(RUN_TAG, tags[RUN_TAG]) != tags[RUN_TAG]:
                return False
            actual = self.client.get_experiment(run.info.experiment_id)
        is_there = experiment in (None, actual.name)
        if not (is_there and experiment_id in (None, actual.experiment_id)) and not keyed:
            raise RefusedError(
                f"MLFLOW_RUN_ID={run_id!r} is a run of the experiment {actual.name!r}, not of "
                f"{experiment or experiment_id!r}; unset MLFLOW_RUN_ID or choose its experiment."
            )
        more = {name: value for name, value in tags.items() if name not in theirs}
        if run.info.status != "RUNNING" and not (keyed and RUN_TAG in theirs):
            self.reopen(run_id, more)
        else:
            self.log_batch(run_id, tags=more)
        return True

    def _join(self, run_id: str, tags: Mapping[str, str], *, placeholder: bool) -> str:
        """Use another process's run with our key, unless ours is only its placeholder."""
        if not placeholder:
            self.reopen(run_id, tags)
        return run_id

    def _only_run(self, key: str, experiment_id: str, *, placeholder: bool) -> str | None:
        """Return the id of the run with `key`; of several, delete all but one.

        Processes that created one each at the same time keep the same, not a placeholder if
        possible. If the only run is a placeholder and this one is not, return None: the caller
        creates its run and deletes the placeholder, so that metrics are not logged twice.
        """
        with translated("search runs"):
            query = f"tags.`{RUN_TAG}` = '{key}'"
            runs = sorted(
                self.client.search_runs([experiment_id], query),
                key=lambda r: (PLACEHOLDER_TAG in r.data.tags, r.info.start_time, r.info.run_id),
            )
            if runs and not placeholder and PLACEHOLDER_TAG in runs[0].data.tags:
                return None
            for run in runs[1:]:
                self.client.delete_run(run.info.run_id)
        return str(runs[0].info.run_id) if runs else None

    def find_run(self, key: str, experiment_id: str | None = None) -> str | None:
        """Return the id of the run tracked under `key`; None if there is none.

        Args:
            key: The value of the run's RUN_TAG.
            experiment_id: The experiment to search; all of them by default.
        """
        experiment_ids = self.experiment_ids() if experiment_id is None else [experiment_id]
        with translated("search runs"):
            query = f"tags.`{RUN_TAG}` = '{key}'"
            runs = self.client.search_runs(experiment_ids, query, max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def reopen(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set an ended run back to RUNNING, set `tags`, and clear the reason of its failure."""
        with translated(f"continue the run {run_id}"):
            old_tags = self.client.get_run(run_id).data.tags
            self.client.update_run(run_id, "RUNNING")
            if "tracker.failure" in old_tags:
                self.client.delete_tag(run_id, "tracker.failure")
        self.log_batch(run_id, tags=tags)

    def set_status(self, run_id: str, status: str) -> None:
        """Set the status of a run without changing its end time."""
        with translated(f"update run {run_id}"):
            self.client.update_run(run_id, status)

    def end_run(self, run_id: str, status: str, end_time: int) -> None:
        """Give the run its final status, at `end_time` in milliseconds since 1970."""
        with translated(f"end the run {run_id}"), quiet():
            self.client.set_terminated(run_id, status, end_time)
        self._created.discard(run_id)

    def is_placeholder(self, run_id: str) -> bool:
        """Return whether a run gives way to another one with the same key."""
        with translated(f"read run {run_id}"):
            return PLACEHOLDER_TAG in self.client.get_run(run_id).data.tags

    def run_name(self, run_id: str) -> str:
        """Return the name of a run, which MLflow chose if none was given."""
        with translated(f"read run {run_id}"):
            return str(self.client.get_run(run_id).info.run_name)

    def run_problem(self, run_id: str) -> str | None:
        """Return why a run accepts nothing at the moment; None if it does."""
        try:
            with translated(f"read run {run_id}"):
                run = self.client.get_run(run_id).info
                experiment = self.client.get_experiment(run.experiment_id)
        except (RefusedError, GoneError) as error:
            return str(error)
        what, command = "it", f"runs restore --run-id {run_id}"
        if experiment.lifecycle_stage != "active":
            what = "its experiment"
            command = f"experiments restore --experiment-id {run.experiment_id}"
        elif run.lifecycle_stage == "active":
            return None
        return f"{what} is deleted; restore it with `mlflow {command}`."

    def last_steps(self, run_id: str) -> dict[str, int]:
        """Return the largest step of each metric of a run."""
        with translated(f"read run {run_id}"):
            latest = self.client.get_run(run_id).data.to_proto().metrics  # by step, then time
            return {str(point.key): int(point.step) for point in latest}

    # -- what a run logs ---------------------------------------------------------------------

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[MetricPoint] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        in_doubt: bool = False,
    ) -> None:
        """Log metrics, params and tags together.

        A new value of an existing param goes to a tag, see LATER_PARAM: `mlflow run -P device=auto`
        has already logged `auto`.

        Args:
            run_id: The run.
            metrics: The points to log.
            params: Params by name.
            tags: Tags by name.
            in_doubt: Leave out what an earlier attempt has logged.
        """
        params, tags = params or {}, tags or {}
        with translated(f"log to run {run_id}"), without_retries():
            points = self.without_logged(run_id, metrics) if in_doubt else metrics
            new_params = params
            if params and (in_doubt or run_id not in self._created):
                old = self.client.get_run(run_id).data.params
                changed = {k: v for k, v in params.items() if not _is_same(old.get(k, v), v)}
                tags = {**tags, **{f"{LATER_PARAM}{k}": v for k, v in changed.items()}}
                new_params = {k: v for k, v in params.items() if k not in old}
            try:
                self.client.log_batch(  # in as many requests as MLflow's limits ask for
                    run_id,
                    [Metric(name, value, time, step) for name, value, step, time in points],
                    [Param(k, v) for k, v in new_params.items()],
                    [RunTag(k, v) for k, v in tags.items()],
                )
            except MlflowException:
                if in_doubt or not new_params:
                    raise
                if not new_params.keys() & self.client.get_run(run_id).data.params:
                    raise
                # Another process has logged a param since we looked, which MLflow refuses.
                self.log_batch(run_id, metrics, params, tags, in_doubt=True)

    def without_logged(self, run_id: str, metrics: Sequence[MetricPoint]) -> Sequence[MetricPoint]:
        """Leave out the points that an earlier request may have logged; see `doubt.py`."""
        with translated(f"read the metrics of run {run_id}"), without_retries():
            return without_logged(self.client, self.tracking_uri, run_id, metrics)

    def log_artifact(self, run_id: str, path: Path, folder: str | None) -> None:
        """Upload a file, or a folder's content.

        Args:
            run_id: The run.
            path: The file or folder.
            folder: Folder of the run's artifacts; None is their root.
        """
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
        """Record a data set as an input of the run.

        Args:
            run_id: The run.
            dataset: The fields of `mlflow.entities.Dataset`.
            context: The purpose of the data set, such as `training`.
        """
        entity = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", context)])
        with translated(f"record the data set of run {run_id}"):
            self.client.log_inputs(run_id, [entity])

    # -- artifacts ---------------------------------------------------------------------------

    def artifacts(self, run_id: str, folder: str | None = None) -> list[str]:
        """Return the sorted paths in one folder of the run's artifacts."""
        with translated(f"list the artifacts of run {run_id}"):
            return sorted(item.path for item in self.client.list_artifacts(run_id, folder))

    def download(self, run_id: str, path: str, into: Path) -> Path:
        """Download a file or folder of the run's artifacts.

        Args:
            run_id: The run.
            path: Its path in the run's artifacts.
            into: The folder to download to.

        Returns:
            Where it is.

        Raises:
            StoreError: It does not exist, cannot be read, or would be written elsewhere.
        """
        if path not in self.artifacts(run_id, posixpath.dirname(path) or None):
            raise StoreError(f"run_id={run_id!r} has no artifact {path!r}.")
        with translated(f"download {path} of run {run_id}"), quiet():
            check_listing(self.client, run_id, path)
            return Path(self.client.download_artifacts(run_id, path, str(into)))

    def delete_artifact(self, run_id: str, path: str) -> None:
        """Delete a file or folder of the run's artifacts, if it exists."""
        with translated(f"delete the artifact {path} of run {run_id}"):
            root = self.client.get_run(run_id).info.artifact_uri
            parent = posixpath.dirname(path) or None
            if path in [item.path for item in self.client.list_artifacts(run_id, parent)]:
                get_artifact_repository(root, self.tracking_uri).delete_artifacts(path)


def _is_same(old: str, new: str) -> bool:
    """Return whether two texts spell one value: `1e-2` and `0.01`, `true` and `True`."""
    if old.lower() == new.lower():
        return True
    try:
        return float(old) == float(new)
    except ValueError:
        return False


def _allow_file_store() -> bool:
    """Set the variable without which MLflow opens no file store; return whether it was unset."""
    was_set = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true"
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    return not was_set
