"""What a call of logging waits for while the server is away: `python -m bench.outage`.

A real server stands behind a proxy that misbehaves. Each contestant meets each fault in a process
of its own, which first begins its run with the server up. The rows "nothing" call nothing: they
show the machine's own noise, and that of a server that starts on the same cores.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bench.measuring import table
from studies.arguments import positive_int
from tests.faults import Behaviour, FaultyProxy, TrackingServer

if TYPE_CHECKING:
    from torch import Tensor

STEP_SECONDS = 0.002
RESTARTS = 10
GOAL_SECONDS = 1e-3
PATIENCE_SECONDS = 300.0  # for what is no contestant's call
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
    parser = argparse.ArgumentParser(prog="bench.outage", description=__doc__)
    parser.add_argument("--steps", type=positive_int, default=3_000)
    parser.add_argument(
        "--limit", type=positive_int, default=20, help="seconds that plain MLflow has for a fault"
    )
    parser.add_argument("--restarts", type=positive_int, default=RESTARTS)
    parser.add_argument("--only", choices=list(FAULTS))
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        who, uri, experiment = given.worker
        work(who, uri, experiment, given.steps)
        return
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    print(
        f"{date.today()}, {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores, "
        f"1 thread, Python {platform.python_version()}, torch {version('torch')}, "
        f"MLflow {version('mlflow')}",
        flush=True,
    )
    rows: list[list[str]] = []
    verdicts: list[str] = []
    with tempfile.TemporaryDirectory() as name, TrackingServer(Path(name) / "server") as server:
        for fault in [given.only] if given.only else FAULTS:
            noise = (NOTHING,) if fault in ("up", "restarted") else ()
            for who in (*noise, *CONTESTANTS):
                place = Path(name) / f"{len(rows)}"
                place.mkdir()
                found = measure(who, fault, server, place, given)
                rows.append([f"{fault}: {who}", *found.cells()])
                if who in (TRACKER, TRACK_LOSS):
                    late = found.at(0.999)
                    verdict = "met" if late < GOAL_SECONDS else "MISSED"
                    verdicts.append(
                        f"goal: {fault}: {who}, 99.9 % < {GOAL_SECONDS * 1e6:,.0f} µs: "
                        f"{late * 1e6:,.0f}, {verdict}"
                    )
    table(
        f"One call a step, {given.steps:,} steps of {STEP_SECONDS * 1e3:.0f} ms of work; "
        f"`restarted`: as many more as it takes to kill\nand start the server "
        f"{given.restarts} times. Plain MLflow is cut after {given.limit} s a fault.",
        ["server", "calls", "arrived", "median, µs", "99.9 %, µs", "maximum, µs"],
        rows,
    )
    print("\n".join(verdicts))


class Calls(NamedTuple):
    """What the calls of one contestant took."""

    seconds: list[float]
    cut: bool
    """Whether the last of them had not returned yet."""
    arrived: int | None
    """Points on the server in the end."""

    def at(self, share: float) -> float:
        """The seconds that this share of the calls stayed within."""
        return float(np.quantile(self.seconds, share, method="higher"))

    def cells(self) -> list[str]:
        """Its columns of the table."""
        arrived = "" if self.arrived is None else f"{self.arrived:,}"
        times = [self._shown(self.at(share)) for share in (0.5, 0.999, 1.0)]
        return [f"{len(self.seconds):,}", arrived, *times]

    def _shown(self, value: float) -> str:
        if self.cut and value == self.seconds[-1]:
            return f"> {value:.0f} s (cut)"
        return f"{value * 1e6:,.0f}"


def measure(
    who: str, fault: str, server: TrackingServer, place: Path, given: argparse.Namespace
) -> Calls:
    """Have a contestant meet a fault, in a process of its own that works in `place`."""
    calls, stop = place / "calls", place / "stop"
    command = [sys.executable, "-m", "bench.outage", "--steps", str(given.steps), "--worker", who]
    with ExitStack() as stack:
        proxy = stack.enter_context(FaultyProxy(server.port))
        log = stack.enter_context((place / "log").open("wb"))
        process = subprocess.Popen(
            [*command, proxy.uri, f"{fault}, {who}".replace("=", " ")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            cwd=place,
            env=_environment(),
        )
        stack.callback(_finish, process)
        if not _said(process, b"ready\n", PATIENCE_SECONDS):
            raise RuntimeError(f"{who} did not begin:\n{(place / 'log').read_text()}")
        proxy.behave(FAULTS[fault])
        _tell(process)
        if fault == "restarted":
            until = given.restarts, stop
            restarting = threading.Thread(target=_restart, args=(server, *until, process))
            restarting.start()
            stack.callback(restarting.join)
        else:
            stop.touch()
        limit = given.limit if who == MLFLOW else PATIENCE_SECONDS
        done = _said(process, b"done\n", limit)
        if not done:
            process.kill()
        now = time.perf_counter()
        proxy.behave("pass")
        if done:
            _tell(process)
            process.wait(PATIENCE_SECONDS)
            if (place / ".tracker").exists():  # as its user is told to, if its end came too soon
                sync = [sys.executable, "-m", "tracker.cli", "sync"]
                subprocess.run(sync, cwd=place, env=_environment(), stdout=log, stderr=log)
    # Of each call when it started, and, unless that was never, how long it took.
    moments = [moment for (moment,) in struct.iter_unpack("d", calls.read_bytes())]
    cut = len(moments) % 2 == 1
    took = moments[1::2] + [now - moments[-1]] * cut
    return Calls(took, cut, None if who == NOTHING else _arrived(server, f"{fault}, {who}"))


def _environment() -> dict[str, str]:
    """Defaults, whatever this shell has set."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TRACKER_"))}
    own = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(Path(__file__).parents[1])}
    return kept | own


