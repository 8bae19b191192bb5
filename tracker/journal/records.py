"""What the bodies of a journal's records look like: a file may be damaged, or anybody's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from tracker.statuses import Status
from tracker.validation import RUN_TAG

Kind = Literal[
    "begin",
    "params",
    "tags",
    "metrics",
    "epoch",
    "histograms",
    "file",
    "delete",
    "dataset",
    "model",
    "signal",
    "end",
]


@dataclass(frozen=True)
class Record:
    """One thing that happened in a run."""

    seq: int
    """Its place in the journal, from 1."""
    run: str
    """The run's key in this journal; MLflow's run id is known once it is delivered."""
    time: int
    """When it happened, in milliseconds since 1970."""
    kind: Kind
    body: Mapping[str, Any]
    """What happened, by kind: see `run.py`, which writes them, and `uploader.py`, which reads."""


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: Any
    """A float, or a tensor of one number that nobody changes: it is read when it is written."""
    step: int
    time: int
    """Milliseconds since 1970."""


def now() -> int:
    """Milliseconds since 1970, the clock of MLflow."""
    return time.time_ns() // 1_000_000


_Check = Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, float) or _whole(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and _encodable(value)


def _path(value: Any) -> bool:
    return _text(value) and "\0" not in value


def _or_none(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(_text(k) and _text(v) for k, v in value.items())


def _tags_of_a_run(value: Any) -> bool:
    return _texts(value) and RUN_TAG in value


def _parent(value: Any) -> bool:
    return _texts(value) and ("run_id" in value or "key" in value)


def _row(value: Any) -> bool:
    return isinstance(value, dict) and _encodable(json.dumps(value, ensure_ascii=False))


def _points(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list)
        and len(point) == 4
        and _text(point[0])
        and _number(point[1])
        and _whole(point[2])
        and _whole(point[3])
        for point in value
    )


def _dataset(value: Any) -> bool:
    known = {"name", "digest", "source_type", "source", "schema", "profile"}
    return _texts(value) and {"name", "digest", "source_type", "source"} <= value.keys() <= known


def _histograms(value: Any) -> bool:
    return isinstance(value, list) and all(map(_histogram, value))


def _histogram(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    bins, counts = value.get("bins"), value.get("counts")
    return (
        isinstance(bins, list)
        and isinstance(counts, list)
        and len(bins) == len(counts)
        and all(isinstance(number, int) for number in (*bins, *counts))
        and all(_text(value.get(name)) for name in ("tensor", "kind"))
        and all(_whole(value.get(name)) for name in ("nan", "posinf", "neginf"))
    )


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_SHAPES: Mapping[str, Mapping[str, _Check]] = {
    "begin": {
        "experiment": _text,
        "experiment_id": _or_none(_text),
        "name": _or_none(_text),
        "tags": _tags_of_a_run,
        "parent": _or_none(_parent),
        "adopt": _or_none(_text),
        "resume": _or_none(_text),
        "samples": _number,
    },
    "params": {"params": _texts},
    "tags": {"tags": _texts},
    "metrics": {"metrics": _points},
    "epoch": {"row": _row},
    "histograms": {"step": _whole, "histograms": _histograms},
    "file": {"staged": _path, "folder": _or_none(_path)},
    "delete": {"path": _path},
    "dataset": {"dataset": _dataset, "context": _text},
    "model": {"staged": _path, "name": _path, "step": _whole},
    "signal": {"signal": _text},
    "end": {"status": get_args(Status).__contains__},
}


def validation_error(kind: str, body: Any, time: Any = 0) -> str | None:
    """Why a record of `kind` made at `time` can never be delivered; None where it has its shape."""
    if kind not in _SHAPES:
        return "its kind is not known"
    if not isinstance(body, dict):
        return "it has no fields"
    if not _whole(time):
        return f"time={repr(time)[:50]} is no time"
    for field, check in _SHAPES[kind].items():
        if field not in body:
            return f"it has no {field}"
        if not check(body[field]):
            return f"{field}={repr(body[field])[:50]} is not what it must be"
    return None
