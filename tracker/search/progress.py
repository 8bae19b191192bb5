"""A study's progress on a terminal: a bar, and a line for each trial; silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from tracker.search.best import best_trials
from tracker.search.plan import ENDED, Plan
from tracker.search.stored_study import StoredStudy


class Progress:
    """The progress bar of one search."""

    def __init__(self, record: StoredStudy, plan: Plan, trials: Sequence[FrozenTrial]) -> None:
        """Show the bar.

        Args:
            record: The study.
            plan: Its plan, which is kept up to date by the search.
            trials: Those that existed before.
        """
        self._record = record
        self._plan = plan
        self._best = next(iter(best_trials(trials, record.directions)), None)
        self._bar = tqdm(
            total=plan.total,
            initial=plan.finished(),
            desc=record.name,
            unit="trial",
            disable=None,
            leave=True,
            file=sys.stderr,
        )

    def trial_ended(self, trial: FrozenTrial, is_best: bool) -> None:
        """Show a trial that ended, and whether it is the best so far."""
        self._best = trial if is_best else self._best
        if self._bar.disable:
            return
        self.say(line(self._record, trial))
        self._bar.n = self._plan.finished()
        if self._best is not None and not self._record.is_multi_objective:
            value = f"{self._best.values[0]:.5g}"
            self._bar.set_postfix_str(f"best {self._record.metrics[0]} {value}")
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Show a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def line(record: StoredStudy, trial: FrozenTrial) -> str:
    """Describe an ended trial in one line."""
    parts = [f"trial {trial.number:>3}", f"{trial.state.name.lower():<8}"]
    if trial.state == TrialState.COMPLETE:
        named = zip(record.metrics, trial.values, strict=True)
        parts.append("  ".join(f"{name} {value:.5g}" for name, value in named))
    elif trial.state == TrialState.PRUNED:
        parts.append(f"after {trial.last_step} steps")
    parts.append(" ".join(f"{name}={_short(value)}" for name, value in trial.params.items()))
    if trial.datetime_start and trial.datetime_complete:
        seconds = (trial.datetime_complete - trial.datetime_start).total_seconds()
        parts.append(f"{seconds:.1f} s")
    ended: Mapping[str, Any] = trial.user_attrs.get(ENDED, {})
    parts.append((ended.get("reason") or "").partition("\n")[0])
    return "  ".join(part for part in parts if part)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
