"""See to studies from outside.

python -m studies mirror --study NAME --storage URL    write what MLflow lacks of a study
python -m studies reap --study NAME --storage URL      clean up after a machine that was lost
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from studies.arguments import positive_float
from tracker import TrackerError
from tracker.cli import DIRECTORY, OneSentenceParser
from tracker.search.leases import GRACE_SECONDS
from tracker.search.storage import DEFAULT, Storage
from tracker.search.upkeep import mirror_study, reap_study, studies


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = OneSentenceParser(prog="studies", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    mirror = commands.add_parser("mirror", help="write what MLflow lacks of a study")
    reap = commands.add_parser(
        "reap", help="fail the trials of searches that are gone, then mirror"
    )
    for command in (mirror, reap):
        command.add_argument("--study", help="by default all that the storage has")
        command.add_argument("--storage", default=DEFAULT, help=f"by default {DEFAULT}")
        command.add_argument("--tracking-uri", help="by default where the study went")
        command.add_argument("--directory", type=Path, default=DIRECTORY, help="of its journals")
    reap.add_argument(
        "--grace-seconds",
        type=positive_float,
        default=GRACE_SECONDS,
        help="how long a search of another machine must be silent",
    )
    return parser.parse_args(arguments)


def see_to(storage: Storage, given: argparse.Namespace) -> None:
    """Do what was asked for, and print what that came to."""
    for record in studies(storage, given.study):
        if given.command == "reap":
            found = reap_study(storage, record, given.grace_seconds)
            print(f"{record.name}: {len(found)} trials were lost")
        written, run_id = mirror_study(storage, record, given.tracking_uri, given.directory)
        print(f"{record.name}: run {run_id}, {written} things were missing")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake."""
    given = parse(arguments)
    try:
        storage = Storage(given.storage, make=False)
        try:
            see_to(storage, given)
        finally:
            storage.close()
    except TrackerError as error:
        print(f"studies: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
