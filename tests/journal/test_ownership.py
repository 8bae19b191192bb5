"""Who writes and who delivers a journal is known, whatever has become of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import tracker
from tracker.errors import StoreError
from tracker.journal.ownership import BEAT_SECONDS, LOST_SECONDS, Lock, Writer, writer_lives
from tracker.journal.writer import JournalWriter

PROJECT = Path(tracker.__file__).parents[1]

WRITES = """
import sys
from pathlib import Path
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
writer.append("a", "begin", {})
writer.flush()
"""
TELL = """
print(writer.folder, flush=True)
sys.stdin.read()
"""


@contextmanager
def training(directory: Path, code: str = WRITES + TELL) -> Iterator[subprocess.Popen[str]]:
    """A process that has a journal in `directory`, and lives until it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def folder_of(process: subprocess.Popen[str]) -> Path:
    """The journal that a process tells of."""
    assert process.stdout
    return Path(process.stdout.readline().strip())


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A journal that its process, this one, has given up."""
    writer = JournalWriter(tmp_path)
    writer.close()
    return writer.folder


def elsewhere(folder: Path) -> None:
    """Have a journal be that of another host."""
    replace(Writer.of(folder), host="elsewhere.example").save(folder)


def silent_for(folder: Path, seconds: float) -> None:
    """Have its writer touched its lock that long ago."""
    at = time.time() - seconds
    os.utime(folder / "writer.lock", (at, at))


# -- on this host --------------------------------------------------------------------------------


def test_a_process_lives_until_it_is_killed(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        folder = folder_of(process)
        assert (Writer.of(folder).pid, Writer.of(folder).host) == (process.pid, os.uname().nodename)
        assert writer_lives(folder)
        assert writer_lives(folder)  # looking changes nothing
        process.kill()
        process.wait()
    assert not writer_lives(folder)


def test_this_process_lives_until_it_closes_its_journal(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    assert writer_lives(writer.folder)

    writer.close()

    assert not writer_lives(writer.folder)


FORK = """
import os

ready, told = os.pipe()
child = os.fork()
if child == 0:
    os.write(told, b"x")
    sys.stdin.read()  # lives on, whatever becomes of its parent
    os._exit(0)
os.read(ready, 1)
"""
WORKER = """
import multiprocessing

def work(ready, hold):
    ready.set()
    hold.wait()

context = multiprocessing.get_context("fork")  # as the workers of a DataLoader
ready, hold = context.Event(), context.Event()
worker = context.Process(target=work, args=(ready, hold))
worker.start()
ready.wait()
child = worker.pid
"""
PROGRAM = """
import subprocess

