"""`RunManager(histograms=Every(…))`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import Store
from tracker import ArgumentError, Every, RunManager, load_histograms


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (True, {("epoch", e, n, k) for e in (1, 2) for n in "01" for k in ("weight", "gradient")}),
        (False, set()),
        (Every(epochs=2, only="1.*", gradients=False), {("epoch", 2, "1", "weight")}),
        (Every(steps=3, weights=False), {("step", s, n, "gradient") for s in (3, 6) for n in "01"}),
    ],
)
def test_histograms_are_logged_when_and_of_what_every_says(
    store: Store, every: Any, expected: set[Any]
) -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with RunManager(model=False, histograms=every) as manager:
        manager.begin_run({}, network, [])
        for _ in range(2):
            manager.begin_epoch()
            for _ in range(3):
                loss = network(torch.ones(1, 2)).sum()
                loss.backward()
                manager.track_loss(loss, 1)
            manager.end_epoch()
        manager.end_run()
    if not expected:
        assert not any("histogram" in file for file in store.artifacts(store.run()))
        return
    table = load_histograms(store.run().info.run_id, store.uri)
    keys = zip(table["unit"], table["step"], table["tensor"].str[0], table["kind"], strict=True)
    assert set(keys) == expected


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"epochs": 1.5}, {"steps": 1, "epochs": 1}, {"only": ""}]
)
def test_what_every_does_not_allow_is_refused(fields: Any) -> None:
    with pytest.raises(ArgumentError, match=r"not allowed|exclude"):
        Every(**fields)
    with pytest.raises(ArgumentError, match="histograms=3 is not allowed"):
        RunManager(histograms=3)  # type: ignore[arg-type]
