"""The keeper of a study: keeps MLflow up to date while a search runs, and cleans up after it.

By default it is a second, niced process that outlives a killed search: it fails the trials that
the search left running and gives all runs their final status. Inline, the search's own process
does this at the beginning and at the end.
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from tracker.delivery.leftovers import deliver_left_behind, journals
from tracker.delivery.process import NICENESS
from tracker.errors import StoreError, TrackerError
from tracker.journal.ownership import writer_lives
from tracker.journal.reader import OFFLINE
from tracker.redaction import public_uri
from tracker.search.interrupts import block_signals
from tracker.search.leases import BEATS, Leases, active_searches
from tracker.search.reap import reap
from tracker.search.storage import Storage
from tracker.search.stored_study import load

if TYPE_CHECKING:
    from tracker.search.mirror import Mirror
    from tracker.search.session import Search
    from tracker.store.client import MlflowStore

SETTLE_SECONDS = 60.0
"""How long the end of a study waits for uploads."""
REFRESH_SECONDS = 10.0
"""Shortest time between two updates of the page of a running study …"""
REFRESH_SHARE = 0.01
"""… which take at most this share of the time."""
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 2.0, 30.0
_DIED = "the keeper's process ended"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class KeeperConfig:
    """Settings of a keeper; sent to its process as JSON."""

    storage: str
    """URL of the study's storage."""
    study: str
    search: str
    """Id of the search that it serves."""
    tracking_uri: str | None
    directory: str
    """Where the search's journals are."""
    environment: Mapping[str, str]
    """Tags of the study's run."""
    adopt: str | None
    """Id of the run that `mlflow run` created for the study."""
    started: int
    """When the search began, in milliseconds since 1970."""
    grace: float
    """How long another search may be silent, in seconds."""


class Keeper(Protocol):
    """Keeps a study in MLflow up to date."""

    def finish(self, *, settled: bool, left: bool = True) -> str | None:
        """Add to MLflow what is missing.

        Args:
            settled: Whether the journal of the search's own process is uploaded.
            left: Whether the search could end its trials and store how it ended.

        Returns:
            Why something is still missing; None if nothing is.
        """


class InlineKeeper:
    """Creates the study's run at once, and completes it at the end."""

    def __init__(self, config: KeeperConfig, search: Search) -> None:
        self._service = MirrorService(config, search.storage)
        search.storage.patiently(self._service.begin, search.stopping)

    def finish(self, *, settled: bool, left: bool = True) -> str | None:
        """Add to MLflow what is missing."""
        return self._service.finish(settled=settled, left=left)


class KeeperProcess:
    """Runs `main` in a second process; one that died is replaced at the end."""

    def __init__(self, config: KeeperConfig) -> None:
        self._config = config
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        program = (
            "import sys; sys.path.append(sys.argv[1]);"
            "from tracker.search.keeper import main; main()"
        )
        with block_signals(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,  # else a write to a dead process is tried again when it is closed
            )
        with suppress(OSError):  # it has died, which `finish` notices
            _send(process, asdict(self._config))
        return process

    def finish(self, *, settled: bool, left: bool = True) -> str | None:
        """Let the process add what is missing; wait for it, but at most `2 * SETTLE_SECONDS`."""
        request = {"settled": settled, "left": left}
        problem = self._finish(request)
        if problem == _DIED:
            self._process = self._start()
            problem = self._finish(request)
        return problem

    def _finish(self, request: Mapping[str, bool]) -> str | None:
        with self._process as process:
            assert process.stdout is not None
            ready, line = [process.stdout], b""
            with suppress(OSError):  # it has died
                _send(process, request)
                ready, _, _ = select.select([process.stdout], [], [], 2 * SETTLE_SECONDS)
                line = process.stdout.readline() if ready else b""
            if not line:
                process.kill()
        if not line:
            return _DIED if ready else "the keeper's process takes too long"
        problem = json.loads(line)["problem"]
        return None if problem is None else str(problem)


