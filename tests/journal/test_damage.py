"""Journals that are cut off, corrupt, foreign, locked away or hostile, and disks that are full.

Of each what can be saved is saved, once; the rest is one sentence.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import tracker
from tests.helpers import Store
from tracker.cli import main
from tracker.errors import StoreError
from tracker.journal.ownership import Writer
from tracker.journal.reader import DAMAGED, Journal
from tracker.journal.records import Begin, End, Epoch, Params, Point
from tracker.journal.writer import JournalWriter

PROJECT = Path(tracker.__file__).parents[1]

BEGIN = Begin("Default", None, None, {"tracker.run": "a"})


class Recorder:
    """A store that takes everything and remembers it; `fails_at` counts down to a failure."""

    fails_at = 0

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri or "recorder:"

    calls: list[tuple[str, Any]] = []  # noqa: RUF012 - one store, opened again and again

    def mend(self, run_ids: Any) -> None:
        """Nothing is ever half-written here."""

    def _called(self, name: str, what: Any = None) -> None:
        Recorder.fails_at -= 1
        if Recorder.fails_at == 0:
            raise StoreError("the store is away")
        self.calls.append((name, what))

    def experiment_id(self, name: str, by_id: str | None) -> str:
        return "0"

    def find_run(self, key: str, experiment_id: str | None = None) -> str | None:
        return f"id of {key}" if ("begin", key) in self.calls else None

    def begin_run(self, *, tags: Mapping[str, str], in_doubt: bool, **_: Any) -> str:
        key = tags["tracker.run"]
        if not (in_doubt and self.find_run(key)):
            self._called("begin", key)
        return f"id of {key}"

    def run_name(self, run_id: str) -> str:
        return "fox"

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        in_doubt: bool = False,
    ) -> None:
        if params:
            self._called("params", params)
        for point in metrics:
            if not (in_doubt and ("metric", point) in self.calls):
                self._called("metric", point)
        for name in tags or {}:
            self._called("tag", name)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self._called("text", name)

    def end_run(self, run_id: str, status: str, end_time: int) -> None:
        self._called("end", status)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr("tracker.store.client.MlflowStore", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(Recorder, "fails_at", 0)
    return Recorder


def left_behind(directory: Path, uri: str, points: int = 40) -> Path:
    """The journal of a process that has ended, a record a point, with nothing delivered."""
    writer = JournalWriter(directory)
    writer.append("a", BEGIN)
    writer.append("a", Params({"lr": "0.1"}))
    for step in range(points):
        writer.append_points("a", [Point("loss", 1.0 / (1 + step), step, 1_000 + step)])
        writer.append("a", Epoch({"step": step, "text": f"epoch-{step:04d}" * 30}))
    writer.append("a", End("FINISHED"))
    writer.close()
    with closing(Journal(writer.folder)) as journal:
        journal.tracking_uri = uri
    return writer.folder


def add(folder: Path, *records: tuple[Any, Any, Any, Any]) -> None:
    """Write (run, time, kind, body) to a journal as anybody can; a body that is no text as JSON."""
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        for run, time, kind, body in records:
            text = body if isinstance(body, str | bytes) else json.dumps(body)
            db.execute(
                "INSERT INTO records (run, time, kind, body) VALUES (?, ?, ?, ?)",
                (run, time, kind, text),
            )


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """All that is in a folder: files by content, links by target."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


@pytest.fixture
def neighbours(tmp_path: Path) -> Iterator[Path]:
    """Files of others around the journals, which stay as they are."""
    for name in ("canary.txt", "journals/canary.txt", "photos/canary.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("alive")
    before = snapshot(tmp_path)
    yield tmp_path / "journals"
    after = snapshot(tmp_path)
    assert {name: after.get(name) for name in before} == before


def one_sentence(text: str) -> str:
    """The only line of a text."""
    (line,) = text.splitlines()
    assert "Traceback" not in line
    return line


Output = pytest.CaptureFixture[str]


def said(capsys: Output) -> list[str]:
    """The lines that were printed since, none of a traceback; what was delivered left out."""
    captured = capsys.readouterr()
    lines = [*captured.out.splitlines(), *captured.err.splitlines()]
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if not line.startswith("delivered: ")]