child = subprocess.Popen([sys.executable, "-c", "input()"], close_fds=False).pid
"""


@pytest.mark.parametrize("child", [FORK, WORKER, PROGRAM], ids=["fork", "worker", "program"])
def test_a_child_that_lives_on_does_not_keep_its_parent_s_journal_alive(
    tmp_path: Path, child: str
) -> None:
    with training(tmp_path, WRITES + child + "print(child, flush=True)\n" + TELL) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        folder = folder_of(process)
        assert writer_lives(folder)
        process.kill()
        os.waitpid(process.pid, 0)
        try:
            os.kill(pid, 0)  # it does live
            assert not writer_lives(folder)
        finally:
            os.kill(pid, 9)


def test_who_else_has_the_pid_makes_no_difference(tmp_path: Path, closed: Path) -> None:
    """`closed` names this process, which lives; the other one a process that does not."""
    with training(tmp_path / "other") as process:
        folder = folder_of(process)
        replace(Writer.of(folder), pid=2**22 + 1).save(folder)
        assert writer_lives(folder)
    assert Writer.of(closed).pid == os.getpid()
    assert not writer_lives(closed)


def test_a_lock_is_held_by_one_at_a_time_in_one_process_or_two(closed: Path) -> None:
    one, other = Lock(closed, "delivery"), Lock(closed, "delivery")
    assert one.take()
    assert not other.take()
    holds = "import sys; from pathlib import Path; from tracker.journal.ownership import Lock; "
    holds += "sys.exit(Lock(Path(sys.argv[1]), 'delivery').take())"
    there = [sys.executable, "-c", holds, str(closed)]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    assert subprocess.run(there, env=env, check=False).returncode == 0

    one.release()

    assert subprocess.run(there, env=env, check=False).returncode == 1  # and died with it
    assert other.take()
    assert not one.take()
    other.release()
    other.release()


def test_who_writes_and_who_delivers_are_apart(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    lock = Lock(writer.folder, "delivery")

    assert lock.take()

    lock.release()
    writer.close()


# -- on another host -----------------------------------------------------------------------------


def test_a_writer_of_another_host_is_gone_once_it_was_silent_for_long(closed: Path) -> None:
    """Its lock may not be seen here."""
    elsewhere(closed)
    for seconds, lives in (
        (0.0, True),
        (LOST_SECONDS - 60, True),
        (LOST_SECONDS + 60, False),
        (LOST_SECONDS * 100, False),
        (-3600, True),  # its clock is another
    ):
        silent_for(closed, seconds)
        assert writer_lives(closed) is lives
        assert writer_lives(closed) is lives  # asking is no sign of life
    assert sorted(path.name for path in closed.iterdir()) == [
        *("files", "journal.sqlite", "writer.json", "writer.lock"),
    ]


def test_a_lock_that_is_seen_says_more_than_silence(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    elsewhere(writer.folder)
    silent_for(writer.folder, LOST_SECONDS * 100)

    assert writer_lives(writer.folder)

    writer.close()
    silent_for(writer.folder, LOST_SECONDS * 100)
    assert not writer_lives(writer.folder)


def test_a_writer_shows_that_it_lives_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.journal.writer.BEAT_SECONDS", 0.0)
    writer = JournalWriter(tmp_path)
    lock = writer.folder / "writer.lock"
    for _ in range(2):
        silent_for(writer.folder, 1000)
        then = lock.stat().st_mtime
        while lock.stat().st_mtime == then:
            assert writer.flush(60)
        assert abs(lock.stat().st_mtime - time.time()) < 500
    writer.close()
    assert BEAT_SECONDS * 10 < LOST_SECONDS


def test_a_writer_shows_no_life_after_its_folder_was_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.journal.writer.BEAT_SECONDS", 0.0)
    writer = JournalWriter(tmp_path)
    writer.folder.rename(tmp_path / "away")
    for _ in range(3):
        assert writer.flush(60)
    writer.close()
    assert not writer.folder.exists()


# -- who it is -----------------------------------------------------------------------------------


def test_a_writer_is_read_back(closed: Path) -> None:
    there = Writer.of(closed)
    assert there.host == Writer.this_process().host
    assert there.pid == os.getpid()
    assert 0 <= Writer.this_process().started - there.started < 600_000


@pytest.mark.parametrize(
    "content",
    [
        *(
            None,
            b"",
            b"garbage",
            b"[]",
            b"null",
            b'"text"',
            b"{}",
            b'{"host": "x"}',
            b"\xff\xfe\xff",
        ),
        json.dumps({"host": "x", "pid": 1, "started": 2, "more": 3}).encode(),
        b"[" * 100_000,
    ],
    ids=lambda content: str(content)[:20],
)
@pytest.mark.parametrize("asks", [Writer.of, writer_lives])
def test_a_folder_that_does_not_say_whose_it_is_is_no_journal(
    closed: Path, content: bytes | None, asks: Callable[[Path], object]
) -> None:
    (closed / "writer.json").unlink()
    if content is not None:
        (closed / "writer.json").write_bytes(content)

    with pytest.raises(StoreError, match=r"^\S+ is not a journal of this program\.$"):
        asks(closed)


def test_asking_about_a_folder_that_is_no_journal_leaves_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        writer_lives(tmp_path)
    assert list(tmp_path.iterdir()) == []
