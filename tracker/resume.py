"""What a run that is to be continued has in MLflow: its checkpoint, and what it has logged."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracker.checkpoint import Checkpoint, load_checkpoint, load_metrics
from tracker.errors import StoreError
from tracker.journal import Journal
from tracker.ownership import Writer, writer_lives
from tracker.sync import deliver_left_behind, journals

if TYPE_CHECKING:
    from tracker.mlflow_store import MlflowStore

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""The folder of the run's artifacts with a checkpoint a folder, named after its step."""
_SETTLE_SECONDS = 60.0


@dataclass(frozen=True)
class Earlier:
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


def load_earlier(run_id: str, tracking_uri: str | None, directory: Path) -> Earlier:
    """Read what is needed to continue `run_id`.

    What its process left in `directory` is delivered first. Raises StoreError where there is no
    such run, or its process still lives.
    """
    from tracker.mlflow_store import MlflowStore  # importing mlflow takes seconds

    store = MlflowStore(tracking_uri)
    if directory.is_dir():
        _settle(directory, store, run_id)
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
    return Earlier(
        run_id=run_id,
        params=past.params,
        last_steps=past.last_steps,
        samples=1 + past.last_steps.get("system/cpu_utilization_percentage", -1),
        rows=rows,
        histograms=histograms,
        kept=kept,
        checkpoint=checkpoint,
    )


def _settle(directory: Path, store: MlflowStore, run_id: str) -> None:
    """Have what a dead process left of the run delivered, by us or by its uploader if that lives.

    Other journals in `directory` are none of its concern.
    """
    until = time.monotonic() + _SETTLE_SECONDS
    while True:
        deliver_left_behind(directory, store)
        left = [folder for folder in journals(directory) if _is_left(folder, run_id)]
        if not left:
            return
        if time.monotonic() > until:
            raise StoreError(f"{left[0]} holds what is left of run_id={run_id!r}: tracker sync.")
        time.sleep(0.2)


def _is_left(folder: Path, run_id: str) -> bool:
    """Whether a dead process left records of the run; StoreError where a living one tracks it."""
    try:
        writer, lives = Writer.of(folder), writer_lives(folder)
        if lives and writer.host != Writer.this_process().host:
            return False  # not to be opened by two hosts; MLflow says whether the run is RUNNING
        with closing(Journal(folder)) as journal:
            if not lives:
                return journal.holds(run_id)
            tracked = journal.holds(run_id, unended=True)
    except StoreError as error:  # gone by now, or for `tracker sync` to say what is wrong with it
        logger.debug("%s", error)
        return False
    if tracked:
        raise StoreError(f"run_id={run_id!r} still goes on, in process {writer.pid}.")
    return False


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
