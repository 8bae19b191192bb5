"""The command `tracker`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tracker._version import __version__
from tracker.errors import TrackerError


class OneSentenceParser(argparse.ArgumentParser):
    """Says what is wrong with an argument in one sentence, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for a mistake in the arguments."""
    parser = OneSentenceParser(prog="tracker", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="deliver a journal whose process has ended")
    sync.add_argument(
        "path", type=Path, nargs="+", help="a journal's folder, as a warning named it"
    )
    sync.add_argument("--tracking-uri", help="by default where the process delivered to")
    given = parser.parse_args(arguments)
    try:
        for path in given.path:
            _sync(path, given.tracking_uri)
    except TrackerError as error:
        print(f"tracker: {error}", file=sys.stderr)
        return 2
    return 0


def _sync(path: Path, tracking_uri: str | None) -> None:
    from tracker.uploader import sync  # importing mlflow takes a second

    delivered = sync(path, tracking_uri)
    print(f"{path}: {delivered} records delivered.")


if __name__ == "__main__":
    sys.exit(main())
