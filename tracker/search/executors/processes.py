"""Trials in worker processes, which send requests to the search over pipes.

The death of a worker is noticed at once. A worker that is silent for the grace period loses its
trial; if it comes back, it continues with the next one. Workers never access the storage.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tracker.errors import ArgumentError, StoreError
from tracker.search.channel import Ended, TrialLostError
from tracker.search.executors.base import TrialSpec
from tracker.search.executors.cores import usable_cores
from tracker.search.executors.devices import environment_for
from tracker.search.executors.worker import work
from tracker.search.interrupts import Interrupts, block_signals
from tracker.search.policy import unpacked
from tracker.search.sending import pack
from tracker.search.session import Search

WORKER = "trial worker"
"""The name of a worker's process."""
DEVICES_TAG = "tracker.devices"
"""The tag of a trial's run that names the GPUs of its worker."""

_POLL_SECONDS = 0.25
_WAIT_SECONDS = 0.5  # until the next claim, if other searches run the last trials
_EXIT_SECONDS = 30.0  # for a worker to end, including the delivery of its runs
_MAX_FAILED_STARTS = 3  # in a row
_MAX_KILLED_STARTS = 20  # by the user, or for lack of memory

# Workers are forked from a process that has imported torch once for all of them, and holds neither
# threads nor CUDA. A worker with its own GPUs is a new process instead: its CUDA_VISIBLE_DEVICES is
# set before anything is imported, such as a script that asks torch for its device at the top.
_FORKED = multiprocessing.get_context("forkserver")
_NEW = multiprocessing.get_context("spawn")
_PRELOADED = ["tracker.search.trial"]
_STOPPED = Ended.failed("interrupted", "It was still running when its search ended.")

