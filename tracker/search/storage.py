"""Optuna's storages, with a lock for a whole study and retries during outages.

docs/studies.md lists their URLs.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError as UrlError
from sqlalchemy.exc import InterfaceError, OperationalError, PendingRollbackError, SQLAlchemyError

from tracker.errors import ArgumentError, StoreError, first_line
from tracker.extras import install
from tracker.locks import Lock
from tracker.logs import muted
from tracker.redaction import public_uri
from tracker.store.uri import is_local, local_path, resolve

DEFAULT = "journal:///studies.journal"
LOCK_SECONDS = 10.0
"""How long to wait for a lock. It is held for milliseconds, or by a process that was suspended."""
PATIENCE_SECONDS = 600.0
"""How long to wait for a storage that does not answer."""
_PAUSE_SECONDS = 0.1  # before the next try; doubled up to 2 s
_OPTUNA_LOCK_SECONDS = 30.0  # after which Optuna takes a lock file for a dead process's

_OUTAGES = (OperationalError, InterfaceError, PendingRollbackError, OSError)
_FAILURES = (OSError, SQLAlchemyError, StorageInternalError, RuntimeError, ValueError, ImportError)

T = TypeVar("T")

# Each side notices in seconds that the other machine has disappeared; TCP alone takes hours.
_POSTGRES: dict[str, Any] = {
    "connect_timeout": 5,
    "tcp_user_timeout": 20_000,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
}

logger = logging.getLogger(__name__)


def default_url(tracking_uri: str | None) -> str:
    """Return the URL of the storage of a study that names none.

    It is `DEFAULT`, in this folder. Only in the temporary folder to which `mlflow run` fetches a
    repository it is beside the tracking store, if that is a local file, else a warning says where.

    Args:
        tracking_uri: The MLflow store; None is MLflow's own.
    """
    here = Path(DEFAULT.removeprefix("journal:///")).absolute()
    temporary = Path(tempfile.gettempdir()).resolve()
    if "MLFLOW_RUN_ID" not in os.environ or temporary not in here.resolve().parents:
        return DEFAULT
    project = temporary / here.resolve().relative_to(temporary).parts[0]
    uri = resolve(tracking_uri)
    if is_local(uri) and project not in (beside := local_path(uri).resolve()).parents:
        return f"journal:///{beside.with_name(here.name)}"
    logger.warning(
        "The study is stored in %s, a temporary folder of mlflow run; storage=URL keeps it.", here
    )
    return DEFAULT


def parse(url: str | None) -> tuple[str, str, Path | None]:
    """Split the URL of a storage; None is the default storage.

    Returns:
        The URL, its kind ("journal", "sqlite" or "postgresql") and its file, if it is one.

    Raises:
        ArgumentError: There is no such kind of storage, or the URL has no file.
    """
    url = url or DEFAULT
    scheme, separator, rest = str(url).partition("://")
    kind = scheme.partition("+")[0]
    kind = "postgresql" if kind == "postgres" else kind
    if not separator or kind not in ("sqlite", "journal", "postgresql"):
        raise ArgumentError(
            f"storage={public_uri(str(url))!r} is not supported; allowed are journal:///FILE, "
            "sqlite:///FILE and postgresql://USER@HOST/DATABASE."
        )
    if kind == "postgresql":
        return url, kind, None
    name = rest.removeprefix("/")
    if name in ("", ":memory:") or not rest.startswith("/"):
        raise ArgumentError(
            f"storage={url!r} does not name a file; it must be {kind}:///FILE, or "
            f"{kind}:////PATH for an absolute path."
        )
    return url, kind, Path(name).absolute()


class LockedError(StoreError):
    """Another process has held a lock of the storage for LOCK_SECONDS; it may be suspended."""


class Storage:
    """One of Optuna's storages (`optuna`), with a lock and retries during outages."""

    def __init__(self, url: str | None = None, *, make: bool = True) -> None:
        """Open a storage.

        Args:
            url: journal:///FILE, sqlite:///FILE or postgresql://…; by default `DEFAULT`.
            make: Whether to create a missing file.

        Raises:
            ArgumentError: The URL is not allowed.
            StoreError: The storage cannot be opened.
        """
        self.url, self.kind, self._file = parse(url)
        self._connection: Any = None
        self._locks: dict[str, _FileLock | _AdvisoryLock] = {}
        self._is_owner = False
        self._is_given_up = False
        if not make and self._file is not None and not self._file.exists():
            raise StoreError(f"storage={self.url!r} does not exist.")
        try:
            if self._file is not None:
                _check_content(self._file, self.kind)
                self._file.parent.mkdir(parents=True, exist_ok=True)
            with self.lock(), quiet():
                self.optuna = self._open()
        except ModuleNotFoundError as error:
            needs = f"needs the package {error.name}; {install('postgresql')}"
            raise StoreError(f"storage={public_uri(self.url)!r} {needs}") from error
        except _FAILURES as error:
            raise self._error("cannot be opened", error) from error

    def _open(self) -> BaseStorage:
        if self.kind == "journal":
            file = str(self._file)
            return JournalStorage(JournalFileBackend(file, lock_obj=_JournalLock(file)))
        url = f"sqlite:///{self._file}"
        engine: dict[str, Any] = {"connect_args": {"timeout": 60}}
        if self.kind == "postgresql":
            url = self._sqlalchemy_url()
            engine = {"pool_pre_ping": True, "connect_args": dict(_POSTGRES)}
        return get_storage(RDBStorage(url, engine_kwargs=engine))

    def _sqlalchemy_url(self) -> str:
        try:
            url = make_url(self.url)
        except UrlError as error:
            raise ValueError(str(error)) from error
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        return url.render_as_string(hide_password=False)

    def _error(self, what: str, error: BaseException) -> StoreError:
        cause = error.__cause__ or error
        return StoreError(f"storage={public_uri(self.url)!r} {what}: {first_line(cause)}.")

    def own(self) -> None:
        """Reserve an SQLite file for this process until `disown`; a no-op for other storages.

        Two searches on one SQLite file could claim the same trial.

        Raises:
            StoreError: Another process has reserved it.
        """
        if self.kind != "sqlite" or self._is_owner:
            return
        self._is_owner = self._lock("search").take(timeout=0)
        if not self._is_owner:
            raise StoreError(
                f"storage={self.url!r} is in use by another search, and SQLite allows one at a "
                "time; use journal:///FILE or postgresql://… for several."
            )

    def disown(self) -> None:
        """Release an SQLite file."""
        if self._is_owner:
            self._is_owner = False
            self._lock("search").release()

    @contextmanager
    def lock(self, name: str = "tracker") -> Iterator[None]:
        """Hold a lock of this storage. It is released if its holder dies.

        Args:
            name: Locks of different names are independent.

        Raises:
            LockedError: Another process does not release it; `patiently` tries again.
        """
        lock = self._lock(name)
        if not lock.take(timeout=LOCK_SECONDS):
            raise LockedError(f"storage={public_uri(self.url)!r} is locked by another process.")
        try:
            yield
        finally:
            lock.release()

    def study_lock(self, key: str) -> AbstractContextManager[None]:
        """Hold the lock under which trials of a study are claimed; a file has one for all."""
        return self.lock("tracker" if self._file is not None else f"study {key}")

    def _lock(self, name: str) -> _FileLock | _AdvisoryLock:
        if name not in self._locks:
            if self._file is None:
                self._locks[name] = _AdvisoryLock(self._connect, name)
            else:
                # Not FILE.lock, which is Optuna's.
                self._locks[name] = _FileLock(Path(f"{self._file}.{name}.lock"))
        return self._locks[name]

    def _connect(self) -> Any:
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
        """Close connections and release locks."""
        self.disown()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        backend = getattr(self.optuna, "_backend", None)
        if isinstance(backend, RDBStorage):
            backend.remove_session()
            backend.engine.dispose()

    def unreachable(self, error: BaseException) -> bool:
        """Whether `error` means that the storage cannot be used now, but may be later."""
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        return isinstance(cause, (LockedError, *_OUTAGES)) and not _is_permanent(error)

    def patiently(
        self, do: Callable[[], T], stop: Callable[[], bool] = bool, patience: float | None = None
    ) -> T:
        """Call `do`, again while the storage does not answer, and return its result.

        Args:
            do: May be called several times.
            stop: Returns whether to stop trying early.
            patience: How long to try, in seconds; by default PATIENCE_SECONDS. After one wait in
                vain, as at the end of the study, each call tries only once.

        Raises:
            StoreError: The storage did not answer, or cannot be written.
        """
        patience = PATIENCE_SECONDS if patience is None else patience
        until, pause, is_warned = time.monotonic() + patience, _PAUSE_SECONDS, False
        while True:
            try:
                return do()
            except Exception as error:
                if _is_permanent(error):
                    raise self._error("cannot be written", error) from error
                if not self.unreachable(error):
                    raise
                if self._is_given_up or time.monotonic() > until or stop():
                    self._is_given_up |= patience > 0
                    raise self._error("does not answer", error) from error
                if not is_warned and time.monotonic() > until - patience + 2.0:
                    is_warned = True
                    logger.warning("The storage does not answer; the study waits for it.")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)


