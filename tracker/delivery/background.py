"""Delivery by a second process, or, offline, by `tracker sync` later."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tracker.delivery.signals import ActiveRuns
from tracker.errors import ArgumentError, StoreError
from tracker.journal.reader import OFFLINE, Journal
from tracker.journal.writer import JournalWriter
from tracker.redaction import public_uri

DEADLINE_SECONDS = 10.0
"""How long the end of a run, and of the program, waits; TRACKER_EXIT_TIMEOUT replaces it."""
WARN_SECONDS = 5.0
"""How long a store may fail without a warning: another process may hold its lock."""
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 1.0  # between two checks of the uploader
_STOP_SECONDS = 2.0  # from SIGTERM to SIGKILL of an uploader, which loses nothing by either
_RESTARTS = 3  # before a warning, if the uploader dies each time without delivering anything

BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""The signals that wait while the uploader starts."""

logger = logging.getLogger(__name__)


class BackgroundDelivery:
    """Leaves delivery to a second process, or, offline, to `tracker sync`.

    Nothing here waits for a store, except the end of a run and of the program, up to a deadline.
    """

    def __init__(self, directory: Path, tracking_uri: str, *, uploader: bool) -> None:
        self.tracking_uri = tracking_uri
        self._wants_uploader = uploader
        self._process: subprocess.Popen[bytes] | None = None
        self._starting: threading.Thread | None = None
        self.deadline = _exit_timeout()
        """How many seconds the end of a run, and of the program, waits."""
        self._start_at = 0.0
        self._deaths = 0
        self._look_at = 0.0
        self._last_notice = 0
        self._warned = False
        self._stuck_at: int | None = None  # the last record delivered before a wait timed out
        self.journal = JournalWriter(directory)
        self._reader = Journal(self.journal.folder)
        self._reader.tracking_uri = public_uri(tracking_uri)
        # A second reader: a signal's handler must not wait for a lock whose holder it interrupted.
        self._watcher = Journal(self.journal.folder)
        self._active_runs = ActiveRuns(self.journal)
        if uploader:
            self.journal.on_tick = self._tick
        else:
            (self.journal.folder / OFFLINE).touch(mode=0o600)

    def begin(self, run: str, abandon: Callable[[], None]) -> None:
        """Note that `run` is active; the journal's thread starts its uploader."""
        self._active_runs.begin(run, abandon)
        self._look_at = 0.0

    def deliver(self) -> None:
        """Do nothing: the uploader delivers continuously."""

    def flush(self, timeout: float, run: str | None = None) -> bool:
        """Wait until everything appended so far is delivered; return whether it is."""
        return self._flush(timeout) and not self._reader.is_held(run)

    def _flush(self, timeout: float) -> bool:
        """Wait like `flush`, but not for held runs: they would keep every other one waiting."""
        until = time.monotonic() + timeout
        if not self.journal.flush(timeout):
            return False
        last = self._reader.last()
        if self._wants_uploader:
            self._reader.hurry()
        while self._wants_uploader and self._reader.delivered < last:
            problem = self._reader.problem
            if time.monotonic() > until or (problem and time.time() > problem.since + timeout):
                self._stuck_at = self._reader.delivered
                return False
            time.sleep(_POLL_SECONDS)
        return self._wants_uploader

    def end(self, run: str, *, wait: bool = True) -> None:
        """Wait for the run's delivery up to the deadline, then warn."""
        self._active_runs.runs.pop(run, None)
        if not wait:
            return
        try:  # offline too, after which the run is on disk
            if not self._flush(self.deadline) and self._wants_uploader:
                problem = self._reader.problem
                self._warn(problem.text if problem else None)
        except StoreError as error:  # the journal was removed, which must not stop the training
            self._warn(str(error))

    def run_id(self, run: str) -> str | None:
        """Return MLflow's id of `run`; None while it is not delivered."""
        return self._reader.run_id(run)

    def close(self) -> None:
        """Do nothing: the process may track more, and ends with `shut_down`."""

    def leave(self) -> None:
        """Close the journal without waiting; the uploader continues alone."""
        self._active_runs.forget()
        self._stop_writing()
        self._reader.close()
        self._watcher.close()

    def _stop_writing(self) -> None:
        self._wants_uploader = False
        self.journal.close()
        if self._starting is not None:
            self._starting.join()

    def shut_down(self) -> None:
        """End abandoned runs, deliver up to the deadline, and warn of what is undelivered."""
        delivered = False
        with suppress(KeyboardInterrupt, StoreError):  # Ctrl-C ends the wait
            for abandon in list(self._active_runs.runs.values()):
                abandon()
            is_stuck = self._stuck_at == self._reader.delivered  # an earlier wait has timed out
            delivered = self._flush(0.0 if is_stuck else self.deadline)
        self._active_runs.forget()
        is_gone = self._watcher.is_gone()  # once it is not written, the uploader may remove it
        self._stop_writing()
        try:
            self._look()
            if not delivered and self._is_healthy():
                logger.warning(
                    "%d records are still being uploaded, which continues in the background; "
                    "see: tracker status %s",
                    self._reader.remaining(),
                    self.journal.folder,
                )
            else:
                self._end_uploader(delivered)
                self._look()
                self._remove_or_report(is_gone)
        except StoreError as error:  # the journal's file is unreadable
            logger.warning("%s", error)
        self._reader.close()
        self._watcher.close()

    def _end_uploader(self, delivered: bool) -> None:
        if self._process is None:
            return
        if not delivered:
            self._process.terminate()
        try:
            self._process.wait(self.deadline if delivered else _STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _remove_or_report(self, is_gone: bool) -> None:
        """Remove a delivered journal, unless the uploader has, or say what is undelivered."""
        folder = self.journal.folder
        if is_gone or folder.exists():
            if (summary := self._reader.undelivered_summary()) is not None:
                logger.warning("%s", summary)
            else:
                shutil.rmtree(folder, ignore_errors=True)

    def _is_healthy(self) -> bool:
        """Return whether the uploader works, however slowly: it will finish by itself."""
        is_alive = self._process is not None and self._process.poll() is None
        return is_alive and self.journal.folder.exists() and self._reader.problem is None

    # -- the uploader, supervised by the journal's thread --------------------------------------

    def _tick(self) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_SECONDS
        if self._watcher.is_gone() and self._watcher.pending():
            self._warn("it was deleted")
            return
        self._supervise()
        self._look()

    def _supervise(self) -> None:
        """Run an uploader while anything is pending."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            if code:
                self._deaths += 1
                self._start_at = time.monotonic() + min(2.0 ** (self._deaths - 1), 60.0)
                if self._deaths == _RESTARTS:
                    self._warn(f"the uploader does not start: {self._last_words()}")
        if not self._watcher.pending():
            self._deaths = 0
            return
        is_starting = self._starting is not None and self._starting.is_alive()
        if self._process is None and self._wants_uploader and not is_starting:
            if time.monotonic() < self._start_at:
                return
            # In another thread: records must reach the disk while the system is busy.
            self._starting = threading.Thread(target=self._start, daemon=True)
            self._starting.start()

    def _start(self) -> None:
        # Inherited by the uploader, which lets them through when it has handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
        try:
            self._start_process()
        except OSError as error:  # no memory, or the journal was removed: tried again
            logger.debug("The uploader could not be started: %s", error)
            self._start_at = time.monotonic() + _LOOK_SECONDS

    def _start_process(self) -> None:
        # Not -m: the user's folder may hold a json.py, which the uploader must not import.
        program = (
            "import sys; sys.path.append(sys.argv[1]);"
            "from tracker.delivery.process import main; main()"
        )
        settings = {
            "folder": str(self.journal.folder),
            "tracking_uri": self.tracking_uri,  # not an argument: all users see command lines
        }
        # Written before the start: a signal may kill this process at any moment after it.
        ours, theirs = os.pipe()
        with open(theirs, "wb") as pipe:
            pipe.write(json.dumps(settings).encode())
        with (
            open(ours, "rb") as settings_pipe,
            (self.journal.folder / "uploader.log").open("ab") as log,
        ):
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(Path(__file__).parents[2])],
                stdin=settings_pipe,
                stdout=log,
                stderr=log,
            )

    def _last_words(self) -> str:
        log = self.journal.folder / "uploader.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "it was killed"

    def _look(self) -> None:
        """Pass on the uploader's notices, and warn of a problem that lasts."""
        for number, text in self._watcher.notices(self._last_notice):
            self._last_notice = number
            logger.warning("%s", text)
        problem = self._watcher.problem
        if problem is not None and time.time() > problem.since + WARN_SECONDS:
            self._warn(problem.text)

    def _warn(self, reason: str | None) -> None:
        """Warn once that delivery is late; without a reason it works, but slowly."""
        if self._watcher.is_gone():
            if self._wants_uploader:
                self._wants_uploader = False
                logger.warning(
                    "The journal %s was deleted: records that are not uploaded yet, and all later "
                    "ones, are lost; training continues.",
                    self.journal.folder,
                )
        elif not self._warned:
            self._warned = True
            if reason is None:
                logger.warning(
                    "Saved on disk; the upload is slow and continues in the background; see: "
                    "tracker status %s",
                    self.journal.folder,
                )
                return
            logger.warning(
                "Saved on disk; upload delayed (%s). It continues in the background. "
                "If this process ends first, finish it with: tracker sync %s",
                reason.rstrip("."),
                self.journal.folder,
            )


def _exit_timeout() -> float:
    text = os.environ.get("TRACKER_EXIT_TIMEOUT", "").strip()
    return checked_timeout("TRACKER_EXIT_TIMEOUT", text or DEADLINE_SECONDS)


def checked_timeout(name: str, value: float | str) -> float:
    """Return a timeout as a number of seconds.

    Args:
        name: Its name in the error.
        value: The number, or a text that holds it.

    Raises:
        ArgumentError: It is not a finite number from 0.
    """
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ArgumentError(f"{name}={value!r} is not allowed; it must be a number of seconds.")
    return seconds
