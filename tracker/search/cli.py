"""The commands `tracker mirror` and `tracker reap`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tracker.arguments import OneSentenceParser, positive_float
from tracker.validation import DIRECTORY

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_commands(subparsers: _SubParsersAction[OneSentenceParser]) -> None:
    """Add the commands for studies to those of `tracker`."""
    mirror = subparsers.add_parser("mirror", help="add missing trials of a study to MLflow")
    reap = subparsers.add_parser("reap", help="fail the trials of lost searches, then mirror")
    for command in (mirror, reap):
        command.set_defaults(run=_run)
        command.add_argument("--study", help="by default all studies in the storage")
        command.add_argument("--storage", help="by default journal:///studies.journal")
        command.add_argument("--tracking-uri", help="by default the store of the study")
        command.add_argument(
            "--directory",
            type=Path,
            default=Path(DIRECTORY),
            help=f"where journals are kept; by default {DIRECTORY}",
        )
    reap.add_argument(
        "--grace-seconds",
        type=positive_float,
        help="how long a search on another machine must have been silent; by default 60, or the "
        "search's own setting if that is longer",
    )


def _run(given: argparse.Namespace) -> int:
    from tracker.search.leases import GRACE_SECONDS  # importing Optuna takes a second
    from tracker.search.storage import Storage
    from tracker.search.upkeep import mirror_study, reap_study, studies

    storage = Storage(given.storage, make=False)
    try:
        for record in studies(storage, given.study):
            if given.command == "reap":
                lost = reap_study(storage, record, given.grace_seconds or GRACE_SECONDS)
                print(f"{record.name}: {len(lost)} trials were lost")
            written, run_id = mirror_study(storage, record, given.tracking_uri, given.directory)
            print(f"{record.name}: run {run_id}, {written} things were missing")
    finally:
        storage.close()
    return 0
