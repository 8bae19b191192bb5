"""Trained models, read back from MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tracker.errors import StoreError
from tracker.export import EXPORTED, FILES
from tracker.logs import muted
from tracker.tracking_uri import check_there, resolve


@dataclass(frozen=True)
class Trained:
    """A model that a run has logged: no class of the network is needed for it."""

    program: torch.export.ExportedProgram
    """The network on the CPU, in evaluation mode; its `state_dict` holds the weights."""
    files: Mapping[str, str]
    """The texts that travel with it, by name."""


def load_trained(model_uri: str, tracking_uri: str | None = None) -> Trained:
    """The model at `model_uri`: `runs:/RUN_ID/model`, `models:/NAME@ALIAS` or `models:/NAME/1`.

    tracking_uri: by default the one that MLflow itself would use.
    Raises StoreError where there is no such model, or it is none that `Run.log_model` has logged.
    """
    from tracker.mlflow_store import MlflowStore  # takes seconds, and few runs begin with a model

    check_there(resolve(tracking_uri), f"the model {model_uri!r}")
    with TemporaryDirectory() as temporary:
        folder = MlflowStore(tracking_uri).download_model(model_uri, Path(temporary))
        exported = folder / EXPORTED
        if not exported.is_file():
            raise StoreError(
                f"model={model_uri!r} was not logged by tracker: it has no {EXPORTED}."
            )
        try:
            with muted("torch.export"):  # it logs a stack trace before it raises
                program = torch.export.load(exported)
        except Exception as error:  # what zip files, JSON and torch raise on a damaged file
            why = next(iter(str(error).splitlines()), type(error).__name__)
            raise StoreError(
                f"model={model_uri!r} cannot be read by torch {torch.__version__}: {why}."
            ) from error
        extra = folder / FILES
        files = {path.name: path.read_text("utf-8") for path in extra.glob("*") if path.is_file()}
    return Trained(program, files)
