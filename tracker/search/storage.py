"""Where a study lies: Optuna's storages, with a lock of the whole study and errors of an outage.

| URL | for |
|---|---|
| `journal:///FILE` | any number of workers on this machine; the default |
| `sqlite:///FILE` | one search at a time, with any number of workers |
| `postgresql://…` | several machines |
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError, SQLAlchemyError

from tracker.errors import ArgumentError, StoreError
from tracker.redaction import public_uri

DEFAULT = "journal:///studies.journal"
LOCK_SECONDS = 10.0
"""A lock is held for milliseconds; longer only by a process that was stopped."""

T = TypeVar("T")

# A machine that goes away is noticed in seconds on either side, not in the hours of TCP's own.
_KEEPALIVE: dict[str, Any] = {"keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5}
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": 20_000,
    "keepalives_count": 3,
    **_KEEPALIVE,
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
}

logger = logging.getLogger(__name__)


def parse(url: str | None) -> tuple[str, str, Path | None]:
    """The URL, its kind and its file, if it has one; ArgumentError where it is none of ours."""
    url = url or DEFAULT
    scheme, separator, rest = url.partition("://")
    kind = scheme.partition("+")[0]
    kind = "postgresql" if kind == "postgres" else kind
    if not separator or kind not in ("sqlite", "journal", "postgresql"):
        raise ArgumentError(
            f"storage={public_uri(url)!r} is not known; allowed are journal:///FILE, "
            "sqlite:///FILE and postgresql://USER@HOST/DATABASE."
        )
    if kind == "postgresql":
        return url, kind, None
    name = rest.removeprefix("/")
    if name in ("", ":memory:") or not rest.startswith("/"):
        raise ArgumentError(
            f"storage={url!r} names no file; it must be {kind}:///FILE, or {kind}:////PATH for an "
            "absolute one."
        )
    return url, kind, Path(name).absolute()


class Storage:
    """One of Optuna's storages, and what it lacks: a lock, and patience with an outage."""

    def __init__(self, url: str | None = None, *, make: bool = True) -> None:
        """Open the storage at `url`, by default `DEFAULT`; StoreError where it cannot be.

        A file that is not there is made, unless `make` says no.
        """
        self.url, self.kind, self._file = parse(url)
        self._connection: Any = None
        if not make and self._file is not None and not self._file.exists():
            raise StoreError(f"storage={self.url!r} does not exist.")
        self._locks: dict[str, FileLock] = {}
        self._owner: FileLock | None = None
        try:
            if self._file is not None:
                _check_file(self._file, self.kind)
                self._file.parent.mkdir(parents=True, exist_ok=True)
            with self.lock(), quiet():
                self.optuna = self._open()
        except (OSError, SQLAlchemyError, RuntimeError, ValueError, ImportError) as error:
            raise StoreError(
                f"storage={public_uri(self.url)!r} cannot be opened: {_first_line(error)}"
            ) from error

    def _open(self) -> BaseStorage:
        if self.kind == "journal":
            file = str(self._file)
            return JournalStorage(JournalFileBackend(file, lock_obj=_KernelLock(file)))
        if self.kind == "sqlite":
            backend = RDBStorage(
                f"sqlite:///{self._file}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
        else:
            backend = RDBStorage(
                self._sqlalchemy_url(),
                engine_kwargs={"pool_pre_ping": True, "connect_args": dict(_POSTGRES)},
            )
        return get_storage(backend)

    def _sqlalchemy_url(self) -> str:
        try:
            url = make_url(self.url)
        except UrlError as error:
            raise ValueError(str(error)) from error
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        return url.render_as_string(hide_password=False)

    def own(self) -> None:
        """Take a SQLite file for this process alone, as long as it lives.

        Two processes that take trials from one SQLite file take the same ones. StoreError where
        another has it. The other storages are for any number.
        """
        if self.kind != "sqlite" or self._owner is not None:
            return
        self._owner = FileLock(f"{self._file}.search.lock", fallback_to_soft=False)
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            self._owner = None
            raise StoreError(
                f"storage={self.url!r} is in use by another search, and SQLite takes one at a "
                "time; use journal:///FILE or postgresql://… for several."
            ) from None

    def disown(self) -> None:
        """Give a SQLite file back."""
        if self._owner is not None:
            self._owner.release()
            self._owner = None

    @contextmanager
    def lock(self, name: str = "") -> Iterator[bool]:
        """Nobody else holds this lock of the storage meanwhile; its holder's death releases it.

        A holder that is stopped, and holds it for LOCK_SECONDS, is not waited for: who depends on
        the lock looks whether it is held, or afterwards whether it took longer, see `Search.claim`.
        A lock of another `name` is another lock.
        """
        if self._file is not None:
            lock = self._file_lock(name)
            with suppress(Timeout):
                lock.acquire(timeout=LOCK_SECONDS)
            try:
                yield lock.is_locked
            finally:
                lock.release()
            return
        connection = self._connected()
        until, pause = time.monotonic() + LOCK_SECONDS, 0.001
        while not (held := self._asked(connection, "SELECT pg_try_advisory_lock(%s)", name)):
            if time.monotonic() > until:
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        try:
            yield held
        finally:
            try:
                self._asked(connection, "SELECT pg_advisory_unlock(%s)", name)
            except ConnectionError as error:
                logger.debug("The lock went with its connection: %s", error)

    def _file_lock(self, name: str) -> FileLock:
        if name not in self._locks:
            file = f"{self._file}.{name}.lock" if name else f"{self._file}.lock"
            self._locks[name] = FileLock(file, fallback_to_soft=False)
        return self._locks[name]

    def _asked(self, connection: Any, query: str, name: str) -> bool:
        import psycopg

        digest = hashlib.sha256(f"tracker{name}".encode()).digest()
        number = int.from_bytes(digest[:8], "big", signed=True)
        try:
            return bool(connection.execute(query, [number]).fetchone()[0])
        except psycopg.Error as error:
            raise ConnectionError(str(error)) from error

    def _connected(self) -> Any:
        import psycopg

        if self._connection is None or self._connection.closed:
            url = make_url(self.url).set(drivername="postgresql")
            try:
                self._connection = psycopg.connect(
                    url.render_as_string(hide_password=False), autocommit=True, **_POSTGRES
                )
            except psycopg.Error as error:
                raise ConnectionError(str(error)) from error
        return self._connection

    def close(self) -> None:
        """Let go of connections and locks."""
        self.disown()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        backend = getattr(self.optuna, "_backend", None)
        if isinstance(backend, RDBStorage):
            backend.remove_session()
            backend.engine.dispose()

    def unreachable(self, error: BaseException) -> bool:
        """Whether `error` says that the storage does not answer now, and may later."""
        if _is_for_good(error):
            return False
        if isinstance(error, StorageInternalError):
            return isinstance(
                error.__cause__, (OperationalError, InterfaceError, PendingRollbackError)
            )
        return isinstance(error, (OperationalError, InterfaceError, OSError))

    def patiently(
        self, do: Callable[[], T], stop: Callable[[], bool] = lambda: False, patience: float = 600.0
    ) -> T:
        """What `do` returns, tried again while the storage does not answer.

        Raises StoreError after `patience` seconds, or when `stop` says so.
        """
        until, pause, warned = time.monotonic() + patience, 0.1, False
        while True:
            try:
                return do()
            except Exception as error:
                if _is_for_good(error):
                    raise self._refusal(error) from error
                if not self.unreachable(error):
                    raise
                if time.monotonic() > until or stop():
                    raise StoreError(
                        f"storage={public_uri(self.url)!r} does not answer: {_first_line(error)}"
                    ) from error
                if not warned and time.monotonic() > until - patience + 2.0:
                    warned = True
                    logger.warning("The storage does not answer; the study waits for it.")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _refusal(self, error: BaseException) -> StoreError:
        return StoreError(
            f"storage={public_uri(self.url)!r} cannot be written: {_first_line(error)}"
        )

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Make what the storage raises a StoreError, in one sentence."""
        try:
            yield
        except (OSError, SQLAlchemyError, StorageInternalError) as error:
            raise self._refusal(error) from error


def _is_for_good(error: BaseException) -> bool:
    """Whether it will be the same later: this process may not write there."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, OperationalError):
        return "readonly database" in str(cause)
    return isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


class _KernelLock(BaseJournalFileLock):
    """Optuna's own locks stay for 30 s where their holder died, and are then taken by force."""

    def __init__(self, file: str) -> None:
        self._path = file
        self._held: int | None = None

    def acquire(self) -> bool:
        """Wait for the lock; what a dead process wrote half of is cut off.

        A holder that was stopped is not waited for for ever: an append is whole without a lock too.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _locked(descriptor):
                _cut_half_line(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._held = descriptor
        return True

    def release(self) -> None:
        """Give it back."""
        held, self._held = self._held, None
        if held is not None:
            os.close(held)


def _locked(descriptor: int) -> bool:
    until, pause = time.monotonic() + LOCK_SECONDS, 0.0005
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _check_file(path: Path, kind: str) -> None:
    """Raise ValueError for a file of something else: what looks like half a line would be cut."""
    first = b'{"op_code":' if kind == "journal" else b"SQLite format 3\0"
    if path.exists():
        with path.open("rb") as file:
            head = file.read(len(first))
        if not first.startswith(head):
            raise ValueError(f"it is no {kind} file of Optuna's.")


def _cut_half_line(descriptor: int) -> None:
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return
    while end > 0:
        start = max(0, end - (1 << 20))
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        end = start + newline + 1
        if newline >= 0:
            break
    os.ftruncate(descriptor, end)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna tells of each study it makes, and warns of what is experimental."""
    logs = logging.getLogger("optuna")
    level = logs.level
    logs.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        logs.setLevel(level)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return public_uri(next(iter(str(cause).strip().splitlines()), type(cause).__name__))
