"""Views of a training: in a notebook, in a terminal, in TensorBoard, or none."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tensorboard.backend.event_processing.event_accumulator import (
    COMPRESSED_HISTOGRAMS,
    HISTOGRAMS,
    IMAGES,
    SCALARS,
    TENSORS,
    EventAccumulator,
)
from torch import nn, optim
from torch.utils.data import DataLoader

from models import FashionCNN
from tests.helpers import Store, train_epoch
from tests.programs import ForkServer
from tracker import ArgumentError, Every, RunBuilder, RunManager, load_histograms
from tracker.views.base import View, Views

PROGRAM = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from tracker import RunManager
network = torch.nn.Linear(2, 2)
loader = DataLoader(TensorDataset(torch.rand(40, 2), torch.zeros(40, dtype=torch.int64)), 10)
manager = RunManager(model=False)
manager.begin_run({"lr": 0.1}, network, loader)
for epoch in range(3):
    manager.begin_epoch()
    for batch in loader:
        manager.track_loss(torch.tensor(0.5), batch)
    manager.end_epoch()
manager.end_run()
"""


def test_nothing_is_printed_without_a_terminal_or_a_notebook(
    store: Store, deliverers: ForkServer
) -> None:
    done = deliverers.run(PROGRAM)
    assert (done.code, done.output()) == (0, "")
    assert store.run().info.status == "FINISHED"


def test_a_terminal_shows_a_progress_bar_and_one_line_per_epoch(store: Store) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=follower)
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", seen.decode())
    assert re.search(r"epoch 1: +\d+%\|.*\| \d/4", text)
    lines = [line.rpartition("\r")[2].strip() for line in text.replace("\r\n", "\n").split("\n")]
    assert lines[0] == "run 1  lr=0.1"
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1", "epoch 2", "epoch 3"]
    assert all("loss 0.5" in line for line in epochs)


def test_the_progress_of_a_loop_within_an_epoch_has_the_number_of_that_epoch(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []
    with RunManager(model=False) as manager:
        manager.begin_run({}, None, [1, 2])
        monkeypatch.setattr(manager._views, "begin_epoch", lambda number, _: shown.append(number))
        manager.begin_epoch()
        assert list(manager.progress(manager.loader)) == [1, 2]
        manager.end_epoch()
    assert shown == [1, 1]


def test_a_notebook_shows_one_table_that_is_updated_in_place(store: Store, tmp_path: Path) -> None:
    twice = PROGRAM + PROGRAM.partition("manager = RunManager(model=False)")[2]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(twice)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[0].outputs
    (output,) = (item for item in outputs if item.output_type == "display_data")
    table = output.data["text/html"]
    assert table.count("<tr") == 7  # the header, and three epochs of two runs
    assert "epoch duration" in table


def test_a_notebook_cell_that_raises_ends_its_run_as_failed(store: Store, tmp_path: Path) -> None:
    cells = [
        PROGRAM.partition("for epoch")[0] + "manager.begin_epoch()\n1 / 0",
        "manager.begin_run({'lr': 0.2}, network, loader)\nmanager.end_run()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, timeout=120, allow_errors=True)
    client.execute(cwd=str(tmp_path))
    failed, finished = store.runs()
    assert failed.info.status == "FAILED"
    assert failed.data.tags["tracker.failure"].startswith("ZeroDivisionError")
    assert finished.info.status == "FINISHED"


def test_tensorboard_reads_scalars_histograms_pictures_graph_and_hyperparameters(
    store: Store, network: FashionCNN, loader: DataLoader[Any], tmp_path: Path
) -> None:
    (grid,) = RunBuilder.get_runs({"lr": [0.1], "batch_size": [100], "loss": ["mse"]})
    optimizer = optim.SGD(network.parameters(), lr=grid.lr)
    with RunManager(tensorboard="runs", model=False) as manager:
        manager.begin_run(grid, network, loader)
        for _ in range(2):
            manager.begin_epoch()
            train_epoch(network, loader, optimizer, manager)
            manager.end_epoch()
        manager.end_run()

    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "run001-lr=0.1-batch_size=100-loss=mse"
    everything = dict.fromkeys((SCALARS, HISTOGRAMS, IMAGES, TENSORS, COMPRESSED_HISTOGRAMS), 0)
    events = EventAccumulator(str(folder), everything).Reload()
    tags = events.Tags()
    of_epochs = {"loss", "accuracy", "epoch_duration", "run_duration"}
    of_the_loop = {"train/lr", "train/gradient_norm", "system/data_wait"}
    assert of_epochs | of_the_loop <= set(tags["scalars"])
    logged = store.history(store.run(), "loss")
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    assert shown == [(step, pytest.approx(value)) for step, value in logged]
    assert tags["images"] == ["images"]
    assert tags["graph"]
    assert "_hparams_/session_start_info" in events.summary_metadata

    counts = load_histograms(store.run().info.run_id, store.uri).query(
        "tensor == 'fc1.weight' and kind == 'gradient' and step == 2"
    )
    written = events.Histograms("fc1.weight.grad")[1].histogram_value
    assert written.num == counts["count"].sum() == network.fc1.weight.numel()
    assert [count for count in written.bucket if count] == counts["count"].tolist()


@pytest.mark.parametrize("every", [{"steps": 2}, {"epochs": 1}])
def test_tensorboard_has_the_histograms_of_steps_and_of_activations(
    every: Any, store: Store, tmp_path: Path
) -> None:
    network = nn.Linear(3, 2)
    with RunManager(
        tensorboard="runs", model=False, histograms=Every(**every, activations=True)
    ) as manager:
        manager.begin_run({}, network, [])
        manager.begin_epoch()
        for _ in range(4):
            network(torch.ones(5, 3)).sum().backward()
            manager.track_loss(1.0, 5)
        manager.end_epoch()
        manager.end_run()
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder), {HISTOGRAMS: 0}).Reload()
    at = [2, 4] if "steps" in every else [1]
    for name, size in {
        **{"weight": 6, "bias": 2, "weight.grad": 6, "bias.grad": 2},
        "Linear.activation": 10,
    }.items():
        found = [(one.step, one.histogram_value.num) for one in events.Histograms(name)]
        assert found == [(step, size) for step in at]


