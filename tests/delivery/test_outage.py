"""Servers that go away, hang, fail, lose their answers or never existed do not affect training."""

from __future__ import annotations

import http.server
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from mlflow.entities import Run as MlflowRun

from tests.faults import FaultyProxy, TrackingServer
from tests.helpers import Store
from tests.programs import wait_for
from tracker.cli import main
from tracker.delivery.background import WARN_SECONDS
from tracker.delivery.leftovers import journal_status
from tracker.journal.reader import Journal

# Answers each line of its input with one of JSON, which also lists every socket it connected.
TRAINER = """
import sys
connected = []
sys.addaudithook(lambda event, given: connected.append(event) if event == "socket.connect" else 0)

import json, logging, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tracker import RunManager

def now():
    return time.time_ns() // 1_000_000

logging.basicConfig(format="%(levelname)s:%(name)s:%(message)s")
torch.manual_seed(0)
loader = DataLoader(TensorDataset(torch.rand(64, 8), torch.randint(3, (64,))), batch_size=16)
(batch, *_) = loader
network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
manager = RunManager(experiment=sys.argv[1], batch_loss=True)
run = manager.begin_run({"lr": 0.1}, network, loader)
manager.begin_epoch()
done = []

def steps(number):
    for step in range(len(done) + 1, len(done) + 1 + number):
        inputs, labels = batch
        loss = nn.functional.cross_entropy(network(inputs), labels)
        loss.backward()
        before = now()
        manager.track_loss(loss, batch)
        run.log_metrics({"loss_now": loss.detach()}, step)
        done.append((step, loss.item(), before, now()))
    return done

def notes(number):
    for note in range(number):
        run.log_tags({f"note.{note}": "x"})

def flush(seconds):
    return run.flush(seconds)

def end(_):
    manager.end_epoch()
    manager.end_run()

for line in sys.stdin:
    verb, number = line.split()
    said = {"steps": steps, "notes": notes, "flush": flush, "end": end}[verb](int(number))
    imported = "mlflow" in sys.modules and verb != "end"  # exporting the model needs it
    print(json.dumps({"said": said, "connected": connected, "imported": imported}), flush=True)
"""


class Trainer:
    """A training in a separate process."""

    def __init__(self, folder: Path, uri: str, experiment: str, **environment: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.done: list[tuple[int, float, int, int]] = []
        """Step, loss, and the milliseconds before and after it was logged."""
        own = {"TRACKER_INLINE": "0", "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", TRAINER, experiment],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=os.environ | own | environment,
                text=True,
            )

    @property
    def _log(self) -> Path:
        return self.folder / "trainer.log"

    def _tell(self, verb: str, number: int = 0) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{verb} {number}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._log.read_text()
        answer = json.loads(line)
        assert answer["connected"] == []  # no thread of the training has a socket to wait for
        assert not answer["imported"]
        return answer["said"]

    def steps(self, number: int) -> None:
        """Train `number` steps."""
        self.done = [tuple(each) for each in self._tell("steps", number)]

    def notes(self, number: int) -> None:
        """Set `number` tags, one record each."""
        self._tell("notes", number)

    def end(self) -> None:
        """End the run."""
        self._tell("end")

    def leave(self) -> int:
        """Let the program end; returns its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait()

    @property
    def warnings(self) -> list[str]:
        """The warnings that the user saw."""
        lines = self._log.read_text().splitlines()
        return [line for line in lines if line.startswith("WARNING:tracker")]

    @property
    def journals(self) -> list[Path]:
        """The program's journals."""
        return sorted((self.folder / ".tracker").glob("[!.]*"))

    @property
    def journal(self) -> Journal:
        """The only journal; the caller closes it."""
        (folder,) = self.journals
        return Journal(folder)

    def wait_for_delivery(self) -> None:
        """Wait until everything logged so far is delivered."""
        assert self._tell("flush", 120)

    def wait_for_problem(self, lasting: float = 0.0) -> str:
        """Wait until delivery has failed for `lasting` seconds; returns the problem."""
        with closing(self.journal) as journal:

            def has_lasted() -> bool:
                problem = journal.problem
                return problem is not None and time.time() > problem.since + lasting

            wait_for(has_lasted, "the uploader to meet the fault")
            problem = journal.problem
            assert problem is not None
            return problem.text

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.__exit__(kind, error, trace)  # closes its pipes and waits


