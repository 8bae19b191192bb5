"""A study as tables: its trials, their metrics, and what pruning saved."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tracker.redaction import public_values
from tracker.search.plan import ENDED, SLOT, SOURCE, times
from tracker.search.stored_study import StoredStudy
from tracker.validation import allowed_name, fitted

_COLUMNS = ("trial", "slot", "state", "steps", "started", "seconds", "source", "reason")

INTERMEDIATE = "intermediate_value"
"""The metric of a trial's run that holds what the trial reported."""
ATTRIBUTE = "user_attrs."
"""Begins the names of tags and columns that hold user attributes."""


def objectives(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Return the metrics of a trial's run that hold its values.

    Args:
        names: The names of the objectives.
        values: A value for each.
    """
    if len(names) == 1:
        return {"objective": values[0]}
    return {f"objective.{name}": value for name, value in zip(names, values, strict=True)}


def attributes(user_attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the user attributes of a trial that are the user's, not ours."""
    return {k: v for k, v in user_attrs.items() if not k.startswith("tracker:")}


def attribute_tags(user_attrs: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of a trial's run that hold its user attributes, without secrets.

    A text is itself, anything else JSON. Characters that MLflow does not allow in a name become _.
    """
    texts = {
        allowed_name(f"{ATTRIBUTE}{name}"): value if isinstance(value, str) else json.dumps(value)
        for name, value in attributes(user_attrs).items()
    }
    return public_values(fitted(texts))


def rows(metrics: Sequence[str], trials: Iterable[FrozenTrial]) -> list[dict[str, Any]]:
    """Return the rows of `trials.csv`, one for each trial, by their columns.

    Args:
        metrics: The names of the objectives.
        trials: The trials.
    """
    trials = list(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    tags = [attribute_tags(trial.user_attrs) for trial in trials]
    columns = list(dict.fromkeys(name for each in tags for name in each))
    return [
        _row(metrics, trial, names) | {name: attrs.get(name) for name in columns}
        for trial, attrs in zip(trials, tags, strict=True)
    ]


def _row(metrics: Sequence[str], trial: FrozenTrial, names: Sequence[str]) -> dict[str, Any]:
    begin, end = trial.datetime_start, trial.datetime_complete
    values: Sequence[float | None] = trial.values or [None] * len(metrics)
    if len(metrics) == 1 and trial.state == TrialState.PRUNED:
        values = [None]  # Optuna stores the last report as its value
    taken = (*_COLUMNS, *metrics)
    reason = trial.user_attrs.get(ENDED, {}).get("reason") or ""
    return {
        "trial": trial.number,
        "slot": trial.user_attrs.get(SLOT),
        "state": trial.state.name,
        **dict(zip(metrics, values, strict=True)),
        **{f"param {name}" if name in taken else name: trial.params.get(name) for name in names},
        "steps": trial.last_step,
        "started": _utc(times(trial)[0]) if begin else None,
        "seconds": round((end - begin).total_seconds(), 3) if begin and end else None,
        "source": trial.user_attrs.get(SOURCE),
        "reason": reason.partition("\n")[0] or None,
    }


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def saved(record: StoredStudy, trials: Iterable[FrozenTrial]) -> tuple[int, int] | None:
    """Return how many steps pruning saved, and how many there would be without; None if unknown."""
    ended = [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    pruned = [t for t in ended if t.state == TrialState.PRUNED]
    complete = [t.last_step or 0 for t in ended if t.state == TrialState.COMPLETE]
    full = record.steps or max(complete, default=0)
    if not full or not pruned:
        return None
    return sum(max(full - (t.last_step or 0), 0) for t in pruned), full * len(ended)
