"""The process that delivers the journal of another process while that trains.

It imports mlflow, so that training imports it only to save a model, and never torch. The two
processes share nothing but the journal. When the training process is gone, this one gives abandoned
runs the correct status, delivers the rest, and removes the journal.
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

from tracker.delivery.background import BLOCKED
from tracker.delivery.leftovers import deliver_left_behind
from tracker.delivery.uploader import Uploader, close_unended
from tracker.errors import StoreError, TrackerError
from tracker.journal.ownership import delivery_lock, writer_lives
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, Metrics, now
from tracker.redaction import public_uri

if TYPE_CHECKING:
    from tracker.store.client import MlflowStore
    from tracker.store.system_metrics import SystemMetrics

NICENESS = 5
"""Training comes first, but on busy cores niceness 19 would get no time at all."""
POLL_SECONDS = 0.1
CPU_SHARE = 0.02
"""Of one core: what the delivery of metrics may take while training runs …"""
LONGEST_PACE_SECONDS = 2.0
"""… unless they would be older than this in the store."""
LOOK_SECONDS = 0.25
"""Between two checks whether the training process lives."""
RETRY_SECONDS = 5.0
"""The longest pause before a failing store is tried again; the first is half a second."""
GIVE_UP_SECONDS = 60.0
"""How long a failing store is tried after the training process is gone."""
IDLE_SECONDS = 30.0
"""How long the process stays without an active run and pending records; it is started again."""
STOP_SECONDS = 5.0
"""How long it continues to deliver after SIGTERM."""
SAMPLE_SECONDS = 10.0
"""Between two samples of the system metrics."""
FIRST_SAMPLE_SECONDS = 0.1
REQUEST_SECONDS = 20
"""The timeout of a request, doubled after each failure …"""
LONGEST_REQUEST_SECONDS = 640
"""… up to this: a server may take so long to store a large model."""

logger = logging.getLogger(__name__)


class UploaderProcess:
    """One journal, and the store that it is delivered to."""

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        self._journal = Journal(folder)
        self._uri = tracking_uri
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._metrics: SystemMetrics | None = None
        self._sample_at = 0.0
        self._first_sample: dict[str, int] = {}  # when step 0 of each run's samples was
        self._failures = 0
        self._retry_at = 0.0
        self._pace_until = 0.0
        self._stop_at: float | None = None
        self._gone_at: float | None = None  # when the training process was seen to be gone
        self._look_at = 0.0
        self._held_pause = 0.25
        self._held_at = 0.0  # when the held runs are tried again
        self._is_nice = False
        self._user_timeout = "MLFLOW_HTTP_REQUEST_TIMEOUT" in os.environ
        self._raise_timeout()

    def stop(self, *_: object) -> None:
        """End soon: the handler of SIGTERM."""
        self._stop_at = self._stop_at or time.monotonic() + STOP_SECONDS

    def run(self) -> int:
        """Deliver until the training process is gone or idle; return 0 if all is delivered."""
        busy_at = time.monotonic()
        swept = False
        while True:
            self._look()
            self._sample()
            delivered = self.deliver()
            moment = time.monotonic()
            if delivered:
                busy_at = moment
                continue
            pending = self._journal.pending()
            if self._gone_at is not None and not pending:
                if self._journal.held():
                    return 1
                self._journal.remove()
                if not swept and self._store is not None:  # a program too short to be idle in
                    self.stop()  # the training process may wait for this one
                    deliver_left_behind(self._journal.folder.parent, self._store, self._stopped)
                return 0
            is_failing = self._gone_at is not None and self._failures > 0
            if is_failing and moment > (self._gone_at or 0.0) + GIVE_UP_SECONDS:
                return 1
            # As long as the training process lives it may append more, such as the run's end.
            is_over = self._gone_at is not None and (not pending or is_failing)
            if self._stop_at is not None and (is_over or moment > self._stop_at):
                return 1 if pending else 0
            if not pending and self._store is not None and not swept:
                swept = deliver_left_behind(self._journal.folder.parent, self._store, self._busy)
            if not pending and moment > busy_at + IDLE_SECONDS:
                if not self._journal.unended():
                    return 0
                busy_at = moment
            time.sleep(POLL_SECONDS)

    def _look(self) -> None:
        """Check whether the training process lives; if not, close the runs it did not end."""
        if self._gone_at is not None or time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        if not writer_lives(self._journal.folder):
            self._gone_at = time.monotonic()
            close_unended(self._journal)

    def deliver(self) -> int:
        """Deliver what is pending, unless it has to wait; return the number of records.

        A failing store waits for its retry, and metrics for more of them.
        """
        retry_held = time.monotonic() > self._held_at and bool(self._journal.held())
        if time.monotonic() < self._retry_at or not (retry_held or self._journal.pending()):
            return 0
        if time.monotonic() < self._pace_until and not (self._is_ending or self._journal.urgent()):
            return 0
        self._journal.take_hurry()
        started = time.process_time()
        try:
            # MLflow's client would try a dead server for minutes.
            reason = self._store.unreachable_reason() if self._store and self._failures else None
            if reason is not None:
                raise StoreError(f"the server does not answer: {reason}.")
            delivered = self._open().drain(self._stopped, retry_held=retry_held)
            if retry_held:
                self._held_pause = min(2 * self._held_pause, RETRY_SECONDS)
                self._held_at = time.monotonic() + self._held_pause
            # A request costs the same for one point as for a hundred, and that is CPU of training.
            pace = min((time.process_time() - started) / CPU_SHARE, LONGEST_PACE_SECONDS)
            self._pace_until = time.monotonic() + pace
            return delivered
        except StoreError as error:
            self._be_nice()
            self._journal.problem = str(error)
            self._failures += 1
            pause = min(0.5 * 2 ** (self._failures - 1), RETRY_SECONDS)
            self._retry_at = time.monotonic() + max(pause, error.retry_after)
            self._raise_timeout()
            return 0

    def _progressed(self, records: int) -> None:
        """Clear the problem: a store that makes progress has none, however slow it is."""
        self._be_nice()
        self._extend_stop()
        if self._failures:
            self._failures = 0
            self._journal.problem = None
            self._raise_timeout()
        self._look()
        self._sample()

    def _extend_stop(self) -> None:
        """Continue after SIGTERM while delivery makes progress: a kill would lose nothing."""
        if self._stop_at is not None:
            self._stop_at = time.monotonic() + STOP_SECONDS

    def _be_nice(self) -> None:
        """Give way to training, but only once mlflow is imported and the run is in the store."""
        if not self._is_nice:
            self._is_nice = True
            os.nice(NICENESS)

    @property
    def _is_ending(self) -> bool:
        return self._stop_at is not None or self._gone_at is not None

    def _busy(self) -> bool:
        return self._stopped() or self._journal.pending()

    def _stopped(self) -> bool:
        return self._stop_at is not None and time.monotonic() > self._stop_at

    def _raise_timeout(self) -> None:
        """Double the timeout of requests after each failure, unless the user set one.

        The health check, which detects a server that hangs altogether, waits as long at most.
        """
        if not self._user_timeout:
            seconds = min(REQUEST_SECONDS * 2**self._failures, LONGEST_REQUEST_SECONDS)
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(seconds)

    def _open(self) -> Uploader:
        if self._store is None or self._uploader is None:
            from tracker.store.client import MlflowStore  # importing mlflow takes seconds
            from tracker.store.guards import note_answers

            note_answers()

            self._store = MlflowStore(self._uri)
            self._uploader = Uploader(self._journal, self._store, self._progressed)
            self._extend_stop()
        return self._uploader

    def _sample(self) -> None:
        """Append the system metrics to every active run."""
        if self._gone_at is not None or time.monotonic() < self._sample_at:
            return
        if self._metrics is None:
            from tracker.store.system_metrics import SystemMetrics

            self._metrics = SystemMetrics()  # the CPU's first figure is of the time from here
            self._sample_at = time.monotonic() + FIRST_SAMPLE_SECONDS
            return
        self._sample_at = time.monotonic() + SAMPLE_SECONDS
        if not (runs := self._journal.unended()):
            return
        at, sample = now(), self._metrics.sample()
        for run in runs:
            if run not in self._first_sample:
                begins = self._journal.records(run, Begin)  # none if it is damaged
                earlier = int(sum(b.samples for b in begins) * SAMPLE_SECONDS * 1_000)
                self._first_sample[run] = self._journal.begin_time(run) - earlier
            # From the clock, not from a count, so that a restarted uploader continues the steps.
            step = round((at - self._first_sample[run]) / (SAMPLE_SECONDS * 1_000))
            points = [(name, value, step, at) for name, value in sample.items()]
            self._journal.append(run, Metrics(points), at)

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()


def main() -> NoReturn:
    """Deliver the journal that standard input names; exit with 0 if all was delivered."""
    code = _main()
    logging.shutdown()
    os._exit(code)  # nothing is left to clean up, and mlflow's threads would delay the end


def _main() -> int:
    settings: dict[str, Any] = json.load(sys.stdin)
    # Ctrl-C and a closed terminal are meant for the training, whose end is still to be delivered.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The client's own retries block a call for minutes, and may send twice what must arrive once.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    logging.basicConfig(level=logging.WARNING)
    folder = Path(settings["folder"])
    lock = delivery_lock(folder)
    try:
        if not lock.take():
            return 0
        process = UploaderProcess(folder, settings["tracking_uri"])
        signal.signal(signal.SIGTERM, process.stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)  # a SIGTERM during the start counts
        try:
            return process.run()
        finally:
            process.close()
            lock.release()
    except TrackerError as error:
        logger.error("%s", public_uri(str(error)))
        return 1
