"""Download a data set's archives, all or none, or a single file, within a bounded time.

torchvision's own download has no time limit, and leaves partial files behind when it fails.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PROBE_S = 2.0
"""Seconds within which a mirror must first answer."""
STALL_S = 10.0
"""Seconds without a byte after which a transfer is abandoned."""


class DownloadError(Exception):
    """The files could not be downloaded; the message is the reason, to embed in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Archives:
    """Where the archives of a data set are published."""

    mirrors: tuple[str, ...]
    """URLs that a file's name is appended to, tried in this order."""
    files: tuple[tuple[str, str], ...]
    """Name, which ends in `.gz`, and MD5 of each file."""


def download(archives: Archives, folder: Path, *, limit_s: float) -> None:
    """Download and unpack the files of a data set.

    Args:
        archives: The files and their mirrors.
        folder: Where the unpacked files go; other files in it are kept.
        limit_s: Seconds that this may take, roughly.

    Raises:
        DownloadError: A file could not be downloaded or written. The disk is as it was before.
    """
    deadline = time.monotonic() + limit_s
    mirrors = _check_answers(archives)
    absent = [path for path in folder.parents if not os.path.exists(path)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=folder.parent) as temporary:
            fetched = Path(temporary, folder.name)
            fetched.mkdir()
            _fetch_all(archives, mirrors, fetched, deadline)
            _move(fetched, folder)
    except OSError as error:
        raise DownloadError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        for path in absent:
            with suppress(OSError):
                path.rmdir()  # removes empty folders only, so nothing after a success


def download_file(url: str, path: Path, *, sha256: str, limit_s: float) -> None:
    """Download one file.

    Args:
        url: Its address.
        path: Where it goes; missing folders are created.
        sha256: The first hexadecimal digits of its SHA-256.
        limit_s: Seconds that this may take, roughly.

    Raises:
        DownloadError: The file could not be downloaded or written; `path` does not exist.
    """
    deadline = time.monotonic() + limit_s
    mirror, _, name = url.rpartition("/")
    _check_answers(Archives(mirrors=(f"{mirror}/",), files=((name, ""),)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=path.parent) as temporary:
            fetched = Path(temporary, name)
            _fetch(url, fetched, deadline)
            with fetched.open("rb") as file:
                if not hashlib.file_digest(file, "sha256").hexdigest().startswith(sha256):
                    raise DownloadError(f"{url} arrived damaged: its SHA-256 is not {sha256}...")
            fetched.replace(path)
    except OSError as error:
        raise DownloadError(f"{path} cannot be written: {error.strerror}") from error


def _check_answers(archives: Archives) -> list[str]:
    """The mirrors that answer for the first file within PROBE_S; DownloadError if none does."""
    failures = {url: f"{url} did not answer within {PROBE_S:g} s" for url in archives.mirrors}
    answers: list[str] = []

    def ask(mirror: str) -> None:
        try:
            with _open(mirror + archives.files[0][0], method="HEAD", timeout=PROBE_S):
                answers.append(mirror)
        except DownloadError as error:
            failures[mirror] = str(error)

    # Daemon threads, because a socket's timeout does not cover the name lookup.
    threads = [threading.Thread(target=ask, args=(url,), daemon=True) for url in archives.mirrors]
    deadline = time.monotonic() + PROBE_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    answered = [mirror for mirror in archives.mirrors if mirror in answers]
    if not answered:
        raise DownloadError("; ".join(failures.values()))
    return answered


def _fetch_all(archives: Archives, mirrors: list[str], into: Path, deadline: float) -> None:
    """Download and unpack every file from the first mirror that has them all."""
    from torchvision.datasets.utils import check_integrity, extract_archive  # takes seconds

    failures = []
    for mirror in mirrors:
        try:
            for name, md5 in archives.files:
                _fetch(mirror + name, into / name, deadline)
                if not check_integrity(into / name, md5):
                    raise DownloadError(f"{mirror}{name} arrived damaged: its MD5 is not {md5}")
                extract_archive(into / name, remove_finished=True)
        except DownloadError as error:
            failures.append(str(error))
        else:
            return
    raise DownloadError("; ".join(failures))


def _fetch(url: str, path: Path, deadline: float) -> None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise DownloadError(f"{url} did not arrive in time")
    with _open(url, timeout=min(left_s, STALL_S)) as response, path.open("wb") as file:
        # read1 waits for the socket once; read would wait for a slow trickle past the deadline.
        while chunk := response.read1(1 << 16):
            file.write(chunk)
            if time.monotonic() > deadline:
                raise DownloadError(f"{url} did not arrive in time")


@contextmanager
def _open(url: str, *, method: str = "GET", timeout: float) -> Iterator[HTTPResponse]:
    try:
        with urlopen(Request(url, method=method), timeout=timeout) as response:
            yield response
    except HTTPError as error:
        error.close()
        raise DownloadError(f"{url} answered {error.code} {error.reason}") from error
    except (OSError, HTTPException) as error:
        raise DownloadError(f"{url}: {getattr(error, 'reason', error)}") from error


def _move(fetched: Path, folder: Path) -> None:
    try:
        fetched.replace(folder)  # atomic: other processes never see part of the files
    except OSError:  # the folder is not empty; another process may have been faster
        for path in sorted(fetched.iterdir()):
            os.replace(path, folder / path.name)
