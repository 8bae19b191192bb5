"""What is done to a study from outside: cleaning up after a lost machine, completing its mirror."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from tracker.delivery.leftovers import journals
from tracker.errors import StoreError
from tracker.redaction import MASK
from tracker.search.keeper_config import SETTLE_SECONDS
from tracker.search.leases import PREFIX, Leases, active_searches, grace_of, was_here
from tracker.search.plan import SEARCH
from tracker.search.reap import reap
from tracker.search.record import Record, load
from tracker.search.storage import Storage

_LOOK_SECONDS = 0.5

logger = logging.getLogger(__name__)


def reap_study(storage: Storage, record: Record, grace: float) -> list[FrozenTrial]:
    """Fail the trials of searches that are silent for `grace` seconds, and their own grace period.

    Returns them. Takes no longer than that; at once, where the processes are known to be gone.
    """
    leases = Leases(grace)
    began = time.monotonic()
    while True:
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        trials = storage.optuna.get_all_trials(
            record.study_id, deepcopy=False, states=(TrialState.RUNNING,)
        )
        there = active_searches(attrs)
        there |= {trial.user_attrs[SEARCH] for trial in trials if SEARCH in trial.user_attrs}
        dead = {search for search in there if not leases.lives(search, attrs)}
        own = max(
            (grace_of(attrs[f"{PREFIX}{search}"]) for search in active_searches(attrs)), default=0.0
        )
        if dead == there or time.monotonic() > began + max(grace, own) + 2 * _LOOK_SECONDS:
            return reap(storage, record, dead.__contains__) if dead else []
        time.sleep(_LOOK_SECONDS)


def mirror_study(
    storage: Storage, record: Record, tracking_uri: str | None, directory: Path
) -> tuple[int, str]:
    """Write what MLflow lacks of a study; returns how many things, and the id of its run.

    What journals in `directory` still hold is delivered first. `tracking_uri` is by default where
    the study went; it is needed where that has a password. Raises StoreError where MLflow does not
    answer.
    """
    from tracker.search.keeper_process import settle
    from tracker.search.mirror import Mirror
    from tracker.store.client import MlflowStore  # importing mlflow takes seconds

    uri = tracking_uri or record.tracking_uri
    if uri is not None and MASK in uri:
        raise StoreError(f"study={record.name!r} goes to {uri}; give --tracking-uri, all of it.")
    store = MlflowStore(uri)
    settle(directory, store, SETTLE_SECONDS)
    nothing_left = not (directory.is_dir() and journals(directory))
    attrs = storage.optuna.get_study_user_attrs(record.study_id)

    def is_settled(trial: FrozenTrial) -> bool:
        """Whether its search was here, and left nothing."""
        search = trial.user_attrs.get(SEARCH)
        return search is None or (nothing_left and was_here(search, attrs))

    mirror = Mirror(storage, record, store)
    mirror.complete(is_settled)
    assert mirror.run_id is not None
    if mirror.problem is not None:
        logger.warning("The study is not all in MLflow: %s", mirror.problem)
    return mirror.written, mirror.run_id


def studies(storage: Storage, name: str | None) -> list[Record]:
    """The study `name`, or all of ours in `storage`; StoreError where there is none."""
    if name is not None:
        return [load(storage, name)]
    found = []
    for study in storage.optuna.get_all_studies():
        try:
            found.append(load(storage, study.study_name))
        except StoreError:  # somebody else's
            continue
    return found
