"""What a run that is to be continued has in MLflow: its checkpoint, and what it has logged."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.errors import StoreError
from tracker.training.checkpoint import Checkpoint, load_checkpoint, load_metrics

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of the run's artifacts with a checkpoint a folder, named after its step."""


@dataclass(frozen=True)
class ResumeState:
    """A run that ended before its training did."""

    run_id: str
    params: Mapping[str, str]
    last_steps: Mapping[str, int]
    """The last step of each metric: up to there a continued run logs it no more."""
    samples: int
    """Samples of the system's metrics that there are."""
    rows: list[dict[str, Any]]
    """The rows of `epochs.json` up to the checkpoint."""
    histograms: list[dict[str, Any]]
    """The histograms' records up to the checkpoint."""
    kept: Mapping[int, Mapping[str, float]]
    """The checkpoints that there are, by step, with their metrics."""
    checkpoint: Checkpoint | None
    """The last one; None where there is none, and training begins anew."""


def load_resume_state(run_id: str, tracking_uri: str | None) -> ResumeState:
    """Read what is needed to continue `run_id`.

    Raises StoreError where there is no such run, or its process may still live.
    """
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    store = MlflowStore(tracking_uri)
    past = store.past(run_id)
    if past.status == "RUNNING":
        raise StoreError(
            f"run_id={run_id!r} is RUNNING: end its process, then deliver its journal with "
            "`tracker sync`, wherever that lies (or, if it is gone for good, set the run's status "
            "with MlflowClient().set_terminated(run_id, 'FAILED'))."
        )
    with tempfile.TemporaryDirectory(prefix="tracker-resume-") as place:
        kept, checkpoint = _checkpoints(store, run_id, Path(place))
        epochs = checkpoint.epoch if checkpoint else 0
        rows = [row for row in _rows(store, run_id, Path(place)) if row["epoch"] <= epochs]
        histograms = _histograms(store, run_id, Path(place), epochs)
    return ResumeState(
        run_id=run_id,
        params=past.params,
        last_steps=past.last_steps,
        samples=1 + past.last_steps.get("system/cpu_utilization_percentage", -1),
        rows=rows,
        histograms=histograms,
        kept=kept,
        checkpoint=checkpoint,
    )


def _checkpoints(
    store: MlflowStore, run_id: str, place: Path
) -> tuple[dict[int, Mapping[str, float]], Checkpoint | None]:
    """The checkpoints' metrics by step, and the last that is whole."""
    steps = sorted(
        int(name)
        for path in store.artifacts(run_id, CHECKPOINTS)
        if (name := path.rpartition("/")[2]).isdecimal()
    )
    kept: dict[int, Mapping[str, float]] = {}
    last = None
    for step in reversed(steps):
        path = f"{CHECKPOINTS}/{step:08d}"
        try:
            if last is None:
                last = load_checkpoint(store.download(run_id, path, place))
                kept[step] = last.metrics
            else:
                kept[step] = load_metrics(store.download(run_id, f"{path}/state.json", place))
        except StoreError as error:  # its upload was cut off
            logger.warning("Checkpoint %d is not used: %s", step, error)
    return kept, last


def _rows(store: MlflowStore, run_id: str, place: Path) -> list[dict[str, Any]]:
    if "epochs.json" not in store.artifacts(run_id):
        return []
    text = store.download(run_id, "epochs.json", place).read_text(encoding="utf-8")
    # Text is what JSON has no number for: NaN, Infinity.
    return [
        {key: float(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in json.loads(text)
    ]


def _histograms(store: MlflowStore, run_id: str, place: Path, epochs: int) -> list[dict[str, Any]]:
    if not (paths := store.artifacts(run_id, "histograms")):
        return []
    folder = store.download(run_id, "histograms", place)
    names = [path.rpartition("/")[2] for path in paths]
    records = [json.loads((folder / name).read_text(encoding="utf-8")) for name in names]
    return [record for record in records if record["step"] <= epochs]
