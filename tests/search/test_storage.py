"""Opening storages, their locks and their patience with outages."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import StudyDirection

import tracker
from tests.postgres import PostgresServer, free_port
from tests.programs import ForkServer
from tracker.errors import ArgumentError, StoreError
from tracker.search.storage import DEFAULT, LockedError, Storage, default_url, parse, quiet

PROJECT = Path(tracker.__file__).parents[1]
KINDS = ["journal", "sqlite", "postgresql"]
MINIMIZE = [StudyDirection.MINIMIZE]


@pytest.fixture(autouse=True)
def quiet_optuna() -> Iterator[None]:
    with quiet():
        yield


def url_of(kind: str, request: pytest.FixtureRequest) -> str:
    """The URL of a new storage: a file that does not exist, or an empty database."""
    if kind == "postgresql":
        database: str = request.getfixturevalue("database")
        return database
    return f"{kind}:///some/folder/studies"


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest) -> str:
    """A storage of each kind."""
    return url_of(request.param, request)


@pytest.fixture(params=["journal", "sqlite"])
def file_url(request: pytest.FixtureRequest) -> str:
    """A storage of each kind that is a single file."""
    return url_of(request.param, request)


def opened(url: str) -> closing[Storage]:
    return closing(Storage(url))


def names(storage: Storage) -> list[str]:
    """The names of the studies."""
    return sorted(study.study_name for study in storage.optuna.get_all_studies())


@contextmanager
def elsewhere(url: str, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that opens the storage and runs `code`, until it is killed."""
    program = "import sys, optuna\nfrom tracker.search.storage import Storage\n"
    program += f"storage = Storage(sys.argv[1])\n{code}"
    with subprocess.Popen(
        [sys.executable, "-c", program, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def next_line(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert process.stdout
    return process.stdout.readline().strip()


def checked_message(error: BaseException) -> str:
    """The message of an error, which must be one line without secrets."""
    text = str(error)
    assert "\n" not in text
    assert "hunter2" not in text
    assert text.startswith("storage='")
    return text


# -- URLs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("studies.journal", "journal:///FILE, sqlite:///FILE and postgresql://"),
        ("/tmp/studies.db", "journal:///FILE, sqlite:///FILE and postgresql://"),
        ("mysql://me:hunter2@host/studies", "journal:///FILE, sqlite:///FILE and postgresql://"),
        ("redis://host", "journal:///FILE, sqlite:///FILE and postgresql://"),
        ("://", "journal:///FILE, sqlite:///FILE and postgresql://"),
        ("journal://", "journal:///FILE"),
        ("journal:///", "journal:///FILE"),
        ("journal://file", "journal:///FILE"),
        ("sqlite://", "sqlite:///FILE"),
        ("sqlite:///", "sqlite:///FILE"),
        ("sqlite://file/studies.db", "sqlite:///FILE"),
        ("sqlite:///:memory:", "sqlite:///FILE"),
    ],
)
def test_an_unsupported_url_is_rejected_and_creates_nothing(
    url: str, allowed: str, workdir: Path
) -> None:
    with pytest.raises(ArgumentError) as caught:
        Storage(url)
    message = checked_message(caught.value)
    assert message.endswith(".")
    assert allowed in message
    assert list(workdir.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "kind", "file"),
    [
        ("journal:///studies.journal", "journal", "studies.journal"),
        ("journal:////data/studies", "journal", "/data/studies"),
        ("sqlite:///a/b.db", "sqlite", "a/b.db"),
        ("sqlite:////data/b.db", "sqlite", "/data/b.db"),
        ("sqlite+pysqlite:///b.db", "sqlite", "b.db"),
        ("postgresql://me@host/studies", "postgresql", None),
        ("postgresql+psycopg://me@host/studies", "postgresql", None),
        ("postgres://me@host/studies", "postgresql", None),
    ],
)
def test_three_slashes_start_a_relative_path_and_four_an_absolute_one(
    url: str, kind: str, file: str | None, workdir: Path
) -> None:
    assert parse(url) == (url, kind, None if file is None else workdir / file)


