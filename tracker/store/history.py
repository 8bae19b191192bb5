"""Read what resuming needs from MLflow: a run's last checkpoint and its logged values."""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.errors import StoreError, first_line
from tracker.training.checkpoint import Checkpoint, load_checkpoint, load_metrics
from tracker.validation import TABLES_TAG, checked_path

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of a run's artifacts that holds one folder per checkpoint, named after its step."""


@dataclass(frozen=True)
class ResumeState:
    """What resuming a run reads from MLflow."""

    run_id: str
    params: Mapping[str, str]
    last_steps: Mapping[str, int]
    """The last step of each metric: a continued run does not log it again up to there."""
    samples: int
    """The number of samples of the system metrics."""
    rows: list[dict[str, Any]]
    """The rows of `epochs.json` up to the checkpoint."""
    histograms: list[Mapping[str, Any]]
    """The histograms' records up to the checkpoint."""
    kept: Mapping[int, Mapping[str, float]]
    """The metrics of each checkpoint, by step."""
    checkpoint: Checkpoint | None
    """The last checkpoint; None if there is none, and training begins anew."""
    tables: Mapping[str, bytes] = field(default_factory=dict)
    """The content of the tables of `log_table`, by path: further rows are added to it."""


def load_resume_state(run_id: str, tracking_uri: str | None) -> ResumeState:
    """Read what is needed to continue a run.

    Args:
        run_id: MLflow's id of the run.
        tracking_uri: By default the one that MLflow itself would use.

    Raises:
        StoreError: The run does not exist, or its process may still be running.
    """
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds
    from tracker.store.runs import read_run

    store = MlflowStore(tracking_uri)
    run = read_run(store, run_id)
    if run.status == "RUNNING":
        raise StoreError(
            f"run_id={run_id!r} is RUNNING. End its process, then upload its journal with "
            "`tracker sync`. If the journal is lost, set the run's status with "
            "MlflowClient().set_terminated(run_id, 'FAILED')."
        )
    last_steps = store.last_steps(run_id)
    with tempfile.TemporaryDirectory(prefix="tracker-resume-") as folder:
        kept, checkpoint = _checkpoints(store, run_id, Path(folder))
        epochs = checkpoint.epoch if checkpoint else 0
        rows = [row for row in _rows(store, run_id, Path(folder)) if row["epoch"] <= epochs]
        tables = _tables(store, run_id, run.tags, Path(folder))
    histograms: list[Mapping[str, Any]] = []
    if "histograms" in store.artifacts(run_id):
        last = {"epoch": epochs, "step": checkpoint.step if checkpoint else 0}
        histograms = [
            record
            for record in load_histogram_records(store, run_id)
            if record["step"] <= last[record.get("unit", "epoch")]
        ]
    return ResumeState(
        run_id=run_id,
        params=run.params,
        last_steps=last_steps,
        samples=1 + last_steps.get("system/cpu_utilization_percentage", -1),
        rows=rows,
        histograms=histograms,
        kept=kept,
        checkpoint=checkpoint,
        tables=tables,
    )


def _checkpoints(
    store: MlflowStore, run_id: str, folder: Path
) -> tuple[dict[int, Mapping[str, float]], Checkpoint | None]:
    """Return the checkpoints' metrics by step, and the last complete checkpoint."""
    names = (path.rpartition("/")[2] for path in store.artifacts(run_id, CHECKPOINTS))
    kept: dict[int, Mapping[str, float]] = {}
    last = None
    steps = (int(name) for name in names if re.fullmatch(r"[0-9]{1,18}", name))
    for step in sorted(steps, reverse=True):
        path = f"{CHECKPOINTS}/{step:08d}"
        try:
            if last is None:
                last = load_checkpoint(store.download(run_id, path, folder))
                kept[step] = last.metrics
            else:
                kept[step] = load_metrics(store.download(run_id, f"{path}/state.json", folder))
        except StoreError as error:  # its upload was interrupted
            logger.warning("Checkpoint %d is not used: %s", step, error)
    return kept, last


def _tables(
    store: MlflowStore, run_id: str, tags: Mapping[str, str], folder: Path
) -> dict[str, bytes]:
    try:
        listed = json.loads(tags.get(TABLES_TAG, "[]"))
        paths = [checked_path(one["path"], "path") for one in listed if one["type"] == "table"]
    except (KeyError, TypeError, ValueError):  # it is not MLflow's
        return {}
    return {path: store.download(run_id, path, folder).read_bytes() for path in paths}


def _rows(store: MlflowStore, run_id: str, folder: Path) -> list[dict[str, Any]]:
    if "epochs.json" not in store.artifacts(run_id):
        return []
    with _readable("epochs.json", run_id):
        return epoch_rows(store.download(run_id, "epochs.json", folder).read_text("utf-8"))


def epoch_rows(text: str) -> list[dict[str, Any]]:
    """Return the rows of `epochs.json`; strings stand for NaN and infinity, which JSON lacks.

    Raises:
        ValueError: The text is cut off, or is not a table of epochs.
    """
    rows = json.loads(text)
    if not isinstance(rows, list):
        raise ValueError("it is not a table of epochs")
    for row in rows:
        if not isinstance(row, dict) or type(row.get("epoch")) is not int:
            raise ValueError("it has a row without an epoch")
        for key, value in row.items():
            if not isinstance(value, int | float | str):
                raise ValueError(f"its {key!r:.50} is not a number")
            row[key] = float(value) if isinstance(value, str) else value
    return rows


@contextmanager
def _readable(name: str, run_id: str) -> Iterator[None]:
    """Raise StoreError where an artifact is cut off or was written by something else."""
    try:
        yield
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(
            f"{name} of run_id={run_id!r} cannot be read: {first_line(error)}."
        ) from error


def load_histogram_records(store: MlflowStore, run_id: str) -> list[Mapping[str, Any]]:
    """Read the histograms of a run as they were logged, by step.

    Raises:
        StoreError: The run does not exist, or has no histograms.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = store.download(run_id, "histograms", Path(folder))
        loaded: list[Mapping[str, Any]] = []
        for file in sorted(files.glob("*.json")):
            with _readable(f"histograms/{file.name}", run_id):
                loaded.append(_histogram_record(file.read_text("utf-8")))
        return loaded


def _histogram_record(text: str) -> Mapping[str, Any]:
    record: Mapping[str, Any] = json.loads(text)
    try:
        whole = type(record["step"]) is int and all(map(_is_histogram, record["histograms"]))
        whole = whole and record.get("unit", "epoch") in ("epoch", "step")
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError("it is not a record of histograms")
    return record


def _is_histogram(item: Any) -> bool:
    numbers = *item["bins"], *item["counts"], item["nan"], item["posinf"], item["neginf"]
    return (
        isinstance(item["tensor"], str)
        and isinstance(item["kind"], str)
        and len(item["bins"]) == len(item["counts"])
        and all(type(number) is int for number in numbers)
    )
