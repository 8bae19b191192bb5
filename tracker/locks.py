"""Locks that the kernel releases when their holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

_FIRST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.05


class KernelLock:
    """An exclusive lock on a file, between processes and between instances in one process."""

    def __init__(self, path: Path) -> None:
        """Prepare a lock; `take` creates a missing file, and never changes its content."""
        self.path = path
        self._descriptor: int | None = None

    def take(self, timeout: float | None = 0.0) -> bool:
        """Take the lock.

        Args:
            timeout: How long to wait for another holder, in seconds; None for ever.

        Returns:
            Whether the lock is held now.

        Raises:
            OSError: The file cannot be opened for writing.
        """
        if self._descriptor is not None:
            return True
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        until = None if timeout is None else time.monotonic() + timeout
        pause = _FIRST_PAUSE
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._descriptor, descriptor = descriptor, -1
                    return True
                except BlockingIOError:
                    if until is not None and time.monotonic() >= until:
                        return False
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def release(self) -> None:
        """Release the lock, if it is held; it can be taken again."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> KernelLock:
        self.take(timeout=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
