"""How the journal of this process gets to MLflow: by a second process, in-line, or later.

A process has one journal and one uploader for each folder and store, whatever runs it tracks.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from tracker.errors import ArgumentError, StoreError
from tracker.journal import Journal, JournalWriter, Problem
from tracker.redaction import public_uri
from tracker.signals import on_termination
from tracker.tracking_uri import check, resolve
from tracker.uploader import Uploader

if TYPE_CHECKING:
    from tracker.mlflow_store import MlflowStore

DEADLINE_SECONDS = 10.0
"""How long the end of a run waits until it is delivered; so does the end of the program."""
WARN_SECONDS = 5.0
"""A store that fails this long is worth a warning: another process may only hold its lock."""
_POLL_SECONDS = 0.02
_LOOK_SECONDS = 1.0  # between two looks at what the uploader says
_STOP_SECONDS = 2.0  # for an uploader that is told to stop, until it is killed: nothing is lost
_RESTARTS = 3  # of an uploader that dies before it delivered anything, until we say so

Mode = Literal["process", "inline", "offline"]
logger = logging.getLogger(__name__)


class Delivery(Protocol):
    """Takes the records of a journal to MLflow."""

    journal: JournalWriter

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """`run` begins; `abandon` is called at the program's end, unless it was ended before."""

    def deliver(self) -> None:
        """An epoch has ended: a good moment for who delivers in the training thread."""

    def flush(self, timeout: float) -> bool:
        """Whether everything appended so far is delivered, at the latest after `timeout` s."""

    def release(self, run: str) -> None:
        """`run` has ended, and its end is appended."""

    def run_id(self, run: str) -> str | None:
        """MLflow's id of `run`, None while it is not known."""

    def close(self) -> None:
        """Whoever made this delivery needs it no more."""


def delivery(directory: Path, tracking_uri: str | None, mode: Mode) -> Delivery:
    """The delivery of this process to a store; StoreError where the URI or folder cannot be."""
    if mode == "inline":
        return InlineDelivery(directory, tracking_uri)
    uri = resolve(tracking_uri)
    check(uri)
    key = (os.getpid(), directory.absolute(), uri, mode)
    with _opening:
        if key not in _open:
            _open[key] = BackgroundDelivery(directory, uri, uploader=mode == "process")
            if len(_open) == 1:
                atexit.register(_close_all)
        return _open[key]


_open: dict[tuple[int, Path, str, Mode], BackgroundDelivery] = {}
_opening = threading.Lock()


def _close_all() -> None:
    for (pid, *_), opened in list(_open.items()):
        if pid == os.getpid():  # a fork has nothing to say about its parent's runs
            opened.shut_down()
    _open.clear()


def mode_of(*, inline: bool | None, offline: bool | None) -> Mode:
    """How to deliver: as the arguments say, else TRACKER_OFFLINE and TRACKER_INLINE.

    Raises ArgumentError for both at once, or a variable that is neither true nor false.
    """
    if inline and offline:
        raise ArgumentError("inline=True and offline=True exclude each other.")
    if offline or (offline is None and not inline and _flag("TRACKER_OFFLINE")):
        return "offline"
    if inline or (inline is None and not offline and _flag("TRACKER_INLINE")):
        return "inline"
    return "process"


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value not in ("", "0", "1", "false", "true"):
        raise ArgumentError(f"{name}={value!r} is not allowed; it must be 1, 0, true or false.")
    return value in ("1", "true")


class _Signalled:
    """Tells a journal which runs were going on when SIGTERM came."""

    def __init__(self, journal: JournalWriter) -> None:
        self._journal = journal
        self.runs: dict[str, Callable[[], None]] = {}
        self.forget = on_termination(self._tell)

    def _tell(self, name: str) -> None:
        for run in list(self.runs):
            self._journal.append(run, "signal", {"signal": name})
        self._journal.flush(timeout=1.0)


