from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.programs import ROOT, ForkServer, Program

Start = Callable[..., Program]


@pytest.fixture(scope="session")
def search_server() -> Iterator[ForkServer]:
    """Starts programs that run studies."""
    server = ForkServer("tracker.search.study", "tracker.manager")
    yield server
    server.close()


@pytest.fixture
def start(search_server: ForkServer, workdir: Path, tracking_uri: str) -> Iterator[Start]:
    """Starts a program that runs a study in the test's folder; ends it with the test.

    `start(source, *arguments)` gets the program's source text and its command line.
    """
    programs: list[Program] = []

    def start(source: str, *arguments: object) -> Program:
        environment = {
            "MLFLOW_TRACKING_URI": tracking_uri,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TRACKER_INLINE": "0",
        }
        program = search_server.start(source, workdir, environment, *map(str, arguments))
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.kill_all()
