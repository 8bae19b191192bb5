"""Helpers for tests of journals: a recording store, journals to deliver, and printed lines."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import tracker
from tracker.errors import StoreError
from tracker.journal.reader import Journal
from tracker.journal.records import Begin, End, Epoch, Params, Point
from tracker.journal.writer import JournalWriter

PROJECT = Path(tracker.__file__).parents[1]

BEGIN = Begin("Default", None, None, {"tracker.run": "a"})


class Recorder:
    """A store that accepts and remembers everything, until call number `fails_at`."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012 - one store, opened again and again
    fails_at = 0

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri or "recorder:"

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

    def run_problem(self, run_id: str) -> str | None:
        return None

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

    def without_logged(self, run_id: str, metrics: Sequence[Any]) -> Sequence[Any]:
        return [point for point in metrics if ("metric", point) not in self.calls]

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self._called("text", name)

    def end_run(self, run_id: str, status: str, end_time: int) -> None:
        self._called("end", status)


def left_behind(directory: Path, uri: str, points: int = 40) -> Path:
    """The undelivered journal of a process that has ended, with one record per point."""
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


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """The content of each file in a folder, and the target of each link."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def one_sentence(text: str) -> str:
    """The only line of a text, which is not a traceback."""
    (line,) = text.splitlines()
    assert "Traceback" not in line
    return line


Output = pytest.CaptureFixture[str]


def said(capsys: Output) -> list[str]:
    """The lines printed since the last call, without those on what was delivered."""
    captured = capsys.readouterr()
    lines = [*captured.out.splitlines(), *captured.err.splitlines()]
    assert not any("Traceback" in line for line in lines)
    return [line for line in lines if not line.startswith("Uploaded ")]


def steps_of(calls: Sequence[tuple[str, Any]]) -> list[int]:
    return [what[2] for name, what in calls if name == "metric"]
