"""Who keeps MLflow a mirror of the study while it goes on, and sees to its end.

By default a second process, niced, that outlives a killed search: it fails the trials that were
left, and gives all runs their status. In-line, this process at the beginning and the end.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tracker.search.interrupts import deaf

SETTLE_SECONDS = 60.0
"""How long the end of a study waits for what MLflow has not got yet."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Duty:
    """What a keeper must know."""

    storage: str
    study: str
    search: str
    """The search that it serves."""
    tracking_uri: str | None
    directory: str
    environment: Mapping[str, str]
    adopt: str | None
    """The run that `mlflow run` made for the study."""
    started: int
    """When the search began, in milliseconds since 1970."""
    grace: float
    """How long another search may be silent, in seconds."""


class Keeper(Protocol):
    """Keeps a study's mirror."""

    def finish(self, *, settled: bool) -> str | None:
        """Complete the mirror; why that is not done, None where it is.

        `settled` is whether the journal of this process is delivered.
        """


class NoKeeper:
    """Offline: `tracker mirror` does it later."""

    def finish(self, *, settled: bool) -> str | None:
        """Nothing."""
        return None


class InlineKeeper:
    """Makes the study's run now, and completes the mirror at the end."""

    def __init__(self, duty: Duty) -> None:
        from tracker.search.keeper_process import Keeping  # importing mlflow takes seconds

        self._keeping = Keeping(duty)
        self._keeping.begin()

    def finish(self, *, settled: bool) -> str | None:
        """Complete the mirror."""
        try:
            return self._keeping.finish(settled=settled)
        finally:
            self._keeping.close()


class KeeperProcess:
    """A second process that keeps the mirror."""

    def __init__(self, duty: Duty) -> None:
        program = (
            "import sys; sys.path.append(sys.argv[1]);"
            "from tracker.search.keeper_process import main; main()"
        )
        with deaf(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        self._tell(asdict(duty))

    def _tell(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()

    def finish(self, *, settled: bool) -> str | None:
        """Have it complete the mirror, and wait for that up to a deadline."""
        assert self._process.stdout is not None
        try:
            self._tell({"settled": settled})
            until = time.monotonic() + 2 * SETTLE_SECONDS
            ready, _, _ = select.select([self._process.stdout], [], [], until - time.monotonic())
            line = self._process.stdout.readline() if ready else b""
        except OSError as error:
            return f"its process ended ({error})"
        if not line:
            self._process.kill()
            self._process.wait()
            return "it takes too long" if not ready else "its process ended"
        self._process.wait()
        problem = json.loads(line)["problem"]
        return None if problem is None else str(problem)


def adopted() -> str | None:
    """The run that `mlflow run` made for this process."""
    return os.environ.get("MLFLOW_RUN_ID")
