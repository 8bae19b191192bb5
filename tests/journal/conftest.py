from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

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
