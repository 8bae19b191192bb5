"""A trial of a search that has not ended yet."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial

from tracker.search.channel import Task
from tracker.search.sampler import PRUNERS


@dataclass
class RunningTrial:
    """A trial, and what it reported during an outage of the storage."""

    task: Task
    trial: optuna.Trial
    index: int
    """How many trials its search took before it."""
    reports: deque[tuple[int, float]] = field(default_factory=deque)
    """Steps and values that are not stored yet."""

    def write_reports(self) -> None:
        """Store the pending reports."""
        while self.reports:
            step, value = self.reports[0]
            self.trial.report(value, step)
            self.reports.popleft()

    def pruned_by(self, pruner: str) -> str | None:
        """Return why the trial should be pruned; None if it should continue.

        Args:
            pruner: What is stored of the pruner.
        """
        if not self.trial.should_prune():
            return None
        who = f"The {pruner} pruner" if pruner in PRUNERS else pruner
        return pruning_reason(self.trial.storage.get_trial(self.trial._trial_id), who)


def pruning_reason(frozen: FrozenTrial, who: str) -> str:
    """Return why a trial was pruned.

    Args:
        frozen: The trial.
        who: What pruned it.
    """
    if (step := frozen.last_step) is None:  # a user's own pruner may not look at reports
        return f"{who} stopped it before it reported."
    return f"{who} stopped it at step {step}, value {frozen.intermediate_values[step]:g}."
