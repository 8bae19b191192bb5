"""A damaged journal is read up to its damage.

What was read is delivered once, the damaged file is kept, and one sentence tells the user.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.journal.helpers import BEGIN, Output, Recorder, one_sentence, said, snapshot, steps_of
from tracker.cli import main
from tracker.delivery.leftovers import deliver_left_behind, settle_run
from tracker.journal.damage import DAMAGED
from tracker.journal.reader import Journal
from tracker.journal.records import Point
from tracker.journal.writer import JournalWriter
from tracker.store.client import MlflowStore


def damaged(small: Path, into: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy of a journal with its database changed."""
    folder = shutil.copytree(small, into)
    content = bytearray((folder / "journal.sqlite").read_bytes())
    change(content)
    (folder / "journal.sqlite").write_bytes(content)
    return folder


def whole_before(content: bytes, cut: int) -> int:
    """How many epochs lie without a gap on the pages before a cut."""
    kept = content[: cut // 4096 * 4096]
    steps = [step for step in range(40) if b"epoch-%04d" % step in kept]
    return next((n for n, step in enumerate(steps) if n != step), len(steps))


def check_saved(folder: Path, recorder: type[Recorder], expected: int, capsys: Output) -> None:
    """Check that the first `expected` points at least are delivered, in order and once."""
    before = snapshot(folder)
    assert main(["status", str(folder)]) == 0
    assert said(capsys)[0] == str(folder)

    code = main(["sync", str(folder), "--tracking-uri", "recorder:"])

    lines = said(capsys)
    steps = steps_of(recorder.calls)
    assert steps == sorted(set(steps))
    assert steps[:expected] == list(range(expected))
    if code == 2:
        assert "".join(lines).startswith(f"tracker: {folder} is not a tracker journal.")
        assert snapshot(folder)["journal.sqlite"] == before["journal.sqlite"]
    elif lines:
        assert lines[-1] == (
            f"tracker: {folder} was damaged; the damaged file is kept there as {DAMAGED}."
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


def test_a_journal_that_is_cut_off_anywhere_delivers_what_was_before(
    small: Path, tmp_path: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    content = (small / "journal.sqlite").read_bytes()
    generator = random.Random(1)
    cuts = {*range(0, len(content) + 1, 2048), *(generator.randrange(len(content)) for _ in "abc")}
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


@pytest.mark.parametrize("seed", range(6))
def test_a_journal_with_overwritten_bytes_delivers_what_can_be_read(
    seed: int, small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
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
        said(capsys)
    assert recorder.calls == calls  # nothing the second time
    assert [name for name, _ in calls].count("begin") <= 1


def test_a_lost_page_ends_the_run_at_the_record_before_it(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    content = (small / "journal.sqlite").read_bytes()
    page = content.rindex(b"epoch-0020") // 4096 * 4096

    def overwrite(content: bytearray) -> None:
        content[page : page + 4096] = bytes(4096)

    folder = damaged(small, neighbours / "hole", overwrite)
    assert main(["sync", str(folder)]) == 0

    steps = steps_of(recorder.calls)
    assert steps == list(range(len(steps)))
    assert len(steps) >= whole_before(content, page) > 0
    assert recorder.calls[-1] == ("end", "FAILED")
    assert DAMAGED in said(capsys)[-1]


def test_damaged_letters_cost_no_other_record(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    def overwrite(content: bytearray) -> None:
        for name in (b"epoch-0003", b"epoch-0030"):
            at = content.rindex(name)
            content[at : at + 10] = b"\xff\xfe\xfd" * 3 + b"\x80"

    folder = damaged(small, neighbours / "letters", overwrite)
    assert main(["sync", str(folder)]) == 0
    assert steps_of(recorder.calls) == list(range(40))
    assert recorder.calls[-1] == ("end", "FINISHED")
    assert DAMAGED in said(capsys)[-1]


def damaged_letters(small: Path, into: Path, uri: str = "recorder:") -> tuple[Path, bytes]:
    """A journal for a store with a record that is not JSON, and its database."""
    folder = shutil.copytree(small, into)
    with closing(Journal(folder)) as journal:
        journal.tracking_uri = uri
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute("UPDATE records SET body = CAST(x'7b22ff' AS TEXT) WHERE seq = 40")
    return folder, (folder / "journal.sqlite").read_bytes()


def test_a_sync_that_is_repeated_keeps_the_damaged_file(
    small: Path, recorder: type[Recorder], neighbours: Path
) -> None:
    folder, content = damaged_letters(small, neighbours / "letters")
    recorder.fails_at = 10
    assert [main(["sync", str(folder)]) for _ in range(2)] == [2, 0]
    assert (folder / DAMAGED).read_bytes() == content


def test_a_damaged_journal_is_left_to_sync_and_then_kept(
    store: Store, small: Path, neighbours: Path
) -> None:
    folder, content = damaged_letters(small, neighbours / "letters", store.uri)
    mlflow_store = MlflowStore(store.uri)
    assert deliver_left_behind(neighbours, mlflow_store)
    assert (folder / "journal.sqlite").read_bytes() == content

    assert main(["sync", str(folder)]) == 0
    assert deliver_left_behind(neighbours, mlflow_store)
    assert (folder / DAMAGED).read_bytes() == content
    settle_run(store.run().info.run_id, store.uri, neighbours)  # raises if it waits for the journal


def test_a_journal_without_its_progress_asks_for_the_store_and_sends_nothing_twice(
    small: Path, recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    folder = shutil.copytree(small, neighbours / "lost")
    recorder.fails_at = 20
    assert main(["sync", str(folder)]) == 2
    delivered = list(recorder.calls)
    assert len(delivered) == 19
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute("DROP TABLE progress")
    said(capsys)

    assert main(["sync", str(folder)]) == 2
    assert one_sentence("\n".join(said(capsys)[-1:])).endswith("add --tracking-uri URI.")
    assert main(["sync", str(folder), "--tracking-uri", "recorder:"]) == 0

    assert recorder.calls[:19] == delivered
    assert steps_of(recorder.calls) == list(range(40))
    assert recorder.calls.count(("begin", "a")) == 1


def test_the_end_of_a_run_is_delivered_though_records_before_it_are_lost(
    small: Path, recorder: type[Recorder], neighbours: Path
) -> None:
    """Its number must not be one of those that were delivered already."""
    folder = shutil.copytree(small, neighbours / "short")
    with closing(sqlite3.connect(folder / "journal.sqlite")) as db, db:
        db.execute("UPDATE progress SET delivered = 82, sending = 82")
        db.execute("INSERT INTO runs VALUES ('a', 'id of a')")
        db.execute("DELETE FROM records WHERE seq > 70")
        db.execute("DROP TABLE notices")
    assert main(["sync", str(folder)]) == 0
    assert recorder.calls[-1] == ("end", "FAILED")


def test_the_log_of_a_killed_process_may_be_cut_off_anywhere(
    recorder: type[Recorder], neighbours: Path, capsys: Output
) -> None:
    """The log holds the records that SQLite has not moved into the database yet."""
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


def test_a_cut_off_journal_is_delivered_to_a_real_store(
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
    assert "ended without reporting why" in run.data.tags["tracker.failure"]
    assert run.data.params == {"lr": "0.1"}


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
def test_altered_tables_end_in_one_sentence(
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
