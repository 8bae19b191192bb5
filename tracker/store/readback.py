"""What a run has logged, read back from MLflow: models and histograms."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tracker.capture.histograms import bin_edges
from tracker.capture.model import EXPORTED, FILES, PICKLED
from tracker.errors import ArgumentError, StoreError, first_line
from tracker.exported import load_exported
from tracker.logs import muted
from tracker.store.history import load_histogram_records
from tracker.store.uri import check_exists, resolve
from tracker.training.device import unwrap
from tracker.training.networks import as_networks

Network = TypeVar("Network", bound=nn.Module | Sequence[nn.Module] | Mapping[str, nn.Module])


@dataclass(frozen=True)
class Trained:
    """A model that a run has logged; loading it needs no class of the network."""

    program: torch.export.ExportedProgram
    """The network on the CPU, in evaluation mode; its `state_dict` holds the weights."""
    files: Mapping[str, str]
    """The texts logged with it, by name."""


@overload
def load_trained(model: Any, tracking_uri: str | None = None) -> Trained: ...


@overload
def load_trained(model: Any, tracking_uri: str | None = None, *, into: Network) -> Network: ...


def load_trained(
    model: Any, tracking_uri: str | None = None, *, into: Network | None = None
) -> Trained | Network:
    """Load a model logged by `Run.log_model`, without running any of its code.

    Args:
        model: A Run, the id of a run, or a URI: `runs:/RUN_ID/model`, `models:/NAME@ALIAS` or
            `models:/NAME/1`.
        tracking_uri: Default that of the Run, or the one that MLflow itself would use.
        into: A network whose weights become those of the model; then it is returned. It works for
            runs that have only the weights (`model.pt`) too. Several networks, as `begin_run` was
            given them, take the models `model-NAME`.

    Raises:
        ArgumentError: `into` has other tensors than the model; nothing is changed.
        StoreError: The model does not exist, or was not logged by `Run.log_model`.
    """
    if (flush := getattr(model, "flush", None)) is not None:
        flush()
        tracking_uri = tracking_uri or model.tracking_uri
    uri = getattr(getattr(model, "info", model), "run_id", model)  # MLflow's run has `info`
    if not isinstance(uri, str):
        raise ArgumentError(
            f"model is a {type(model).__name__}; it must be a Run, a run's id or a model's URI."
        )
    uri = uri if ":" in uri else f"runs:/{uri}/model"
    if into is None:
        return _load_program(uri, tracking_uri)
    networks = as_networks(into)
    named = {f"-{name}": part for name, part in getattr(networks, "parts", {}).items()}
    parts = {f"{uri}{name}": unwrap(part) for name, part in (named or {"": networks}).items()}
    states = {name: _load_weights(name, tracking_uri) for name in parts}
    for name, part in parts.items():
        if problem := _misfit(part.state_dict(), states[name]):
            raise ArgumentError(f"into={type(part).__name__} does not fit {name!r}: {problem}.")
    for name, part in parts.items():
        part.load_state_dict(states[name])
    return into


def _misfit(own: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Name the first tensors that differ between a network and saved weights, if any do."""
    shapes = {
        name: [
            None if not isinstance(each, torch.Tensor) or is_lazy(each) else tuple(each.shape)
            for each in (own.get(name), saved.get(name))
        ]
        for name in {**own, **saved}
    }
    problems = [
        f"{name} is not in the {'network' if name in saved else 'model'}"
        if not (name in own and name in saved)
        else f"{name} has the shape {mine} instead of {other}"
        for name, (mine, other) in shapes.items()
        if not (name in own and name in saved) or (None not in (mine, other) and mine != other)
    ]
    more = [f"and {len(problems) - 3} more"] if problems[3:] else []
    return "; ".join(problems[:3] + more)


def _load_weights(uri: str, tracking_uri: str | None) -> Mapping[str, Any]:
    """Load the weights of a model, or `NAME.pt` of a run that has no model."""
    from tracker.store.client import MlflowStore

    check_exists(resolve(tracking_uri), f"the model {uri!r}")
    store = MlflowStore(tracking_uri)
    scheme, _, path = uri.partition(":/")
    run_id, _, name = path.strip("/").partition("/")
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if scheme != "runs" or not name:
                raise StoreError(f"model={uri!r} names no run.")
            file = store.download(run_id, f"{name}.pt", Path(temporary))
        except StoreError:  # the run has a model, or neither
            file = store.models.download(uri, Path(temporary)) / PICKLED
        if not file.is_file():
            graph: Mapping[str, Any] = _load_program(uri, tracking_uri).program.state_dict
            return graph
        try:
            weights: dict[str, Any] = dict(torch.load(file, map_location="cpu", weights_only=True))
            return weights
        except Exception as error:  # of a pickled network, or a damaged file
            raise StoreError(
                f"model={uri!r} holds more than weights, and reading it would run its code; if you "
                "trust it, load it with mlflow.pytorch.load_model."
            ) from error


def _load_program(model_uri: str, tracking_uri: str | None) -> Trained:
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    check_exists(resolve(tracking_uri), f"the model {model_uri!r}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = MlflowStore(tracking_uri).models.download(model_uri, Path(temporary))
        exported = folder / EXPORTED
        if not exported.is_file():
            if (folder / PICKLED).is_file():
                raise StoreError(
                    f"model={model_uri!r} has no graph; load it with mlflow.pytorch.load_model, "
                    "which runs its code, or its weights with load_trained(…, into=network)."
                )
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
        A table with the columns `tensor` (its name), `kind` (weight, gradient, activation or
        value), `step`, `left` and `right` (the bin's edges), `count`, and `unit` (epoch or step:
        what `step` is).

    Raises:
        StoreError: The run does not exist, or has no histograms.
    """
    columns = ["tensor", "kind", "step", "left", "right", "count", "unit"]
    rows = [
        pd.DataFrame(
            {
                "tensor": item["tensor"],
                "kind": item["kind"],
                "step": record["step"],
                "left": left,
                "right": right,
                "count": np.asarray(item["counts"], dtype=np.int64),
                "unit": record.get("unit", "epoch"),
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
