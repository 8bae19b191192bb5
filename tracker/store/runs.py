"""What a study's mirror asks of MLflow: the study's run, its trials' runs, their models.

Like `mlflow_store.py`, every call with explicit ids, and MLflow's errors as StoreErrors.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from tracker.errors import StoreError
from tracker.logs import muted
from tracker.store.client import MlflowStore, translated
from tracker.validation import RUN_TAG

PARENT = "mlflow.parentRunId"
_PAGE = 1000


@dataclass(frozen=True)
class MirroredRun:
    """A run as MLflow has it."""

    run_id: str
    experiment_id: str
    status: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    """The last value of each, which may be NaN."""
    models: Sequence[str]
    """The ids of the models that it logged."""


class StudyRuns:
    """The runs of studies in one MLflow store."""

    def __init__(self, store: MlflowStore) -> None:
        self._store = store
        self._client = store.client

    def parent(
        self,
        key: str,
        *,
        experiment: str,
        experiment_id: str | None,
        tags: Mapping[str, str],
        start_time: int,
        adopt: str | None,
    ) -> tuple[MirroredRun, bool]:
        """The run tracked under `key`, made if need be, and whether it was.

        `adopt` is the id of a run that `mlflow run` has made for it.
        """
        experiment_id = self._store.experiment_id(experiment, experiment_id)
        found = self._store.find_run(key)
        if found is None:
            run_id = self._store.begin_run(
                experiment_id=experiment_id,
                name=tags.get("mlflow.runName"),
                start_time=start_time,
                tags={**tags, RUN_TAG: key},
                adopt=adopt,
            )
            return self.run(run_id), True
        return self.run(found), False

    def find(self, key: str) -> MirroredRun | None:
        """The run tracked under `key`."""
        found = self._store.find_run(key)
        return None if found is None else self.run(found)

    def run(self, run_id: str) -> MirroredRun:
        """One run."""
        with translated(f"read run {run_id}"):
            return _mirrored(self._client.get_run(run_id))

    def children(self, key: str) -> dict[str, MirroredRun]:
        """The runs of the trials of the study that is tracked under `key`, by their own keys."""
        found: dict[str, MirroredRun] = {}
        token: str | None = None
        with translated("read the runs of a study's trials"):
            ids = [e.experiment_id for e in self._client.search_experiments()]
            while True:
                page = self._client.search_runs(
                    ids,  # not by their parent, which may be another one, or gone
                    f"tags.`{RUN_TAG}` LIKE '{key}-%'",
                    max_results=_PAGE,
                    page_token=token,
                )
                for run in page:
                    child = _mirrored(run)
                    found[child.tags[RUN_TAG]] = child
                token = page.token
                if not token:
                    return found

    def finished(self, experiment: str) -> list[MirroredRun]:
        """The FINISHED runs of an experiment, oldest first, with the metrics that are no NaN.

        StoreError where there is no such experiment.
        """
        with translated(f"read the experiment {experiment!r}"):
            found = self._client.get_experiment_by_name(experiment)
        if found is None:
            raise StoreError(f"experiment={experiment!r} does not exist.")
        runs: list[MirroredRun] = []
        token: str | None = None
        with translated(f"read the experiment {experiment!r}"):
            while True:
                page = self._client.search_runs(
                    [found.experiment_id],
                    "attributes.status = 'FINISHED'",
                    order_by=["attributes.start_time ASC"],
                    max_results=_PAGE,
                    page_token=token,
                )
                for run in map(_mirrored, page):
                    numbers = {k: v for k, v in run.metrics.items() if not math.isnan(v)}
                    runs.append(replace(run, metrics=numbers))
                token = page.token
                if not token:
                    return runs

    def create(
        self, parent: MirroredRun, key: str, tags: Mapping[str, str], start_time: int
    ) -> MirroredRun:
        """A run below `parent`, as one that was tracked under `key`."""
        told = {**tags, PARENT: parent.run_id, RUN_TAG: key}
        with translated("create a run"):
            run = self._client.create_run(
                parent.experiment_id, start_time, told, tags.get("mlflow.runName")
            )
        return _mirrored(run)

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log metrics (name, value, step, milliseconds), params and tags."""
        with translated(f"log to run {run_id}"):
            for start in range(0, max(len(metrics), 1), _PAGE):
                some = metrics[start : start + _PAGE]
                self._client.log_batch(
                    run_id,
                    [Metric(name, value, at, step) for name, value, step, at in some],
                    [Param(k, v) for k, v in (params or {}).items()] if start == 0 else [],
                    [RunTag(k, v) for k, v in (tags or {}).items()] if start == 0 else [],
                )

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Upload `text` as the artifact `path`."""
        self._store.log_text(run_id, text, path)

    def artifacts(self, run_id: str) -> list[str]:
        """The paths at the top of a run's artifacts."""
        return self._store.artifacts(run_id)

    def set_status(self, run_id: str, status: str, end_time: int | None) -> None:
        """Set a run's status, whatever it was; with `end_time` in milliseconds a final one."""
        if end_time is not None:
            self._store.end_run(run_id, status, end_time)
            return
        with translated(f"update run {run_id}"):
            self._client.update_run(run_id, status)

    def delete_model(self, model_id: str) -> bool:
        """Delete a logged model and its files; whether it was still there."""
        with translated(f"delete the model {model_id}"):
            try:
                model = self._client.get_logged_model(model_id)
            except MlflowException as error:  # a run goes on naming what was deleted
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
            uri = self._store.tracking_uri
            get_artifact_repository(model.artifact_location, uri).delete_artifacts()
            self._client.delete_logged_model(model_id)
        return True

    def is_registered(self, run_id: str) -> bool:
        """Whether a run's model has a version in the registry."""
        with translated(f"look for versions of run {run_id}"):
            return bool(self._client.search_model_versions(f"run_id = '{run_id}'", max_results=1))

    def register(
        self, name: str, alias: str | None, model_id: str, run_id: str, tags: Mapping[str, str]
    ) -> bool:
        """Register a logged model under `name`, once, with `alias`; whether any was missing."""
        with translated(f"register the model {name}"), muted("mlflow", logging.ERROR):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            versions = self._client.search_model_versions(f"name = '{name}'")
            there = [v.version for v in versions if v.run_id == run_id]
            version = there[0] if there else self._version(name, model_id, run_id, tags)
            aliases = self._client.get_registered_model(name).aliases
            if alias is None or str(aliases.get(alias)) == str(version):
                return not there
            self._client.set_registered_model_alias(name, alias, version)
        return True

    def _version(self, name: str, model_id: str, run_id: str, tags: Mapping[str, str]) -> str:
        # MLflow 3.17 would look for `models:/ID` in the tracking URI of the process.
        place = self._client.get_logged_model(model_id).artifact_location
        made = self._client.create_model_version(name, place, run_id, dict(tags), model_id=model_id)
        return str(made.version)


def _mirrored(run: Run) -> MirroredRun:
    outputs = run.outputs.model_outputs if run.outputs else []
    return MirroredRun(
        str(run.info.run_id),
        str(run.info.experiment_id),
        str(run.info.status),
        dict(run.data.tags),
        dict(run.data.params),
        dict(run.data.metrics),
        [output.model_id for output in outputs],
    )
