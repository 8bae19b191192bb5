"""A checkpoint that another program has written is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tracker.errors import StoreError
from tracker.training.checkpoint import load_checkpoint, load_metrics
from tracker.training.checkpoint_files import write_files

WHOLE: dict[str, Any] = {
    "epoch": 1,
    "step": 2,
    "position": 0,
    "metrics": {"loss": 0.5},
    "extra": None,
    "random": {},
    "objects": {},
}
CHANGES: dict[str, dict[str, Any]] = {
    "a text as an epoch": {"epoch": "1"},
    "a negative step": {"step": -1},
    "a flag as a position": {"position": True},
    "metrics without names": {"metrics": [1.0, 2.0]},
    "a text as a metric": {"metrics": {"loss": "low"}},
    "a number of metrics": {"metrics": 5},
    "an unknown tensor": {"extra": {"!tensor": "none"}},
    "no bits": {"extra": {"!float": "xyz"}},
    "too few bits": {"extra": {"!float": "00"}},
    "an unknown device": {"extra": {"!device": "moon"}},
    "a function as a dtype": {"extra": {"!dtype": "load"}},
    "an object as a scalar": {"extra": {"!scalar": ["O", "00" * 8]}},
    "pairs without values": {"extra": {"!OrderedDict": [[1]]}},
    "a set of lists": {"extra": {"!set": [[1]]}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_foreign_state_is_one_sentence(change: str, tmp_path: Path) -> None:
    write_files(tmp_path / "a", {"x": torch.ones(1)}, WHOLE)
    assert load_checkpoint(tmp_path / "a").metrics == {"loss": 0.5}
    write_files(tmp_path / "a", {"x": torch.ones(1)}, WHOLE | CHANGES[change])
    with pytest.raises(StoreError, match=r"^\S+ is not a checkpoint of tracker\.$"):
        load_checkpoint(tmp_path / "a")


@pytest.mark.parametrize("metrics", [[1.0], {"loss": "low"}, 5, None])
def test_foreign_metrics_are_one_sentence(metrics: Any, tmp_path: Path) -> None:
    write_files(tmp_path / "a", {}, WHOLE | {"metrics": metrics})
    with pytest.raises(StoreError, match=r"^\S+ is not a checkpoint of tracker\.$"):
        load_metrics(tmp_path / "a" / "state.json")


def test_a_state_without_a_part_is_one_sentence(tmp_path: Path) -> None:
    for name in ("epoch", "step", "position", "metrics", "extra"):
        state = {key: value for key, value in WHOLE.items() if key != name}
        write_files(tmp_path / "a", {}, state)
        with pytest.raises(StoreError, match=r"^\S+ is not a checkpoint of tracker\.$"):
            load_checkpoint(tmp_path / "a")
