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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from tracker.search.interrupts import block_signals
from tracker.search.keeper_config import SETTLE_SECONDS, KeeperConfig

_ENDED = "its process ended"

logger = logging.getLogger(__name__)


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

    def __init__(self, duty: KeeperConfig) -> None:
        from tracker.search.keeper_process import MirrorService  # importing mlflow takes seconds

        self._keeping = MirrorService(duty)
        self._keeping.begin()

    def finish(self, *, settled: bool) -> str | None:
        """Complete the mirror."""
        try:
            return self._keeping.finish(settled=settled)
        finally:
            self._keeping.close()


class KeeperProcess:
    """A second process that keeps the mirror."""

    def __init__(self, duty: KeeperConfig) -> None:
        self._duty = duty
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        program = (
            "import sys; sys.path.append(sys.argv[1]);"
            "from tracker.search.keeper_process import main; main()"
        )
        with block_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # what a dead process did not read is not kept for it
            )
        _tell(process, asdict(self._duty))
        return process

    def finish(self, *, settled: bool) -> str | None:
        """Have it complete the mirror, and wait for that up to a deadline; if it died, another."""
        problem = self._finish(settled)
        if problem == _ENDED:
            self._process = self._start()
            problem = self._finish(settled)
        return problem

    def _finish(self, settled: bool) -> str | None:
        with self._process as process:
            assert process.stdout is not None
            ready, line = [process.stdout], b""
            with suppress(OSError):  # it is gone
                _tell(process, {"settled": settled})
                ready, _, _ = select.select([process.stdout], [], [], 2 * SETTLE_SECONDS)
                line = process.stdout.readline() if ready else b""
            if not line:
                process.kill()
        if not line:
            return _ENDED if ready else "it takes too long"
        problem = json.loads(line)["problem"]
        return None if problem is None else str(problem)


def _tell(process: subprocess.Popen[bytes], what: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(what).encode() + b"\n")


def adopted() -> str | None:
    """The run that `mlflow run` made for this process."""
    return os.environ.get("MLFLOW_RUN_ID")