# -- cut off and corrupt -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal of 83 records on a dozen pages, to be copied."""
    return left_behind(tmp_path_factory.mktemp("small"), "recorder:")


def damaged(small: Path, into: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy of a journal with its database changed."""
    folder = shutil.copytree(small, into)
    content = bytearray((folder / "journal.sqlite").read_bytes())
    change(content)
    (folder / "journal.sqlite").write_bytes(content)
    return folder


def whole_before(content: bytes, cut: int) -> int:
    """How many epochs lie on pages before a cut, the first of them without a gap."""
    kept = content[: cut // 4096 * 4096]
    steps = [step for step in range(40) if b"epoch-%04d" % step in kept]
    return next((n for n, step in enumerate(steps) if n != step), len(steps))


def steps_of(calls: Sequence[tuple[str, Any]]) -> list[int]:
    return [what[2] for name, what in calls if name == "metric"]


def check_saved(folder: Path, recorder: type[Recorder], expected: int, capsys: Output) -> None:
    """That a damaged journal gives its first `expected` points, in order, and nothing twice."""
    before = snapshot(folder)
    assert main(["status", str(folder)]) == 0
    assert said(capsys)[0] == str(folder)

    code = main(["sync", str(folder), "--tracking-uri", "recorder:"])

    lines = said(capsys)
    steps = steps_of(recorder.calls)
    assert steps == sorted(set(steps))
    assert steps[:expected] == list(range(expected))
    if code == 2:
        assert "".join(lines).startswith(f"tracker: {folder} is not a journal of this program.")
        assert snapshot(folder)["journal.sqlite"] == before["journal.sqlite"]
    elif lines:
        assert lines[-1] == (
            f"tracker: {folder} was damaged; what could not be read is kept in {DAMAGED} there."
        )
        assert snapshot(folder)[DAMAGED] == before["journal.sqlite"]
    calls = list(recorder.calls)
    if folder.exists():
        assert main(["sync", str(folder), "--tracking-uri", "recorder:"]) == code
        said(capsys)
        assert recorder.calls == calls
    begun = [what for name, what in calls if name == "begin"]
    ended = [what for name, what in calls if name == "end"]
    assert len(begun) == len(ended) <= 1
    assert ended in ([], ["FAILED"], ["FINISHED"])


def test_a_journal_that_is_cut_off_anywhere_gives_what_was_before(
    small: Path, tmp_path: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    content = (small / "journal.sqlite").read_bytes()
    generator = random.Random(1)
    cuts = {*range(0, len(content) + 1, 512), *(generator.randrange(len(content)) for _ in "abc")}
    saved = []
    for cut in sorted(cuts):
        recorder.calls.clear()
        folder = damaged(
            small, neighbours / f"cut-{cut}", lambda c, cut=cut: c.__delitem__(slice(cut, None))
        )
        check_saved(folder, recorder, whole_before(content, cut), capsys)
        saved.append(len(steps_of(recorder.calls)))
    assert saved == sorted(saved)
    assert saved[-1] == 40
    assert len(set(saved)) > 5


@pytest.mark.parametrize("seed", range(15))
def test_a_journal_with_bytes_overwritten_gives_what_can_be_read(
    seed: int,
    small: Path,
    recorder: type[Recorder],
    neighbours: Path,
    capsys: Output,
) -> None:
    generator = random.Random(seed)

    def overwrite(content: bytearray) -> None:
        for _ in range(generator.choice([1, 5, 50])):
            start = generator.randrange(100, len(content) - 64)
            size = generator.choice([1, 16, 64])
            content[start : start + size] = generator.randbytes(size)

    folder = damaged(small, neighbours / "corrupt", overwrite)

    for command in ("status", "sync", "sync"):
        calls = list(recorder.calls)
        if folder.exists():
            more = [] if command == "status" else ["--tracking-uri", "recorder:"]
            assert main([command, str(folder), *more]) in (0, 2)
        lines = said(capsys)
        assert all(line.count("\n") == 0 for line in lines)
    assert recorder.calls == calls  # nothing the second time
    assert [name for name, _ in calls].count("begin") <= 1


def test_a_page_lost_in_the_middle_costs_what_was_on_it(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    content = (small / "journal.sqlite").read_bytes()
    page = content.rindex(b"epoch-0020") // 4096 * 4096
    lost = {step for step in range(40) if b"epoch-%04d" % step in content[page : page + 4096]}

    def overwrite(content: bytearray) -> None:
        content[page : page + 4096] = bytes(4096)

    folder = damaged(small, neighbours / "hole", overwrite)
    assert main(["sync", str(folder)]) == 0

    steps = steps_of(recorder.calls)
    assert 0 < len(lost) < 20
    assert set(range(40)) - set(steps) <= lost | {max(lost) + 1}  # the point is there, its row not
    assert steps == sorted(set(steps))
    assert ("end", "FINISHED") in recorder.calls


def test_letters_that_are_no_text_cost_no_other_record(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    def overwrite(content: bytearray) -> None:
        for name in (b"epoch-0003", b"epoch-0030"):
            at = content.rindex(name)
            content[at : at + 10] = b"\xff\xfe\xfd" * 3 + b"\x80"

    folder = damaged(small, neighbours / "letters", overwrite)
    assert main(["sync", str(folder)]) == 0
    assert steps_of(recorder.calls) == list(range(40))
    assert ("end", "FINISHED") in recorder.calls
    assert DAMAGED in said(capsys)[-1]


def test_a_journal_that_lost_where_it_goes_asks_for_it_and_what_it_delivered_is_not_sent_twice(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    folder = shutil.copytree(small, neighbours / "lost")
    recorder.fails_at = 20
    assert main(["sync", str(folder)]) == 2
    delivered = list(recorder.calls)
    assert len(delivered) == 19
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute("DELETE FROM progress")
        db.execute("UPDATE records SET body = '{' WHERE kind = 'params'")
    said(capsys)

    assert main(["sync", str(folder)]) == 2
    assert one_sentence("\n".join(said(capsys)[-1:])).endswith("give --tracking-uri.")
    assert main(["sync", str(folder), "--tracking-uri", "recorder:"]) == 0

    assert recorder.calls[:19] == delivered
    assert steps_of(recorder.calls) == list(range(40))
    assert recorder.calls.count(("begin", "a")) == 1


def test_what_is_added_to_a_repaired_journal_is_delivered_too(
    small: Path, recorder: type[Recorder], neighbours: Path
) -> None:
    """Its numbers go on behind those that were delivered and are gone."""
    folder = shutil.copytree(small, neighbours / "short")
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute("UPDATE progress SET delivered = 82, sending = 82")
        db.execute("INSERT INTO runs VALUES ('a', 'id of a')")
        db.execute("DELETE FROM records WHERE seq > 70")
        db.execute("UPDATE records SET body = '{' WHERE seq = 5")
    assert main(["sync", str(folder)]) == 0
    assert recorder.calls[-1] == ("end", "FAILED")


def test_the_log_of_a_killed_process_may_be_cut_off_too(
    recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    """What SQLite has not moved into the database yet lies in its log."""
    writer = JournalWriter(neighbours)
    writer.append("a", BEGIN)
    for step in range(40):
        writer.append_points("a", [Point("loss", 0.5, step, 1)])
        assert writer.flush(60)
    killed = shutil.copytree(writer.folder, neighbours / "killed")
    writer.close()
    shutil.rmtree(writer.folder)
    log = (killed / "journal.sqlite-wal").read_bytes()
    saved = []
    for number, cut in enumerate(range(0, len(log) + 1, len(log) // 16)):
        recorder.calls.clear()
        folder = shutil.copytree(killed, neighbours / f"cut-{number}")
        (folder / "journal.sqlite-wal").write_bytes(log[:cut])
        (folder / "journal.sqlite-shm").unlink(missing_ok=True)
        assert main(["sync", str(folder), "--tracking-uri", "recorder:"]) == 0
        steps = steps_of(recorder.calls)
        assert steps == list(range(len(steps)))
        saved.append(len(steps))
        assert said(capsys) == []
    assert saved == sorted(saved)
    assert saved[0] < 40 == saved[-1]


def test_a_cut_off_journal_arrives_in_a_real_store(
    store: Store, small: Path, neighbours: Path, capsys: Output
) -> None:
    content = (small / "journal.sqlite").read_bytes()
    cut = content.rindex(b"epoch-0020") // 4096 * 4096 + 1000
    folder = damaged(small, neighbours / "cut", lambda c: c.__delitem__(slice(cut, None)))

    for _ in range(2):
        assert main(["sync", str(folder), "--tracking-uri", store.uri]) == 0

    run = store.run()
    steps = [step for step, _ in store.history(run, "loss")]
    assert whole_before(content, cut) <= len(steps) < 40
    assert steps == list(range(len(steps)))
    assert run.info.status == "FAILED"
    assert "ended without saying how" in run.data.tags["tracker.failure"]
    assert run.data.params == {"lr": "0.1"}


# -- not ours ------------------------------------------------------------------------------------


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
def test_what_is_not_ours_is_said_to_be_and_stays(
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
    assert said(capsys) == [f"tracker: {folder} is not a journal of this program."]
    assert main(["status", str(folder)]) in (0, 2)
    assert f"{folder} is not a journal of this program." in said(capsys)[-1]
    after = snapshot(folder)
    assert {file: after[file] for file in before} == before
    assert set(after) - set(before) <= {"writer.lock", "delivery.lock"}


def test_a_folder_without_journals_is_said_to_be_none(tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("a note")
    for command in ("sync", "status"):
        assert main([command, "empty"]) == 2
        assert said(capsys) == ["tracker: empty is not a journal of this program."]
        assert main([command, "notes.txt"]) == 2
        assert said(capsys) == ["tracker: path='notes.txt' is not a folder."]
        assert main([command, "nowhere"]) == 2
        assert said(capsys) == ["tracker: path='nowhere' is not a folder."]
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_journal_of_another_version_is_left_to_that(
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


def test_one_bad_journal_keeps_no_other_from_being_delivered(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    foreign = neighbours / "1"
    foreign.mkdir()
    foreign_database(foreign / "journal.sqlite")
    shutil.copytree(small, neighbours / "2")

    assert main(["sync", str(neighbours)]) == 2

    assert said(capsys) == [f"tracker: {foreign} is not a journal of this program."]
    assert steps_of(recorder.calls) == list(range(40))
    assert not (neighbours / "2").exists()


# -- where nothing can be written ----------------------------------------------------------------


def as_mortal(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command `tracker` of a user whom the modes of files bind, as they do not bind root."""
    command = [sys.executable, "-m", "tracker.cli", *arguments]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv to be less")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    env = os.environ | {"PYTHONPATH": str(PROJECT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", ["folder", "database", "locks", "unreadable"])
