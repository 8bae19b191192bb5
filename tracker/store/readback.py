"""What a run has logged, read back from MLflow: models and histograms."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from tracker.capture.histograms import bin_edges
from tracker.capture.model import EXPORTED, FILES
from tracker.errors import StoreError, first_line
from tracker.exported import load_exported
from tracker.logs import muted
from tracker.store.history import load_histogram_records
from tracker.store.uri import check_exists, resolve


@dataclass(frozen=True)
class Trained:
    """A model that a run has logged; loading it needs no class of the network."""

    program: torch.export.ExportedProgram
    """The network on the CPU, in evaluation mode; its `state_dict` holds the weights."""
    files: Mapping[str, str]
    """The texts logged with it, by name."""


def load_trained(model_uri: str, tracking_uri: str | None = None) -> Trained:
    """Load a model that `Run.log_model` has logged.

    Args:
        model_uri: `runs:/RUN_ID/model`, `models:/NAME@ALIAS` or `models:/NAME/1`.
        tracking_uri: By default the one that MLflow itself would use.

    Raises:
        StoreError: The model does not exist, or was not logged by `Run.log_model`.
    """
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    check_exists(resolve(tracking_uri), f"the model {model_uri!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = MlflowStore(tracking_uri).models.download(model_uri, Path(temporary))
        exported = folder / EXPORTED
        if not exported.is_file():
            raise StoreError(
                f"model={model_uri!r} was not logged by tracker: it has no {EXPORTED}."
            )
        try:
            with muted("torch.export"):  # it logs a stack trace before it raises
                program = load_exported(exported)
        except Exception as error:  # what zip files, JSON and torch raise on a damaged file
            raise StoreError(
                f"model={model_uri!r} cannot be read by torch {torch.__version__}: "
                f"{first_line(error)}."
            ) from error
        extra = folder / FILES
        files = {path.name: path.read_text("utf-8") for path in extra.glob("*") if path.is_file()}
    return Trained(program, files)


def load_histograms(run_id: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """Load the histograms of a run, one row per bin that is not empty.

    The counts of a tensor at a step add up to its finite elements; `load_nonfinite` counts the
    others.

    Args:
        run_id: MLflow's id of the run.
        tracking_uri: By default the one that MLflow itself would use.

    Returns:
        A table with the columns `tensor` (the parameter's name), `kind` (weight or gradient),
        `step` (the epoch, from 1), `left` and `right` (the bin's edges) and `count`.

    Raises:
        StoreError: The run does not exist, or has no histograms.
    """
    columns = ["tensor", "kind", "step", "left", "right", "count"]
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
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def load_nonfinite(run_id: str, tracking_uri: str | None = None) -> pd.DataFrame:
    """Load the number of elements that are not finite, one row per tensor and step with any.

    Args:
        run_id: MLflow's id of the run.
        tracking_uri: By default the one that MLflow itself would use.

    Returns:
        A table with the columns `tensor`, `kind`, `step`, and the counts `nan`, `posinf`, `neginf`.

    Raises:
        StoreError: The run does not exist, or has no histograms.
    """
    counts = ("nan", "posinf", "neginf")
    rows = [
        (item["tensor"], item["kind"], record["step"], *(item[name] for name in counts))
        for record in _load(run_id, tracking_uri)
        for item in record["histograms"]
        if any(item[name] for name in counts)
    ]
    return pd.DataFrame(rows, columns=["tensor", "kind", "step", *counts])


def _load(run_id: str, tracking_uri: str | None) -> list[Mapping[str, Any]]:
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    return load_histogram_records(MlflowStore(tracking_uri), run_id)
