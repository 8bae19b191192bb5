"""The run of a trial, and what a later attempt at the trial continues from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tracker.delivery.base import Delivery
from tracker.errors import StoreError
from tracker.grid import run_name
from tracker.run import Run
from tracker.search.channel import Task
from tracker.search.config import MODEL
from tracker.search.executors.base import TrialSpec
from tracker.search.tables import attribute_tags
from tracker.store.history import ResumeState, epoch_rows
from tracker.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from tracker.views.files import json_text, write_atomically


class TrialRun(Run):
    """A run whose checkpoints stay on disk, and whose model is logged only after the verdict."""

    def __init__(self, delivery: Delivery, task: Task, spec: TrialSpec) -> None:
        record = spec.record
        super().__init__(
            delivery,
            task.params,
            record.experiment,
            run_name({"trial": task.number, **task.params}) or f"trial={task.number}",
            {
                "tracker.replays" if spec.is_replay else "tracker.study": record.name,
                "optuna.trial": str(task.number),
                "optuna.state": "RUNNING",
                "tracker.slot": str(task.slot),
                **attribute_tags(task.user_attrs),
            },
            key=task.key,
            parent_key=None if spec.is_replay else record.key,
            environment=spec.environment,
        )
        self.study = record
        """The study of the trial."""
        self._folder = spec.folder(task.slot)
        self._rows: list[dict[str, Any]] = []
        self._log_pending_model: Callable[[], bool] | None = None
        self.resume_state = _load_resume_state(self._folder)
        for row in self.resume_state.rows if self.resume_state else []:
            metrics = {name: value for name, value in row.items() if name != "epoch"}
            self.log_metrics(metrics, row["epoch"])
            self.log_epoch(row)

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to the epochs' table; a later attempt at the trial continues the table."""
        self._rows.append(dict(row))
        super().log_epoch(row)

    def log_model(
        self,
        network: nn.Module,
        example: Any,
        name: str = MODEL,
        step: int = 0,
        **more: Any,
    ) -> bool:
        """Log `network` when the objective has returned, if the study keeps the trial's model."""
        if name != MODEL:
            return super().log_model(network, example, name, step, **more)
        self._log_pending_model = partial(super().log_model, network, example, name, step, **more)
        return True

    def log_pending_model(self) -> None:
        """Log the model of the last `log_model`, if there was one; return when it is on disk."""
        pending, self._log_pending_model = self._log_pending_model, None
        if pending is not None:
            pending()
            self._journal.flush(_DISK_SECONDS)

    def log_checkpoint(self, step: int, **states: Any) -> bool:
        """Save a checkpoint for the next attempt at the trial."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            rows = [{**row} for row in self._rows]
            write_atomically(self._folder / "rows.json", json_text(rows))
            save_checkpoint(self._folder / f"{step:08d}", step=step, **states)
        except (OSError, StoreError) as error:
            self._journal.lose(f"checkpoint {step}", error)
            return False
        return True

    def delete_checkpoint(self, step: int) -> None:
        """Delete the checkpoint of a step."""
        shutil.rmtree(self._folder / f"{step:08d}", ignore_errors=True)


_DISK_SECONDS = 10.0


def _load_resume_state(folder: Path) -> ResumeState | None:
    """Load what an earlier attempt at the trial has left, up to its last whole checkpoint."""
    checkpoints: dict[int, Checkpoint] = {}
    for path in folder.glob("*"):
        if path.name.isdecimal():
            try:
                checkpoints[int(path.name)] = load_checkpoint(path)
            except StoreError:  # it was being written or deleted
                continue
    if not checkpoints:
        return None
    last = checkpoints[max(checkpoints)]
    try:
        rows = epoch_rows((folder / "rows.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is not ours: the trial begins anew
        return None
    rows = [row for row in rows if row["epoch"] <= last.epoch]
    return ResumeState(
        run_id="",
        params={},
        last_steps={},
        samples=0,
        rows=rows,
        histograms=[],
        kept={step: checkpoint.metrics for step, checkpoint in checkpoints.items()},
        checkpoint=last,
    )
