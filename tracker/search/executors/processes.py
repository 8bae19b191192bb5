"""Trials in processes of their own, which ask the search over pipes.

A worker that dies is noticed at once, one that is silent for the grace period gives its trial up,
and goes on with the next one when it is back. Nobody but the search touches the storage.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    distribution_to_json,
    json_to_distribution,
)

from tracker.errors import ArgumentError, StoreError, TrackerError
from tracker.search.interrupts import block_signals
from tracker.search.session import Ended, Search, Task, TrialLostError, Verdict

_TICK_SECONDS = 0.25
_WAIT_SECONDS = 0.5  # while others run the last trials, between two looks at whether one is free
_ALIVE_SECONDS = 1.0
_EXIT_SECONDS = 30.0  # for a worker that was told to end: its runs are delivered meanwhile
_STARTS = 3  # of workers that end before they are ready, until we give up
_KILLED_STARTS = 20  # of such that are killed: by whoever does that, or for want of memory

WORKER = "trial worker"
"""The name of a worker's process."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spec:
    """What a worker must know."""

    objective: Any
    tracking: Any
    tracking_uri: str | None
    mode: Any
    environment: Mapping[str, str]
    threads: int


def check_picklable(objective: Any) -> None:
    """Raise ArgumentError for an objective that no other process can import."""
    try:
        pickle.dumps(objective)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"objective={objective!r} cannot run in another process ({error}); with workers above "
            "1 it must be a function at the top of a module."
        ) from error


# -- the search's side -----------------------------------------------------------------------------


@dataclass
class _Worker:
    process: Any
    connection: Connection
    heard: float
    trial: int | None = None
    lost: bool = False
    ready: bool = False
    told: bool = False
    stopped: bool = False
    """By us, at the end: what it did is interrupted, not lost."""


