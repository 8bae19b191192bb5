"""A lock between processes that the kernel releases when its holder dies, however it dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tracker.errors import StoreError


class Lock:
    """An exclusive lock on a file, held until it is released or its holder dies.

    All threads that share a `Lock` share its hold; to exclude other threads, give each its own.
    """

    def __init__(self, path: Path) -> None:
        """Create a lock that is not held; the file is created when it is first taken."""
        self.path = path
        # Never a soft lock, which would outlive its holder.
        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False)

    def take(self, timeout: float = 0) -> bool:
        """Take the lock, or return False if another holds it for `timeout` seconds.

        Raises:
            StoreError: The folder of the lock does not exist or cannot be written.
        """
        if not self.path.parent.is_dir():  # filelock would create it
            raise StoreError(f"{self.path.parent} is not a folder.")
        try:
            self._lock.acquire(timeout=timeout)
        except Timeout:
            return False
        except OSError as error:
            raise StoreError(f"{self.path.parent} cannot be written: {error.strerror}.") from error
        return True

    def release(self) -> None:
        """Release the lock; it may be taken again."""
        self._lock.release()

    @contextmanager
    def hold(self, timeout: float = 0) -> Iterator[bool]:
        """Hold the lock during a block; yield whether it could be taken within `timeout` seconds.

        Raises:
            StoreError: The folder of the lock does not exist or cannot be written.
        """
        taken = self.take(timeout)
        try:
            yield taken
        finally:
            if taken:
                self.release()

    def touch(self) -> None:
        """Set the file's time to now, as a sign of life for hosts that cannot see the lock."""
        os.utime(self.path)