def test_a_journal_that_may_not_be_written_waits(what: str, store: Store, neighbours: Path) -> None:
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
        synced = as_mortal("sync", str(folder))
        status = as_mortal("status", str(folder))
    finally:
        for place, had in zip(places, modes, strict=True):
            place.chmod(had)

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


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk may be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    """Leave not one byte on a disk."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while ballast.write(bytes(size)):
                    pass
            except OSError:
                pass


@pytest.mark.parametrize("torn", [False, True], ids=["whole", "damaged"])
def test_a_journal_on_a_full_disk_waits_for_room(
    torn: bool, store: Store, tiny_disk: Path, capsys: Output
) -> None:
    folder = left_behind(tiny_disk, store.uri, points=2)
    if torn:
        with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
            db.execute("UPDATE records SET body = '{' WHERE kind = 'epoch'")
    fill(tiny_disk)

    for _ in range(2):
        assert main(["sync", str(folder)]) == 2
        assert one_sentence("\n".join(said(capsys))).startswith("tracker: ")
    assert main(["status", str(folder)]) == 0
    assert len(said(capsys)) in (2, 3)  # SQLite may need room even to read

    (tiny_disk / "ballast").unlink()
    assert main(["sync", str(folder)]) == 0
    assert store.history(store.run(), "loss") == [(0, 1.0), (1, 0.5)]
    assert store.run().info.status == "FINISHED"


# -- hostile -------------------------------------------------------------------------------------


def hostile(directory: Path, uri: str, *records: tuple[Any, Any, Any, Any]) -> Path:
    """A journal with `records` between a good beginning and a good end."""
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


def test_a_record_reaches_no_file_but_the_journal_s_own(
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
def test_a_model_that_is_none_is_a_notice(
    content: str | None, store: Store, neighbours: Path, capsys: Output
) -> None:
    """A power cut leaves a file empty that was written just before."""
    model = file("files/x/model", kind="model", name="model", step=1)
    folder = hostile(neighbours, store.uri, model)
    (folder / "files" / "x" / "model").mkdir(parents=True)
    if content is not None:
        (folder / "files" / "x" / "model" / "MLmodel").write_text(content)

    assert main(["sync", str(folder)]) == 0

    assert "A record (model) is lost: model is not a model: " in one_sentence(said(capsys)[-1])
    run = store.run()
    assert store.client.search_logged_models([run.info.experiment_id]) == []
    assert store.history(run, "loss") == [(1, 0.5)]


def test_a_link_in_the_place_of_the_files_leads_nowhere(
    store: Store, neighbours: Path, tmp_path: Path, capsys: Output
) -> None:
    folder = hostile(neighbours, store.uri, file("files/photos/canary.txt"))
    (folder / "files").rmdir()
    (folder / "files").symlink_to(tmp_path)

    assert main(["sync", str(folder)]) == 0

    assert len(said(capsys)) == 1
    assert store.artifacts(store.run()) == set()
    assert not folder.exists()


HISTOGRAM = {"tensor": "w", "kind": "weight", "bins": [1], "counts": [2]}

MALFORMED: dict[str, list[Any]] = {
    "metrics": [
        *({}, {"metrics": None}, {"metrics": {"loss": 1}}, {"metrics": [None]}, {"metrics": [[]]}),
        *({"metrics": [["loss", "1", 1, 1]]}, {"metrics": [["loss", 1.0, "1", 1]]}),
        *({"metrics": [[None, 1.0, 1, 1]]}, {"metrics": [["loss", 1.0, 1, 1.5]]}),
        *({"metrics": [["loss", 1.0, 2**70, 1]]}, {"metrics": [["\udc80", 1.0, 1, 1]]}),
        *({"metrics": [["", 1.0, 1, 1]]}, {"metrics": [["../x", 1.0, 1, 1]]}),
        *([], 1, '"text"', None),
    ],
    "params": [{}, {"params": []}, {"params": {"x": 1}}],
    "tags": [{}, {"tags": {"x": None}}, {"tags": {"\udc80": "x"}}, {"tags": {"../x": "x"}}],
    "epoch": [{}, {"row": 1}, {"row": [1]}, {"row": {"x": "\udc80"}}],
    "histograms": [
        *({}, {"step": "1", "histograms": []}, {"step": 1, "histograms": {}}),
        *({"step": 1, "histograms": [1]}, {"step": 1, "histograms": [HISTOGRAM]}),
        {"step": 1, "histograms": [HISTOGRAM | {"nan": 0, "posinf": 0, "neginf": 0, "bins": []}]},
    ],
    "file": [{}, {"staged": 1, "folder": None}, {"staged": "files/x/y", "folder": 1}],
    "delete": [{}, {"path": None}, {"path": "x\0y"}],
    "dataset": [
        *({}, {"dataset": {}, "context": "x"}, {"dataset": {"name": "x"}, "context": "x"}),
        {"dataset": dict.fromkeys(("name", "digest", "source_type", "source", "more"), "x")},
    ],
    "model": [{}, {"staged": "files/x/y", "name": None, "step": 1}],
    "end": [{}, {"status": "DONE"}, {"status": ["FINISHED"]}, {"status": {}}],
    "begin": [{}, {"tags": {}}, vars(BEGIN) | {"tags": {}}, vars(BEGIN) | {"parent": {}}],
    "nonsense": [{}, {"metrics": []}],
    "non\nsense" * 50: [{}],
}


def test_records_of_a_wrong_shape_are_a_notice_each_and_the_rest_is_delivered(
    store: Store, neighbours: Path, capsys: Output
) -> None:
    bodies = [(kind, body) for kind, several in MALFORMED.items() for body in several]
    folder = hostile(
        neighbours,
        store.uri,
        *(("a", 3, kind, body) for kind, body in bodies),
        *(("a", time, "tags", {"tags": {"x": "y"}}) for time in ("noon", 1e300, 2.5)),
    )

    assert main(["sync", str(folder)]) == 0

    notices = said(capsys)
    assert [notice for notice in notices if not notice.startswith("tracker: A record (")] == []
    assert len(notices) == len(bodies) + 3
    assert max(map(len, notices)) < 400
    run = store.run()
    assert store.history(run, "loss") == [(1, 0.5)]
    assert run.info.status == "FINISHED"
    assert not folder.exists()


def test_bodies_that_are_no_json_are_damage(store: Store, neighbours: Path, capsys: Output) -> None:
    bodies = ["", "{", "garbage", b"\xff\xff", "[" * 100_000, "9" * 10_000, '{"x": 1}{']
    folder = hostile(neighbours, store.uri, *(("a", 3, "tags", body) for body in bodies))

    assert main(["sync", str(folder)]) == 0

    assert DAMAGED in said(capsys)[-1]
    run = store.run()
    assert store.history(run, "loss") == [(1, 0.5)]
    assert run.info.status == "FINISHED"


def test_runs_without_a_beginning_are_a_notice_each(
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


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM progress",
        "INSERT INTO progress SELECT * FROM progress",
        "UPDATE progress SET delivered = 'x'",
        "UPDATE progress SET problem = 'x', problem_since = 'noon'",
        "UPDATE progress SET tracking_uri = x'ff'",
        "UPDATE progress SET tracking_uri = 'no-such-scheme://x'",
        "UPDATE sqlite_sequence SET seq = 9223372036854775807",
        "DROP TABLE notices",
        "DROP TABLE records",
        "DROP TABLE progress",
    ],
)
def test_a_journal_whose_tables_are_not_what_they_were_is_one_sentence(
    statement: str, recorder: type[Recorder], small: Path, neighbours: Path, capsys: Output
) -> None:
    folder = shutil.copytree(small, neighbours / "odd")
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute(statement)

    assert main(["status", str(folder)]) == 0
    assert 2 <= len(said(capsys)) <= 4
    code = main(["sync", str(folder)])
    lines = said(capsys)
    assert len(lines) <= 2
    assert (code == 2) <= bool(lines)


# -- a disk that fills up while training goes on -------------------------------------------------

TRAINING = """
import json, logging, resource, sys
from pathlib import Path
import torch
from PIL import Image
from torch import nn
from tracker import start_run
import tracker.run
sys.path.insert(0, sys.argv[3])
from tests.journal.test_damage import fill

