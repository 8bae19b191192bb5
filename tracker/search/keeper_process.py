"""The process that keeps a study's mirror in MLflow."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from optuna.trial import FrozenTrial

from tracker.delivery.leftovers import deliver_left_behind, journals
from tracker.errors import StoreError, TrackerError
from tracker.journal.ownership import writer_lives
from tracker.journal.reader import OFFLINE
from tracker.redaction import public_uri
from tracker.search.keeper_config import SETTLE_SECONDS, KeeperConfig
from tracker.search.leases import BEATS, Leases, active_searches
from tracker.search.mirror import LATE_SECONDS, Mirror
from tracker.search.plan import SEARCH
from tracker.search.record import load
from tracker.search.session import reap
from tracker.search.storage import Storage
from tracker.store.client import MlflowStore

REFRESH_SECONDS = 10.0
"""While the study goes on its page is drawn anew at most this often …"""
REFRESH_SHARE = 0.01
"""… and takes at most this share of the time."""
_RETRY_SECONDS = 2.0
_LONGEST_RETRY_SECONDS = 30.0

logger = logging.getLogger(__name__)


class MirrorService:
    """Mirrors one study, on behalf of one search."""

    def __init__(self, duty: KeeperConfig) -> None:
        self._duty = duty
        self._storage: Storage | None = None
        self._store: MlflowStore | None = None
        self._mirror: Mirror | None = None
        self._leases = Leases(duty.grace)

    def begin(self) -> Mirror:
        """Make the study's run; StoreError where the storage or MLflow does not answer."""
        if self._mirror is None:
            duty = self._duty
            store = MlflowStore(duty.tracking_uri)
            storage = self._open()
            mirror = Mirror(storage, load(storage, duty.study), store)
            mirror.begin(duty.environment, duty.adopt, duty.started)
            self._store, self._mirror = store, mirror
        return self._mirror

    def _open(self) -> Storage:
        if self._storage is None:
            self._storage = Storage(self._duty.storage)
        return self._storage

    def close(self) -> None:
        """Let go of the storage."""
        if self._storage is not None:
            self._storage.close()

    def refresh(self) -> float:
        """Bring the study's page up to date; returns in how many seconds to do it again."""
        started = time.monotonic()
        self.begin().refresh()
        return max(REFRESH_SECONDS, (time.monotonic() - started) / REFRESH_SHARE)

    def forget(self) -> None:
        """Something did not answer: what was not seen meanwhile says nothing."""
        self._leases.forget()

    def watch(self) -> float:
        """Fail the trials of other searches that are dead; returns when to look again.

        The search itself looks only when it takes a trial, which may be hours apart.
        """
        storage = self._open()
        record = load(storage, self._duty.study)
        attrs = storage.optuna.get_study_user_attrs(record.study_id)
        dead = {
            search
            for search in active_searches(attrs)
            if search != self._duty.search and not self._leases.lives(search, attrs)
        }
        if dead:
            reap(storage, record, dead.__contains__)
        return self._duty.grace / BEATS

    def finish(self, *, settled: bool) -> str | None:
        """Complete the mirror; why that is not done, None where it is.

        `settled` is whether the search's own journal is delivered.
        """
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                return self._complete(settled)
            except TrackerError as error:
                problem = public_uri(str(error))
            except Exception as error:  # a mistake of ours, which no waiting mends
                logger.debug("The mirror failed.", exc_info=True)
                return public_uri(f"{type(error).__name__}: {error}")
            if time.monotonic() > until:
                return problem
            time.sleep(_RETRY_SECONDS)

    def _complete(self, settled: bool) -> str | None:
        mirror = self.begin()
        assert self._store is not None
        settled &= settle(Path(self._duty.directory), self._store, SETTLE_SECONDS)
        ours = self._duty.search
        self._patiently(lambda: mirror.complete(lambda t: settled and _by(t) in (ours, None)))
        waiting = None if settled else "some runs wait in their journals (tracker sync)"
        return "; ".join(filter(None, (waiting, mirror.problem))) or None

    def bury(self) -> None:
        """The search is dead: fail what it left, and complete the mirror."""
        self._patiently(self._reap)
        directory = Path(self._duty.directory)
        until = time.monotonic() + 3 * LATE_SECONDS
        while directory.is_dir() and journals(directory) and time.monotonic() < until:
            time.sleep(0.2)  # its workers end, and their uploaders deliver
        self.finish(settled=not (directory.is_dir() and journals(directory)))

    def _reap(self) -> None:
        storage = self._open()
        reap(storage, load(storage, self._duty.study), lambda by: by == self._duty.search)

    def _patiently(self, do: Callable[[], None]) -> None:
        self._open().patiently(do, patience=SETTLE_SECONDS)


def _by(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get(SEARCH)


def settle(directory: Path, store: MlflowStore, seconds: float) -> bool:
    """Have the journals in `directory` whose processes are dead delivered, within `seconds`."""
    until = time.monotonic() + seconds
    while directory.is_dir() and time.monotonic() < until:
        deliver_left_behind(directory, store)
        if not any(_is_left(folder) for folder in journals(directory)):
            return True
        time.sleep(0.1)
    return not directory.is_dir()


def _is_left(folder: Path) -> bool:
    try:
        return not (folder / OFFLINE).exists() and not writer_lives(folder)
    except StoreError:  # gone by now, or none
        return False


def main() -> NoReturn:
    """Keep the mirror that standard input names, until told to finish or left alone."""
    code = _main()
    logging.shutdown()
    os._exit(code)  # mlflow's threads would take their time


def _main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are meant for the search, whose end we see to
    os.nice(19)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each table it makes
    source = os.fdopen(sys.stdin.fileno(), "rb", buffering=0)
    keeping = MirrorService(KeeperConfig(**json.loads(source.readline())))
    tasks = {keeping.refresh: 0.0, keeping.watch: 0.0}  # when each is due
    pauses = dict.fromkeys(tasks, _RETRY_SECONDS)
    while True:
        pause = max(min(tasks.values()) - time.monotonic(), 0.0)
        if select.select([source], [], [], pause)[0]:
            if not (line := source.readline()):
                keeping.bury()
                return 0
            problem = keeping.finish(settled=json.loads(line)["settled"])
            print(json.dumps({"problem": problem}), flush=True)  # noqa: T201 - to the search
            return 0
        task = min(tasks, key=tasks.__getitem__)
        started = time.monotonic()
        try:
            tasks[task] = started + task()
            pauses[task] = _RETRY_SECONDS
        except Exception as error:  # noqa: BLE001 - it is tried again, and the end says what it is
            logger.debug("%s", error)
            keeping.forget()
            tasks[task] = time.monotonic() + pauses[task]
            pauses[task] = min(2 * pauses[task], _LONGEST_RETRY_SECONDS)


if __name__ == "__main__":
    main()