def _is_permanent(error: BaseException) -> bool:
    """Whether this process is not allowed to write to the storage."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if isinstance(cause, OperationalError):
        return "readonly database" in str(cause)
    return isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


class _FileLock(Lock):
    """A lock beside the storage's file; OSError, as for an outage, if it cannot be taken."""

    def take(self, timeout: float = 0) -> bool:
        try:
            return super().take(timeout)
        except StoreError as error:
            raise error.__cause__ or FileNotFoundError(str(error)) from error


class _AdvisoryLock:
    """A lock of a PostgreSQL database, with the methods of `Lock`."""

    def __init__(self, connect: Callable[[], Any], name: str) -> None:
        digest = hashlib.sha256(f"tracker{name}".encode()).digest()
        self._number = int.from_bytes(digest[:8], "big", signed=True)
        self._connect = connect
        self._connection: Any = None

    def take(self, timeout: float = 0) -> bool:
        self._connection = self._connect()
        return _polled(lambda: self._query("SELECT pg_try_advisory_lock(%s)"), timeout)

    def release(self) -> None:
        try:
            self._query("SELECT pg_advisory_unlock(%s)")
        except ConnectionError as error:
            logger.debug("The lock ended with its connection: %s", error)

    def _query(self, query: str) -> bool:
        import psycopg

        try:
            return bool(self._connection.execute(query, [self._number]).fetchone()[0])
        except psycopg.Error as error:
            raise ConnectionError(str(error)) from error


