"""A study as tables: its trials, its best, what pruning saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tracker.search.best import best_trials
from tracker.search.plan import ENDED, SLOT, SOURCE
from tracker.search.record import Record

_TAKEN = ("trial", "slot", "state", "steps", "started", "seconds", "source", "reason")

INTERMEDIATE = "intermediate_value"
"""The metric of a trial's run that holds what the trial reported."""


def objectives(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """The metrics of a trial's run that hold its values."""
    if len(names) == 1:
        return {"objective": values[0]}
    return {f"objective.{name}": value for name, value in zip(names, values, strict=True)}


def rows(record: Record, trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    """A row for each trial: number, state, values, hyperparameters, when, how long, why."""
    trials = list(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    return [_row(record, trial, names) for trial in trials]


def _row(record: Record, trial: FrozenTrial, names: Sequence[str]) -> dict[str, Any]:
    ended = trial.user_attrs.get(ENDED, {})
    begin, end = trial.datetime_start, trial.datetime_complete
    several = len(record.metrics) > 1
    values = trial.values or [None] * len(record.metrics)
    if not several and trial.state == TrialState.PRUNED:
        values = [None]  # Optuna takes the last report for it
    return {
        "trial": trial.number,
        "slot": trial.user_attrs.get(SLOT),
        "state": trial.state.name,
        **dict(zip(record.metrics, values, strict=True)),
        **{
            f"param {name}" if name in _TAKEN or name in record.metrics else name: trial.params.get(
                name
            )
            for name in names
        },
        "steps": trial.last_step,
        "started": begin.isoformat(timespec="milliseconds") if begin else None,
        "seconds": round((end - begin).total_seconds(), 3) if begin and end else None,
        "source": trial.user_attrs.get(SOURCE),
        "reason": (ended.get("reason") or "").partition("\n")[0] or None,
    }


def best(record: Record, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The best trial, the first of equals; of several objectives those on the Pareto front.

    None breaks a constraint. Empty where none is complete.
    """
    return best_trials(trials, record.directions)


def saved(record: Record, trials: Iterable[FrozenTrial]) -> tuple[int, int] | None:
    """Steps that pruned trials were not trained, and all there would have been; None if unknown."""
    trials = list(trials)
    whole = record.steps or max(
        (t.last_step or 0 for t in trials if t.state == TrialState.COMPLETE), default=0
    )
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    pruned = [t for t in ended if t.state == TrialState.PRUNED]
    if not whole or not pruned:
        return None
    return sum(max(whole - (t.last_step or 0), 0) for t in pruned), whole * len(ended)