directory, uri, _, how = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
network, example = nn.Linear(2, 2), torch.zeros(1, 2)
optimizer = torch.optim.Adam(network.parameters())
folder = Path("folder")
(folder / "below").mkdir(parents=True)
(folder / "below" / "x.bin").write_bytes(bytes(100_000))
run = start_run(tracking_uri=uri, directory=directory, offline=True)

def log(step):
    run.log_metrics({"loss": 0.5}, step)
    run.log_metrics({"norm": torch.tensor(2.0)}, step)
    run.log_params({f"p{step}": step})
    run.log_text("text" * 1000, f"{step}/text.txt")
    run.log_image(f"{step}.png", torch.rand(3, 32, 32))
    run.log_image("noise", torch.rand(3, 32, 32), step)
    run.log_artifact("folder", f"{step}")
    run.log_artifact("folder/below/x.bin", f"{step}/file")
    run.log_histograms(network, step)
    run.log_checkpoint(step=step, network=network, optimizer=optimizer, epoch=step)
    if how == "limit" and step > 1:  # takes its time
        run.log_model(network, example, f"model{step}", step)
    run.log_epoch({"epoch": step})

journal = run._delivery.journal
log(0)
assert journal.flush(60)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
else:
    fill(Path(directory))
for step in (1, 2):
    log(step)
    assert not journal.flush(60)
