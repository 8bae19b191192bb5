"""The records of a journal, as they are written, stored, validated and read.

A record is stored as its kind and a JSON object of its fields. Unknown fields are ignored, and
fields with a default may be missing, so that journals of other versions can be read. Records are
validated only when they are read: the file may be damaged, or written by another program.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NotRequired

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from tracker.statuses import Status
from tracker.validation import RUN_TAG

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RelativePath = Annotated[str, Field(pattern=r"^[^\x00]*$")]

_MAX_PROBLEM = 200  # characters
_KINDS: dict[str, type[Record]] = {}


class Point(NamedTuple):
    """One value of a metric."""

    name: str
    value: Any
    """A float, or an `Arriving`, which is read when it is written."""
    step: int
    time: int
    """Milliseconds since 1970."""


class Parent(TypedDict):
    """A parent run: its id in MLflow, or its key in this or another journal."""

    run_id: NotRequired[str]
    key: NotRequired[str]


class Histogram(TypedDict):
    """The histogram of one tensor; see `tracker.capture.histograms` for the bins."""

    tensor: str
    kind: str
    bins: list[int]
    counts: list[int]
    nan: Int64
    posinf: Int64
    neginf: Int64


def _must(holds: Callable[[Any], bool], problem: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(problem)
        return value

    return AfterValidator(check)


def _is_dataset(fields: dict[str, str]) -> bool:
    required = {"name", "digest", "source_type", "source"}
    return required <= fields.keys() <= required | {"schema", "profile"}


class Record:
    """What happened in a run: the base of the classes below, whose names are the kinds."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.kind = cls.__name__.lower()
        _KINDS[cls.kind] = cls


@dataclass(frozen=True)
class Begin(Record):
    """A run begins, or continues an earlier one."""

    experiment: str
    experiment_id: str | None
    """The experiment's id, if it was given."""
    name: str | None
    tags: Annotated[dict[str, str], _must(lambda tags: RUN_TAG in tags, f"{RUN_TAG} is missing")]
    parent: Annotated[Parent, _must(bool, "it names no run")] | None = None
    adopt: str | None = None
    """The id of the run that `mlflow run` created for this one, or that MLFLOW_RUN_ID names."""
    resume: str | None = None
    """The id of the run that continues as this one."""
    samples: float = 0
    """How many samples of the system the resumed run has."""
    keyed: bool = False
    """Whether the caller chose the run's key: other processes may create a run under it too."""
    placeholder: bool = False
    """Whether another run with the same key replaces this one."""
    named: bool = False
    """Whether the user named the experiment: its id and an adopted run must agree with that."""


@dataclass(frozen=True)
class Params(Record):
    """Hyperparameters, as text."""

    params: Mapping[str, str]


@dataclass(frozen=True)
class Tags(Record):
    """Tags, which replace those of the same name."""

    tags: Mapping[str, str]


@dataclass(frozen=True)
class Metrics(Record):
    """Points of metrics: name, value, step and milliseconds since 1970 of each."""

    metrics: Sequence[tuple[str, float, Int64, Int64]]


@dataclass(frozen=True)
class Epoch(Record):
    """A row of the table of epochs."""

    row: Mapping[str, Any]


@dataclass(frozen=True)
class Histograms(Record):
    """The histograms of some tensors at one step."""

    step: Int64
    histograms: list[
        Annotated[
            Histogram, _must(lambda h: len(h["bins"]) == len(h["counts"]), "a count is missing")
        ]
    ]
    there: bool = False
    """Whether the run that is resumed has them already."""
    unit: Literal["epoch", "step"] = "epoch"
    """What `step` counts."""
    part: int = 0
    """How many records of the run have the same step and unit, and come before this one."""


@dataclass(frozen=True)
class File(Record):
    """A file, or a folder's content, to be uploaded as an artifact."""

    staged: RelativePath
    """Its path in the journal's folder."""
    folder: RelativePath | None
    """The folder of the run's artifacts that it goes to."""
    passing: bool = False
    """Whether it may be removed before it is uploaded, as a superseded checkpoint is."""


@dataclass(frozen=True)
class Delete(Record):
    """An artifact to be deleted."""

    path: RelativePath


@dataclass(frozen=True)
class Dataset(Record):
    """A data set that the run uses."""

    dataset: Annotated[dict[str, str], _must(_is_dataset, "it is not MLflow's Dataset")]
    """The fields of `mlflow.entities.Dataset`."""
    context: str


@dataclass(frozen=True)
class Model(Record):
    """A saved MLflow model to be uploaded."""

    staged: RelativePath
    name: RelativePath
    step: Int64


@dataclass(frozen=True)
class Signal(Record):
    """The process received a signal that ends it."""

    signal: str


@dataclass(frozen=True)
class End(Record):
    """The run ends."""

    status: Status


@dataclass(frozen=True)
class Invalid:
    """A row that is not a record, and can never be delivered."""

    kind: str
    problem: str
    """Why, without a full stop."""


class Entry(NamedTuple):
    """A row of a journal."""

    seq: int
    """Its place in the journal, from 1."""
    run: str
    """The run's key; MLflow's run id is known once the run is delivered."""
    time: int
    """When it was made, in milliseconds since 1970."""
    record: Record | Invalid


def now() -> int:
    """Return the milliseconds since 1970, the clock of MLflow."""
    return time.time_ns() // 1_000_000


def encode(record: Record) -> str:
    """Return the body of a record: its fields as JSON.

    Raises:
        TypeError: A value is neither JSON nor a NumPy scalar or tensor of one number.
    """
    text = json.dumps(vars(record), default=_python_scalar)
    if "\\ud" in text:  # perhaps half of a character, which `decode` refuses
        plain = json.dumps(json.loads(text), ensure_ascii=False)
        text = plain.encode(errors="replace").decode()
    return text


def decode(kind: str, body: bytes | str, at: Any = 0) -> Record | Invalid:
    """Return the record that a row holds, or why it is not a record.

    Args:
        kind: The kind of the record.
        body: Its fields as JSON.
        at: When it was made, in milliseconds since 1970.
    """
    if kind not in _KINDS:
        return Invalid(str(kind), "its kind is not known")
    if not isinstance(at, int):
        return Invalid(kind, f"time={at!s:.50} is not a time")
    try:
        return _adapter(kind).validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        problem = f"{where}: {first['msg']}" if where else first["msg"]
        return Invalid(kind, " ".join(problem.split())[:_MAX_PROBLEM])


@cache
def _adapter(kind: str) -> TypeAdapter[Record]:
    return TypeAdapter(_KINDS[kind])


def _python_scalar(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")
