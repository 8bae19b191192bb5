from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.programs import ForkServer, Program, children_of

Start = Callable[..., Program]


def workers_of(search: Program) -> list[psutil.Process]:
    """The worker processes of a search; a separate process forks them."""
    servers = search.children("forkserver")
    return [worker for server in servers for worker in children_of(server.pid)]


@pytest.fixture
def start(trainers: ForkServer, workdir: Path, tracking_uri: str) -> Iterator[Start]:
    """Starts a program that runs a study in the test's folder; ends it with the test.

    `start(source, *arguments)` gets the program's source text and its command line, and more
    variables of its environment by name.
    """
    programs: list[Program] = []

    def start(source: str, *arguments: object, **environment: str) -> Program:
        program = trainers.start(
            source,
            *map(str, arguments),
            folder=workdir,
            MLFLOW_TRACKING_URI=tracking_uri,
            **{"TRACKER_INLINE": "0", **environment},
        )
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.kill_all()