print("LOST", journal.lost)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
else:
    (Path(directory) / "ballast").unlink()
log(3)
assert journal.flush(60)
run.end()
"""


def check_full_disk(how: str, directory: Path, store: Store, tmp_path: Path) -> None:
    arguments = [str(directory), store.uri, str(PROJECT), how]
    env = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    env.pop("TRACKER_INLINE")
    training = subprocess.run(
        [sys.executable, "-c", TRAINING, *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert training.returncode == 0, training.stderr
    warned = [line for line in training.stdout.splitlines() if not line.startswith("LOST")]
    (lost,) = [line.split()[1] for line in training.stdout.splitlines() if line.startswith("LOST")]
    full, told, left = warned
    assert "training goes on" in full
    assert told == f"WARNING {lost} records are lost: they could not be read or written."
    assert "are not delivered; deliver them: tracker sync" in left

    assert main(["sync", str(directory)]) == 0
    run = store.run()
    assert run.info.status == "FINISHED"
    for name in ("loss", "norm"):
        assert [step for step, _ in store.history(run, name)] == [0, 1, 2, 3]
    assert run.data.params == {f"p{step}": str(step) for step in range(4)}
    files = store.artifacts(run)
    for step in (0, 3):
        assert {
            *(f"{step}/text.txt", f"{step}/folder/below/x.bin", f"{step}/file/x.bin"),
            *(f"{step}.png", f"checkpoints/{step:08d}/tensors.pt"),
        } <= files
    for step in (1, 2):
        assert not any(file.startswith((f"{step}/", f"{step}.", f"model{step}")) for file in files)
        assert f"histograms/{step:06d}.json" in files
    models = store.client.search_logged_models([run.info.experiment_id])
    assert [model.name for model in models] == (["model3"] if how == "limit" else [])
    # Of each step a text, a picture, one in two files, a folder, a file, a checkpoint.
    assert int(lost) == 2 * 7 + (how == "limit")


@pytest.mark.skipif(sys.platform != "linux", reason="limits a file's size as Linux does")
def test_training_goes_on_where_no_file_may_grow(store: Store, tmp_path: Path) -> None:
    check_full_disk("limit", tmp_path / "journals", store, tmp_path)


@pytest.mark.slow
def test_training_goes_on_when_the_disk_is_full(
    store: Store, tmp_path: Path, tiny_disk: Path
) -> None:
    check_full_disk("disk", tiny_disk, store, tmp_path)
