"""A real tracking server on loopback, and a proxy in front of it that misbehaves on request.

Used by `bench.outage` and by the tests of outages. Both are context managers that end what they
start, and listen on 127.0.0.1 only.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tests.programs import wait_for

Behaviour = Literal["pass", "refuse", "hang", "error", "slow", "lose"]

HOST = "127.0.0.1"
SLOW_SECONDS = 0.5
_HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "expect")


def free_port() -> int:
    """Return a port that no process listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class TrackingServer:
    """`mlflow server` with one worker and proxied artifacts; a restart keeps its port and data."""

    def __init__(self, folder: Path, backend: Literal["sqlite", "file"] = "sqlite") -> None:
        """Keep the server's data and log in `folder`, which is created if necessary."""
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.uri = f"http://{HOST}:{self.port}"
        self.log = folder / "server.log"
        store = f"sqlite:///{folder / 'mlflow.db'}"
        if backend == "file":
            store = (folder / "mlruns").absolute().as_uri()
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", HOST, "--port", str(self.port), "--backend-store-uri", store),
            *("--artifacts-destination", str(folder / "artifacts")),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        own = {
            "MLFLOW_ALLOW_FILE_STORE": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else eight more processes
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env={k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | own,
                start_new_session=True,  # so that its worker ends with it
            )
        try:
            wait_for(self._answers, "the server's first answer")
        except BaseException:
            self.kill()
            raise

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"The server has ended:\n{self.log.read_text(errors='replace')}")
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self) -> None:
        """Stop the server as an administrator would."""
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        """Stop the server as a power cut would."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> TrackingServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


class FaultyProxy:
    """An HTTP proxy on a fixed port whose behaviour can change at any moment.

    pass: the server behind it answers every request; without a server, requests are dropped.
    refuse: connections are refused.
    hang: requests are accepted and never answered.
    error: every request is answered with 503.
    slow: as pass, SLOW_SECONDS later.
    lose: a request that changes something is carried out, but its answer is dropped; the same
        request is answered the second time.

    Changing the behaviour drops the requests in flight, as restarting a server does.
    """

    def __init__(self, behind: int | None = None, behaviour: Behaviour = "pass") -> None:
        """Forward to the port `behind`; None if there is no server yet."""
        self.behind = behind
        self.met: Counter[str] = Counter()
        """Number of requests by the behaviour that they met."""
        self.answered = 0
        """Number of requests that got the server's answer."""
        self.lost: list[str] = []
        """`METHOD path` of each request whose answer was lost."""
        self._lost: set[bytes] = set()
        self._changes = 0
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._behaviour: Behaviour = "refuse"
        self._socket = self._bound(0)
        self.port = int(self._socket.getsockname()[1])
        self.uri = f"http://{HOST}:{self.port}"
        self.behave(behaviour)

    @property
    def behaviour(self) -> Behaviour:
        """What the proxy does with a request."""
        return self._behaviour

    def behave(self, behaviour: Behaviour) -> None:
        """Change the behaviour; once this returns, no request is answered in the former way."""
        with self._changed:
            before, self._behaviour = self._behaviour, behaviour
            self._changes += 1
            self._changed.notify_all()
        if behaviour == "refuse" and before != "refuse":
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
            self._socket.close()
            self._socket = self._bound(self.port)  # still bound, but not listening
        elif behaviour != "refuse" and before == "refuse":
            self._socket.listen(128)
            self._start(self._accept, self._socket)

    @staticmethod
    def _bound(port: int) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((HOST, port))
        return made

    def _start(self, work: Callable[..., None], *given: Any) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=work, args=given, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the socket was closed
            while True:
                connection, address = listener.accept()
                self._start(self._talk, connection, address)

    def _talk(self, connection: socket.socket, address: Any) -> None:
        connection.settimeout(60)
        with connection, suppress(OSError):  # the client went away
            _Conversation(connection, address, self)  # type: ignore[arg-type]

    def serve(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes | None:
        """Return the answer to a request, None to drop it."""
        with self._changed:
            how, change = self._behaviour, self._changes
            self.met[how] += 1
            if how in ("hang", "slow"):
                patience = SLOW_SECONDS if how == "slow" else None
                if self._changed.wait_for(lambda: self._changes != change, patience):
                    return None
        if how == "error":
            return b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
        answer = None if self.behind is None else _forward(self.behind, method, path, headers, body)
        with self._changed:
            if answer is None or self._changes != change:
                return None
            if how == "lose" and _changes_something(method, path):
                request = hashlib.sha256(f"{method} {path}\n".encode() + body).digest()
                if request not in self._lost:
                    self._lost.add(request)
                    self.lost.append(f"{method} {path}")
                    return None
            self.answered += 1
        return answer

    def close(self) -> None:
        """Stop listening, and drop the requests in flight."""
        self.behave("refuse")
        self._socket.close()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Conversation(http.server.BaseHTTPRequestHandler):
    """Answers one request as the proxy says."""

    protocol_version = "HTTP/1.1"
    server: Any

    def _serve(self) -> None:
        self.close_connection = True
        answer = self.server.serve(self.command, self.path, dict(self.headers), self._body())
        if answer is not None:
            self.wfile.write(answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args: object) -> None:
        pass


def _changes_something(method: str, path: str) -> bool:
    return method not in ("GET", "HEAD") and not path.partition("?")[0].endswith("/search")


def _forward(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes
) -> bytes | None:
    """Return the answer of the server on `port`, None if it does not answer."""
    passed = {k: v for k, v in headers.items() if k.lower() not in _HOP_BY_HOP}
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request(method, path, body, passed | {"Connection": "close"})
        answer = connection.getresponse()
        content = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}"]
    lines += [f"{k}: {v}" for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP]
    lines += [f"Content-Length: {len(content)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1") + content
