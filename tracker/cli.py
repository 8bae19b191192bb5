"""Upload what is still on disk, and bring studies in MLflow up to date."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tracker._version import __version__
from tracker.arguments import OneSentenceParser
from tracker.errors import MissingError, StoreError, TrackerError
from tracker.validation import DIRECTORY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, 2 for a mistake or an unfinished upload."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given = _parser(words[:1]).parse_args(words)
        return int(given.run(given))
    except TrackerError as error:
        print(f"tracker: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tracker: interrupted; repeat the command to continue.", file=sys.stderr)
        return 128 + signal.SIGINT


def _parser(command: Sequence[str]) -> argparse.ArgumentParser:
    parser = OneSentenceParser(prog="tracker", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser(
        "sync",
        help="upload what offline runs, failed servers and killed programs left on disk",
        description="Upload what offline runs, failed servers and killed programs left on disk.",
    )
    sync.set_defaults(run=_sync)
    status = commands.add_parser(
        "status",
        help="list unfinished uploads and why they are unfinished",
        description="List unfinished uploads and why they are unfinished.",
    )
    status.set_defaults(run=_status)
    for each in (sync, status):
        each.add_argument(
            "path",
            type=Path,
            nargs="*",
            default=[Path(DIRECTORY)],
            help=f"a journal, or a folder of journals; default: {DIRECTORY}",
        )
    sync.add_argument(
        "--tracking-uri", metavar="URI", help="the store; default: the one each run was meant for"
    )
    choice = sync.add_mutually_exclusive_group()
    choice.add_argument(
        "--experiment", metavar="NAME", help="where runs begin anew whose own experiment is missing"
    )
    choice.add_argument(
        "--drop", metavar="RUN", help="remove a run that cannot be delivered; uploads nothing"
    )
    if command not in (["sync"], ["status"]):  # importing Optuna takes a second
        try:
            from tracker.search.cli import add_commands
        except MissingError:
            if command in (["mirror"], ["reap"]):
                raise
        else:
            add_commands(commands)
    return parser


def _journals(paths: Sequence[Path]) -> list[Path]:
    from tracker.delivery.leftovers import journals

    if list(paths) == [Path(DIRECTORY)] and not paths[0].exists():
        return []  # nothing was tracked here, or everything is uploaded
    folders = []
    for path in paths:
        found = journals(path)
        if not found and path.name != DIRECTORY:
            raise StoreError(f"{path} is not a tracker journal.")
        folders += found
    return folders


def _sync(given: argparse.Namespace) -> int:
    from tqdm import tqdm

    from tracker.delivery.leftovers import deliver_only, journal_status, sweep, sync

    deliver_only()
    # MLflow's own retries block a call for minutes; the user can repeat the command.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for path in given.path:
        sweep(path)
    if given.drop is not None:
        return _drop(given)
    statuses = [journal_status(folder) for folder in _journals(given.path)]
    total = sum(status.undelivered for status in statuses if status.state != "in use")
    runs = records = unfinished = 0
    waited_for: set[Path] = set()
    with tqdm(total=total, unit="record", disable=None, leave=False) as bar:

        def wait(pending: int) -> None:
            bar.update(max(0, status.undelivered - pending - bar.n) if len(statuses) == 1 else 0)
            if status.folder not in waited_for:
                waited_for.add(status.folder)
                waiting = f"waiting for the process that uploads it ({_count(pending, 'record')})"
                tqdm.write(f"tracker: {status.folder}: {waiting}", file=sys.stderr)

        for status in statuses:
            if status.state == "in use" and len(statuses) > 1:
                unfinished += 1  # its own process uploads it
                continue
            try:
                done = sync(status.folder, given.tracking_uri, bar.update, given.experiment, wait)
            except StoreError as error:
                tqdm.write(f"tracker: {error}", file=sys.stderr)
                unfinished += 1
                continue
            runs, records = runs + done.runs, records + done.records
            unfinished += bool(done.held)
            for notice in done.notices + done.held:
                tqdm.write(f"tracker: {notice}", file=sys.stderr)
    uploaded = f"Uploaded {_count(records, 'record')} of {_count(runs, 'run')}"
    if not unfinished:
        print(f"{uploaded}.")
        return 0
    print(f"{uploaded}; {_count(unfinished, 'journal')} unfinished, see: tracker status")
    return 2


def _drop(given: argparse.Namespace) -> int:
    from tracker.delivery.leftovers import drop

    dropped = sum(drop(folder, given.drop) for folder in _journals(given.path))
    if not dropped:
        raise StoreError(f"--drop {given.drop} is not a run in these journals; see: tracker status")
    print(f"Dropped {_count(dropped, 'record')} of 1 run.")
    return 0


def _status(given: argparse.Namespace) -> int:
    from tracker.delivery.leftovers import journal_status

    statuses = [journal_status(folder) for folder in _journals(given.path)]
    if not statuses:
        print("Everything is uploaded.")
    for status in statuses:
        print(status.folder)
        if status.state == "unreadable":
            print(f"  unreadable: {status.problem}")
            continue
        records, runs = _count(status.undelivered, "record"), _count(status.runs, "run")
        print(f"  {status.state}: {records} of {runs} to upload")
        if status.tracking_uri:
            print(f"  to {status.tracking_uri}")
        if status.problem:
            print(f"  {status.problem}")
    return 0


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
