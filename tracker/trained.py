"""Trained models, read back from MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tracker.errors import StoreError
from tracker.export import EXPORTED, FILES


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

    with TemporaryDirectory() as temporary:
        folder = MlflowStore(tracking_uri).download_model(model_uri, Path(temporary))
        exported = folder / EXPORTED
        if not exported.is_file():
            raise StoreError(
                f"model={model_uri!r} was not logged by tracker: it has no {EXPORTED}."
            )
        program = torch.export.load(exported)
        extra = folder / FILES
        files = {path.name: path.read_text("utf-8") for path in extra.glob("*") if path.is_file()}
    return Trained(program, files)