def tracker(*arguments: str | Path, **streams: Any) -> subprocess.Popen[str]:
    """Start the command `tracker` with Ctrl-C as in a terminal; shells ignore it for their jobs."""
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from tracker.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.Popen(command, text=True, **streams)


def assert_warned_once(trainer: Trainer) -> None:
    """Check for one warning about all outages, and a line at the end only if something is left."""
    late = ("upload delayed", "the upload is slow")
    outages = [line for line in trainer.warnings if any(text in line for text in late)]
    assert len(outages) <= 1
    leftovers = [f"Finish it with: tracker sync {j}" for j in trainer.journals]
    rest = [line for line in trainer.warnings if line not in outages]
    assert len(rest) == len(leftovers)
    assert all(command in line for line, command in zip(rest, leftovers, strict=True))


def deliver_rest(proxy: FaultyProxy, trainer: Trainer) -> None:
    """Sync what the end of the training did not wait for."""
    proxy.behave("pass")
    for journal in trainer.journals:
        sync = tracker("sync", journal)
        _, err = sync.communicate()
        assert (sync.returncode, err) == (0, "")
    assert trainer.journals == []


def assert_all_arrived(server: TrackingServer, experiment: str, trainer: Trainer) -> MlflowRun:
    """Check that each point of the training is stored once, in its only run."""
    store = Store(server.uri)
    (run,) = store.runs(experiment)
    for name in ("loss_now", "batch_loss"):
        points = store.client.get_metric_history(run.info.run_id, name)
        points.sort(key=lambda point: point.step)
        assert [point.step for point in points] == [step for step, *_ in trainer.done]
        assert [point.value for point in points] == [loss for _, loss, *_ in trainer.done]
        assert [point.timestamp for point in points] == sorted(p.timestamp for p in points)
        for point, (_, _, before, after) in zip(points, trainer.done, strict=True):
            assert before <= point.timestamp <= after
    models = store.client.search_logged_models([run.info.experiment_id])
    assert [model.status for model in models] == ["READY"]
    assert [output.model_id for output in run.outputs.model_outputs] == [models[0].model_id]
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.1"
    assert {"epochs.csv", "histograms.html", "network/layers.csv"} <= store.artifacts(run)
    return run


@pytest.fixture
def proxy() -> Iterator[FaultyProxy]:
    with FaultyProxy() as proxy:
        yield proxy


# -- the proxy itself ------------------------------------------------------------------------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers with the request's body."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def ask(uri: str, body: bytes, path: str = "/x") -> bytes:
    with urllib.request.urlopen(uri + path, data=body, timeout=30) as answer:
        return bytes(answer.read())


def test_the_proxy_misbehaves_as_requested(proxy: FaultyProxy) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo) as behind:
        thread = threading.Thread(target=behind.serve_forever)
        thread.start()
        proxy.behind = behind.server_port
        try:
            assert ask(proxy.uri, b"1") == b"1"
            proxy.behave("error")
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                ask(proxy.uri, b"2")
            caught.value.close()
            proxy.behave("lose")
            with pytest.raises(ConnectionError):
                ask(proxy.uri, b"3")
            assert ask(proxy.uri, b"3") == b"3"
            assert ask(proxy.uri, b"4", "/x/search") == b"4"
            assert proxy.lost == ["POST /x"]
            proxy.behave("slow")
            assert ask(proxy.uri, b"5") == b"5"
            for _ in range(2):  # it comes back on the same port
                proxy.behave("refuse")
                with pytest.raises(urllib.error.URLError, match="refused"):
                    ask(proxy.uri, b"6")
                proxy.behave("pass")
                assert ask(proxy.uri, b"7") == b"7"
            proxy.behave("hang")
            answered = proxy.answered
            change = threading.Thread(
                target=lambda: (
                    wait_for(lambda: proxy.met["hang"], "the request to be taken"),
                    proxy.behave("pass"),
                )
            )
            change.start()
            with pytest.raises(ConnectionError):  # a hanging server never answers what it took
                ask(proxy.uri, b"8")
            change.join()
            assert proxy.answered == answered
        finally:
            behind.shutdown()
            thread.join()


