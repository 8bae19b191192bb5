"""A study as it goes by: one bar, one line a trial; silence where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from tracker.search.plan import ENDED
from tracker.search.record import Record
from tracker.search.session import feasible


class Progress:
    """The bar of one search."""

    def __init__(self, record: Record, total: int, finished: int) -> None:
        self._record = record
        self._best: float | None = None
        self._bar = tqdm(
            total=total,
            initial=finished,
            desc=record.name,
            unit="trial",
            disable=None,
            leave=True,
            file=sys.stderr,
        )

    def known(self, trial: FrozenTrial) -> None:
        """A trial that ended before."""
        if trial.state == TrialState.COMPLETE and len(trial.values) == 1 and feasible(trial):
            value = trial.values[0]
            down = self._record.directions[0] == "minimize"
            if self._best is None or (value < self._best if down else value > self._best):
                self._best = value

    def ended(self, trial: FrozenTrial, finished: int) -> None:
        """A trial ended; `finished` of the study's are done."""
        self.known(trial)
        if self._bar.disable:
            return
        self._bar.write(line(self._record, trial), file=sys.stderr)
        self._bar.n = finished
        if self._best is not None:
            self._bar.set_postfix_str(f"best {self._record.metrics[0]} {self._best:.5g}")
        self._bar.refresh()

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """The bar stays where it is."""
        self._bar.close()


def line(record: Record, trial: FrozenTrial) -> str:
    """One line that tells of an ended trial."""
    parts = [f"trial {trial.number:>3}", f"{trial.state.name.lower():<8}"]
    if trial.state == TrialState.COMPLETE:
        named = zip(record.metrics, trial.values, strict=True)
        parts.append("  ".join(f"{name} {value:.5g}" for name, value in named))
    elif trial.state == TrialState.PRUNED:
        parts.append(f"after {trial.last_step} steps")
    parts.append(" ".join(f"{name}={_short(value)}" for name, value in trial.params.items()))
    if trial.datetime_start and trial.datetime_complete:
        took = (trial.datetime_complete - trial.datetime_start).total_seconds()
        parts.append(f"{took:.1f} s")
    ended: Mapping[str, Any] = trial.user_attrs.get(ENDED, {})
    if reason := (ended.get("reason") or "").partition("\n")[0]:
        parts.append(reason)
    return "  ".join(part for part in parts if part)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
