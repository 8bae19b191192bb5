"""The store: tracking URIs that work or not, runs found in it, and a store that fails."""

from __future__ import annotations

import http.server
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from tests.helpers import Store
from tests.programs import ForkServer
from tracker import StoreError, start_run
from tracker.cli import main
from tracker.store.client import MlflowStore
from tracker.store.runs import read_run, runs_by_tag_prefix
from tracker.store.uri import check_uri, resolve
from tracker.validation import RUN_TAG


def test_a_new_sqlite_file_has_its_artifacts_next_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "store"
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for experiment in (None, "my: own", "x" * 300, "漢" * 100, ".", "..", "a/b", "a_b"):
        with start_run(tracking_uri=uri, experiment=experiment) as run:
            run.log_text("x", "x.txt")
            assert run.tracking_uri == uri
    files = {str(path.relative_to(folder)) for path in folder.rglob("x.txt")}
    assert {file.split("/")[1] for file in files} == {str(number) for number in range(8)}
    assert len(files) == 8
    assert not (tmp_path / "mlruns").exists()


def test_the_default_uri_is_mlflows_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    with start_run() as run:
        pass
    assert run.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert Store(run.tracking_uri).run().info.status == "FINISHED"


def test_the_file_store_warns_once_that_it_is_in_maintenance_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    uri = f"file://{tmp_path / 'runs'}"
    for _ in range(2):
        with start_run(tracking_uri=uri):
            pass
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("tracker")]
    assert len(messages) == 1
    assert "is in maintenance mode" in messages[0]
    assert len(Store(uri).runs()) == 2


class Failing(http.server.BaseHTTPRequestHandler):
    """A server that answers every request with an error."""

    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_refuses_connections_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"'http://127.0.0.1:9' cannot be opened: .*refused"):
        start_run(tracking_uri="http://127.0.0.1:9")
    assert list((tmp_path / ".tracker").iterdir()) == []


def test_a_server_that_answers_with_errors_is_an_error(broken_server: str) -> None:
    with pytest.raises(StoreError, match="cannot be opened: it answers 503"):
        start_run(tracking_uri=broken_server)


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("sqlite:///{tmp}/text.txt", "is not a SQLite file"),
        ("sqlite:///{tmp}", "is a folder"),
        ("sqlite:///{tmp}/text.txt/x.db", "is not a folder"),
        ("file://{tmp}/text.txt", "is not a folder"),
        ("no-such-scheme://x", "cannot be opened"),
        ("http://", "cannot be opened"),
    ],
)
def test_a_wrong_uri_is_refused_in_one_sentence_and_creates_nothing(
    tmp_path: Path, uri: str, problem: str
) -> None:
    (tmp_path / "text.txt").write_text("not a database, but long enough to look at")
    uri = uri.format(tmp=tmp_path)
    with pytest.raises(StoreError) as caught:
        start_run(tracking_uri=uri)
    assert problem in str(caught.value)
    assert repr(uri) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tracker", "text.txt"]
    assert list((tmp_path / ".tracker").iterdir()) == []


def test_a_folder_that_cannot_hold_the_journal_is_an_error(
    tmp_path: Path, tracking_uri: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="directory='file/x' cannot hold the journal"):
        start_run(directory="file/x")


