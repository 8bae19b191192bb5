"""The names that scripts written for the tutorial's RunManager read and set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from tracker.managed_runs import ManagedRuns
from tracker.run import Run
from tracker.training.distributed import is_main
from tracker.training.meters import EpochMeter
from tracker.views.files import ResultTable


class TutorialNames:
    """The public state of a manager, under the tutorial's names."""

    network: nn.Module | None = None
    """The network of the run."""
    loader: Any = None
    """The loader of the run."""
    run_params: Any = None
    """The hyperparameters of the run, as given to `begin_run`."""
    run_count = 0
    """Number of runs begun."""
    epoch_count = 0
    """Number of epochs begun in this run."""
    _runs: ManagedRuns
    _results: ResultTable
    _meter: EpochMeter  # of the current epoch, or of the last one

    @property
    def run(self) -> Run:
        """The current run; raises CallOrderError if there is none."""
        return self._runs.current("run")

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the current run, to use with MLflow's own functions."""
        return self._runs.run_id

    @property
    def run_data(self) -> list[dict[str, Any]]:
        """The table that `save` writes: a row for each epoch of each run."""
        return self._results.rows

    @property
    def epoch_loss(self) -> float:
        """Sum of this epoch's losses over the samples of this rank; waits for the device."""
        return self._meter.loss_sum

    @property
    def epoch_num_correct(self) -> int:
        """Number of correct predictions in this epoch on this rank; waits for the device."""
        return self._meter.correct

    def save(self, name: str | Path) -> None:
        """Write `run_data` to `name.csv` and `name.json`; raises ArgumentError if it cannot."""
        if is_main():
            self._results.save(name)
