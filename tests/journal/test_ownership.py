"""Whether the writer of a journal is alive is known, however it ended."""

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
from tracker.delivery.leftovers import journals, sweep
from tracker.errors import StoreError
from tracker.journal import database
from tracker.journal.ownership import (
    BEAT_SECONDS,
    LOST_SECONDS,
    Writer,
    delivery_lock,
    writer_lives,
)
from tracker.journal.writer import JournalWriter

PROJECT = Path(tracker.__file__).parents[1]

WRITES = """
import sys
from pathlib import Path
from tracker.journal.records import Epoch
from tracker.journal.writer import JournalWriter

writer = JournalWriter(Path(sys.argv[1]))
writer.append("a", Epoch({}))
writer.flush()
"""
PRINTS_FOLDER = """
print(writer.folder, flush=True)
sys.stdin.read()
"""


@contextmanager
def training(
    directory: Path, code: str = WRITES + PRINTS_FOLDER
) -> Iterator[subprocess.Popen[str]]:
    """A process with a journal in `directory`, which lives until it is killed."""
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
    """The folder of the journal, which the process prints."""
    assert process.stdout
    return Path(process.stdout.readline().strip())


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A journal of this process, closed."""
    writer = JournalWriter(tmp_path)
    writer.close()
    return writer.folder


def move_to_another_host(folder: Path) -> None:
    """Let a journal name another host as its writer's."""
    replace(Writer.of(folder), host="elsewhere.example").save(folder)


def silence(folder: Path, seconds: float) -> None:
    """Let the writer have touched its lock `seconds` ago."""
    at = time.time() - seconds
    os.utime(folder / "writer.lock", (at, at))


# -- on this host --------------------------------------------------------------------------------


def test_a_writer_lives_until_it_is_killed(tmp_path: Path) -> None:
    with training(tmp_path) as process:
        folder = folder_of(process)
        assert (Writer.of(folder).pid, Writer.of(folder).host) == (process.pid, os.uname().nodename)
        assert writer_lives(folder)
        assert writer_lives(folder)  # asking changes nothing
        process.kill()
        process.wait()
    assert not writer_lives(folder)


def test_a_writer_is_alive_until_it_closes_its_journal_even_while_it_is_delivered(
    tmp_path: Path,
) -> None:
    writer = JournalWriter(tmp_path)
    with delivery_lock(writer.folder).hold() as delivering:
        assert delivering
        assert writer_lives(writer.folder)

        writer.close()

        assert not writer_lives(writer.folder)


