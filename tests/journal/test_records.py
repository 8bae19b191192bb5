"""A record is read back as it was written, and anything else is rejected with the reason."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracker.journal.records import Begin, Epoch, Invalid, Metrics, Tags, decode, encode

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), JSON, max_size=3))
@settings(deadline=None, max_examples=50)
def test_any_json_is_read_back_as_it_was(row: dict[str, Any]) -> None:
    assert decode("epoch", encode(Epoch(row))) == Epoch(row)


def test_half_a_character_does_not_cost_its_record() -> None:
    emoji, half = "\N{GRINNING FACE}", "\ud83d"
    assert decode("epoch", encode(Epoch({emoji: half + emoji}))) == Epoch({emoji: "?" + emoji})


def test_nan_and_infinity_are_valid_numbers() -> None:
    record = decode("metrics", encode(Metrics([("a", math.nan, 0, 1), ("b", -math.inf, 0, 1)])))
    assert isinstance(record, Metrics)
    (_, a, *_), (_, b, *_) = record.metrics
    assert math.isnan(a)
    assert b == -math.inf


def test_scalars_of_numpy_and_torch_become_pythons_own() -> None:
    import numpy as np
    import torch

    row = {"loss": torch.tensor(0.5), "right": np.int64(3)}
    assert decode("epoch", encode(Epoch(row))) == Epoch({"loss": 0.5, "right": 3})


OLD = {
    "experiment": "Default",
    "experiment_id": None,
    "name": "fox",
    "tags": {"tracker.run": "a"},
    "parent": {"key": "b"},
    "adopt": None,
    "keyed": True,
    "queued": False,
    "resume": None,
    "samples": 0,
}


def test_a_beginning_of_another_version_is_read() -> None:
    """0.1.0 wrote `queued`, and did not know `placeholder`."""
    expected = Begin(
        *("Default", None, "fox", {"tracker.run": "a"}), parent={"key": "b"}, keyed=True
    )
    assert decode("begin", json.dumps(OLD)) == expected


HISTOGRAM = {"tensor": "w", "kind": "weight", "bins": [1], "counts": [2]}

MALFORMED: dict[str, list[Any]] = {
    "metrics": [
        *({}, {"metrics": None}, {"metrics": {"loss": 1}}, {"metrics": [None]}, {"metrics": [[]]}),
        *({"metrics": [["loss", "1", 1, 1]]}, {"metrics": [["loss", 1.0, "1", 1]]}),
        *({"metrics": [[None, 1.0, 1, 1]]}, {"metrics": [["loss", 1.0, 1, 1.5]]}),
        *({"metrics": [["loss", 1.0, 2**70, 1]]}, {"metrics": [["\udc80", 1.0, 1, 1]]}),
        *([], 1, '"text"', None),
    ],
    "params": [{}, {"params": []}, {"params": {"x": 1}}],
    "tags": [{}, {"tags": {"x": None}}, {"tags": {"\udc80": "x"}}],
    "epoch": [{}, {"row": 1}, {"row": [1]}, {"row": {"x": "\udc80"}}],
    "histograms": [
        *({}, {"step": "1", "histograms": []}, {"step": 1, "histograms": {}}),
        *({"step": 1, "histograms": [1]}, {"step": 1, "histograms": [HISTOGRAM]}),
        {"step": 1, "histograms": [HISTOGRAM | {"nan": 0, "posinf": 0, "neginf": 0, "bins": []}]},
    ],
    "file": [{}, {"staged": 1, "folder": None}, {"staged": "files/x/y", "folder": 1}],
    "delete": [{}, {"path": None}, {"path": "x\0y"}],
    "dataset": [
        *({}, {"dataset": {}, "context": "x"}, {"dataset": {"name": "x"}, "context": "x"}),
        {
            "dataset": dict.fromkeys(("name", "digest", "source_type", "source", "more"), "x"),
            "context": "x",
        },
    ],
    "model": [{}, {"staged": "files/x/y", "name": None, "step": 1}],
    "signal": [{}, {"signal": 15}],
    "end": [{}, {"status": "DONE"}, {"status": ["FINISHED"]}, {"status": {}}],
    "begin": [{}, {"tags": {}}, OLD | {"tags": {}}, OLD | {"parent": {}}],
    "nonsense": [{}, {"metrics": []}],
    "non\nsense" * 50: [{}],
}
NOT_JSON = ["", "{", "garbage", b"\xff\xff", "[" * 100_000, "9" * 10_000, '{"x": 1}{']


@pytest.mark.parametrize("kind", MALFORMED, ids=lambda kind: kind[:10])
def test_a_record_of_the_wrong_shape_is_rejected_in_one_short_sentence(kind: str) -> None:
    bodies = [json.dumps(body) for body in MALFORMED[kind]]
    for body in [*bodies, *NOT_JSON]:
        record = decode(kind, body)
        assert isinstance(record, Invalid), body
        assert len(record.problem.splitlines()) == 1
        assert 0 < len(record.problem) <= 200


@pytest.mark.parametrize("time", ["noon", 1e300, 2.5, None])
def test_a_record_without_a_time_is_rejected(time: Any) -> None:
    assert decode("tags", encode(Tags({})), time) == Invalid("tags", f"time={time} is not a time")
