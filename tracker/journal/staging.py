"""Files that wait in a journal's folder for their delivery."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

from tracker.journal.writer import JournalWriter

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def stage(journal: JournalWriter, name: str, write: Callable[[Path], object]) -> Path | None:
    """Write a file or folder into a journal.

    Args:
        journal: The journal.
        name: Name of the file or folder.
        write: Writes to the path that it receives.

    Returns:
        Its path, or None if the disk failed: that is a warning, and training continues.

    Raises:
        OSError: It cannot be written for another reason.
    """
    path: Path | None = None
    try:
        path = journal.stage(name)
        write(path)
    except OSError as error:
        if path is not None:
            shutil.rmtree(path.parent, ignore_errors=True)
        if not _is_disk_error(error):
            raise
        journal.lose(name, error)
        return None
    return path


def _is_disk_error(error: OSError) -> bool:
    # shutil.copytree collects errors as text.
    text = str(error) if isinstance(error, shutil.Error) else ""
    return error.errno in _DISK_ERRORS or any(f"[Errno {code}]" in text for code in _DISK_ERRORS)