# -- without a server ------------------------------------------------------------------------------


def test_status_and_sync_without_the_server(
    proxy: FaultyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "Everything is uploaded.\n"
    program = (
        "from tracker import start_run\n"
        f"with start_run(tracking_uri={proxy.uri!r}, offline=True) as run:\n"
        "    run.log_metrics({'loss': 1.0}, 1)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRACKER_INLINE"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    (journal,) = (tmp_path / ".tracker").iterdir()
    assert done.stderr.count("\n") == 1
    assert f"Finish it with: tracker sync {journal}" in done.stderr

    proxy.behave("refuse")
    assert main(["sync"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "refused" in said.err
    assert said.out == "Uploaded 0 records of 0 runs; 1 journal unfinished, see: tracker status\n"
    assert main(["status"]) == 0
    assert re.fullmatch(
        rf".tracker/{journal.name}\n  unfinished: 3 records of 1 run to upload\n"
        rf"  to {proxy.uri}\n",
        capsys.readouterr().out,
    )


# -- with one --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_continues_through_every_fault(
    tracking_server: TrackingServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.behind = tracking_server.port
    proxy.behave("lose")
    with Trainer(tmp_path, proxy.uri, "faults", MLFLOW_HTTP_REQUEST_TIMEOUT="2") as trainer:
        trainer.steps(50)
        trainer.wait_for_delivery()
        assert any(path.endswith("/runs/create") for path in proxy.lost)
        assert any(path.endswith("/runs/log-batch") for path in proxy.lost)
        for fault in ("refuse", "hang", "error", "killed"):
            if fault == "killed":
                tracking_server.kill()
                proxy.behave("pass")  # drops what is under way
            else:
                proxy.behave(fault)
            answered = proxy.answered
            trainer.steps(50)
            # Only the first outage is reported, even if a later one lasts as long.
            lasting = {"refuse": 0, "hang": WARN_SECONDS + 2}.get(fault, 0)
            assert trainer.wait_for_problem(lasting)
            if fault == "refuse":
                wait_for(lambda: trainer.warnings, "the warning")
            trainer.steps(50)
            assert proxy.answered == answered
            if fault == "killed":
                tracking_server.start()
            proxy.behave("pass")
            trainer.wait_for_delivery()
        proxy.behave("slow")
        trainer.steps(50)
        trainer.wait_for_delivery()
        proxy.behave("lose")
        trainer.steps(50)
        trainer.end()
        assert trainer.leave() == 0
    assert_warned_once(trainer)
    warning = trainer.warnings[0]
    assert "Saved on disk; upload delayed" in warning
    assert "tracker sync" in warning
    deliver_rest(proxy, trainer)
    assert any(path.endswith("/logged-models") for path in proxy.lost)
    assert_all_arrived(tracking_server, "faults", trainer)


@pytest.mark.slow
def test_a_server_that_is_killed_again_and_again_loses_nothing(
    tracking_server: TrackingServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.behind = tracking_server.port
    with Trainer(tmp_path, proxy.uri, "killed") as trainer:
        for _ in range(3):
            trainer.steps(20)  # some are being sent when it dies
            tracking_server.kill()
            trainer.steps(20)
            tracking_server.start()
        trainer.steps(20)
        trainer.end()
        assert trainer.leave() == 0
    assert_warned_once(trainer)
    deliver_rest(proxy, trainer)
    assert_all_arrived(tracking_server, "killed", trainer)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refuse", "hang", "hang later"])
def test_a_program_ends_without_its_server_and_sync_delivers(
    tracking_server: TrackingServer, proxy: FaultyProxy, tmp_path: Path, fault: str
) -> None:
    experiment = f"without: {fault}"
    if fault == "hang later":
        proxy.behind = tracking_server.port
    else:
        proxy.behave(fault)
    with Trainer(tmp_path, proxy.uri, experiment) as trainer:
        trainer.steps(50)
        if fault == "hang later":
            trainer.wait_for_delivery()
            proxy.behave("hang")
        answered = proxy.answered
        trainer.steps(50)
        trainer.notes(30)
        trainer.end()
        assert trainer.leave() == 0
    assert proxy.answered == answered
    assert fault == "hang later" or answered == 0
    (journal,) = trainer.journals
    outage, left = trainer.warnings
    # A request that hangs may only be slow: until it times out, the uploader is left to itself.
    is_delayed = "upload delayed" in outage and f"tracker sync {journal}" in outage
    assert is_delayed or ("the upload is slow" in outage and fault == "hang later")
    is_left = "which continues in the background; see: tracker status" in left
    assert f"Finish it with: tracker sync {journal}" in left or (is_left and fault == "hang later")
    wait_for(lambda: journal_status(journal).state == "unfinished", "the uploader gives up")

    status = tracker("status")
    out, err = status.communicate()
    assert (status.returncode, err) == (0, "")
    head, left_behind, goes_to, *problem = out.splitlines()
    assert head == f".tracker/{journal.name}"
    assert re.fullmatch(r"  unfinished: \d+ records of 1 run to upload", left_behind)
    assert goes_to == f"  to {proxy.uri}"
    assert len(problem) <= 1

    proxy.behind = tracking_server.port
    proxy.behave("slow")  # so that it can be stopped in the middle
    sync = tracker("sync", journal)
    wait_for(lambda: proxy.met["slow"] > 20, "20 slow requests")
    sync.send_signal(signal.SIGINT)
    _, err = sync.communicate()
    assert sync.returncode == 130
    assert err == "tracker: interrupted; repeat the command to continue.\n"
    assert journal.exists()

    proxy.behave("pass")
    master, terminal = pty.openpty()
    termios.tcsetwinsize(master, (24, 80))
    sync = tracker("sync", journal, stderr=terminal)
    os.close(terminal)
    with closing(os.fdopen(master, "rb", buffering=0)) as screen:
        shown = b""
        try:
            while some := screen.read(4096):
                shown += some
        except OSError:  # Linux: the terminal was closed
            pass
    out, _ = sync.communicate()
    assert sync.returncode == 0, shown
    assert re.fullmatch(r"Uploaded \d+ records of 1 run\.\n", out)
    assert re.search(rb"\d+/\d+ .*record", shown)
    assert trainer.journals == []
    assert tracker("status").communicate() == ("Everything is uploaded.\n", "")
    run = assert_all_arrived(tracking_server, experiment, trainer)
    assert {f"note.{number}" for number in range(30)} <= set(run.data.tags)


@pytest.mark.slow
def test_a_sync_with_lost_answers_makes_one_run(
    tracking_server: TrackingServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.behind = tracking_server.port
    with Trainer(tmp_path, proxy.uri, "synced", TRACKER_OFFLINE="1") as trainer:
        trainer.steps(5)
        trainer.end()
        assert trainer.leave() == 0
    proxy.behave("lose")
    (journal,) = trainer.journals
    tracker("sync", journal).communicate()
    assert any(path.endswith("/runs/create") for path in proxy.lost)
    deliver_rest(proxy, trainer)
    assert_all_arrived(tracking_server, "synced", trainer)


@pytest.mark.slow
def test_a_server_on_a_file_store_stores_nothing_twice(proxy: FaultyProxy, tmp_path: Path) -> None:
    with TrackingServer(tmp_path / "server", "file") as server:
        proxy.behind = server.port
        proxy.behave("lose")
        with Trainer(tmp_path / "training", proxy.uri, "files") as trainer:
            for _ in range(3):
                trainer.steps(20)
                trainer.wait_for_delivery()
            trainer.end()
            assert trainer.leave() == 0
        assert sum(path.endswith("/runs/log-batch") for path in proxy.lost) >= 3
        deliver_rest(proxy, trainer)
        assert_all_arrived(server, "files", trainer)
