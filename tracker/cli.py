"""The command `tracker`: runs and studies that are not (all) in MLflow yet."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tracker._version import __version__
from tracker.arguments import OneSentenceParser
from tracker.errors import StoreError, TrackerError

DIRECTORY = Path(".tracker")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake or a journal that stays."""
    parser = OneSentenceParser(prog="tracker", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser(
        "sync", help="deliver to MLflow what offline runs, dead servers and killed programs left"
    )
    status = commands.add_parser("status", help="list what is not delivered, and where it stands")
    for command in (sync, status):
        command.add_argument(
            "path",
            type=Path,
            nargs="*",
            default=[DIRECTORY],
            help="a journal, or a folder with journals; by default .tracker",
        )
    sync.add_argument("--tracking-uri", help="by default where each was meant to go")
    from tracker.search.cli import add_commands

    add_commands(commands)
    given = parser.parse_args(arguments)
    try:
        if given.command == "status":
            return _status(given.path)
        if given.command == "sync":
            return _sync(given.path, given.tracking_uri)
        return int(given.run(given))
    except TrackerError as error:
        print(f"tracker: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tracker: stopped; the same command goes on from here.", file=sys.stderr)
        return 128 + signal.SIGINT


def _journals(paths: Sequence[Path]) -> list[Path]:
    from tracker.delivery.leftovers import journals

    if list(paths) == [DIRECTORY] and not DIRECTORY.exists():
        return []  # nothing was ever tracked here, or all of it was delivered
    found = [(path, journals(path)) for path in paths]
    for path, folders in found:
        if not folders and path.name != DIRECTORY.name:
            raise StoreError(f"{path} is not a journal of this program.")
    return [folder for _, folders in found for folder in folders]


def _sync(paths: Sequence[Path], tracking_uri: str | None) -> int:
    from tqdm import tqdm

    from tracker.delivery.leftovers import journal_status, sweep, sync

    # MLflow's own retries hold a call for minutes; to go on, the command is given again.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for path in paths:
        sweep(path)
    folders = _journals(paths)
    standings = {folder: journal_status(folder) for folder in folders}
    total = sum(each.undelivered for each in standings.values() if each.state != "in use")
    runs = records = kept = 0
    bar = tqdm(total=total, unit="record", disable=None, leave=False)

    def progress(some: int) -> None:
        bar.update(some)

    with bar:
        for folder in folders:
            if standings[folder].state == "in use" and len(folders) > 1:
                kept += 1  # its own process delivers it
                continue
            try:
                done = sync(folder, tracking_uri, progress)
            except StoreError as error:
                tqdm.write(f"tracker: {error}", file=sys.stderr)
                kept += 1
                continue
            runs, records = runs + done.runs, records + done.records
            for notice in done.notices:
                tqdm.write(f"tracker: {notice}", file=sys.stderr)
    print(f"delivered: {_count(records, 'record')} of {_count(runs, 'run')}", end="")
    print(f"; {_count(kept, 'journal')} left, see `tracker status`" if kept else "")
    return 2 if kept else 0


def _status(paths: Sequence[Path]) -> int:
    from tracker.delivery.leftovers import journal_status

    found = [journal_status(folder) for folder in _journals(paths)]
    if not found:
        print("Nothing is undelivered.")
    for each in found:
        print(each.folder)
        what = f"{_count(each.undelivered, 'record')} of {_count(each.runs, 'run')} undelivered"
        print(f"  {each.state}: {what if each.state != 'unreadable' else each.problem}")
        if each.tracking_uri:
            print(f"  goes to {each.tracking_uri}")
        if each.problem and each.state != "unreadable":
            print(f"  {each.problem}")
    return 0


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
