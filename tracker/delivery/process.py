"""The process that delivers the journal of another one while that trains.

It alone imports mlflow for tracking, and never torch. It is told by the journal what there is to
do and tells there how it stands; the two processes share nothing else. When the other one is gone
it gives runs that were not ended their true status, delivers the rest, and removes the journal.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tracker.delivery.leftovers import deliver_left_behind
from tracker.delivery.system_metrics import SystemMetrics
from tracker.delivery.uploader import Uploader, close_unended
from tracker.errors import StoreError, TrackerError
from tracker.journal.ownership import delivery_lock, writer_lives
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, Metrics, now
from tracker.redaction import public_uri

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore

POLL_SECONDS = 0.1
LOOK_SECONDS = 0.25
"""Between two looks at whether the training lives."""
RETRY_SECONDS = 5.0
"""A store that fails is tried again after half a second, then ever later, at last so often."""
GIVE_UP_SECONDS = 60.0
"""How long a store that fails is tried after the training process is gone."""
IDLE_SECONDS = 30.0
"""Without a run that goes on and with nothing to deliver the process ends; it is started again."""
STOP_SECONDS = 5.0
"""How long it goes on delivering after SIGTERM."""
SAMPLE_SECONDS = 10.0
"""Between two samples of the system's metrics."""
FIRST_SAMPLE_SECONDS = 1.0
REQUEST_SECONDS = 20
"""A request that a server does not answer by then is tried again, with twice the time …"""
LONGEST_REQUEST_SECONDS = 640
"""… up to this: storing a large model may take a server so long."""

logger = logging.getLogger(__name__)


class UploaderProcess:
    """One journal, and the store that it goes to."""

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        self._journal = Journal(folder)
        self._uri = tracking_uri
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._metrics = SystemMetrics()
        # The first a moment later: the figure of the CPU is of the time since it was last asked.
        self._sample_at = time.monotonic() + FIRST_SAMPLE_SECONDS
        self._begun: dict[str, int] = {}
        self._failures = 0
        self._retry_at = 0.0
        self._stop_at: float | None = None
        self._gone: float | None = None  # when the training was found to be gone
        self._look_at = 0.0
        self._user_timeout = "MLFLOW_HTTP_REQUEST_TIMEOUT" in os.environ
        self._raise_timeout()

    def stop(self, *_: object) -> None:
        """End soon: the handler of SIGTERM."""
        self._stop_at = self._stop_at or time.monotonic() + STOP_SECONDS

    def run(self) -> int:
        """Deliver until there is nobody to deliver for; 0 if all is delivered."""
        busy = time.monotonic()  # when there was something to do last
        swept = False
        while True:
            self._look()
            self._sample()
            delivered = self._deliver()
            moment = time.monotonic()
            if delivered:
                busy = moment
                continue
            left = self._journal.pending()
            if self._gone is not None and not left:
                self._journal.remove()
                if not swept and self._store is not None:  # a program too short to be idle in
                    self.stop()  # which is waited for: not long
                    deliver_left_behind(self._journal.folder.parent, self._store, self._stopped)
                return 0
            if self._gone is not None and self._failures and moment > self._gone + GIVE_UP_SECONDS:
                return 1
            # As long as the training lives there may be more to say: its end, for one.
            over = self._gone is not None and (not left or self._failures)
            if self._stop_at is not None and (over or moment > self._stop_at):
                return 1 if left else 0
            if not left and self._store is not None and not swept:
                swept = deliver_left_behind(self._journal.folder.parent, self._store, self._busy)
            if not left and moment > busy + IDLE_SECONDS:
                if not self._journal.unended():
                    return 0
                busy = moment
            time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        """See whether the training lives; if not, close the runs that it did not."""
        if self._gone is not None or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        if not writer_lives(self._journal.folder):
            self._gone = time.monotonic()
            close_unended(self._journal)

    def _deliver(self) -> int:
        """Deliver what there is, if it is time to try; returns how many records."""
        if time.monotonic() < self._retry_at or not self._journal.pending():
            return 0
        try:
            if (
                self._failures
                and self._store is not None
                and (why := self._store.unreachable_reason())
            ):
                raise StoreError(f"the server does not answer: {why}")
            return self._open().drain(self._stopped)
        except StoreError as error:
            self._journal.problem = str(error)
            self._failures += 1
            wait = min(0.5 * 2 ** (self._failures - 1), RETRY_SECONDS)
            self._retry_at = time.monotonic() + wait
            self._raise_timeout()
            return 0

    def _progressed(self, records: int) -> None:
        """Some were delivered: a store that gets on has no problem, however long it takes."""
        if self._failures:
            self._failures = 0
            self._journal.problem = None
            self._raise_timeout()
        self._look()
        self._sample()

    def _busy(self) -> bool:
        return self._stopped() or self._journal.pending()

    def _raise_timeout(self) -> None:
        """Give requests more time the more of them have failed, unless the user has said how much.

        A server that hangs altogether is found out by its health, in three seconds.
        """
        if not self._user_timeout:
            seconds = min(REQUEST_SECONDS * 2**self._failures, LONGEST_REQUEST_SECONDS)
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(seconds)

    def _stopped(self) -> bool:
        return self._stop_at is not None and time.monotonic() > self._stop_at

    def _open(self) -> Uploader:
        if self._store is None or self._uploader is None:
            from tracker.store.client import MlflowStore  # takes two seconds

            self._store = MlflowStore(self._uri)
            self._uploader = Uploader(self._journal, self._store, self._progressed)
        return self._uploader

    def _sample(self) -> None:
        """Append the system's metrics to every run that goes on."""
        if self._gone is not None or time.monotonic() < self._sample_at:
            return
        self._sample_at = time.monotonic() + SAMPLE_SECONDS
        if not (runs := self._journal.unended()):
            return
        at, sample = now(), self._metrics.sample()
        for run in runs:
            if run not in self._begun:
                (begin,) = self._journal.records(run, Begin)
                earlier = int(begin.samples * SAMPLE_SECONDS * 1_000)
                self._begun[run] = self._journal.begin_time(run) - earlier
            # From the clock, not from a count: whoever is started in our place goes on with it.
            step = round((at - self._begun[run]) / (SAMPLE_SECONDS * 1_000))
            points = [(name, value, step, at) for name, value in sample.items()]
            self._journal.append(run, Metrics(points), at)

    def close(self) -> None:
        """Let go of the GPUs and the journal."""
        self._metrics.close()
        self._journal.close()


def main() -> NoReturn:
    """Deliver the journal that standard input names; the exit code is 0 if all was delivered."""
    code = _main()
    logging.shutdown()
    os._exit(code)  # nothing is left to tidy up, and mlflow's threads would take their time


def _main() -> int:
    given: dict[str, Any] = json.load(sys.stdin)
    # Ctrl-C and a closed terminal are meant for the training, whose end we have to tell of.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(19)  # training comes first
    # The client's own retries hold a call for minutes, and may send twice what must arrive once.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    logging.basicConfig(level=logging.WARNING)
    folder = Path(given["folder"])
    lock = delivery_lock(folder)
    try:
        if not lock.take():
            return 0
        process = UploaderProcess(folder, given["tracking_uri"])
        signal.signal(signal.SIGTERM, process.stop)
        try:
            return process.run()
        finally:
            process.close()
            lock.release()
    except TrackerError as error:
        logger.error("%s", public_uri(str(error)))
        return 1