def test_a_relative_uri_keeps_its_place_when_the_program_changes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    for uri in ("sqlite:///relative.db", "file:runs"):
        monkeypatch.chdir(tmp_path)
        with start_run(tracking_uri=uri) as run:
            monkeypatch.chdir(tmp_path / "elsewhere")
            run.log_metrics({"loss": 1.0})
            run.flush()
        assert Store(run.tracking_uri).run().info.status == "FINISHED"
        assert str(tmp_path) in run.tracking_uri
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_processes_can_create_one_sqlite_store_at_the_same_time(
    tmp_path: Path, deliverers: ForkServer
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    program = f"from tracker import start_run\nwith start_run(tracking_uri={uri!r}): pass"
    started = [deliverers.start(program) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert [run.info.status for run in Store(uri).runs()] == ["FINISHED"] * 3


def test_runs_are_found_among_more_experiments_than_mlflow_lists_at_a_time(store: Store) -> None:
    with start_run() as run:
        key = store.client.get_run(run.run_id).data.tags[RUN_TAG]
    with closing(sqlite3.connect(store.uri.removeprefix("sqlite:///"))) as db, db:
        db.execute(  # newer than the run's own, and so listed first
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n <"
            " 1100) INSERT INTO experiments (name, artifact_location, lifecycle_stage,"
            " creation_time, last_update_time) SELECT 'experiment-' || n, 'file:///none', 'active',"
            " 4000000000000, 4000000000000 FROM numbers"
        )
    opened = MlflowStore(store.uri)
    assert len(opened.experiment_ids()) == 1101
    assert opened.find_run(key) == run.run_id
    assert runs_by_tag_prefix(opened, RUN_TAG, key[:20])[key].run_id == run.run_id
    assert runs_by_tag_prefix(opened, RUN_TAG, "none") == {}


def test_a_snapshot_has_the_latest_value_of_a_param(store: Store) -> None:
    with start_run(params={"device": "auto", "lr": 0.1}) as run:
        run.flush()
        run_id = str(run.run_id)
        MlflowStore(store.uri).log_batch(run_id, params={"device": "cpu", "lr": "1e-1"})
    assert store.client.get_run(run_id).data.params["device"] == "auto"
    assert read_run(MlflowStore(store.uri), run_id).params == {"device": "cpu", "lr": "0.1"}


# -- a store that fails ------------------------------------------------------------------------


def test_a_store_that_fails_during_training_stops_nothing_and_sync_delivers_the_rest(
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = Path(store.uri.removeprefix("sqlite:///"))
    with start_run() as run:
        run.log_metrics({"loss": 1.0}, 1)
        run.flush()
        database.rename(tmp_path / "away.db")  # MLflow's next connection makes an empty file
        with closing(sqlite3.connect(database)) as db:
            db.execute("CREATE TABLE t (x)")
        for step in (2, 3):
            run.log_metrics({"loss": 1.0 / step}, step)
            run.flush()
    messages = [r.getMessage() for r in caplog.records if r.name == "tracker.delivery.inline"]
    assert len(messages) == 2
    assert messages[0].startswith("Saved on disk; upload failed and will be tried again: ")
    (journal,) = (tmp_path / ".tracker").iterdir()
    assert messages[1].endswith(f"Finish it with: tracker sync {journal}")

    (tmp_path / "away.db").replace(database)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # the journal names its store
    assert main(["sync", str(journal)]) == 0
    assert store.history(store.run(), "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert store.run().info.status == "FINISHED"
    assert not journal.exists()


def test_sync_gives_the_run_of_a_killed_process_its_correct_status(
    store: Store, tmp_path: Path, deliverers: ForkServer
) -> None:
    program = (
        "import os, signal\nfrom tracker import start_run\nrun = start_run()\n"
        "run.log_metrics({'loss': 0.5}, 1)\nrun.flush()\nrun.log_metrics({'loss': 0.25}, 2)\n"
        "import threading; from tracker.journal.writer import FLUSH_SECONDS\n"
        "threading.Event().wait(5 * FLUSH_SECONDS); os.kill(os.getpid(), signal.SIGKILL)"
    )
    deliverers.run(program)
    assert store.run().info.status == "RUNNING"
    (journal,) = (tmp_path / ".tracker").iterdir()
    wrong = f"sqlite:///{tmp_path / 'wrong.db'}"
    assert main(["sync", str(journal), "--tracking-uri", wrong]) == 2  # but nothing is lost
    assert journal.exists()
    assert main(["sync", str(journal)]) == 0
    assert store.run().info.status == "FAILED"
    assert "ended without reporting why" in store.run().data.tags["tracker.failure"]
    assert store.history(store.run(), "loss") == [(1, 0.5), (2, 0.25)]


def test_sync_leaves_a_living_process_alone(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_run():
        (journal,) = (tmp_path / ".tracker").iterdir()
        assert main(["sync", str(journal)]) == 2
    assert "is still in use by process" in capsys.readouterr().err
    assert store.run().info.status == "FINISHED"


def test_sync_of_a_folder_that_is_not_a_journal_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"tracker: {tmp_path} is not a tracker journal.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_param_that_another_process_logs_meanwhile_does_not_fail_the_request(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = MlflowStore(store.uri), MlflowStore(store.uri)
    run_id = store.client.create_run("0").info.run_id
    log_batch = here.client.log_batch

    def collide(*given: object) -> None:
        monkeypatch.setattr(here.client, "log_batch", log_batch)
        there.log_batch(run_id, params={"lr": "0.1", "width": "8"})
        raise MlflowException("UNIQUE constraint failed: params.key, params.run_uuid")

    monkeypatch.setattr(here.client, "log_batch", collide)
    here.log_batch(run_id, [("loss", 0.5, 1, 2)], {"lr": "0.1", "width": "16"}, {"a": "b"})
    run = read_run(here, run_id)
    assert run.params == {"lr": "0.1", "width": "16"}
    assert run.metrics == {"loss": 0.5}
    assert run.tags["a"] == "b"


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("~/mlruns", "file://{home}/mlruns"),
        ("file:~/mlruns", "file://{home}/mlruns"),
        ("sqlite:///~/mlflow.db", "sqlite:///{home}/mlflow.db"),
        ("file://localhost/runs", "file:///runs"),
        ("file:mlruns", "file://{here}/mlruns"),
        (" mlruns ", "file://{here}/mlruns"),
        ("HTTP://127.0.0.1:9", "http://127.0.0.1:9"),
        ("SQLite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        (None, "sqlite:///{here}/mlflow.db"),
    ],
)
@pytest.mark.parametrize("blank", ["", "  "])
def test_a_uri_means_what_its_user_meant(
    uri: str | None, resolved: str, blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", blank)
    assert resolve(uri) == resolved.format(home=home, here=tmp_path)


@pytest.mark.parametrize("uri", ["", "  ", "file:", "file://mlruns", "file://host/runs", "HTTP://"])
def test_a_uri_that_names_no_store_is_refused_in_one_sentence(uri: str) -> None:
    with pytest.raises(StoreError, match=r"^tracking_uri='[^\n]*' cannot be opened: [^\n]*\.$"):
        check_uri(resolve(uri))
