"""Failing the trials of searches that died."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Set

from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from tracker.search.channel import Ended
from tracker.search.leases import PREFIX, Leases, active_searches
from tracker.search.plan import ENDED, SEARCH
from tracker.search.storage import Storage
from tracker.search.stored_study import StoredStudy

LOST = Ended.failed("lost", "The process of its search ended abruptly, or hung for too long.")
"""The end of a trial whose search is dead."""


def store_failure(storage: BaseStorage, trial_id: int, ended: Ended) -> None:
    """Store that a trial failed, unless it has already ended.

    Args:
        storage: Optuna's storage.
        trial_id: The id of the trial in the storage.
        ended: Why it failed.
    """
    why = {"why": ended.why, "status": ended.status, "reason": (ended.reason or "")[:2000]}
    try:
        storage.set_trial_user_attr(trial_id, ENDED, why)
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return


def fail_orphans(
    storage: BaseStorage,
    study_id: int,
    trials: Iterable[FrozenTrial],
    *,
    own: str,
    confirmed: Container[int],
    leases: Leases,
) -> int:
    """Fail the running trials of dead searches, and those of our own that it does not know.

    Args:
        storage: Optuna's storage.
        study_id: The id of the study in the storage.
        trials: Trials of the study.
        own: The id of the calling search.
        confirmed: The numbers of its running trials.
        leases: Says which searches are alive.

    Returns:
        How many trials were failed.
    """
    orphans = [
        trial
        for trial in trials
        if trial.state == TrialState.RUNNING
        and SEARCH in trial.user_attrs
        and trial.number not in confirmed
    ]
    if any(trial.user_attrs[SEARCH] != own for trial in orphans):
        attrs = storage.get_study_user_attrs(study_id)
        orphans = [
            trial
            for trial in orphans
            if (search := trial.user_attrs[SEARCH]) == own or not leases.lives(search, attrs)
        ]
    for trial in orphans:
        is_own = trial.user_attrs[SEARCH] == own
        ended = Ended.failed("given up", "The storage did not answer.") if is_own else LOST
        store_failure(storage, trial._trial_id, ended)
    return len(orphans)


def reap(storage: Storage, record: StoredStudy, dead: Set[str]) -> list[FrozenTrial]:
    """Fail the running trials of dead searches, and store that these searches have left.

    Args:
        storage: The storage of the study.
        record: The study.
        dead: The ids of these searches.

    Returns:
        The trials, as they were before.
    """
    with storage.study_lock(record.key):
        orphans = [
            trial
            for trial in storage.optuna.get_all_trials(record.study_id, deepcopy=False)
            if trial.state == TrialState.RUNNING and trial.user_attrs.get(SEARCH) in dead
        ]
        for trial in orphans:
            store_failure(storage.optuna, trial._trial_id, LOST)
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        for search in active_searches(attrs) & dead:
            left = {"status": "FAILED", "reason": "The process that ran the study was lost."}
            info = {**attrs[f"{PREFIX}{search}"], "time": time.time(), "left": left}
            storage.optuna.set_study_user_attr(record.study_id, f"{PREFIX}{search}", info)
    return orphans
