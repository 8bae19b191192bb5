"""How long a logging call blocks while the server is unreachable.

python -m bench.outage [--only up|refused|hanging|503|restarted]

A real server stands behind a proxy that misbehaves. Each contestant meets each fault in a separate
process, which begins its run while the server is up. The rows "nothing" make no call: they show the
noise of the machine, and of a server that starts on the same cores.
"""

from __future__ import annotations

import argparse
import os
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.measuring import machine, table
from studies.arguments import RAW, positive_int
from tests.faults import Behaviour, FaultyProxy, TrackingServer

if TYPE_CHECKING:
    from torch import Tensor

STEP_SECONDS = 0.002
RESTARTS = 10
GOAL_SECONDS = 1e-3
PATIENCE_SECONDS = 300.0  # for everything but a contestant's call
TRACKER, TRACK_LOSS = "tracker log_metrics", "tracker track_loss, batch_loss=True"
MLFLOW, NOTHING = "MLflow log_metric", "nothing"
CONTESTANTS = (TRACKER, TRACK_LOSS, MLFLOW)
FAULTS: dict[str, Behaviour] = {
    "up": "pass",
    "refused": "refuse",
    "hanging": "hang",
    "503": "error",
    "restarted": "pass",
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="bench.outage", description=__doc__, formatter_class=RAW)
    parser.add_argument(
        "--steps",
        type=positive_int,
        default=3_000,
        metavar="N",
        help="steps per contestant and fault; default: 3000",
    )
    parser.add_argument(
        "--limit",
        type=positive_int,
        default=20,
        metavar="S",
        help="seconds after which plain MLflow is stopped under a fault; default: 20",
    )
    parser.add_argument(
        "--restarts",
        type=positive_int,
        default=RESTARTS,
        metavar="N",
        help=f"restarts of the server under the fault restarted; default: {RESTARTS}",
    )
    parser.add_argument("--only", choices=list(FAULTS), help="measure one fault; default: all")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        contestant, uri, experiment = given.worker
        work(contestant, uri, experiment, given.steps)
        return
    print(machine("torch", "mlflow", threads=1), flush=True)
    rows: list[list[str]] = []
    verdicts: list[str] = []
    with tempfile.TemporaryDirectory() as name, TrackingServer(Path(name) / "server") as server:
        for fault in [given.only] if given.only else FAULTS:
            noise = (NOTHING,) if fault in ("up", "restarted") else ()
            for contestant in (*noise, *CONTESTANTS):
                folder = Path(name) / f"{len(rows)}"
                folder.mkdir()
                calls = measure(contestant, fault, server, folder, given)
                rows.append([f"{fault}: {contestant}", *calls.cells()])
                if contestant in (TRACKER, TRACK_LOSS):
                    late = calls.quantile(0.999)
                    verdict = "met" if late < GOAL_SECONDS else "MISSED"
                    verdicts.append(
                        f"goal: {fault}: {contestant}, 99.9 % < {GOAL_SECONDS * 1e6:,.0f} µs: "
                        f"{late * 1e6:,.0f}, {verdict}"
                    )
    table(
        f"One call per step, {given.steps:,} steps of {STEP_SECONDS * 1e3:.0f} ms of work; "
        f"`restarted`: as many more as it takes to kill\nand restart the server "
        f"{given.restarts} times. Plain MLflow is stopped after {given.limit} s per fault.",
        ["server", "calls", "arrived", "median, µs", "99.9 %, µs", "maximum, µs"],
        rows,
    )
    print("\n".join(verdicts))


class Calls(NamedTuple):
    """The calls of one contestant under one fault."""

    seconds: list[float]
    cut: bool
    """Whether the last call had not returned when the contestant was stopped."""
    arrived: int | None
    """Points on the server in the end."""

    def quantile(self, share: float) -> float:
        """Return the seconds that this share of the calls took at most."""
        return float(np.quantile(self.seconds, share, method="higher"))

    def cells(self) -> list[str]:
        """Return the contestant's cells of the table."""
        arrived = "" if self.arrived is None else f"{self.arrived:,}"
        times = [self._shown(self.quantile(share)) for share in (0.5, 0.999, 1.0)]
        return [f"{len(self.seconds):,}", arrived, *times]

    def _shown(self, value: float) -> str:
        if self.cut and value == self.seconds[-1]:
            return f"> {value:.0f} s (cut)"
        return f"{value * 1e6:,.0f}"


