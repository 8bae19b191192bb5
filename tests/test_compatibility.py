"""Files of version 0.1.0 can still be read: a journal, a checkpoint, and a study with its journal.

The archives in `tests/data` were written by commit 44da99a, on another host, by processes that were
killed or interrupted.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Store
from tracker import Study, Trial, load_histograms
from tracker.cli import main
from tracker.training.checkpoint import load_checkpoint

DATA = Path(__file__).parent / "data"


def unpack(name: str, into: Path) -> Path:
    """Unpack an archive of `tests/data`."""
    folder = into / name
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(folder)
    for journal in folder.glob("*/journal.sqlite"):
        (journal.parent / "files").mkdir(exist_ok=True)
        lock = journal.with_name("writer.lock")
        lock.touch()
        os.utime(lock, (0, 0))  # its writer has been silent since
    return folder


def pictures() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.rand(24, 1, 4, 4, generator=generator), torch.randint(3, (24,), generator=generator)
    )


def test_a_journal_of_0_1_0_is_delivered_whole(store: Store, tmp_path: Path) -> None:
    folder = unpack("journal", tmp_path)
    assert main(["sync", str(folder), "--tracking-uri", store.uri]) == 0
    whole, cut_off = store.runs("old")
    assert [whole.info.status, cut_off.info.status] == ["FINISHED", "FAILED"]
    assert whole.data.params["lr"] == "0.1"
    assert whole.data.tags["note"] == "füchse"
    assert [step for step, _ in store.history(whole, "batch_loss")] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in store.history(cut_off, "batch_loss")] == [1, 2, 3]
    assert {"epochs.csv", "histograms.html", "notes/hello.txt", "samples.png"} <= store.artifacts(
        whole
    )
    assert "checkpoints/00000005/state.json" in store.artifacts(whole)
    assert len(whole.outputs.model_outputs) == 1
    assert set(load_histograms(whole.info.run_id, store.uri)["step"]) == {1, 2}
    assert list(folder.iterdir()) == []


def test_a_training_continues_from_a_checkpoint_of_0_1_0(tmp_path: Path) -> None:
    folder = unpack("checkpoint", tmp_path)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    loader = DataLoader(pictures(), batch_size=8, shuffle=True, generator=torch.Generator())

    checkpoint = load_checkpoint(folder / "00000004")
    assert (checkpoint.epoch, checkpoint.step, checkpoint.position) == (1, 4, 1)
    assert checkpoint.extra == {"seen": 8, "pair": (1, "two")}
    checkpoint.restore(network=network, optimizer=optimizer, scheduler=scheduler)
    losses = []
    for batches in (checkpoint.remaining(loader), loader):
        for inputs, labels in batches:
            loss = nn.functional.cross_entropy(network(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    expected = json.loads((folder / "expected.json").read_text())
    assert losses == pytest.approx(expected["losses"], rel=1e-5)


def objective(trial: Trial) -> Any:
    trial.report(trial.params["x"] ** 2, 0)
    return trial.params["x"] ** 2 + trial.params["width"]


SPACES: dict[str, tuple[dict[str, Any], int | None]] = {
    "grid": ({"x": [0.5, 1.0, 2.0], "width": [1, 2]}, None),
    "tpe": ({"x": optuna.distributions.FloatDistribution(-2, 2), "width": [1, 2, 4]}, 8),
}


def test_studies_of_0_1_0_continue_with_the_points_that_it_would_have_tried(
    store: Store, tmp_path: Path
) -> None:
    folder = unpack("study", tmp_path)
    storage = f"journal:///{folder / 'study.journal'}"
    expected = json.loads((folder / "expected.json").read_text())
    trials = {}
    for sampler, (space, budget) in SPACES.items():
        study = Study(
            f"old-{sampler}",
            objective,
            space=space,
            sampler=sampler,
            trials=budget,
            seed=7,
            retries=1,
            storage=storage,
            experiment="old",
            metric="loss",
            steps=1,
            models="none",
            fixed={"data": "toy"},
            directory=folder,
        ).run(resume=True)
        points = {
            str(trial.user_attrs["tracker:slot"]): [trial.params["x"], trial.params["width"]]
            for trial in study.trials
            if trial.state.name == "COMPLETE"
        }
        assert points == expected[study.study_name]
        trials[study.study_name] = len(study.trials)

    # The journal of the interrupted studies is still there, undelivered: each trial has one run.
    assert main(["sync", str(folder), "--tracking-uri", store.uri]) == 0
    for name, count in trials.items():
        runs = [run for run in store.runs("old") if run.data.tags["tracker.study"] == name]
        numbers = sorted(int(run.data.tags.get("optuna.trial", -1)) for run in runs)
        assert numbers == list(range(-1, count))
        assert not {run.info.status for run in runs} & {"RUNNING", "SCHEDULED"}
