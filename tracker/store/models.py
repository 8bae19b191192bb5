"""Logged models in MLflow, and the model registry."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from tracker.errors import RefusedError, StoreError, first_line
from tracker.logs import muted
from tracker.store.guards import all_pages, quiet, translated, without_retries

RECORD_TAG = "tracker.record"
"""The tag of a logged model that names the journal's record it was made from."""


class ModelStore:
    """The models of a tracking store."""

    def __init__(self, client: MlflowClient, tracking_uri: str) -> None:
        self._client = client
        self._tracking_uri = tracking_uri

    def log(
        self, run_id: str, folder: Path, name: str, step: int, record: str, *, in_doubt: bool
    ) -> str:
        """Upload a model that MLflow saved to a folder, as an output of the run.

        Args:
            run_id: The run that made the model.
            folder: The model's folder, with the file `MLmodel`.
            name: The model's name in the run.
            step: The step at which the run logs it.
            record: A unique name of this model; see RECORD_TAG.
            in_doubt: Complete the model of this record if an earlier attempt created it.

        Returns:
            The model's id.

        Raises:
            RefusedError: `folder` does not hold a model, or MLflow does not accept it.
            StoreError: The store cannot be used.
        """
        model = _load_model(folder)
        with translated(f"store the model of run {run_id}"), without_retries():
            run = self._client.get_run(run_id)
            logged = self._begun(run.info.experiment_id, run_id, record) if in_doubt else None
            if logged is None:
                logged = self._client.create_logged_model(
                    run.info.experiment_id,
                    name,
                    run_id,
                    tags={RECORD_TAG: record},
                    params=run.data.params,
                )
            model.run_id = run_id
            model.model_id = model.model_uuid = logged.model_id
            model.artifact_path = logged.artifact_location
            # Written under another name, then renamed: if killed here, no partial file remains.
            fresh = folder.with_name(f"{folder.name}.MLmodel")
            model.save(str(fresh))
            fresh.replace(folder / "MLmodel")
            self._client.log_model_artifacts(logged.model_id, str(folder))
            self._client.finalize_logged_model(logged.model_id, "READY")
            outputs = run.outputs.model_outputs if run.outputs else []
            if logged.model_id not in [output.model_id for output in outputs]:
                self._client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
        return str(logged.model_id)

    def _begun(self, experiment_id: str, run_id: str, record: str) -> LoggedModel | None:
        """Return the model that an earlier attempt created for `record`."""
        query = f"source_run_id = '{run_id}'"
        models = all_pages(self._client.search_logged_models, [experiment_id], query)
        return next((model for model in models if model.tags.get(RECORD_TAG) == record), None)

    def download(self, model_uri: str, into: Path) -> Path:
        """Download a logged or registered model.

        Args:
            model_uri: `runs:/RUN_ID/model`, `models:/NAME@ALIAS`, `models:/NAME/1` or
                `models:/MODEL_ID`.
            into: The folder to download to.

        Returns:
            The model's folder.

        Raises:
            StoreError: The model does not exist.
        """
        with translated(f"find the model {model_uri!r}"), quiet():
            path = download_artifacts(
                artifact_uri=self._location(model_uri),
                dst_path=str(into),
                tracking_uri=self._tracking_uri,
                registry_uri=self._tracking_uri,
            )
        if not Path(path, "MLmodel").is_file():
            raise StoreError(f"model={model_uri!r} is not a model: it has no file MLmodel.")
        return Path(path)

    def _location(self, model_uri: str) -> str:
        """Return the URI of a model's files.

        MLflow 3.17 resolves `models:/` and the models of `runs:/` in the tracking URI of the
        process, whatever URI its download is given.
        """
        scheme, _, path = model_uri.partition(":/")
        name, _, rest = path.partition("/")
        if scheme == "runs":
            return self._location_in_run(name, rest)
        if scheme == "models" and "@" in name:
            name, _, alias = name.partition("@")
            rest = str(self._client.get_model_version_by_alias(name, alias).version)
        if scheme == "models" and rest:
            location = str(self._client.get_model_version_download_uri(name, rest))
            # A version that was registered by its URI alone.
            is_model = location.startswith(("models:/", "runs:/"))
            return self._location(location) if is_model else location
        if scheme == "models":
            return str(self._client.get_logged_model(name).artifact_location)
        raise StoreError(
            f"model={model_uri!r} is not allowed; it must be runs:/RUN_ID/model, "
            "models:/NAME@ALIAS or models:/NAME/1."
        )

    def _location_in_run(self, run_id: str, name: str) -> str:
        experiment_id = self._client.get_run(run_id).info.experiment_id
        query = f"source_run_id = '{run_id}'"
        others = set()
        # The newest comes first.
        for model in all_pages(self._client.search_logged_models, [experiment_id], query):
            if model.name == name:
                return str(model.artifact_location)
            others.add(model.name)
        there = f"; it has {', '.join(sorted(others))}" if others else ""
        raise StoreError(
            f"MLflow could not find the model 'runs:/{run_id}/{name}': the run has no such model"
            f"{there}."
        )

    def delete(self, model_id: str, name: str) -> bool:
        """Delete a logged model and its files, if this library logged it under `name`.

        Returns:
            Whether there was such a model.
        """
        with translated(f"delete the model {model_id}"):
            try:
                model = self._client.get_logged_model(model_id)
            except MlflowException as error:  # a run keeps naming its deleted models
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return False
            if model.name != name or RECORD_TAG not in model.tags:
                return False
            location = model.artifact_location
            get_artifact_repository(location, self._tracking_uri).delete_artifacts()
            self._client.delete_logged_model(model_id)
        return True

    def is_registered(self, run_id: str) -> bool:
        """Return whether a model of the run has a version in the registry."""
        query = f"run_id = '{run_id}'"
        with translated(f"look for registered models of run {run_id}"):
            return bool(self._client.search_model_versions(query, max_results=1))

    def register(
        self, name: str, alias: str | None, model_id: str, run_id: str, tags: Mapping[str, str]
    ) -> bool:
        """Register a logged model, unless a model of its run is registered under the name.

        Args:
            name: The registered model's name; it is created if it does not exist.
            alias: An alias that the version shall have.
            model_id: The logged model.
            run_id: The run that logged it.
            tags: Tags of a new version.

        Returns:
            Whether a version or alias was missing.

        Raises:
            StoreError: The store cannot be used, or refuses the name.
        """
        with translated(f"register the model {name}"), muted("mlflow", logging.ERROR):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            versions = all_pages(self._client.search_model_versions, f"name = '{name}'")
            version = next((each.version for each in versions if each.run_id == run_id), None)
            is_new = version is None
            if version is None:
                # MLflow 3.17 would look for `models:/ID` in the tracking URI of the process.
                location = self._client.get_logged_model(model_id).artifact_location
                version = self._client.create_model_version(
                    name, location, run_id, dict(tags), model_id=model_id
                ).version
            aliases = self._client.get_registered_model(name).aliases
            if alias is None or str(aliases.get(alias)) == str(version):
                return is_new
            self._client.set_registered_model_alias(name, alias, version)
        return True


def _load_model(folder: Path) -> Model:
    try:
        return Model.load(str(folder))
    except Exception as error:  # of YAML, and of MLflow on what YAML makes of the file
        raise RefusedError(f"{folder.name} is not a model: {first_line(error)}.") from error
