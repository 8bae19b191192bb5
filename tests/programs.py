"""Programs in separate processes, forked from one that has already imported the slow modules.

A fork takes milliseconds. Each program leads a process group, so that everything it started can be
waited for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
PATIENCE = 240.0
"""Seconds after which something that must happen counts as never happening."""

FORK_SERVER = """
import gc, json, os, signal, sys, tempfile
for module in sys.argv[1:]:
    __import__(module)
gc.collect()
gc.freeze()  # or each program would walk through all of this again, seconds long, when it ends
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        ended, code = os.waitpid(request["poll"], os.WNOHANG)
        answer = os.waitstatus_to_exitcode(code) if ended else None
    else:
        answer = os.fork()
        if answer == 0:
            break
    print(json.dumps(answer), flush=True)
else:
    sys.exit()
os.setpgid(0, 0)
os.chdir(request["folder"])
tempfile.tempdir = None  # each program has its own TMPDIR
for name in [name for name in os.environ if name.startswith(("MLFLOW_", "TRACKER_"))]:
    del os.environ[name]
os.environ.update(request["environment"])
flags = os.O_WRONLY | os.O_CREAT
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(os.open(request["files"] + "/stdout", flags), 1)
os.dup2(os.open(request["files"] + "/stderr", flags), 2)
# A test run started in the background inherits that these are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
sys.argv = request["arguments"]
main = sys.modules["__main__"]
main.__file__ = sys.argv[0]  # so that multiprocessing finds the program's functions
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), main.__dict__)
"""


class ForkServer:
    """A process that has imported `modules` and forks programs on request."""

    def __init__(self, *modules: str) -> None:
        self._started: list[int] = []
        self._asking = threading.Lock()
        self._files = tempfile.TemporaryDirectory(prefix="programs-")
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )

    def ask(self, request: dict[str, Any]) -> int | None:
        """Send one request; returns the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._asking:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        return None if answer is None else int(answer)

    def start(
        self, program: str, *arguments: str, folder: Path | None = None, **environment: str
    ) -> Program:
        """Start a program.

        Args:
            program: Its source text.
            arguments: Its command line.
            folder: Its current directory; by default this process's.
            environment: Variables in addition to the test's MLFLOW_* and TRACKER_*.
        """
        files = Path(tempfile.mkdtemp(dir=self._files.name))
        (files / "program.py").write_text(program)
        ours = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "TRACKER_"))}
        pid = self.ask(
            {
                "folder": str(folder or Path.cwd()),
                "files": str(files),
                "environment": ours | environment,
                "arguments": [str(files / "program.py"), *arguments],
            }
        )
        assert pid is not None
        self._started.append(pid)
        return Program(pid, self, files)

    def run(
        self, program: str, *arguments: str, folder: Path | None = None, **environment: str
    ) -> Program:
        """Run a program to its end."""
        running = self.start(program, *arguments, folder=folder, **environment)
        running.wait()
        return running

    def close(self) -> None:
        """End every program that still runs, then the server."""
        for pid in self._started:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.communicate(timeout=PATIENCE)
        self._files.cleanup()


class Program:
    """A program that a fork server started; it leads a process group."""

    def __init__(self, pid: int, server: ForkServer, files: Path) -> None:
        self.pid = pid
        self.code: int | None = None
        """The exit code, once it has ended."""
        self._server = server
        self._files = files

    def ended(self) -> bool:
        """Whether the program has ended."""
        if self.code is None:
            self.code = self._server.ask({"poll": self.pid})
        return self.code is not None

    def wait(self) -> int | None:
        """Wait for the program's end; returns its exit code."""
        wait_for(self.ended, f"the end of process {self.pid}", self.output)
        return self.code

    def all_ended(self) -> bool:
        """Whether the program and every process it started have ended."""
        return self.ended() and not process_group(self.pid)

    def wait_for_all(self) -> None:
        """Wait for the end of the program and of every process it started."""
        wait_for(self.all_ended, f"the end of process {self.pid} and its children", self.output)

    def children(self, command: str = "") -> list[psutil.Process]:
        """The living children of the program whose command line contains `command`."""
        return children_of(self.pid, command)

    def uploader(self) -> int | None:
        """The pid of a training's uploader, None while it has none."""
        return next((child.pid for child in self.children()), None)

    def kill_all(self) -> None:
        """Kill the program and every process it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait_for_all()

    @property
    def stdout(self) -> str:
        """What the program wrote to its standard output."""
        return (self._files / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        """What the program wrote to its standard error."""
        return (self._files / "stderr").read_text(errors="replace")

    def output(self) -> str:
        """What the program wrote to both streams."""
        return self.stdout + self.stderr


def children_of(pid: int, command: str = "") -> list[psutil.Process]:
    """The living children of a process whose command line contains `command`."""
    alive = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with suppress(psutil.NoSuchProcess):
                zombie = child.status() == psutil.STATUS_ZOMBIE
                if not zombie and command in " ".join(child.cmdline()):
                    alive.append(child)
    return alive


def process_group(leader: int) -> list[int]:
    """The living processes of a process group."""
    alive = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == leader and not _is_dead(process):
                alive.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return alive


def _is_dead(process: psutil.Process) -> bool:
    """Whether a process holds no locks any more; the threads of a zombie still do for a moment."""
    return bool(process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1)


def wait_for(
    condition: Callable[[], object], what: str, details: Callable[[], str] = lambda: ""
) -> None:
    """Wait until `condition` holds; fail with `what` and `details` if it never does."""
    until, pause = time.monotonic() + PATIENCE, 0.002
    while not condition():
        assert time.monotonic() < until, f"waited {PATIENCE:g} s for {what}: {details()[-3000:]}"
        time.sleep(pause)
        pause = min(1.1 * pause, 0.1)


def kill(pid: int | None, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may just have ended."""
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
