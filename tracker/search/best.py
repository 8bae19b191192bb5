"""The best trials of a study, used by searches, the progress bar, the page and the mirror."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

LISTED = 10
"""Trials of a Pareto front in the tags; `best.json` lists all."""
_LONGEST_TAG = 5000


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial satisfies all its constraints."""
    return all(value <= 0.0 for value in trial.constraints.values())


def best_trials(trials: Iterable[FrozenTrial], directions: Sequence[str]) -> list[FrozenTrial]:
    """Return the best trials, by number; infeasible ones never count.

    Args:
        trials: Trials of one study, in any state and order.
        directions: "minimize" or "maximize", one per objective.

    Returns:
        With one objective the best trial, the first of equals. With several the Pareto front.
        Empty if no feasible trial is complete.
    """
    complete = [t for t in trials if t.state == TrialState.COMPLETE and feasible(t)]
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in directions]
    losses = np.array([t.values for t in complete], dtype=float)
    losses = losses.reshape(len(complete), len(signs)) * signs
    # Sorted like this, no trial is beaten or equalled by one that comes after it.
    remaining = np.lexsort(([t.number for t in complete], *losses.T[::-1]))
    front = []
    while len(remaining):
        front.append(complete[remaining[0]])
        remaining = remaining[(losses[remaining] < losses[remaining[0]]).any(axis=1)]
    return sorted(front, key=lambda trial: trial.number)


def best_tags(good: Sequence[FrozenTrial]) -> dict[str, str]:
    """Return the tags that name the best trials, `best_trials`, lists in the same order."""
    if not good:
        return {}
    listed = good[:LISTED]
    more = f" and {len(good) - LISTED} more" if len(good) > LISTED else ""
    params = [trial.params for trial in listed]
    text = json.dumps(params[0] if len(good) == 1 else params, default=str)
    return {
        "best.trial": ", ".join(str(trial.number) for trial in listed) + more,
        "best.value": "; ".join(", ".join(f"{v:.6g}" for v in t.values) for t in listed),
        "best.params": text if len(text) <= _LONGEST_TAG else json.dumps("see best.json"),
    }
