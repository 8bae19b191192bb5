"""The commands `tracker mirror` and `tracker reap`."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial, TrialState

from tracker.arguments import OneSentenceParser, positive_float
from tracker.errors import StoreError
from tracker.redaction import MASK
from tracker.search.keeper import SETTLE_SECONDS, deliver_leftovers
from tracker.search.leases import GRACE_SECONDS, PREFIX, Leases, active_searches, grace_of
from tracker.search.plan import SEARCH
from tracker.search.reap import reap
from tracker.search.storage import DEFAULT, Storage
from tracker.search.stored_study import StoredStudy, load
from tracker.validation import DIRECTORY

if TYPE_CHECKING:
    from argparse import _SubParsersAction

_LOOK_SECONDS = 0.5

logger = logging.getLogger(__name__)


def add_commands(subparsers: _SubParsersAction[OneSentenceParser]) -> None:
    """Add the commands for studies to those of `tracker`."""
    mirror = subparsers.add_parser(
        "mirror",
        help="add missing trials, tags and files of a study to MLflow",
        description="Add missing trials, tags and files of a study to MLflow.",
    )
    reap = subparsers.add_parser(
        "reap",
        help="fail the running trials of dead searches, then mirror the study",
        description="Fail the running trials of dead searches, then mirror the study.",
    )
    for command in (mirror, reap):
        command.set_defaults(run=_run)
        command.add_argument(
            "--study", metavar="NAME", help="the study; default: all studies in the storage"
        )
        command.add_argument(
            "--storage", metavar="URL", help=f"where studies are stored; default: {DEFAULT}"
        )
        command.add_argument(
            "--tracking-uri", metavar="URI", help="the MLflow store; default: the study's"
        )
        command.add_argument(
            "--directory",
            type=Path,
            default=Path(DIRECTORY),
            metavar="FOLDER",
            help=f"where journals are kept; default: {DIRECTORY}",
        )
    reap.add_argument(
        "--grace-seconds",
        type=positive_float,
        default=GRACE_SECONDS,
        metavar="S",
        help="silence after which another machine's search counts as dead, unless its own setting "
        f"is longer; default: {GRACE_SECONDS:g}",
    )


def _run(given: argparse.Namespace) -> int:
    storage = Storage(given.storage, make=False)
    try:
        storage.patiently(lambda: _complete_studies(storage, given), patience=0.0)
    finally:
        storage.close()
    return 0


def _complete_studies(storage: Storage, given: argparse.Namespace) -> None:
    for record in _studies(storage, given.study):
        if given.command == "reap":
            failed = reap_study(storage, record, given.grace_seconds)
            print(f"{record.name}: failed {len(failed)} lost trials")
        written, run_id = mirror_study(storage, record, given.tracking_uri, given.directory)
        print(f"{record.name}: run {run_id}, missing items added: {written}")


def _studies(storage: Storage, name: str | None) -> list[StoredStudy]:
    if name is not None:
        return [load(storage, name)]
    records = []
    for study in storage.optuna.get_all_studies():
        try:
            records.append(load(storage, study.study_name))
        except StoreError:  # created by another program
            continue
    return records


def reap_study(storage: Storage, record: StoredStudy, grace: float) -> list[FrozenTrial]:
    """Fail the trials of dead searches; return these trials.

    Args:
        storage: Where the study is.
        record: The study.
        grace: Seconds after which a silent search on another machine is dead, unless its own grace
            period is longer. A search on this machine is dead if its process is.
    """
    leases = Leases(grace)
    began = time.monotonic()
    while True:
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        running = storage.optuna.get_all_trials(
            record.study_id, deepcopy=False, states=(TrialState.RUNNING,)
        )
        active = active_searches(attrs)
        longest = max([grace, *(grace_of(attrs[f"{PREFIX}{search}"]) for search in active)])
        active |= {trial.user_attrs[SEARCH] for trial in running if SEARCH in trial.user_attrs}
        dead = {search for search in active if not leases.lives(search, attrs)}
        if dead == active or time.monotonic() > began + longest + 2 * _LOOK_SECONDS:
            return reap(storage, record, dead) if dead else []
        time.sleep(_LOOK_SECONDS)


def mirror_study(
    storage: Storage, record: StoredStudy, tracking_uri: str | None, directory: Path
) -> tuple[int, str]:
    """Add to MLflow what is missing of a study.

    Args:
        storage: Where the study is.
        record: The study.
        tracking_uri: The store; None is the one that the study went to.
        directory: Journals whose leftovers are delivered first.

    Returns:
        How many items were missing, and the id of the study's run.

    Raises:
        StoreError: MLflow does not answer, or its URI has a password that is not stored.
    """
    from tracker.search.mirror import Mirror  # importing mlflow takes seconds
    from tracker.store.client import MlflowStore

    uri = tracking_uri or record.tracking_uri
    if uri is not None and MASK in uri:
        raise StoreError(
            f"study={record.name!r} is in {uri}; add --tracking-uri URI with the secret."
        )
    store = MlflowStore(uri)
    deliver_leftovers(directory, store, SETTLE_SECONDS)
    mirror = Mirror(storage, record, store)
    mirror.complete()
    assert mirror.run_id is not None
    if mirror.problem is not None:
        logger.warning("The study is incomplete in MLflow: %s", mirror.problem)
    return mirror.written, mirror.run_id