class _JournalLock(BaseJournalFileLock):
    """Locks a journal by the kernel, and by Optuna's lock file against plain Optuna.

    Optuna's lock file outlives a killed process by half a minute. One of ours is recognised by its
    target, and removed by the next process that has the kernel's lock. That is on the journal
    itself, as in earlier versions; `Lock` would truncate it.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        folder, name = os.path.split(file)
        self._link, self._target = f"{file}.lock", os.path.join(folder, ".", name)
        self._descriptor: int | None = None
        self._is_linked = False

    def acquire(self) -> bool:
        """Take the lock, and cut off what a dead process has half written.

        It does not wait forever for a suspended holder: an append is whole even without the lock.
        """
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if _polled(lambda: _flock(descriptor), LOCK_SECONDS):
                self._take_link()
                _cut_half_line(descriptor)
        except BaseException:
            self._release_link()
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def _take_link(self) -> None:
        with suppress(OSError):
            if os.readlink(self._link) == self._target:
                os.unlink(self._link)
        if not _polled(self._has_linked, _OPTUNA_LOCK_SECONDS):
            with suppress(FileNotFoundError):  # it has just been released
                os.unlink(self._link)
            self._has_linked()

    def _has_linked(self) -> bool:
        try:
            os.symlink(self._target, self._link)
        except FileExistsError:
            return False
        self._is_linked = True
        return True

    def _release_link(self) -> None:
        if self._is_linked:
            self._is_linked = False
            with suppress(FileNotFoundError):
                os.unlink(self._link)

    def release(self) -> None:
        """Release the lock."""
        self._release_link()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _polled(take: Callable[[], bool], timeout: float) -> bool:
    until, pause = time.monotonic() + timeout, 0.0005
    while not take():
        if time.monotonic() > until:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return True


def _check_content(path: Path, kind: str) -> None:
    """Raise ValueError for another program's file: its end could be cut off as half a line."""
    first = b'{"op_code":' if kind == "journal" else b"SQLite format 3\0"
    if path.exists():
        with path.open("rb") as file:
            head = file.read(len(first))
        if not first.startswith(head):
            raise ValueError(f"it is not a {kind} file of Optuna.")


def _cut_half_line(descriptor: int) -> None:
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return
    newline = -1
    while end > 0 and newline < 0:
        start = max(0, end - (1 << 20))
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        end = start + newline + 1
    os.ftruncate(descriptor, end)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's messages about new studies and experimental features."""
    with muted("optuna", logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