logger = logging.getLogger(__name__)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    last_message: float
    place: int
    """Which of the executor's places it has; a worker that replaces it has the same."""
    trial: int | None = None
    is_ready: bool = False
    """Whether it has ever asked for a trial."""
    is_silent: bool = False
    """Whether it lost its trial because it was silent, and has sent nothing since."""
    is_leaving: bool = False
    """Whether it was asked to end."""
    was_killed: bool = False
    """Whether this executor killed it."""

    def send(self, *message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:  # it is dead, which the next read reports
            logger.debug("%s", error)

    def stop(self) -> None:
        self.is_leaving = True
        self.send("stop")


class ProcessExecutor:
    """Runs trials in worker processes."""

    def __init__(self, spec: TrialSpec, places: Sequence[str | None]) -> None:
        """Prepare an executor; `run` starts its processes.

        Args:
            spec: What the trials share.
            places: For each process its CUDA_VISIBLE_DEVICES, or None to leave it as it is.
        """
        self._spec = spec
        self._places = places
        self._packed: dict[bool, bytes] = {}
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._claim_at = 0.0
        self._failed_starts = self._killed_starts = 0
        self._is_done = False
        self._error: Exception | None = None

    def run(self, search: Search, interrupts: Interrupts) -> None:
        """Run trials until the study is done, or interrupted.

        Args:
            search: Where trials come from.
            interrupts: After the first, trials are interrupted; after the second, killed.

        Raises:
            Exception: The objective raised an exception that ends the study.
            StoreError: The workers cannot start.
        """
        try:
            while not self._is_done or any(w.trial is not None for w in self._active()):
                if interrupts.count or self._error is not None:
                    break
                try:
                    self._start_workers()
                except (EOFError, OSError):
                    if interrupts.count:  # the signal has ended the process that forks them too
                        break
                    raise
                self._handle_messages(search)
                self._fail_silent(search)
                self._hand_out_trials(search)
            self._stop_all(search, interrupts)
        finally:
            for worker in self._workers:
                worker.was_killed = worker.process.is_alive()
                worker.process.kill()
            for worker in list(self._workers):
                self._remove(worker, search)
        if self._error is not None:
            raise self._error

    def settle(self, timeout: float) -> bool:
        """Return True: the workers delivered their runs before they ended."""
        return True

    def _active(self) -> list[_Worker]:
        return [worker for worker in self._workers if not worker.is_silent]

    def _start_workers(self) -> None:
        """Start a worker in each place that has none."""
        taken = {worker.place for worker in self._active()}
        free = [] if self._is_done else [p for p in range(len(self._places)) if p not in taken]
        if not free:
            return
        resource_tracker.ensure_running()  # started below, it would unblock the signals
        if None in self._places:
            _FORKED.set_forkserver_preload(_PRELOADED)
            with block_signals(signal.SIGINT):  # its workers inherit that, and unblock it
                forkserver.ensure_running()
        for place in free:
            ours, theirs = multiprocessing.Pipe()
            process = self._start(theirs, self._places[place])
            theirs.close()
            self._workers.append(_Worker(process, ours, time.monotonic(), place))

    def _start(self, connection: Connection, devices: str | None) -> BaseProcess:
        threads = max(1, usable_cores() // len(self._places))
        spec = replace(self._spec, objective=None, catch=None)  # it asks for these
        if devices is None:
            arguments = connection, spec, threads, dict(os.environ)
            process: BaseProcess = _FORKED.Process(target=work, args=arguments, name=WORKER)
            process.start()
            return process
        spec = replace(spec, environment={**spec.environment, DEVICES_TAG: devices})
        with environment_for(devices), block_signals(signal.SIGINT):
            arguments = connection, spec, threads, dict(os.environ)
            process = _NEW.Process(target=work, args=arguments, name=WORKER)
            process.start()
        return process

    def _handle_messages(self, search: Search) -> None:
        """Wait a moment for messages of the workers, and handle them."""
        ready = wait([worker.connection for worker in self._workers], _POLL_SECONDS)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            self._handle_message(worker, search)

    def _handle_message(self, worker: _Worker, search: Search) -> None:
        try:
            verb, *arguments = worker.connection.recv()
        except (EOFError, OSError):
            self._remove(worker, search)
            return
        worker.last_message = time.monotonic()
        worker.is_silent = False
        if verb == "next":
            worker.trial, worker.is_ready = None, True
            self._claim_at = 0.0
            self._failed_starts = self._killed_starts = 0
            self._idle.append(worker)
        elif verb == "objective":
            worker.send("objective", self._content(*arguments))
        elif verb == "raised":
            self._error = unpacked(*arguments)
        elif verb != "alive":
            _answer(worker, search, verb, *arguments)

    def _content(self, by_value: bool) -> bytes:
        if by_value not in self._packed:
            self._packed[by_value] = pack(self._spec.objective, self._spec.catch, by_value=by_value)
        return self._packed[by_value]

    def _fail_silent(self, search: Search) -> None:
        for worker in self._active():
            silent = time.monotonic() - worker.last_message > search.grace
            if silent and worker.trial is not None:
                worker.is_silent = True
                reason = f"Its process was silent for {search.grace:g} s."
                search.finish(worker.trial, Ended.failed("died", reason))

    def _hand_out_trials(self, search: Search) -> None:
        """Give a trial to each idle worker, while there are any."""
        self._idle = [worker for worker in self._idle if worker in self._workers]
        while self._idle:
            if self._is_done or self._is_replaced(self._idle[0]):
                self._idle.pop(0).stop()
                continue
            if time.monotonic() < self._claim_at:
                return
            task = search.claim()
            if task == "wait":  # for the last trials, which others run
                self._claim_at = time.monotonic() + _WAIT_SECONDS
                return
            if task == "done":
                self._is_done = True
                continue
            worker = self._idle.pop(0)
            worker.trial = task.number
            worker.last_message = time.monotonic()
            worker.send("run", task)

    def _is_replaced(self, worker: _Worker) -> bool:
        """Whether another worker has the same place, as this one or that one was silent."""
        others = [other for other in self._active() if other is not worker]
        return any(other.place == worker.place and not other.is_leaving for other in others)

    def _remove(self, worker: _Worker, search: Search) -> None:
        """Wait for the end of a worker's process, and clean up after it."""
        worker.process.join()
        self._workers.remove(worker)
        worker.connection.close()
        code = worker.process.exitcode
        if worker.trial is not None:
            search.finish(worker.trial, _STOPPED if worker.was_killed else _death(code))
        if worker.is_ready or not code:
            return
        if code < 0 or code > 128:  # by a signal; above 128 if it was handled
            self._killed_starts += 1
        else:
            self._failed_starts += 1
        is_hopeless = (
            self._failed_starts >= _MAX_FAILED_STARTS or self._killed_starts >= _MAX_KILLED_STARTS
        )
        if is_hopeless and self._error is None:
            self._error = StoreError(
                "The worker processes end before they are ready (see above); a script that runs "
                "a study must do so under `if __name__ == '__main__':`."
            )

    def _stop_all(self, search: Search, interrupts: Interrupts) -> None:
        """End all workers, and interrupt those that have a trial."""
        until = time.monotonic() + _EXIT_SECONDS
        for worker in self._workers:
            if worker.is_silent:
                worker.process.kill()
            elif worker.trial is not None or not worker.is_ready:
                worker.process.terminate()
            elif not worker.is_leaving:
                worker.stop()
        self._idle.clear()
        while self._workers and interrupts.count < 2 and time.monotonic() < until:
            self._handle_messages(search)
            while self._idle:
                self._idle.pop().stop()


def _answer(worker: _Worker, search: Search, verb: str, *arguments: Any) -> None:
    """Execute a request of a worker's trial."""
    try:
        answer = ("ok", getattr(search, verb)(*arguments))
    except TrialLostError as error:
        answer = ("lost", str(error))
    except ArgumentError as error:
        answer = ("mistake", str(error))
    except StoreError:
        raise
    except Exception as error:  # fails this trial only, as in the objective's own process
        if verb == "finish" or search.storage.unreachable(error):
            raise
        answer = ("error", f"{type(error).__name__}: {error}")
        if verb == "report":  # nobody waits for the answer; the next request is refused
            search.finish(arguments[0], Ended.failed("failed", answer[1]))
    if verb != "report":
        worker.send(*answer)


def _death(code: int | None) -> Ended:
    """The end of a trial whose worker exited with `code` before it finished the trial."""
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return Ended.failed("interrupted", "Its process was stopped by SIGTERM.")
    if code is not None and code < 0:
        return Ended.failed("died", f"Its process was killed by {signal.Signals(-code).name}.")
    return Ended.failed("died", f"Its process ended with exit code {code}.")