def test_the_default_is_a_journal_in_the_current_directory(workdir: Path) -> None:
    assert parse(None) == (DEFAULT, "journal", workdir / "studies.journal")


@pytest.mark.parametrize(
    ("tracking_uri", "file", "warned"),
    [
        ("sqlite:///{home}/mlflow.db", "{home}/studies.journal", False),
        ("file://{home}/mlruns", "{home}/studies.journal", False),
        ("sqlite:///mlflow.db", "studies.journal", True),
        ("http://127.0.0.1:9", "studies.journal", True),
    ],
)
def test_a_project_that_mlflow_fetched_keeps_its_studies_beside_the_store(
    tracking_uri: str,
    file: str,
    warned: bool,
    workdir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    home, project = workdir / "a b%20", workdir / "tmp" / "tmp1x2y3z" / "project"
    home.mkdir()
    project.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(workdir / "tmp"))
    uri = tracking_uri.format(home=str(home).replace("%", "%25"))
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.chdir(project)  # a clone made by the user
    assert default_url(uri) == DEFAULT
    monkeypatch.setenv("MLFLOW_RUN_ID", "0")
    monkeypatch.chdir(home)  # mlflow run .
    assert default_url(uri) == DEFAULT
    monkeypatch.chdir(project)
    assert parse(default_url(uri))[2] == project / file.format(home=home)
    assert ("temporary folder of mlflow run; storage=URL keeps it." in caplog.text) == warned


# -- opening ---------------------------------------------------------------------------------------


def test_a_storage_reads_what_another_has_written(url: str) -> None:
    with opened(url) as one:
        study_id = one.optuna.create_new_study(MINIMIZE, "ours")
        one.optuna.set_study_user_attr(study_id, "tracker:x", {"a": [1, None, "é"]})
        with opened(url) as other:
            assert names(other) == ["ours"]
    with opened(url) as later:
        study_id = later.optuna.get_study_id_from_name("ours")
        assert later.optuna.get_study_user_attrs(study_id) == {"tracker:x": {"a": [1, None, "é"]}}


def test_missing_folders_of_a_file_are_created(file_url: str, workdir: Path) -> None:
    with opened(file_url) as storage:
        storage.optuna.create_new_study(MINIMIZE, "ours")
    assert (workdir / "some/folder/studies").stat().st_size > 0


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_urls_may_name_their_driver(scheme: str, database: str) -> None:
    with opened(database.replace("postgresql", scheme, 1)) as storage, storage.lock():
        assert names(storage) == []


def test_optuna_can_open_the_journal_without_this_library(workdir: Path) -> None:
    with opened("journal:///studies") as storage:
        storage.optuna.create_new_study(MINIMIZE, "ours")
    backend = optuna.storages.journal.JournalFileBackend(str(workdir / "studies"))
    theirs = optuna.storages.JournalStorage(backend)
    assert [study.study_name for study in theirs.get_all_studies()] == ["ours"]


def refused(url: str) -> str:
    """The message for a storage that cannot be opened."""
    with pytest.raises(StoreError) as caught:
        Storage(url)
    message = checked_message(caught.value)
    assert "cannot be opened" in message
    return message


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_folder_is_not_a_storage(kind: str, workdir: Path) -> None:
    (workdir / "folder").mkdir()
    refused(f"{kind}:///folder")
    assert list((workdir / "folder").iterdir()) == []


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_path_below_a_file_is_not_a_storage(kind: str, workdir: Path) -> None:
    (workdir / "file").write_text("mine")
    refused(f"{kind}:///file/studies")


GARBAGE = {
    "a line": b"my notes",
    "a whole line": b"my notes\n",
    "lines": b"my\nnotes\nof the day\n",
    "json": b'{"mine": 1}\n',
    "a list": b"[1, 2]\n",
    "bytes": bytes(range(256)) * 20,
    "a database": b"SQLite format 3\x00" + bytes(4080),
}


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_file_of_another_program_is_rejected_and_not_changed(
    kind: str, content: bytes, workdir: Path
) -> None:
    (workdir / "file").write_bytes(content)
    refused(f"{kind}:///file")
    assert (workdir / "file").read_bytes() == content
    if content != GARBAGE["a database"]:
        assert os.listdir(workdir) == ["file"]