class Pool:
    """Runs the trials of a search in `workers` processes."""

    def __init__(self, search: Search, spec: Spec, workers: int) -> None:
        self._search = search
        self._spec = spec
        self._wanted = workers
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._claim_at = 0.0
        self._false_starts = self._killed_starts = 0
        self._done = False
        self._error: TrackerError | None = None

    def run(self, stopping: Callable[[], int]) -> None:
        """Run until the study is done, or `stopping` says so: 1 is cleanly, 2 at once.

        Raises the user's mistake that a trial met.
        """
        try:
            while not (self._done and not self._busy()):
                if stopping() or self._error is not None:
                    break
                self._hire()
                self._turn()
                self._hand_out()
            self._stop_all(stopping)
        finally:
            for worker in self._workers:
                worker.stopped = worker.process.is_alive()
                worker.process.kill()
            for worker in list(self._workers):
                worker.process.join()
                self._bury(worker)
        if self._error is not None:
            raise self._error

    def _busy(self) -> bool:
        return any(worker.trial is not None and not worker.lost for worker in self._workers)

    def _hire(self) -> None:
        live = [worker for worker in self._workers if not worker.lost]
        resource_tracker.ensure_running()  # with the first process it would unblock the signals
        for _ in range(0 if self._done else self._wanted - len(live)):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=work, args=(theirs, self._spec), name=WORKER)
            with block_signals(signal.SIGINT):
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, time.monotonic()))

    def _turn(self) -> None:
        """Hear what the workers say, for a moment."""
        ready = wait([worker.connection for worker in self._workers], _TICK_SECONDS)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            self._hear(worker)
        self._search.beat()
        for worker in list(self._workers):
            silent = time.monotonic() - worker.heard > self._search.grace
            if silent and worker.trial is not None and not worker.lost:
                worker.lost = True
                reason = f"Its process was silent for {self._search.grace:g} s."
                ended = Ended("FAIL", why="died", status="FAILED", reason=reason)
                self._search.finish(worker.trial, ended)

    def _hear(self, worker: _Worker) -> None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            self._bury(worker)
            return
        worker.heard = time.monotonic()
        worker.lost = False
        match message:
            case ("alive",):
                pass
            case ("mistake", text):
                self._error = ArgumentError(text)
            case ("next",):
                worker.trial, worker.ready = None, True
                self._claim_at = 0.0
                self._false_starts = self._killed_starts = 0
                self._idle.append(worker)
            case ("finish", number, ended):
                self._send(worker, ("ok", self._search.finish(number, ended)))
            case ("report", number, value, step):
                self._answer(worker, self._search.report, number, value, step, reply=False)
            case ("suggest", number, name, distribution):
                known = json_to_distribution(distribution)
                self._answer(worker, self._search.suggest, number, name, known)
            case (str(verb), *arguments):
                self._answer(worker, getattr(self._search, _VERBS[verb]), *arguments)

    def _answer(
        self, worker: _Worker, verb: Callable[..., Any], *arguments: Any, reply: bool = True
    ) -> None:
        try:
            answer: tuple[str, Any] = ("ok", verb(*arguments))
        except TrialLostError as error:
            answer = ("lost", str(error))
        except ArgumentError as error:
            answer = ("mistake", str(error))
        except StoreError:
            raise
        except Exception as error:  # of this trial only, as it would be in the objective's process
            if self._search.storage.unreachable(error):
                raise
            answer = ("error", f"{type(error).__name__}: {error}")
            if not reply:  # the trial is told at its next question
                ended = Ended("FAIL", why="failed", status="FAILED", reason=answer[1])
                self._search.finish(arguments[0], ended)
        if reply:
            self._send(worker, answer)

    def _send(self, worker: _Worker, message: Any) -> None:
        try:
            worker.connection.send(message)
        except OSError as error:  # it is dead, which its end of the pipe tells
            logger.debug("%s", error)

    def _hand_out(self) -> None:
        """Give the idle workers a trial each, as long as there are any."""
        surplus = sum(not worker.lost for worker in self._workers) - self._wanted
        while self._idle:
            worker = self._idle.pop(0)
            if worker not in self._workers:
                continue
            if surplus > 0 or self._done:
                surplus -= 1
                self._send(worker, ("stop",))
                worker.told = True
                continue
            if time.monotonic() < self._claim_at:
                self._idle.insert(0, worker)
                return
            answer = self._search.claim()
            if isinstance(answer, Task):
                worker.trial = answer.number
                worker.heard = time.monotonic()
                self._send(worker, ("run", answer))
                continue
            self._done = answer == "done"
            self._idle.insert(0, worker)
            if not self._done:  # others run the last ones
                self._claim_at = time.monotonic() + _WAIT_SECONDS
                return

    def _bury(self, worker: _Worker) -> None:
        """A worker's process has ended."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        worker.connection.close()
        code = worker.process.exitcode
        if worker.trial is not None:
            self._search.finish(worker.trial, _STOPPED if worker.stopped else _death(code))
        if not worker.ready and code:
            if code < 0 or code > 128:  # by a signal, the second where it was handled
                self._killed_starts += 1
            else:
                self._false_starts += 1
            failed = self._false_starts >= _STARTS or self._killed_starts >= _KILLED_STARTS
            if failed and self._error is None:
                self._error = StoreError(
                    "The workers' processes end before they begin (see above); a script that runs "
                    "a study must do so under `if __name__ == '__main__':`."
                )

    def _stop_all(self, stopping: Callable[[], int]) -> None:
        """Have all workers end: those with a trial are interrupted."""
        until = time.monotonic() + _EXIT_SECONDS
        for worker in self._workers:
            if worker.lost:
                worker.process.kill()
            elif worker.trial is not None or not worker.ready:
                worker.process.terminate()
            elif not worker.told:
                self._send(worker, ("stop",))
        while self._workers and stopping() < 2 and time.monotonic() < until:
            ready = wait([worker.connection for worker in self._workers], _TICK_SECONDS)
            for worker in [worker for worker in self._workers if worker.connection in ready]:
                self._hear(worker)
                if worker in self._idle:
                    self._idle.remove(worker)
                    self._send(worker, ("stop",))
            self._search.beat()


_CONTEXT = multiprocessing.get_context("spawn")
_VERBS = {"prune": "prune", "attr": "set_attr", "constrain": "constrain"}


_STOPPED = Ended(
    "FAIL", why="interrupted", status="KILLED", reason="It had not ended when its search did."
)


def _death(code: int | None) -> Ended:
    """What becomes of the trial of a worker that ended with `code` and did not say how."""
    if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        reason = "Its process was stopped by SIGTERM."
        return Ended("FAIL", why="interrupted", status="KILLED", reason=reason)
    if code is not None and code < 0:
        reason = f"Its process was killed by {signal.Signals(-code).name}."
    else:
        reason = f"Its process ended with exit code {code}."
    return Ended("FAIL", why="died", status="FAILED", reason=reason)


# -- the worker's side -----------------------------------------------------------------------------


class Pipe:
    """A worker's way to the search."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.gone = False
        """Whether the search is dead."""
        self._shielded = True  # until the first trial is asked for
        self._interrupted: str | None = None

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM: it waits while an answer does, and from a trial's end on."""
        self._interrupted = signal.Signals(number).name
        if not self._shielded:
            raise KeyboardInterrupt(self._interrupted)

    def unshield(self) -> None:
        """From here on SIGTERM interrupts, also one that came before."""
        self._shielded = False
        if self._interrupted is not None:
            raise KeyboardInterrupt(self._interrupted)

    def send(self, *message: Any) -> None:
        """Say something; nothing where nobody hears it."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            self.gone = True

    def receive(self) -> Any:
        """What the search says; `("stop",)` where it is dead."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self.gone = True
            return ("stop",)

    def _ask(self, *message: Any) -> Any:
        self._shielded = True  # an answer that nobody took would be the next one's
        try:
            self.send(*message)
            kind, *answer = self.receive()
        finally:
            if message[0] != "finish":
                self._shielded = False
        if message[0] != "finish":
            self.unshield()
        if kind == "ok":
            return answer[0]
        if kind == "mistake":
            raise ArgumentError(answer[0])
        if kind == "error":
            raise TrackerError(answer[0])
        raise TrialLostError(answer[0] if answer else "The search that the trial belongs to ended.")

    def suggest(self, number: int, name: str, distribution: BaseDistribution) -> Any:
        """The value of a hyperparameter."""
        return self._ask("suggest", number, name, distribution_to_json(distribution))

    def report(self, number: int, value: float, step: int) -> None:
        """Tell an intermediate value; nothing is waited for."""
        self.send("report", number, value, step)

    def prune(self, number: int) -> str | None:
        """Why the trial is to be pruned, None where it is not."""
        reason: str | None = self._ask("prune", number)
        return reason

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """Set an attribute of the user's."""
        self._ask("attr", number, name, value)

    def constrain(self, number: int, name: str, value: float) -> None:
        """Set a constraint."""
        self._ask("constrain", number, name, value)

    def finish(self, number: int, ended: Ended) -> Verdict:
        """Tell how the trial ended."""
        try:
            verdict: Verdict = self._ask("finish", number, ended)
        except TrialLostError:
            return Verdict(accepted=False, again=True)
        return verdict