def test_two_runs_with_the_same_params_have_separate_tensorboard_folders(
    store: Store, network: FashionCNN, loader: DataLoader[Any], tmp_path: Path
) -> None:
    for _ in range(2):
        with RunManager(tensorboard="runs", model=False, histograms=False) as manager:
            manager.begin_run({"lr": 0.1}, network, loader)
            manager.end_run()
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "run001-lr=0.1",
        "run001-lr=0.1-2",
    }


def test_the_error_without_tensorboard_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ArgumentError, match="needs the package tensorboard; pip install "):
        RunManager(tensorboard="runs")


# -- a view that fails -------------------------------------------------------------------------

EVENTS = ["begin_run", "begin_epoch", "batch", "end_epoch", "end_run"]


class Witness(View):
    """Records the events that it receives."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def begin_run(self, number: int, *details: Any) -> None:
        self.events.append(f"begin run {number}")

    def begin_epoch(self, epoch: int, batches: int | None) -> None:
        self.events.append(f"begin epoch {epoch} of {batches} batches")

    def batch(self) -> None:
        self.events.append("batch")

    def end_epoch(self, epoch: int, metrics: Mapping[str, float], histograms: Any) -> None:
        self.events.append(f"end epoch {epoch}, loss {metrics['loss']}")

    def end_run(self, status: str) -> None:
        self.events.append(status)


class BrokenView(View):
    """Raises in one event, and counts how often."""

    def __init__(self, event: str) -> None:
        self.raised = 0

        def fail(*details: Any) -> None:
            self.raised += 1
            raise OSError("the screen is gone")

        self.__class__ = type("BrokenView", (BrokenView,), {event: fail})


@pytest.mark.parametrize("event", EVENTS)
def test_a_view_that_raises_is_switched_off_and_training_continues(
    store: Store,
    network: FashionCNN,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    event: str,
) -> None:
    broken, witness = BrokenView(event), Witness()
    monkeypatch.setattr(
        "tracker.manager.views_of", lambda results, *_, **__: Views(results, broken, witness)
    )
    with caplog.at_level(logging.WARNING, "tracker"), RunManager(model=False) as manager:
        for number in (1, 2):
            manager.begin_run({"number": number}, network, [0, 1])
            for _ in range(2):
                manager.begin_epoch()
                for _ in range(2):
                    manager.track_loss(0.5, 4)
                manager.end_epoch()
            manager.end_run()
    epochs = [
        [f"begin epoch {epoch} of 2 batches", "batch", "batch", f"end epoch {epoch}, loss 0.5"]
        for epoch in (1, 2)
    ]
    assert witness.events == [
        *("begin run 1", *epochs[0], *epochs[1], "FINISHED"),
        *("begin run 2", *epochs[0], *epochs[1], "FINISHED"),
    ]
    assert broken.raised == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"BrokenView is switched off: its {event}() raised OSError: the screen is gone"
    ]
    assert [run.info.status for run in store.runs()] == ["FINISHED", "FINISHED"]
    assert [(row["run"], row["epoch"]) for row in manager.run_data] == [
        *((1, 1), (1, 2)),
        *((2, 1), (2, 2)),
    ]


def test_a_batch_costs_one_call_if_no_view_shows_batches() -> None:
    views = Views(View(), View(), View())
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(event))
    views.batch()
    sys.setprofile(None)
    assert calls.count("call") == 1