class InlineDelivery:
    """Delivers from the training thread, when an epoch or a run ends: tests and short scripts.

    The user's mistakes show when the first run begins. After that a store that cannot be reached
    never stops training: one warning, and what is undelivered stays in the journal.
    """

    def __init__(self, directory: Path, tracking_uri: str | None) -> None:
        self._given_uri = tracking_uri
        self._pid = os.getpid()
        self.journal = JournalWriter(directory)
        self._reader = Journal(self.journal.folder)
        self._signalled = _Signalled(self.journal)
        self._store: MlflowStore | None = None
        self._uploader: Uploader | None = None
        self._began = False
        self._warned = False
        self._noticed = 0

    @property
    def tracking_uri(self) -> str:
        """The URI of the store, resolved."""
        return self._open().tracking_uri

    def _open(self) -> MlflowStore:
        if self._store is None:
            from tracker.mlflow_store import MlflowStore  # importing mlflow takes a second

            self._store = MlflowStore(self._given_uri)
            self._reader.tracking_uri = public_uri(self._store.tracking_uri)
            self._uploader = Uploader(self._reader, self._store)
        return self._store

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """Deliver the beginning of `run`, so that its id is known.

        Raises StoreError where the store cannot be used, as long as nothing was delivered to it.
        """
        try:
            self._drain()
        except StoreError as error:
            if not self._began and self._reader.run_id(run) is None:
                raise
            self._warn(error)
        self._began = True
        self._signalled.runs[run] = abandon
        atexit.register(abandon)

    def deliver(self) -> None:
        """Deliver what there is; a failure is a warning."""
        try:
            self._drain()
        except StoreError as error:
            self._warn(error)

    def flush(self, timeout: float) -> bool:
        """Deliver what there is; whether that worked. The store decides how long it takes."""
        self.deliver()
        return not self._reader.remaining()

    def _drain(self) -> None:
        if os.getpid() != self._pid:  # nor is a fork to deliver its parent's run
            return
        self.journal.flush()
        store = self._open()
        if (problem := store.silence()) is not None:  # MLflow's client would try for minutes
            raise StoreError(f"the server does not answer: {problem}")
        if self._uploader is not None:
            with _own_randomness():
                self._uploader.drain()
        for number, text in self._reader.notices(self._noticed):
            self._noticed = number
            logger.warning("%s", text)

    def _warn(self, error: StoreError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("Training goes on, its records wait in the journal: %s", error)

    def release(self, run: str) -> None:
        """Deliver the run's end."""
        if (abandon := self._signalled.runs.pop(run, None)) is not None:
            atexit.unregister(abandon)
        self.deliver()

    def run_id(self, run: str) -> str | None:
        """MLflow's id of `run`."""
        return self._reader.run_id(run)

    def close(self) -> None:
        """Deliver the rest and close the journal; say what is left and how to deliver it."""
        self._signalled.forget()
        if self._began:
            self.deliver()
        self.journal.close()
        if self._began and (left := self._reader.remaining()):
            _say_left(left, self.journal.folder)
            self._reader.close()
        elif self.journal.lost:
            self._reader.close()
        else:
            self._reader.remove()


class BackgroundDelivery:
    """Leaves delivery to a second process, or, offline, to `tracker sync`.

    Nothing here waits for a store, except the end of a run and of the program, up to a deadline.
    """

    def __init__(self, directory: Path, tracking_uri: str, *, uploader: bool) -> None:
        self.tracking_uri = tracking_uri
        self._wants_uploader = uploader
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at = 0.0
        self._deaths = 0
        self._look_at = 0.0
        self._noticed = 0
        self._warned = False
        self._stuck_at: int | None = None  # what was delivered when waiting for more was given up
        self.journal = JournalWriter(directory)
        self._reader = Journal(self.journal.folder)
        self._reader.tracking_uri = public_uri(tracking_uri)
        # Its own: a signal's handler must not wait for a lock that it interrupted the holder of.
        self._watcher = Journal(self.journal.folder)
        self._signalled = _Signalled(self.journal)
        self.journal.on_tick = self._tick

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """Note that `run` goes on; its uploader is started by the journal's thread."""
        self._signalled.runs[run] = abandon
        self._look_at = 0.0

    def deliver(self) -> None:
        """Nothing: the uploader takes what there is."""

    def flush(self, timeout: float) -> bool:
        """Wait until everything appended so far is delivered."""
        until = time.monotonic() + timeout
        if not self.journal.flush(timeout):
            return False
        last = self._reader.last()
        while self._wants_uploader and self._reader.delivered < last:
            problem = self._reader.problem
            if time.monotonic() > until or (problem and time.time() > problem.since + timeout):
                self._stuck_at = self._reader.delivered
                return False
            time.sleep(_POLL_SECONDS)
        return self._wants_uploader

    def release(self, run: str) -> None:
        """Wait for the run's delivery up to the deadline; then name the command that does it."""
        self._signalled.runs.pop(run, None)
        if self._wants_uploader and not self.flush(DEADLINE_SECONDS):
            problem = self._reader.problem
            self._warn(problem.text if problem else "the run has ended and is not delivered yet")

    def run_id(self, run: str) -> str | None:
        """MLflow's id of `run`, None while it is not delivered."""
        return self._reader.run_id(run)

    def close(self) -> None:
        """Nothing: the process may track more, and ends with `shut_down`."""

    def shut_down(self) -> None:
        """End what was not ended, deliver the rest up to the deadline, and say what is left."""
        delivered = False
        try:
            for abandon in list(self._signalled.runs.values()):
                abandon()
            stuck = self._stuck_at == self._reader.delivered  # then the wait is over already
            delivered = self.flush(0.0 if stuck else DEADLINE_SECONDS)
        except KeyboardInterrupt:  # somebody does not want to wait
            pass
        self._signalled.forget()
        self._wants_uploader = False  # no new one
        self.journal.close()
        if self._process is not None:
            if not delivered:
                self._process.terminate()
            try:
                self._process.wait(DEADLINE_SECONDS if delivered else _STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._look()
        folder = self.journal.folder
        if folder.exists():  # the uploader, if there was one, has left it
            if left := self._reader.remaining():
                _say_left(left, folder, self._reader.problem)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        self._reader.close()
        self._watcher.close()

    # -- the uploader, looked after by the journal's thread ----------------------------------

    def _tick(self) -> None:
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + _LOOK_SECONDS
        try:
            self._supervise()
            self._look()
        except (StoreError, OSError) as error:  # a journal taken away, no more processes
            logger.debug("%s", error)

    def _supervise(self) -> None:
        """Have an uploader while there is something to deliver."""
        if self._process is not None and (code := self._process.poll()) is not None:
            self._process = None
            if code:
                self._deaths += 1
                self._start_at = time.monotonic() + min(2.0 ** (self._deaths - 1), 60.0)
                if self._deaths == _RESTARTS:
                    self._warn(f"the uploader does not start: {self._last_words()}")
        remaining = self._watcher.remaining()
        if not remaining:
            self._deaths = 0
        elif self._process is None and self._wants_uploader and time.monotonic() > self._start_at:
            self._start()

    def _start(self) -> None:
        # Not -m: the user's directory, with a json.py perhaps, is none of the uploader's.
        program = (
            "import sys; sys.path.append(sys.argv[1]);"
            "from tracker.uploader_process import main; main()"
        )
        given = {
            "folder": str(self.journal.folder),
            "tracking_uri": self.tracking_uri,  # here, for command lines can be seen by all
            "system_metrics": True,
        }
        with (self.journal.folder / "uploader.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(Path(__file__).parents[1])],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(json.dumps(given).encode())

    def _last_words(self) -> str:
        log = self.journal.folder / "uploader.log"
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "it was killed"

    def _look(self) -> None:
        """Tell the user, once, of what the uploader found."""
        for number, text in self._watcher.notices(self._noticed):
            self._noticed = number
            logger.warning("%s", text)
        problem = self._watcher.problem
        if problem is not None and time.time() > problem.since + WARN_SECONDS:
            self._warn(problem.text)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "Training goes on, its records wait in the journal: %s. If this process ends "
                "before they are delivered: tracker sync %s",
                *(what.rstrip("."), self.journal.folder),
            )


class NoDelivery:
    """For the ranks that do not write: what they log goes nowhere."""

    tracking_uri = "none"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tracker-rank-")
        self.journal = JournalWriter(Path(self._folder.name))

    def hold(self, run: str, abandon: Callable[[], None]) -> None:
        """Nothing."""

    def deliver(self) -> None:
        """Nothing."""

    def flush(self, timeout: float) -> bool:
        """Nothing; that is done."""
        return True

    def release(self, run: str) -> None:
        """Nothing."""

    def run_id(self, run: str) -> str | None:
        """None: the run is that of another rank."""
        return None

    def close(self) -> None:
        """Remove what was written."""
        self.journal.close()
        self._folder.cleanup()


def _say_left(records: int, folder: Path, problem: Problem | None = None) -> None:
    why = f" ({problem.text.rstrip('.')})" if problem else ""
    logger.warning(
        "%d records are not delivered; deliver them: tracker sync %s%s", records, folder, why
    )


@contextmanager
def _own_randomness() -> Iterator[None]:
    """MLflow draws its run names from python's generator, which belongs to the training."""
    state = random.getstate()
    random.seed()
    try:
        yield
    finally:
        random.setstate(state)