def work(connection: Connection, spec: Spec) -> None:
    """Run trials until told to stop: the main function of a worker."""
    import torch

    from tracker.delivery.base import leave_all, open_delivery
    from tracker.search.trial import run_trial

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search says what is to end
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    pipe = Pipe(connection)
    signal.signal(signal.SIGTERM, pipe.interrupt)
    torch.set_num_threads(spec.threads)
    threading.Thread(target=_show_life, args=(pipe,), name="alive", daemon=True).start()
    code, delivery = 0, None
    try:
        delivery = open_delivery(spec.tracking.directory, spec.tracking_uri, spec.mode)
        while True:
            pipe.unshield()
            pipe.send("next")
            kind, *task = pipe.receive()
            if kind != "run":
                break
            run_trial(task[0], spec.objective, pipe, delivery, spec.tracking, spec.environment)
    except KeyboardInterrupt:
        code = 128 + signal.SIGTERM
    except TrackerError as error:
        pipe.send("mistake", str(error))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave_all()
        if delivery is not None and spec.mode == "inline":
            delivery.close()
    sys.exit(code)


def _show_life(pipe: Pipe) -> None:
    """Say that we live; end the trial when nobody hears it."""
    while not pipe.gone:
        pipe.send("alive")
        time.sleep(_ALIVE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