def _tell(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"go\n")


def _said(process: subprocess.Popen[bytes], word: bytes, seconds: float) -> bool:
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
        if process.poll() is not None:  # it was cut
            break
        server.kill()
        server.start()
    stop.touch()


def _arrived(server: TrackingServer, experiment: str) -> int:
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    found = client.get_experiment_by_name(experiment.replace("=", " "))
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    name = "batch_loss" if "batch_loss" in run.data.metrics else "loss"
    return len(client.get_metric_history(run.info.run_id, name))


# -- in the contestant's process -------------------------------------------------------------------


def work(who: str, uri: str, experiment: str, steps: int) -> None:
    """Train as `who`, in the current directory; the times of all calls go to the file `calls`."""
    import torch

    torch.set_num_threads(1)
    with ExitStack() as stack:
        call = _contestant(who, uri, experiment, stack)
        record = stack.enter_context(Path("calls").open("wb", buffering=0))
        print("ready", flush=True)
        sys.stdin.readline()
        matrix, step, stop = torch.rand(128, 128), 0, Path("stop")
        while step < steps or not stop.exists():
            step += 1
            until = time.perf_counter() + STEP_SECONDS
            while time.perf_counter() < until:
                loss = (matrix @ matrix).mean()
            # Outside what is measured: a disk that is busy holds it up. All processes' one clock.
            record.write(struct.pack("d", time.perf_counter()))
            started = time.perf_counter()
            call(loss, step)
            ended = time.perf_counter()
            record.write(struct.pack("d", ended - started))
        print("done", flush=True)
        sys.stdin.readline()


def _contestant(
    who: str, uri: str, experiment: str, stack: ExitStack
) -> Callable[[Tensor, int], object]:
    """What is called each step, when its run has begun on the server."""
    import torch

    from tracker import RunManager, start_run

    if who == TRACKER:
        run = stack.enter_context(start_run(tracking_uri=uri, experiment=experiment))
        run.flush(PATIENCE_SECONDS)
        return lambda loss, step: run.log_metrics({"loss": loss}, step)
    if who == TRACK_LOSS:
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
    if who == MLFLOW:
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        own = client.create_run(client.create_experiment(experiment))
        return lambda loss, step: client.log_metric(own.info.run_id, "loss", float(loss), step=step)
    return lambda *_: None


if __name__ == "__main__":
    main()