FORK = """
import os

read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    os.write(write_end, b"x")
    sys.stdin.read()  # survives its parent
    os._exit(0)
os.read(read_end, 1)
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
def test_a_surviving_child_does_not_keep_its_parents_journal_alive(
    tmp_path: Path, child: str
) -> None:
    code = WRITES + child + "print(child, flush=True)\n" + PRINTS_FOLDER
    with training(tmp_path, code) as process:
        assert process.stdout
        pid = int(process.stdout.readline())
        folder = folder_of(process)
        assert writer_lives(folder)
        process.kill()
        os.waitpid(process.pid, 0)
        try:
            os.kill(pid, 0)  # the child is alive
            assert not writer_lives(folder)
        finally:
            os.kill(pid, 9)


def test_a_reused_pid_does_not_revive_a_dead_writer(tmp_path: Path, closed: Path) -> None:
    """`closed` names this process, which is alive; the other journal names one that is not."""
    with training(tmp_path / "other") as process:
        folder = folder_of(process)
        replace(Writer.of(folder), pid=2**22 + 1).save(folder)
        assert writer_lives(folder)
    assert Writer.of(closed).pid == os.getpid()
    assert not writer_lives(closed)


# -- on another host -----------------------------------------------------------------------------


def test_a_writer_on_another_host_is_dead_after_a_long_silence(closed: Path) -> None:
    """Its lock may be invisible here."""
    move_to_another_host(closed)
    for seconds, lives in (
        (0.0, True),
        (LOST_SECONDS - 60, True),
        (LOST_SECONDS + 60, False),
        (LOST_SECONDS * 100, False),
        (-3600, True),  # its clock is ahead
    ):
        silence(closed, seconds)
        assert writer_lives(closed) is lives
        assert writer_lives(closed) is lives  # asking is not a sign of life
    assert sorted(path.name for path in closed.iterdir()) == [
        *("files", "journal.sqlite", "writer.json", "writer.lock"),
    ]


def test_a_visible_lock_outweighs_a_long_silence(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    move_to_another_host(writer.folder)
    silence(writer.folder, LOST_SECONDS * 100)

    assert writer_lives(writer.folder)

    writer.close()
    silence(writer.folder, LOST_SECONDS * 100)
    assert not writer_lives(writer.folder)


def test_a_writer_touches_its_lock_periodically(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.journal.writer.BEAT_SECONDS", 0.0)
    writer = JournalWriter(tmp_path)
    lock = writer.folder / "writer.lock"
    for _ in range(2):
        silence(writer.folder, 1000)
        then = lock.stat().st_mtime
        while lock.stat().st_mtime == then:
            assert writer.flush(60)
        assert abs(lock.stat().st_mtime - time.time()) < 500
    writer.close()
    assert BEAT_SECONDS * 10 < LOST_SECONDS


def test_a_writer_whose_folder_was_moved_does_not_recreate_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.journal.writer.BEAT_SECONDS", 0.0)
    writer = JournalWriter(tmp_path)
    writer.folder.rename(tmp_path / "away")
    for _ in range(3):
        assert writer.flush(60)
    writer.close()
    assert not writer.folder.exists()


# -- writer.json ---------------------------------------------------------------------------------


def test_a_journal_names_its_writer(closed: Path) -> None:
    writer = Writer.of(closed)
    assert writer.host == Writer.this_process().host
    assert writer.pid == os.getpid()
    assert 0 <= Writer.this_process().started - writer.started < 600_000


@pytest.mark.parametrize(
    "content",
    [
        *(None, b"", b"garbage", b"[]", b"null", b'"text"', b"{}", b'{"host": "x"}'),
        b"\xff\xfe\xff",
        json.dumps({"host": "x", "pid": 1, "started": 2, "more": 3}).encode(),
        b"[" * 100_000,
    ],
    ids=lambda content: str(content)[:20],
)
@pytest.mark.parametrize("ask", [Writer.of, writer_lives])
def test_a_folder_that_does_not_name_a_writer_is_not_a_journal(
    closed: Path, content: bytes | None, ask: Callable[[Path], object]
) -> None:
    (closed / "writer.json").unlink()
    if content is not None:
        (closed / "writer.json").write_bytes(content)
    before = sorted(closed.iterdir())

    with pytest.raises(StoreError, match=r"^\S+ is not a tracker journal\.$"):
        ask(closed)
    assert sorted(closed.iterdir()) == before


@pytest.mark.parametrize(
    "step",
    ["tracker.journal.database.create", "tracker.journal.database.restrict", "pathlib.Path.rename"],
)
def test_a_journal_whose_process_was_killed_while_it_made_it_is_swept_away(
    step: str, tmp_path: Path
) -> None:
    dies = f"import os, pathlib, tracker.journal.database\n{step} = lambda *_: os._exit(9)\n"
    with training(tmp_path, dies + WRITES) as process:
        process.wait()
    (half_made,) = tmp_path.glob(".*")
    assert journals(tmp_path) == []

    sweep(tmp_path)
    assert not half_made.exists()


def test_a_journal_that_is_being_made_is_not_swept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "restrict", lambda _: sweep(tmp_path))
    writer = JournalWriter(tmp_path)
    writer.close()
    assert journals(tmp_path) == [writer.folder]
