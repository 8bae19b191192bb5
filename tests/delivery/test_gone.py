"""A journal that was deleted is said to be lost, and no command is named that cannot work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.journal.helpers import left_behind, said
from tests.programs import ForkServer
from tracker import start_run
from tracker.cli import main
from tracker.delivery.background import BackgroundDelivery
from tracker.delivery.base import _close_all
from tracker.delivery.leftovers import journals
from tracker.errors import StoreError
from tracker.store.client import MlflowStore


def delete(what: str) -> Path:
    """Delete the only journal, or a part of it."""
    (folder,) = journals(Path(".tracker"))
    if what == "file":
        (folder / "journal.sqlite").unlink()
    else:
        shutil.rmtree(folder if what == "journal" else folder.parent)
    return folder


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("tracker")]


DELETED = pytest.mark.parametrize("what", ["journal", "file", "folder"])


@DELETED
def test_an_offline_run_whose_journal_is_deleted_is_said_to_be_lost(
    what: str, tracking_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    with start_run(offline=True) as run:
        run.log_metrics({"loss": 0.5}, 1)
        run.flush()
        delete(what)
        run.log_metrics({"loss": 0.25}, 2)
        if what != "file":
            run.log_text("text", "note.txt")
    _close_all(BackgroundDelivery.shut_down)
    assert not any("tracker sync" in message for message in messages(caplog))
    last = messages(caplog)[-1]
    assert "records lost: " in last
    assert last.endswith(" was deleted before the upload.")


@DELETED
def test_an_inline_run_whose_journal_is_deleted_while_its_store_is_away_is_lost(
    what: str, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreError("the store is away")

    with start_run() as run:
        monkeypatch.setattr(MlflowStore, "log_batch", away)
        run.log_metrics({"loss": 0.5}, 1)
        run.flush()
        delete(what)
    assert not any("tracker sync" in message for message in messages(caplog))
    assert messages(caplog)[-1].endswith(" was deleted before the upload.")


def test_what_is_uploaded_before_its_journal_is_deleted_is_not_lost(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with start_run() as run:
        run.log_metrics({"loss": 0.5}, 1)
        run.flush()
        delete("journal")
    assert store.run().info.status == "FINISHED"  # its file is open still
    assert messages(caplog) == []


def test_a_training_whose_journal_is_deleted_says_once_that_records_are_lost(
    store: Store, trainers: ForkServer, tmp_path: Path
) -> None:
    program = trainers.run(
        "import shutil\nfrom tracker import start_run\n"
        "with start_run() as run:\n"
        "    run.flush(200)\n"
        "    shutil.rmtree('.tracker')\n"
        "    run.log_metrics({'loss': 0.5}, 1)\n"
        "    while run.flush(200):  # its uploader has the file open, and notices it soon\n"
        "        run.log_metrics({'loss': 0.5}, 2)\n"
        "with start_run() as run:\n"
        "    run.log_metrics({'loss': 0.5}, 1)\n",
        TRACKER_INLINE="0",
    )
    assert program.code == 0, program.output()
    assert program.stderr.count("and all later ones, are lost; training continues.") == 1
    assert program.stderr.count("deleted before the upload.") == 1
    assert "tracker sync" not in program.stderr
    assert store.run().info.status == "RUNNING"


@pytest.mark.parametrize("command", ["sync", "status"])
def test_a_journal_that_is_gone_before_a_command_is_one_sentence(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = left_behind(tmp_path / "journals", "recorder:")
    (folder / "journal.sqlite").unlink()
    lost = f"{folder} has lost its journal.sqlite, and with it its records."
    assert main([command, str(folder)]) == (2 if command == "sync" else 0)
    assert lost in said(capsys)[-1]
    shutil.rmtree(folder)
    assert main([command, str(folder)]) == 2
    gone = f"tracker: {folder} is gone: its records are uploaded, or lost if it was deleted."
    assert said(capsys) == [gone]
