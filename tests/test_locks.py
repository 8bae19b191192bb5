"""A lock excludes other processes, and dies with its holder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tracker
from tracker.errors import StoreError
from tracker.locks import Lock

PROJECT = Path(tracker.__file__).parents[1]

TAKES = """
import sys
from pathlib import Path
from tracker.locks import Lock

sys.exit(Lock(Path(sys.argv[1])).take())  # and dies holding it
"""


def another_process_takes(path: Path) -> bool:
    command = [sys.executable, "-c", TAKES, str(path)]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, env=env, check=False).returncode == 1


def test_a_lock_is_held_once_in_one_process_or_two(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    one, other = Lock(path), Lock(path)
    assert one.take()
    assert not other.take()
    assert not other.take(timeout=0.05)
    assert not another_process_takes(path)

    one.release()

    assert another_process_takes(path)
    assert other.take()
    assert not one.take()
    other.release()
    other.release()


def test_hold_yields_whether_the_lock_was_taken(tmp_path: Path) -> None:
    one, other = Lock(tmp_path / "x.lock"), Lock(tmp_path / "x.lock")
    with one.hold() as taken:
        assert taken
        with other.hold() as taken_too:
            assert not taken_too
        assert not other.take()  # still held
    with pytest.raises(ZeroDivisionError), one.hold():
        raise ZeroDivisionError
    assert other.take()
    other.release()


def test_a_lock_in_a_folder_that_does_not_exist_creates_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^\S+nowhere is not a folder\.$"):
        Lock(tmp_path / "nowhere" / "x.lock").take()
    assert list(tmp_path.iterdir()) == []
