"""A journal is readable by its owner alone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.journal.helpers import BEGIN
from tracker import start_run
from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.base import _close_all
from tracker.delivery.leftovers import journals
from tracker.journal.ownership import delivery_lock
from tracker.journal.reader import Journal
from tracker.journal.records import Entry, Tags
from tracker.journal.refused import set_aside
from tracker.journal.writer import JournalWriter


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    """The files of a journal that other users may read or write; not those that are staged."""
    paths = [folder, *folder.iterdir()]
    return [path.name for path in paths if path.stat().st_mode & 0o077]


def test_the_files_of_a_journal_are_private_whatever_the_umask(
    umask: int, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no memory")

    monkeypatch.setattr(subprocess, "Popen", broken)
    monkeypatch.setenv("TRACKER_EXIT_TIMEOUT", "0")
    with start_run(inline=False) as run:
        run.log_text("text", "note.txt")
        (folder,) = journals(Path(".tracker"))
        while not (folder / "uploader.log").exists():
            run.flush(0.05)
        with closing(Journal(folder)):
            names = {path.name for path in folder.iterdir()}
            assert {"journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm"} <= names
            assert {"writer.json", "writer.lock", "uploader.log", "files"} <= names
            assert open_to_others(folder) == []
    _close_all(BackgroundDelivery.leave)


def test_an_offline_journal_and_its_refused_records_are_private(
    umask: int, tracking_uri: str
) -> None:
    with start_run(offline=True):
        (folder,) = journals(Path(".tracker"))
        with delivery_lock(folder).hold(), closing(Journal(folder)) as journal:
            assert {"offline", "delivery.lock"} <= {path.name for path in folder.iterdir()}
            assert open_to_others(folder) == []
            refused = set_aside(journal, Entry(1, "a", 1, Tags({"a": "b"})), "no")
            assert refused is not None
            assert open_to_others(refused) == []
    _close_all(BackgroundDelivery.leave)


def test_a_journal_of_an_older_version_is_private_once_it_is_opened(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "made")
    writer.append("a", BEGIN)
    writer.flush()
    folder = shutil.copytree(writer.folder, tmp_path / "old")
    writer.close()
    outside = tmp_path / "outside.txt"
    outside.touch(mode=0o644)
    (folder / "link").symlink_to(outside)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with closing(Journal(folder)) as journal:
        journal.bind("a", "0123")
        assert open_to_others(folder) == ["link"]
    assert outside.stat().st_mode & 0o777 == 0o644
