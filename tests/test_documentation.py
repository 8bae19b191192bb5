"""The code in the documentation runs, and what it links to is there."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
import torch.nn.functional as F
from torch import optim
from torch.utils.data import DataLoader

from models import FashionCNN
from tests.helpers import Pictures, Store
from tracker import Study, fit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench/README.md"]


@pytest.fixture
def names() -> dict[str, Any]:
    """What the README's code takes for granted."""
    network, train_set = FashionCNN(), Pictures()
    return {
        **{"OrderedDict": OrderedDict, "DataLoader": DataLoader, "optim": optim, "F": F},
        **{"Network": FashionCNN, "train_set": train_set, "network": network},
        "loader": DataLoader(train_set, batch_size=100),
        "optimizer": optim.Adam(network.parameters()),
        **{"torch": torch, "optuna": optuna, "Study": Study, "fit": fit},
    }


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_tutorial_s_loop_in_the_readme(store: Store, names: dict[str, Any]) -> None:
    after = code_blocks()[1]
    exec(after, names)
    assert [run.info.status for run in store.runs()] == ["FINISHED"] * 4
    assert Path("results.csv").exists()


def test_the_fresh_start_in_the_readme(store: Store, names: dict[str, Any]) -> None:
    fresh = code_blocks()[2]
    exec(fresh, names)
    (run,) = store.runs("digits")
    assert run.info.status == "FINISHED"
    assert {"loss", "accuracy", "epoch_duration"} <= set(run.data.metrics)
    assert len(run.outputs.model_outputs) == 1


def test_the_search_in_the_readme(store: Store, names: dict[str, Any]) -> None:
    search = code_blocks()[3]
    assert len(search.splitlines()) <= 40
    exec(search, names | {"__name__": "__main__"})
    runs = store.runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 9
    assert sum("mlflow.parentRunId" in run.data.tags for run in runs) == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