def _send(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")


class MirrorService:
    """Mirrors one study on behalf of one search."""

    def __init__(self, config: KeeperConfig, storage: Storage | None = None) -> None:
        """Prepare a mirror.

        Args:
            config: What it mirrors, and where.
            storage: The study's storage; None opens it when it is needed.
        """
        self._config = config
        self._directory = Path(config.directory)
        self._storage = storage
        self._store: MlflowStore | None = None
        self._mirror: Mirror | None = None
        self._leases = Leases(config.grace)

    def begin(self) -> Mirror:
        """Create the study's run, unless it is done."""
        if self._mirror is None:
            from tracker.search.mirror import Mirror
            from tracker.store.client import MlflowStore  # importing mlflow takes seconds

            config, storage = self._config, self._open()
            store = MlflowStore(config.tracking_uri)
            mirror = Mirror(storage, load(storage, config.study), store)
            mirror.begin(config.environment, config.adopt, config.started)
            self._store = store
            self._mirror = mirror
        return self._mirror

    def _open(self) -> Storage:
        if self._storage is None:
            self._storage = Storage(self._config.storage)
        return self._storage

    def refresh(self) -> float:
        """Update the study's page; return after how many seconds to do it again."""
        started = time.monotonic()
        self.begin().refresh()
        return max(REFRESH_SECONDS, (time.monotonic() - started) / REFRESH_SHARE)

    def watch(self) -> float:
        """Fail the trials of other searches that are dead; return when to look again.

        The search itself looks only when it claims a trial, which may be hours apart.
        """
        storage = self._open()
        record = load(storage, self._config.study)
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        others = active_searches(attrs) - {self._config.search}
        dead = {search for search in others if not self._leases.lives(search, attrs)}
        if dead:
            reap(storage, record, dead)
        return self._config.grace / BEATS

    def forget(self) -> None:
        """Restart all grace periods after an outage, during which no beat was seen."""
        self._leases.forget()

    def finish(self, *, settled: bool, left: bool = True) -> str | None:
        """Add to MLflow what is missing, and try again for a while; see `Keeper.finish`."""
        deadline = time.monotonic() + SETTLE_SECONDS

        def complete() -> str | None:
            if not left:
                self._leave()
            return self._complete(settled, deadline - time.monotonic())

        return self._tried(complete, deadline)

    def _complete(self, settled: bool, seconds: float) -> str | None:
        mirror = self.begin()
        assert self._store is not None
        settled &= deliver_leftovers(self._directory, self._store, seconds)
        mirror.complete()
        unfinished = None if settled else "some uploads are unfinished (tracker sync)"
        return "; ".join(filter(None, (unfinished, mirror.problem))) or None

    def reap(self) -> str | None:
        """Clean up after the search died: fail its trials, then add what is missing."""
        deadline = time.monotonic() + SETTLE_SECONDS
        self._tried(self._leave, deadline)
        while (unfinished := _has_journals(self._directory)) and time.monotonic() < deadline:
            time.sleep(0.2)  # its workers end, and their uploaders finish
        return self.finish(settled=not unfinished, left=False)

    def _leave(self) -> None:
        """Fail the trials of the search, and store that it has left."""
        storage = self._open()
        reap(storage, load(storage, self._config.study), {self._config.search})

    def _tried(self, do: Callable[[], str | None], deadline: float) -> str | None:
        """Call `do`, again while the storage or MLflow does not answer; return what is wrong."""
        while True:
            try:
                return self._open().patiently(do, patience=0.0)
            except TrackerError as error:
                problem = public_uri(str(error))
            except Exception as error:  # a bug, which waiting does not mend
                logger.debug("The mirror failed.", exc_info=True)
                return public_uri(f"{type(error).__name__}: {error}")
            if time.monotonic() > deadline:
                return problem
            time.sleep(_RETRY_SECONDS)


def warn_of(problem: str, study: str, storage: str, *, left: bool) -> None:
    """Tell the user how to complete a study.

    Args:
        problem: Why it is not complete.
        study: Its name.
        storage: The URL of its storage.
        left: Whether its trials have ended, as in `Keeper.finish`.
    """
    logger.warning(
        "The study is not yet complete in MLflow: %s. Complete it with: "
        "tracker %s --study %s --storage %s",
        problem.rstrip("."),
        "mirror" if left else "reap",
        study,
        public_uri(storage),
    )


def _has_journals(directory: Path) -> bool:
    return directory.is_dir() and bool(journals(directory))


def deliver_leftovers(directory: Path, store: MlflowStore, seconds: float) -> bool:
    """Deliver the journals of dead processes.

    Args:
        directory: The folder of the journals.
        store: The store to deliver to.
        seconds: How long to try.

    Returns:
        Whether none is left.
    """
    deadline = time.monotonic() + seconds
    while directory.is_dir():
        deliver_left_behind(directory, store)
        if not any(map(_is_abandoned, journals(directory))):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_abandoned(folder: Path) -> bool:
    try:
        return not (folder / OFFLINE).exists() and not writer_lives(folder)
    except StoreError:  # it was removed meanwhile, or is not a journal
        return False


def main() -> NoReturn:
    """Serve the search that writes its settings to standard input, until it ends."""
    code = _serve()
    logging.shutdown()
    os._exit(code)  # do not wait for mlflow's threads


def _serve() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the search; its end is noticed below
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    source = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)
    config = KeeperConfig(**json.loads(source.readline()))
    service = MirrorService(config)
    due = {service.refresh: 0.0, service.watch: 0.0}
    pauses = dict.fromkeys(due, _RETRY_SECONDS)
    is_nice = False
    while True:
        pause = max(min(due.values()) - time.monotonic(), 0.0)
        if select.select([source], [], [], pause)[0]:
            if not (line := source.readline()):
                if (problem := service.reap()) is not None:
                    warn_of(problem, config.study, config.storage, left=False)
                return 0
            problem = service.finish(**json.loads(line))
            with suppress(OSError):  # the search has been killed
                print(json.dumps({"problem": problem}), flush=True)  # noqa: T201 - to the search
            return 0
        task = min(due, key=due.__getitem__)
        started = time.monotonic()
        try:
            due[task] = started + task()
            pauses[task] = _RETRY_SECONDS
        except Exception as error:  # noqa: BLE001 - it is tried again, and `finish` reports it
            logger.debug("%s", error)
            service.forget()
            due[task] = time.monotonic() + pauses[task]
            pauses[task] = min(2 * pauses[task], _LONGEST_RETRY_SECONDS)
        if not is_nice:  # not before the study's run is in MLflow
            is_nice = True
            os.nice(NICENESS)
