from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.journal.helpers import Recorder, left_behind, snapshot
from tracker.journal.reader import Journal
from tracker.journal.writer import JournalWriter


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[JournalWriter]:
    writer = JournalWriter(tmp_path / "journals")
    yield writer
    writer.close()


@pytest.fixture
def journal(writer: JournalWriter) -> Iterator[Journal]:
    with closing(Journal(writer.folder)) as journal:
        yield journal


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr("tracker.store.client.MlflowStore", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "fails_at", 0)
    return Recorder


@pytest.fixture
def neighbours(tmp_path: Path) -> Iterator[Path]:
    """A folder for journals, next to files that must not change."""
    for name in ("canary.txt", "journals/canary.txt", "photos/canary.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("alive")
    before = snapshot(tmp_path)
    yield tmp_path / "journals"
    after = snapshot(tmp_path)
    assert {name: after.get(name) for name in before} == before


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of 83 records on a dozen pages, to be copied."""
    return left_behind(tmp_path_factory.mktemp("small"), "recorder:")
