"""Files that are not journals, journals that may not be written, and hostile records."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import Store
from tests.journal.helpers import (
    BEGIN,
    PROJECT,
    Output,
    Recorder,
    left_behind,
    one_sentence,
    said,
    snapshot,
    steps_of,
)
from tracker.cli import main
from tracker.journal.damage import DAMAGED
from tracker.journal.ownership import Writer
from tracker.journal.reader import Journal
from tracker.journal.writer import JournalWriter

# -- foreign ------------------------------------------------------------------------------------


def foreign_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE records (x)")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "database": foreign_database,
    "text": lambda path: path.write_text("a note"),
    "empty": lambda path: path.touch(),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "folder": lambda path: path.mkdir(),
    "dangling": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("with_writer", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_and_stays(
    name: str, with_writer: bool, neighbours: Path, capsys: Output
) -> None:
    folder = neighbours / "other"
    folder.mkdir()
    FOREIGN[name](folder / "journal.sqlite")
    if with_writer:
        Writer("elsewhere", 1, 2).save(folder)
        Writer.this_process().save(folder)
    before = snapshot(folder)

    code = main(["sync", str(folder)])

    assert code == 2
    assert said(capsys) == [f"tracker: {folder} is not a tracker journal."]
    assert main(["status", str(folder)]) in (0, 2)
    assert f"{folder} is not a tracker journal." in said(capsys)[-1]
    after = snapshot(folder)
    assert {file: after[file] for file in before} == before
    assert set(after) - set(before) <= {"writer.lock", "delivery.lock"}


def test_a_folder_without_journals_is_refused(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a note")
    for command in ("sync", "status"):
        assert main([command, "empty"]) == 2
        assert said(capsys) == ["tracker: empty is not a tracker journal."]
        assert main([command, "notes.txt"]) == 2
        assert said(capsys) == ["tracker: notes.txt is not a folder."]
        assert main([command, "nowhere"]) == 2
        assert said(capsys) == ["tracker: nowhere is not a folder."]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_journal_of_another_format_is_refused_and_stays(
    small: Path, neighbours: Path, capsys: Output
) -> None:
    folder = shutil.copytree(small, neighbours / "newer")
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute("PRAGMA user_version = 3")
    before = snapshot(folder)["journal.sqlite"]

    assert main(["sync", str(folder)]) == 2
    assert said(capsys) == [f"tracker: {folder} is a journal of format 3; this version reads 2."]
    assert main(["status", str(folder)]) == 0
    assert said(capsys) == [
        str(folder),
        f"  unreadable: {folder} is a journal of format 3; this version reads 2.",
    ]
    assert snapshot(folder)["journal.sqlite"] == before


def test_a_bad_journal_does_not_block_the_others(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    foreign = neighbours / "1"
    foreign.mkdir()
    foreign_database(foreign / "journal.sqlite")
    shutil.copytree(small, neighbours / "2")

    assert main(["sync", str(neighbours)]) == 2

    assert said(capsys) == [f"tracker: {foreign} is not a tracker journal."]
    assert steps_of(recorder.calls) == list(range(40))
    assert not (neighbours / "2").exists()


# -- not writable ----------------------------------------------------------------


def as_unprivileged(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command `tracker` without the right of root to ignore file modes."""
    command = [sys.executable, "-m", "tracker.cli", *arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("run by root, without setpriv to drop its rights")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", ["folder", "database", "locks", "unreadable"])
def test_a_journal_that_cannot_be_written_stays_until_it_can(
    what: str, store: Store, neighbours: Path
) -> None:
    folder = left_behind(neighbours, store.uri, points=2)
    places, mode = {
        "folder": ([folder], 0o555),
        "database": ([folder / "journal.sqlite"], 0o444),
        "locks": ([folder / "writer.lock"], 0o444),
        "unreadable": ([folder / "journal.sqlite", folder / "writer.json"], 0o000),
    }[what]
    before = snapshot(folder)["journal.sqlite"]
    modes = [place.stat().st_mode for place in places]
    for place in places:
        place.chmod(mode)
    try:
        synced = as_unprivileged("sync", str(folder))
        status = as_unprivileged("status", str(folder))
    finally:
        for place, before_ in zip(places, modes, strict=True):
            place.chmod(before_)

    assert synced.returncode == 2
    assert one_sentence(synced.stderr).startswith("tracker: ")
    assert str(folder) in synced.stderr
    assert status.returncode == 0
    assert status.stderr == ""
    assert status.stdout.splitlines()[0] == str(folder)
    assert snapshot(folder)["journal.sqlite"] == before
    assert store.runs() == []
    assert main(["sync", str(folder)]) == 0
    assert store.history(store.run(), "loss") == [(0, 1.0), (1, 0.5)]


# -- hostile -------------------------------------------------------------------------------------


def add(folder: Path, *records: tuple[Any, Any, Any, Any]) -> None:
    """Write rows (run, time, kind, body) to a journal; bodies other than text as JSON."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        for run, time, kind, body in records:
            text = body if isinstance(body, str | bytes) else json.dumps(body)
            db.execute(
                "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)",
                (run, time, kind, text),
            )


def hostile(directory: Path, uri: str, *records: tuple[Any, Any, Any, Any]) -> Path:
    """A journal with `records` between a valid beginning and a valid end."""
    writer = JournalWriter(directory)
    writer.append("a", BEGIN)
    writer.close()
    add(writer.folder, *records)
    add(
        writer.folder,
        ("a", 5, "metrics", {"metrics": [["loss", 0.5, 1, 5]]}),
        ("a", 6, "end", {"status": "FINISHED"}),
    )
    with closing(Journal(writer.folder)) as journal:
        journal.tracking_uri = uri
    return writer.folder


def file(staged: Any, folder: Any = None, kind: str = "file", **more: Any) -> tuple[Any, ...]:
    return ("a", 3, kind, {"staged": staged, "folder": folder, **more})


def test_a_record_reaches_only_the_journals_own_files(
    store: Store, neighbours: Path, tmp_path: Path, capsys: Output
) -> None:
    outside = tmp_path / "photos"
    strange = [
        *("../..", "../../photos", "../../photos/canary.txt", "/etc/passwd", str(outside)),
        *(str(outside / "canary.txt"), "", ".", "/", "files", "files/x", "journal.sqlite"),
        *("files/../../canary.txt", "files/x/../../writer.json", "files/x/../x/../../canary.txt"),
        *("files/x\0y/z", "files/" + "x" * 5000 + "/y", "files/deep/er/x"),
        *("files/link/canary.txt", "files/file/link", "files/tree/in", "files/pipe/pipe"),
    ]
    places = ["..", "../../x", "/tmp/x", "a/../..", "x\0y", "x" * 300]
    records = [
        *(file(staged) for staged in strange),
        *(file(staged, kind="model", name="model", step=1) for staged in strange),
        *(file(f"files/{number}/note.txt", place) for number, place in enumerate(places)),
        *(("a", 3, "delete", {"path": path}) for path in ("..", "../..", "/", "/etc/passwd", ".")),
    ]
    folder = hostile(neighbours, store.uri, *records, file("files/good/note.txt", "notes"))
    files = folder / "files"
    for name in ("file", "tree/in", "pipe", "deep/er", "x", "good", *map(str, range(len(places)))):
        (files / name).mkdir(parents=True)
        (files / name / "note.txt").write_text("a note")
    (files / "link").symlink_to(outside)
    (files / "file" / "link").symlink_to(outside / "canary.txt")
    (files / "tree" / "in" / "link").symlink_to(outside)
    (files / "deep" / "er" / "x").write_text("x")
    os.mkfifo(files / "pipe" / "pipe")

    assert main(["sync", str(folder)]) == 0

    notices = said(capsys)
    assert [notice for notice in notices if not notice.startswith("tracker: A record (")] == []
    assert len(notices) == len(records)
    run = store.run()
    assert store.artifacts(run) == {"notes/note.txt"}
    assert store.history(run, "loss") == [(1, 0.5)]
    assert run.info.status == "FINISHED"
    assert not folder.exists()


@pytest.mark.parametrize("content", [None, "", "garbage", "[1, 2]", "flavors: {"])
def test_a_folder_that_is_not_a_model_is_a_notice(
    content: str | None, store: Store, neighbours: Path, capsys: Output
) -> None:
    """A power cut can leave a file empty that was written just before."""
    model = file("files/x/model", kind="model", name="model", step=1)
    folder = hostile(neighbours, store.uri, model)
    (folder / "files" / "x" / "model").mkdir(parents=True)
    if content is not None:
        (folder / "files" / "x" / "model" / "MLmodel").write_text(content)

    assert main(["sync", str(folder)]) == 0

    assert "A record (model) is set aside in " in one_sentence(said(capsys)[-1])
    run = store.run()
    assert store.client.search_logged_models([run.info.experiment_id]) == []
    assert store.history(run, "loss") == [(1, 0.5)]


def test_a_link_in_place_of_the_files_is_not_followed(
    store: Store, neighbours: Path, tmp_path: Path, capsys: Output
) -> None:
    folder = hostile(neighbours, store.uri, file("files/photos/canary.txt"))
    (folder / "files").rmdir()
    (folder / "files").symlink_to(tmp_path)

    assert main(["sync", str(folder)]) == 0

    assert len(said(capsys)) == 1
    assert store.artifacts(store.run()) == set()
    assert not folder.exists()


INVALID: list[tuple[Any, str, Any]] = [
    *((3, kind, {}) for kind in ("begin", "metrics", "tags", "epoch", "file", "end", "nonsense")),
    *((3, "metrics", {"metrics": [[name, 1.0, 1, 1]]}) for name in ("", "../x", "\udc80")),
    (3, "tags", {"tags": {"../x": "x"}}),
    *((3, "end", {"status": status}) for status in ("DONE", ["FINISHED"])),
    *((3, "tags", body) for body in (1, None)),
    *((time, "tags", {"tags": {"x": "y"}}) for time in ("noon", 1e300, 2.5)),
    (3, "non\nsense" * 50, {}),
]


def test_each_invalid_record_is_a_notice_and_the_rest_is_delivered(
    store: Store, neighbours: Path, capsys: Output
) -> None:
    """`test_records.py` holds what is invalid; these must not stop the deliverer or the store."""
    folder = hostile(neighbours, store.uri, *(("a", *record) for record in INVALID))

    assert main(["sync", str(folder)]) == 0

    notices = said(capsys)
    assert [notice for notice in notices if not notice.startswith("tracker: A record (")] == []
    assert len(notices) == len(INVALID)
    assert max(map(len, notices)) < 600
    run = store.run()
    assert store.history(run, "loss") == [(1, 0.5)]
    assert run.info.status == "FINISHED"
    assert not folder.exists()


def test_each_body_that_is_not_json_is_a_notice_and_the_file_is_kept(
    store: Store, neighbours: Path, capsys: Output
) -> None:
    bodies = ["", "{", "garbage", b"\xff\xff", "[" * 100_000, "9" * 10_000, '{"x": 1}{']
    folder = hostile(neighbours, store.uri, *(("a", 3, "tags", body) for body in bodies))

    assert main(["sync", str(folder)]) == 0

    *notices, kept = said(capsys)
    assert len(notices) == len(bodies)
    assert all(line.startswith("tracker: A record (tags) is ") for line in notices)
    assert (folder / DAMAGED).exists()
    assert DAMAGED in kept
    run = store.run()
    assert store.history(run, "loss") == [(1, 0.5)]
    assert run.info.status == "FINISHED"


def test_each_run_without_a_beginning_is_a_notice(
    store: Store, neighbours: Path, capsys: Output
) -> None:
    metrics = {"metrics": [["loss", 9.0, 1, 1]]}
    folder = hostile(
        neighbours,
        store.uri,
        *((run, 3, "metrics", metrics) for run in ("b", "c", "b", "", b"\xff")),
        ("b", 3, "end", {"status": "FINISHED"}),
    )

    assert main(["sync", str(folder)]) == 0

    assert len(said(capsys)) == 4
    assert store.history(store.run(), "loss") == [(1, 0.5)]
