"""The main function of a worker process."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from tracker.errors import ArgumentError, TrackerError
from tracker.search.channel import Channel, TrialLostError, Verdict
from tracker.search.executors.base import TrialSpec
from tracker.search.policy import packed

_ALIVE_SECONDS = 1.0  # between two signs of life


class PipeChannel(Channel):
    """A worker's connection to the search. SIGTERM never separates a request from its answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self.is_closed = False
        """Whether the search has ended."""
        self._is_shielded = True  # until the first trial is asked for
        self._interrupted_by: str | None = None

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: at once in an objective, later during a request or between trials."""
        self._interrupted_by = signal.Signals(number).name
        if not self._is_shielded:
            raise KeyboardInterrupt(self._interrupted_by)

    def unshield(self) -> None:
        """Let SIGTERM raise KeyboardInterrupt from here on, including an earlier one."""
        self._is_shielded = False
        if self._interrupted_by is not None:
            raise KeyboardInterrupt(self._interrupted_by)

    def send(self, *message: Any) -> None:
        """Send a message, if the search is still alive."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            self.is_closed = True

    def receive(self) -> Any:
        """Return the search's next message; `("stop",)` if it has ended."""
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            self.is_closed = True
            return ("stop",)

    def request(self, verb: str, *arguments: Any) -> Any:
        """Send a request and return the answer; reports are not answered."""
        if verb == "report":
            self.send(verb, *arguments)
            return None
        self._is_shielded = True
        try:
            self.send(verb, *arguments)
            kind, *answer = self.receive()
        finally:
            self._is_shielded = verb == "finish"
        if verb != "finish":
            self.unshield()
        if kind == "ok":
            return answer[0]
        if kind == "mistake":
            raise ArgumentError(answer[0])
        if kind == "error":
            raise TrackerError(answer[0])
        if verb == "finish":
            return Verdict(accepted=False, retry=True)
        raise TrialLostError(answer[0] if answer else "The search of the trial has ended.")


def work(
    connection: Connection, spec: TrialSpec, threads: int, environment: Mapping[str, str]
) -> None:
    """Run trials until told to stop: the main function of a worker.

    Args:
        connection: This worker's end of the pipe.
        spec: What the trials share; the search sends their objective on request.
        threads: How many threads torch may use.
        environment: The environment variables of the search's process.
    """
    os.environ.clear()  # those of the server that forked this process may be older
    os.environ.update(environment)
    import torch

    from tracker.delivery.base import leave_all, open_delivery
    from tracker.search.trial import run_trial

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the search decides what ends
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    channel = PipeChannel(connection)
    signal.signal(signal.SIGTERM, channel.interrupt)
    torch.set_num_threads(threads)
    threading.Thread(target=_send_life_signs, args=(channel,), name="alive", daemon=True).start()
    code, delivery = 0, None
    try:
        delivery = open_delivery(spec.directory, spec.tracking_uri, spec.mode)
        whole = _with_objective(spec, channel)
        while whole is not None:
            channel.unshield()
            channel.send("next")
            kind, *task = channel.receive()
            if kind != "run":
                break
            if (error := run_trial(task[0], whole, channel, delivery)) is not None:
                channel.send("raised", *packed(error))
                break
    except KeyboardInterrupt:
        code = 128 + signal.SIGTERM
    except TrackerError as error:
        channel.send("raised", *packed(error))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        leave_all()
        if delivery is not None and spec.mode == "inline":
            delivery.close()
    sys.exit(code)


def _with_objective(spec: TrialSpec, channel: PipeChannel) -> TrialSpec | None:
    """Return `spec` with its objective; None if that cannot be loaded, or the search has ended."""
    for by_value in (False, True):
        channel.send("objective", by_value)
        kind, *content = channel.receive()
        if kind != "objective":
            return None
        try:
            objective, catch = pickle.loads(content[0])
            return replace(spec, objective=objective, catch=catch)
        except Exception as error:  # noqa: BLE001 - of the user's modules
            # A script that defines it under `if __name__ == "__main__":` does not do so here.
            if by_value or not isinstance(error, AttributeError):
                channel.send("raised", *packed(error))
                return None
    return None


def _send_life_signs(channel: PipeChannel) -> None:
    """Show that this process is alive, and end its trial when the search has died."""
    while not channel.is_closed:
        channel.send("alive")
        time.sleep(_ALIVE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