def measure(
    contestant: str, fault: str, server: TrackingServer, folder: Path, given: argparse.Namespace
) -> Calls:
    """Measure a contestant under a fault, in a separate process.

    Args:
        contestant: One of `CONTESTANTS`, or `NOTHING`.
        fault: A key of `FAULTS`.
        server: The server, which is up.
        folder: An empty folder for the process.
        given: The parsed command line.

    Raises:
        RuntimeError: The process did not start.
    """
    calls, stop = folder / "calls", folder / "stop"
    experiment = f"{fault}, {contestant}".replace("=", " ")
    command = [sys.executable, "-m", "bench.outage", "--steps", str(given.steps)]
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultyProxy(server.port))
        log = stack.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [*command, "--worker", contestant, proxy.uri, experiment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            cwd=folder,
            env=_environment(),
        )
        stack.callback(_finish, process)
        if not _printed(process, b"ready\n", PATIENCE_SECONDS):
            raise RuntimeError(f"{contestant} did not start:\n{(folder / 'log').read_text()}")
        proxy.behave(FAULTS[fault])
        _proceed(process)
        if fault == "restarted":
            arguments = server, given.restarts, stop, process
            restarting = threading.Thread(target=_restart, args=arguments)
            restarting.start()
            stack.callback(restarting.join)
        else:
            stop.touch()
        limit = given.limit if contestant == MLFLOW else PATIENCE_SECONDS
        done = _printed(process, b"done\n", limit)
        if not done:
            process.kill()
        now = time.perf_counter()
        proxy.behave("pass")
        if done:
            _proceed(process)
            process.wait(PATIENCE_SECONDS)
            if (folder / ".tracker").exists():  # upload what the process left, as it says to
                sync = [sys.executable, "-m", "tracker.cli", "sync"]
                subprocess.run(sync, cwd=folder, env=_environment(), stdout=log, stderr=log)
    # For each call its start, and its duration unless it never returned.
    moments = [moment for (moment,) in struct.iter_unpack("d", calls.read_bytes())]
    cut = len(moments) % 2 == 1
    took = moments[1::2] + [now - moments[-1]] * cut
    return Calls(took, cut, None if contestant == NOTHING else _arrived(server, experiment))


def _environment() -> dict[str, str]:
    """This process's environment without settings of MLflow or the tracker."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TRACKER_"))}
    own = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(Path(__file__).parents[1])}
    return kept | own


def _proceed(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")


def _printed(process: subprocess.Popen[bytes], word: bytes, seconds: float) -> bool:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], seconds)
    return bool(readable) and process.stdout.readline() == word


def _finish(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait()


def _restart(
    server: TrackingServer, times: int, stop: Path, process: subprocess.Popen[bytes]
) -> None:
    for _ in range(times):
        if process.poll() is not None:  # it was stopped
            break
        server.kill()
        server.start()
    stop.touch()


def _arrived(server: TrackingServer, experiment: str) -> int:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    stored = client.get_experiment_by_name(experiment)
    assert stored is not None
    (run,) = client.search_runs([stored.experiment_id])
    name = "batch_loss" if "batch_loss" in run.data.metrics else "loss"
    return len(client.get_metric_history(run.info.run_id, name))


# -- in the contestant's process -------------------------------------------------------------------


def work(contestant: str, uri: str, experiment: str, steps: int) -> None:
    """Train as a contestant, and write the time of each call to the file `calls`.

    Args:
        contestant: One of `CONTESTANTS`, or `NOTHING`.
        uri: The tracking server.
        experiment: The experiment to log to.
        steps: Steps to train at least; continues until the file `stop` exists.
    """
    import torch

    torch.set_num_threads(1)
    with ExitStack() as stack:
        call = _logging_call(contestant, uri, experiment, stack)
        record = stack.enter_context(Path("calls").open("wb", buffering=0))
        print("ready", flush=True)
        sys.stdin.readline()
        matrix, step, stop = torch.rand(128, 128), 0, Path("stop")
        while step < steps or not stop.exists():
            step += 1
            until = time.perf_counter() + STEP_SECONDS
            while time.perf_counter() < until:
                loss = (matrix @ matrix).mean()
            # Not measured: a busy disk may block it. perf_counter is the same in all processes.
            record.write(struct.pack("d", time.perf_counter()))
            started = time.perf_counter()
            call(loss, step)
            ended = time.perf_counter()
            record.write(struct.pack("d", ended - started))
        print("done", flush=True)
        sys.stdin.readline()


def _logging_call(
    contestant: str, uri: str, experiment: str, stack: ExitStack
) -> Callable[[Tensor, int], object]:
    """Begin a run on the server and return what the contestant calls in each step."""
    import torch

    from tracker import RunManager, start_run

    if contestant == TRACKER:
        run = stack.enter_context(start_run(tracking_uri=uri, experiment=experiment))
        run.flush(PATIENCE_SECONDS)
        return lambda loss, step: run.log_metrics({"loss": loss}, step)
    if contestant == TRACK_LOSS:
        manager = stack.enter_context(
            RunManager(
                tracking_uri=uri,
                experiment=experiment,
                batch_loss=True,
                histograms=False,
                model=False,
            )
        )
        batch = (torch.rand(16, 4), torch.zeros(16))
        begun = manager.begin_run({"lr": 0.1}, torch.nn.Linear(4, 1), [batch])
        manager.begin_epoch()
        stack.callback(manager.end_run)
        stack.callback(manager.end_epoch)
        begun.flush(PATIENCE_SECONDS)
        return lambda loss, _: manager.track_loss(loss, batch)
    if contestant == MLFLOW:
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        own = client.create_run(client.create_experiment(experiment))
        return lambda loss, step: client.log_metric(own.info.run_id, "loss", float(loss), step=step)
    return lambda *_: None


if __name__ == "__main__":
    main()