READ_ONLY = """
import os, sys
from tracker import Study, TrackerError

study = Study("s", abs, space={"x": [1]}, sampler="grid", storage=sys.argv[1], inline=True)
if os.getuid() == 0:  # root ignores permissions
    os.setuid(65534)
try:
    study.run(resume=True)
except TrackerError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "resumed"])
def test_a_read_only_storage_is_reported_in_one_line(
    kind: str, exists: bool, workdir: Path, deliverers: ForkServer
) -> None:
    with TemporaryDirectory() as folder:
        url = f"{kind}:///{folder}/studies"
        if exists:
            space = {"x": [1, 2]}
            study = tracker.Study(
                "s", abs, space=space, sampler="grid", trials=1, storage=url, offline=True
            )
            study.run(catch=TypeError)
        os.chmod(folder, 0o555)
        uri = f"sqlite:////tmp/{uuid.uuid4().hex}.db"
        done = deliverers.run(READ_ONLY, url, folder=PROJECT, MLFLOW_TRACKING_URI=uri)
        os.chmod(folder, 0o755)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"storage={url!r} cannot be ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_database_of_another_optuna_version_is_rejected(
    kind: str, request: pytest.FixtureRequest, workdir: Path
) -> None:
    url = url_of(kind, request)
    with opened(url):
        pass
    change = "UPDATE alembic_version SET version_num = 'v99.0.0.a'"
    if kind == "sqlite":
        with closing(sqlite3.connect(workdir / "some/folder/studies")) as connection:
            connection.execute(change)
            connection.commit()
    else:
        with closing(psycopg.connect(url, autocommit=True)) as connection:
            connection.execute(change)
    refused(url)
    with warnings.catch_warnings():  # from connections that Optuna's constructor leaves open
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_missing_server_is_reported_in_one_line() -> None:
    assert "refused" in refused(f"postgresql://me:hunter2@127.0.0.1:{free_port()}/studies")


def test_a_missing_database_is_reported_in_one_line(
    postgres: PostgresServer, database: str
) -> None:
    url = postgres.url("nowhere").replace("postgres@", "postgres:hunter2@")
    assert '"nowhere" does not exist' in refused(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@127.0.0.1:port/studies",
        "postgresql://me:hunter2@127.0.0.1:99999999/studies",
        "postgresql://me:hunter2@127.0.0.1:1/studies?nothing=like+this",
        "postgresql+nothing://me:hunter2@127.0.0.1:1/studies",
    ],
)
def test_an_invalid_postgresql_url_is_reported_in_one_line(url: str) -> None:
    refused(url)


# -- the lock of a storage -------------------------------------------------------------------------

HOLDS = """
import time
from pathlib import Path
with storage.lock():
    print("holds", flush=True)
    sys.stdin.readline()
    time.sleep(0.2)
    Path("released").touch()
