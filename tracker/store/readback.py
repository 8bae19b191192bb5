"""What a run has logged, read back from MLflow: histograms and models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch

from tracker.capture.histograms import bin_edges
from tracker.capture.model import EXPORTED, FILES
from tracker.errors import StoreError
from tracker.logs import muted
from tracker.store.uri import check_there, resolve


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
    from tracker.store.client import MlflowStore  # takes seconds, and few runs begin with a model

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


def load_histograms(run_id: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """The histograms of a run: one row for each bin that is not empty.

    Columns: `tensor` (the parameter's name), `kind` (weight or gradient), `step` (the epoch, from
    1), `left` and `right` (the bin's edges), `count`. The counts of a tensor at a step add up to
    its finite elements; `load_nonfinite` has the others. Raises StoreError where the run has none.
    """
    rows = [
        pd.DataFrame(
            {
                "tensor": item["tensor"],
                "kind": item["kind"],
                "step": record["step"],
                "left": left,
                "right": right,
                "count": np.asarray(item["counts"], dtype=np.int64),
            }
        )
        for record in _load(run_id, tracking_uri)
        for item in record["histograms"]
        for left, right in [bin_edges(item["bins"])]
    ]
    columns = ["tensor", "kind", "step", "left", "right", "count"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def load_nonfinite(run_id: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """The elements of a run's weights and gradients that are not finite, where there are any.

    Columns: `tensor`, `kind`, `step`, and the counts `nan`, `posinf`, `neginf`.
    """
    counted = ("nan", "posinf", "neginf")
    rows = [
        (item["tensor"], item["kind"], record["step"], *(item[column] for column in counted))
        for record in _load(run_id, tracking_uri)
        for item in record["histograms"]
        if any(item[column] for column in counted)
    ]
    return pd.DataFrame(rows, columns=["tensor", "kind", "step", *counted])


def _load(run_id: str, tracking_uri: str | None) -> list[Mapping[str, Any]]:
    from tracker.store.client import MlflowStore  # importing mlflow takes a second

    with tempfile.TemporaryDirectory() as folder:
        files = MlflowStore(tracking_uri).download(run_id, "histograms", Path(folder))
        return [json.loads(file.read_text()) for file in sorted(files.glob("*.json"))]
