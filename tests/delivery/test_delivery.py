"""Delivery by a second process, and the choice between it, inline and offline delivery."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import Store
from tests.programs import ForkServer, Program
from tracker import start_run
from tracker.cli import main
from tracker.delivery.base import Mode, mode_of
from tracker.errors import ArgumentError, StoreError
from tracker.journal.writer import JournalWriter

UPLOADERS = """
import os, psutil, sys
from tracker import RunManager, start_run

def uploaders():
    return [child.pid for child in psutil.Process().children()]
"""
Run = Callable[[str], Program]


@pytest.fixture
def run(trainers: ForkServer, tracking_uri: str) -> Run:
    """Runs a program, which tracks by a second process, and returns it."""

    def run(text: str) -> Program:
        program = trainers.run(UPLOADERS + text, TRACKER_INLINE="0")
        assert program.code == 0, program.output()
        return program

    return run


def test_training_imports_no_mlflow_and_its_uploader_no_torch(
    store: Store, run: Run, tmp_path: Path
) -> None:
    printed = run(
        "with start_run() as run:\n"
        "    run.log_metrics({'loss': 1.0})\n"
        "    while run.run_id is None: run.flush()\n"
        "    (pid,) = uploaders()\n"
        "    maps = open(f'/proc/{pid}/maps').read()\n"
        "    assert 'libtorch' not in maps and 'sqlite' in maps\n"
        "    assert psutil.Process(pid).nice() == 5\n"
        "print([name for name in sys.modules if name.partition('.')[0] == 'mlflow'])",
    ).stdout
    assert printed == "[]\n"
    assert store.run().info.status == "FINISHED"
    assert list((tmp_path / ".tracker").iterdir()) == []


def test_one_uploader_serves_all_runs_of_a_process(store: Store, run: Run) -> None:
    printed = run(
        "seen = set()\n"
        "for number in range(3):\n"
        "    with start_run(params={'number': number}) as run:\n"
        "        while run.run_id is None: run.flush()\n"
        "        seen.update(uploaders())\n"
        "print(len(seen))",
    ).stdout
    assert printed == "1\n"
    runs = store.runs()
    assert [run.data.params["number"] for run in runs] == ["0", "1", "2"]
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_uploader_samples_the_system_metrics(store: Store, run: Run) -> None:
    run("with start_run() as run:\n    while run.run_id is None: run.flush()\n    run.flush()")
    tracked = store.run()
    assert store.history(tracked, "system/system_memory_usage_percentage")
    assert "system/cpu_utilization_percentage" in tracked.data.metrics


def test_the_uploader_does_not_import_modules_from_the_working_directory(
    store: Store, tmp_path: Path
) -> None:
    for name in ("json", "mlflow", "sqlite3"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    program = tmp_path / "elsewhere" / "train.py"
    program.parent.mkdir()
    program.write_text(
        "from tracker import start_run\n"
        "with start_run() as run:\n    while run.run_id is None: run.flush()"
    )
    env = os.environ | {"MLFLOW_TRACKING_URI": store.uri, "TRACKER_INLINE": "0"}
    command = [sys.executable, str(program)]
    subprocess.run(command, env=env, check=True, timeout=600)
    assert store.run().info.status == "FINISHED"


def test_a_deleted_experiment_is_reported_and_nothing_is_lost(store: Store, run: Run) -> None:
    store.client.delete_experiment(store.client.create_experiment("gone"))
    program = (
        "import time\nfrom pathlib import Path\nfrom tracker import start_run\n"
        "from tracker.delivery.leftovers import journals, journal_status\n"
        "with start_run(experiment='gone'):\n"
        "    while journal_status(journals(Path('.tracker'))[0]).problem is None: time.sleep(0.1)"
    )
    done = run(program)
    assert "experiment='gone' is deleted; restore it with" in done.stderr
    assert "Finish it with: tracker sync" in done.stderr


def test_a_wrong_uri_is_an_error_before_anything_is_created(
    tmp_path: Path, trainers: ForkServer
) -> None:
    (tmp_path / "text.txt").write_text("no database")
    program = (
        "from tracker import start_run, StoreError\n"
        "try:\n    start_run(tracking_uri='sqlite:///text.txt', inline=False)\n"
        "except StoreError as error:\n    print(error)"
    )
    done = trainers.run(program)
    assert done.code == 0, done.output()
    assert "text.txt is not a SQLite file." in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("inline", "offline", "env", "mode"),
    [
        (None, None, {}, "process"),
        (True, None, {}, "inline"),
        (None, True, {}, "offline"),
        (None, None, {"TRACKER_INLINE": "1"}, "inline"),
        (None, None, {"TRACKER_OFFLINE": "True"}, "offline"),
        (False, False, {"TRACKER_INLINE": "1", "TRACKER_OFFLINE": "1"}, "process"),
        (True, None, {"TRACKER_OFFLINE": "1"}, "inline"),
        (None, True, {"TRACKER_INLINE": "1"}, "offline"),
        (None, None, {"TRACKER_INLINE": "False"}, "process"),
    ],
)
def test_an_argument_takes_precedence_over_the_variables(
    inline: bool | None,
    offline: bool | None,
    env: dict[str, str],
    mode: Mode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TRACKER_INLINE", "TRACKER_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert mode_of(inline=inline, offline=offline) == mode


def test_a_variable_that_is_neither_true_nor_false_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKER_INLINE", "perhaps")
    with pytest.raises(ArgumentError, match="TRACKER_INLINE='perhaps' is not allowed"):
        start_run()


def test_an_offline_run_is_on_disk_when_its_block_ends(
    tmp_path: Path, trainers: ForkServer
) -> None:
    program = (
        "import os\nfrom tracker import start_run\n"
        "with start_run(offline=True) as run:\n    run.log_metrics({'loss': 1.0})\nos._exit(0)"
    )
    assert trainers.run(program).code == 0
    assert main(["sync"]) == 0
    run = Store(f"sqlite:///{tmp_path / 'mlflow.db'}").run()
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss": 1.0}


def test_the_next_run_does_not_deliver_an_offline_run_in_the_same_folder(
    store: Store, run: Run, trainers: ForkServer
) -> None:
    program = "from tracker import start_run\nwith start_run(offline=True): pass"
    assert trainers.run(program).code == 0
    run("with start_run() as run:\n    while run.run_id is None: run.flush()")
    assert len(store.runs()) == 1
    assert main(["sync"]) == 0
    assert len(store.runs()) == 2


def test_a_parent_must_be_in_the_store_of_its_children(tmp_path: Path, store: Store) -> None:
    with start_run() as parent, pytest.raises(ArgumentError, match="must be in the store of its"):
        start_run(parent=parent, tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")


def test_a_port_of_another_service_is_refused_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        uri = f"http://127.0.0.1:{other.getsockname()[1]}"

        def answer() -> None:
            connection, _ = other.accept()
            connection.sendall(b"220 mail\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(StoreError, match=r"cannot be opened: .*220 mail"):
            start_run(tracking_uri=uri)
        thread.join()


def test_a_flush_in_the_journals_own_thread_does_not_wait_for_itself(tracking_uri: str) -> None:
    writer = JournalWriter(Path("journals"))
    asked: list[bool] = []
    writer.on_tick = lambda: asked.append(writer.flush())
    while not asked:
        writer.flush()
    assert asked[0] is False
    writer.on_tick = None
    writer.close()