print("continues", flush=True)
sys.stdin.readline()
"""


def test_the_lock_excludes_other_processes(url: str, workdir: Path) -> None:
    with elsewhere(url, HOLDS) as other, opened_while_locked(url, other) as storage:
        assert other.stdin
        other.stdin.write("\n")
        other.stdin.flush()
        with storage.lock():
            assert (workdir / "released").exists()
        assert next_line(other) == "continues"


def test_a_killed_holder_releases_the_lock(url: str, workdir: Path) -> None:
    with elsewhere(url, HOLDS) as other, opened_while_locked(url, other) as storage:
        other.kill()
        with storage.lock():
            assert not (workdir / "released").exists()


@contextmanager
def opened_while_locked(url: str, other: subprocess.Popen[str]) -> Iterator[Storage]:
    """The storage, opened before `other` takes the lock, because opening takes it too."""
    with opened(url) as storage:
        assert next_line(other) == "holds"
        yield storage


def test_two_storages_of_one_process_can_take_turns(url: str) -> None:
    with opened(url) as one, opened(url) as other:
        for storage in (one, other, one):
            with storage.lock():
                pass


def test_an_error_releases_the_lock(url: str) -> None:
    with opened(url) as one, opened(url) as other:
        with pytest.raises(ZeroDivisionError), one.lock():
            raise ZeroDivisionError
        with other.lock():
            pass


def test_the_lock_of_a_suspended_holder_is_waited_for_and_never_ignored(
    url: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elsewhere(url, HOLDS) as other, opened_while_locked(url, other) as storage:
        other.send_signal(signal.SIGSTOP)
        monkeypatch.setattr("tracker.search.storage.LOCK_SECONDS", 0.1)

        def take() -> bool:
            with storage.lock():
                return (workdir / "released").exists()

        def resume() -> None:
            other.send_signal(signal.SIGCONT)
            assert other.stdin
            other.stdin.write("\n")
            other.stdin.flush()
            monkeypatch.setattr("tracker.search.storage.LOCK_SECONDS", 100.0)

        with pytest.raises(LockedError, match="is locked by another process"):
            take()
        outage = Outage(take, resume)
        assert storage.patiently(outage)
        assert outage.failures == 1


# -- SQLite allows one search ----------------------------------------------------------------------

OWNS = """
storage.own()
print("owns", flush=True)
sys.stdin.read()
"""


def test_a_sqlite_file_belongs_to_one_search_until_it_dies(workdir: Path) -> None:
    url = "sqlite:///studies.db"
    with elsewhere(url, OWNS) as other, opened(url) as storage:
        assert next_line(other) == "owns"
        with pytest.raises(StoreError) as caught:
            storage.own()
        assert checked_message(caught.value) == (
            f"storage={url!r} is in use by another search, and SQLite allows one at a "
            "time; use journal:///FILE or postgresql://… for several."
        )
        assert names(storage) == []  # it may still be read

        other.kill()
        other.wait()
        storage.own()


def test_a_sqlite_file_can_be_released() -> None:
    with opened("sqlite:///studies.db") as one, opened("sqlite:///studies.db") as other:
        one.own()
        one.own()
        with pytest.raises(StoreError):
            other.own()
        one.disown()
        other.own()
        other.close()
        one.own()


@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_other_storages_allow_any_number_of_searches(
    kind: str, request: pytest.FixtureRequest
) -> None:
    url = url_of(kind, request)
    with opened(url) as one, opened(url) as other:
        one.own()
        other.own()


# -- journals whose writer died --------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A journal of three studies."""
    file = tmp_path_factory.mktemp("written") / "journal"
    with quiet(), opened(f"journal:///{file}") as storage:
        for name in ("a", "b", "c"):
            storage.optuna.create_new_study(MINIMIZE, name)
    return file.read_bytes()


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_only_a_half_written_line_is_cut_off(
    data: st.DataObject, written: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    length = data.draw(st.integers(0, len(written)))
    whole_lines = written[: written[:length].rfind(b"\n") + 1]
    file = tmp_path_factory.mktemp("half") / "journal"
    file.write_bytes(written[:length])

    with quiet(), opened(f"journal:///{file}") as storage:
        assert names(storage) == ["a", "b", "c"][: whole_lines.count(b"\n")]
        storage.optuna.create_new_study(MINIMIZE, "new")
        assert "new" in names(storage)

    now = file.read_bytes()
    assert now.startswith(whole_lines)
    (added,) = now[len(whole_lines) :].splitlines()
    assert json.loads(added)["study_name"] == "new"


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_half_written_line_may_have_any_length(size: int, written: bytes, workdir: Path) -> None:
    half = b'{"op_code":2,"x":"'.ljust(size, b"x")
    (workdir / "journal").write_bytes(written + half)
    with opened("journal:///journal") as storage:
        storage.optuna.create_new_study(MINIMIZE, "new")
        assert names(storage) == ["a", "b", "c", "new"]
    with opened("journal:///journal") as storage:
        assert names(storage) == ["a", "b", "c", "new"]


def test_an_open_storage_cuts_off_the_half_written_line_of_another(workdir: Path) -> None:
    with opened("journal:///journal") as storage:
        storage.optuna.create_new_study(MINIMIZE, "a")
        with (workdir / "journal").open("ab") as file:
            file.write(b'{"op_code":0,"worker_id":"other","study_na')
        assert names(storage) == ["a"]
        storage.optuna.create_new_study(MINIMIZE, "b")
        assert names(storage) == ["a", "b"]


WRITES = """
import os
def never(descriptor):
    print("writes", flush=True)
    sys.stdin.read()
os.fsync = never
storage.optuna.create_new_study([optuna.study.StudyDirection.MINIMIZE], "theirs")
"""


def test_waiting_for_a_suspended_writer_times_out(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("journal:///journal") as storage:
        with elsewhere("journal:///journal", WRITES) as other:
            assert next_line(other) == "writes"
            other.send_signal(signal.SIGSTOP)
            monkeypatch.setattr("tracker.search.storage.LOCK_SECONDS", 0.1)
            storage.optuna.create_new_study(MINIMIZE, "ours")
            assert names(storage) == ["ours", "theirs"]
        storage.optuna.create_new_study(MINIMIZE, "later")
    with opened("journal:///journal") as storage:
        assert names(storage) == ["later", "ours", "theirs"]


def test_a_killed_writer_does_not_delay_the_next_one(workdir: Path) -> None:
    """Optuna's own lock would delay it for half a minute."""
    with elsewhere("journal:///journal", WRITES) as other:
        assert next_line(other) == "writes"
        other.kill()
        with opened("journal:///journal") as storage:
            storage.optuna.create_new_study(MINIMIZE, "ours")
            assert names(storage) == ["ours", "theirs"]


# -- beside plain Optuna ---------------------------------------------------------------------------


def test_appends_exclude_those_of_plain_optuna(workdir: Path) -> None:
    theirs = JournalFileSymlinkLock(str(workdir / "journal"))
    with opened("journal:///journal") as storage:
        theirs.acquire()
        ours = threading.Thread(target=storage.optuna.create_new_study, args=(MINIMIZE, "ours"))
        ours.start()
        ours.join(0.3)
        assert ours.is_alive()
        theirs.release()
        ours.join()
        assert names(storage) == ["ours"]
        theirs.acquire()  # it is free again
        theirs.release()


def test_the_lock_of_a_study_does_not_hold_up_plain_optuna(workdir: Path) -> None:
    with opened("journal:///journal") as storage, storage.lock():
        theirs = JournalStorage(JournalFileBackend(str(workdir / "journal")))
        theirs.create_new_study(MINIMIZE, "theirs")
        assert names(storage) == ["theirs"]


def test_a_lock_file_that_a_killed_process_left_is_removed(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened("journal:///journal") as storage:
        lock = workdir / "journal.lock"
        lock.symlink_to(f"{workdir}/./journal")  # as this library makes it
        storage.optuna.create_new_study(MINIMIZE, "ours")
        monkeypatch.setattr("tracker.search.storage._OPTUNA_LOCK_SECONDS", 0.1)
        lock.symlink_to(workdir / "journal")  # as Optuna makes it
        storage.optuna.create_new_study(MINIMIZE, "later")
        assert names(storage) == ["later", "ours"]
        assert not os.path.lexists(lock)


# -- patience --------------------------------------------------------------------------------------


class Outage:
    """Calls `do`; each failure calls `mend`, which ends the outage."""

    def __init__(self, do: Callable[[], Any], mend: Callable[[], None]) -> None:
        self._do, self._mend, self.failures = do, mend, 0

    def __call__(self) -> Any:
        try:
            return self._do()
        except Exception:
            self.failures += 1
            self._mend()
            raise


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_requests_succeed_when_the_server_is_back(
    database: str, postgres: PostgresServer, mode: str
) -> None:
    with opened(database) as storage:
        study_id = storage.optuna.create_new_study(MINIMIZE, "ours")
        with storage.lock():
            pass

        def note(name: str) -> None:
            storage.optuna.set_study_user_attr(study_id, name, 1)

        def note_locked() -> None:
            with storage.lock():
                note("locked")

        for do in (lambda: note("free"), note_locked):
            postgres.stop(mode)
            outage = Outage(do, postgres.start)
            storage.patiently(outage)
            assert outage.failures >= 1
        assert storage.optuna.get_study_user_attrs(study_id) == {"free": 1, "locked": 1}


def test_a_study_is_created_once_despite_an_outage(database: str, postgres: PostgresServer) -> None:
    with opened(database) as storage:
        postgres.stop("immediate")
        outage = Outage(lambda: storage.optuna.create_new_study(MINIMIZE, "ours"), postgres.start)
        storage.patiently(outage)
        assert names(storage) == ["ours"]


def test_a_server_crash_while_the_lock_is_held_is_an_outage(
    database: str, postgres: PostgresServer
) -> None:
    with opened(database) as storage:
        calls = []

        def do() -> list[str]:
            with storage.lock():
                calls.append(1)
                if len(calls) == 1:
                    postgres.restart()
                return names(storage)

        assert storage.patiently(do) == []
        with opened(database) as other, other.lock():
            pass  # it is free


def test_a_journal_survives_an_unavailable_disk(workdir: Path) -> None:
    with opened("journal:///disk/journal") as storage:
        storage.optuna.create_new_study(MINIMIZE, "a")
        shutil.move(workdir / "disk", workdir / "away")
        outage = Outage(
            lambda: storage.optuna.create_new_study(MINIMIZE, "b"),
            lambda: shutil.move(workdir / "away", workdir / "disk"),
        )
        storage.patiently(outage)
        assert outage.failures == 1
        assert names(storage) == ["a", "b"]


@pytest.mark.parametrize(
    "end", [{"stop": lambda: True}, {"patience": 0.3}], ids=lambda end: next(iter(end))
)
def test_patience_ends_at_the_deadline_or_when_told_to_stop(
    database: str, postgres: PostgresServer, end: dict[str, Any]
) -> None:
    with opened(database.replace("postgres@", "postgres:hunter2@")) as storage:
        postgres.stop()
        with pytest.raises(StoreError) as caught:
            storage.patiently(storage.optuna.get_all_studies, **end)
        assert "does not answer" in checked_message(caught.value)


def test_other_errors_are_raised_at_once(url: str) -> None:
    with opened(url) as storage:
        storage.optuna.create_new_study(MINIMIZE, "ours")
        for do, error in [
            (lambda: storage.optuna.create_new_study(MINIMIZE, "ours"), None),
            (lambda: storage.optuna.get_study_id_from_name("theirs"), KeyError),
            (lambda: storage.optuna.get_trial(12345), KeyError),
            (lambda: json.loads("{"), ValueError),
        ]:
            calls: list[int] = []

            def counted(do: Callable[[], Any] = do, calls: list[int] = calls) -> Any:
                calls.append(1)
                return do()

            with pytest.raises(error or optuna.exceptions.DuplicatedStudyError):
                storage.patiently(counted)
            assert calls == [1]


def test_an_invalid_query_is_not_an_outage(url: str) -> None:
    with opened(url) as storage:
        for error in (
            psycopg.errors.UndefinedTable("relation does not exist"),
            psycopg.errors.SyntaxError("syntax error"),
            RuntimeError("no"),
        ):
            assert not storage.unreachable(error)


# -- Optuna's log ----------------------------------------------------------------------------------


def test_the_level_of_optuna_s_log_is_restored() -> None:
    logs = logging.getLogger("optuna")
    before = logs.level
    with opened("journal:///studies"):
        assert logs.level == before
    with quiet():
        assert logs.level == logging.WARNING
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert logs.level == before
