"""Under torchrun rank 0 alone writes; the runs of other ranks take every call and drop it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.devices import Away, a_device, away
from tests.helpers import Store
from tracker import ArgumentError, CallOrderError, Run, RunManager, start_run
from tracker.journal.records import Point


class Untouched:
    """An object that fails the test when it is used."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AssertionError(f"{name} is used")


class UntouchedNetwork(nn.Module):
    """A network that fails the test when it is called or its tensors are read."""

    def named_parameters(self, *arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError("the network is read")

    parameters = named_modules = state_dict = forward = named_parameters  # type: ignore[assignment]


NETWORK = UntouchedNetwork()
UNREAD: Any = torch.ones(()).as_subclass(Away)  # raises, unless `a_device` allows its use

CALLS: dict[str, Callable[[Run], object]] = {
    "log_params": lambda run: run.log_params({"lr": 0.1, "password": "hidden"}),
    "log_facts": lambda run: run.log_facts({"model": "CNN"}),
    "log_param": lambda run: run.log_param("lr", 0.1),
    "log_metrics": lambda run: run.log_metrics({"loss": UNREAD}),
    "log_metric": lambda run: run.log_metric("loss", UNREAD),
    "log_points": lambda run: run.log_points([Point("loss", UNREAD, 1, 1)]),
    "append_points": lambda run: run.append_points([Point("loss", UNREAD, 1, 1)]),
    "set_tag": lambda run: run.set_tag("kind", "gan"),
    "set_tags": lambda run: run.set_tags({"kind": "gan"}),
    "log_tags": lambda run: run.log_tags({"kind": "gan"}),
    "log_artifact": lambda run: run.log_artifact("only on rank 0.txt"),
    "log_artifacts": lambda run: run.log_artifacts("only on rank 0"),
    "log_text": lambda run: run.log_text("text", "a.txt"),
    "log_dict": lambda run: run.log_dict({"a": UNREAD}, "a.json"),
    "log_html": lambda run: run.log_html("<p>", "a.html"),
    "log_figure": lambda run: run.log_figure(Untouched(), "a.png"),
    "log_table": lambda run: run.log_table({"a": UNREAD}, "a.json"),
    "log_audio": lambda run: run.log_audio(UNREAD, "a.wav", sample_rate=8000),
    "log_video": lambda run: run.log_video(UNREAD, "a.gif"),
    "log_epoch": lambda run: run.log_epoch({"epoch": 1}),
    "log_image": lambda run: run.log_image(UNREAD, "a.png"),
    "log_dataset": lambda run: run.log_dataset(Untouched()),
    "log_network": lambda run: run.log_network(NETWORK, UNREAD),
    "log_mistakes": lambda run: run.log_mistakes(NETWORK, Untouched(), classes=["a", "b"]),  # type: ignore[arg-type]
    "log_histograms": lambda run: run.log_histograms(NETWORK, 1),
    "log_histogram": lambda run: run.log_histogram("latent", UNREAD, 1),
    "log_model": lambda run: run.log_model(NETWORK, UNREAD),
    "log_checkpoint": lambda run: run.log_checkpoint(1, network=NETWORK, epoch=1),
    "delete_checkpoint": lambda run: run.delete_checkpoint(1),
    "deliver": lambda run: run.deliver(),
    "flush": lambda run: run.flush(),
    "abandoned_outcome": lambda run: run.abandoned_outcome("here"),
    "end": lambda run: run.end(),
    "abandon": lambda run: run.abandon(),
}
"""A call of each method of a run."""


@pytest.fixture
def rank_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if "mlflow" not in str(path)}


@pytest.mark.usefixtures("rank_1")
@pytest.mark.parametrize("inline", [True, False])
def test_the_run_of_another_rank_takes_every_call_and_writes_nothing(
    inline: bool, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = files(tmp_path)
    caplog.set_level(logging.WARNING, "tracker")
    run = start_run(params={"lr": 0.1}, parent="0" * 32, inline=inline)
    assert set(CALLS) == {
        name for name in dir(Run) if not name.startswith("_") and callable(getattr(Run, name))
    }
    for call in CALLS.values():
        call(run)

    assert run.status == "FINISHED"
    assert run.run_id is None
    assert store.runs() == []
    assert files(tmp_path) == before
    assert caplog.messages == []
    with pytest.raises(CallOrderError, match="the run has ended"):
        run.log_metrics({"loss": 1.0})


@pytest.mark.usefixtures("rank_1")
def test_a_manager_on_another_rank_computes_sums_only(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(tmp_path)
    losses = []
    with a_device(monkeypatch) as stream, RunManager(batch_loss=True) as manager:
        stream.refuses_waits = True
        manager.begin_run({"lr": 0.1}, nn.Linear(2, 1), [])
        manager.begin_epoch()
        for _ in range(3):
            manager.track_loss(away(0.5), 2)
        assert stream.copies == []
        stream.refuses_waits = False
        losses.append(manager.epoch_loss)
        manager.end_epoch({"val_loss": np.float32(0.25)})
        manager.end_run()

    assert losses == [3.0]
    assert manager.run_data[0]["loss"] == 0.5
    assert store.runs() == []
    assert files(tmp_path) == before


def test_a_manager_logs_all_to_a_run_that_is_written_whatever_the_rank(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a trial, if torchrun starts several searches."""
    with start_run() as run:
        for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        with RunManager(run=run, batch_loss=True) as manager:
            network, batch = nn.Linear(2, 1), torch.ones(2, 2)
            manager.begin_run({"lr": 0.1}, network, [batch])
            manager.begin_epoch()
            manager.track_loss(network(batch).mean(), batch)
            manager.end_epoch()
            manager.end_run()

    artifacts = store.artifacts(store.run())
    assert {"network/layers.csv", "histograms/000001.json"} <= artifacts
    assert len(store.history(store.run(), "batch_loss")) == 1
    assert len(store.run().outputs.model_outputs) == 1


@pytest.mark.usefixtures("rank_1")
def test_a_run_of_another_rank_can_be_a_parent_and_can_be_joined(store: Store) -> None:
    with start_run() as parent:
        with start_run(parent=parent) as child:
            child.log_metrics({"loss": 1.0})
        with RunManager(run=parent, model=False) as manager:
            manager.begin_run({"lr": 0.1}, nn.Linear(2, 1), [])
            manager.begin_epoch()
            manager.track_loss(0.5, 1)
            manager.end_epoch()
            manager.end_run()

    assert store.runs() == []


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group in which this process is rank 0, and collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def fully(network: nn.Module, part: str = "") -> nn.Module:
    fully_shard(network.get_submodule(part), mesh=init_device_mesh("cpu", (2,)))
    return network


def tensor_parallel(network: nn.Module) -> nn.Module:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(network, init_device_mesh("cpu", (2,)), plan)


SHARDED: dict[str, Callable[[nn.Module], Any]] = {
    "fully_shard": fully,
    "one layer": lambda network: fully(network, "2"),
    "tensor parallel": tensor_parallel,
    "FSDP": lambda network: FullyShardedDataParallel(network, device_id=torch.device("cpu")),
    "compiled": lambda network: torch.compile(tensor_parallel(network), backend="eager"),
}


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("shard", SHARDED.values(), ids=SHARDED)
def test_rank_0_does_not_call_a_sharded_network_by_itself(
    store: Store, caplog: pytest.LogCaptureFixture, shard: Callable[[nn.Module], nn.Module]
) -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    network = shard(layers)
    calls: list[int] = []
    layers[1].register_forward_hook(lambda *_: calls.append(1))

    with RunManager(tensorboard="runs") as manager:
        run = manager.begin_run({}, network, [torch.rand(2, 8)])
        manager.begin_epoch()
        for batch in manager.loader:
            loss = network(batch).sum()
            manager.track_loss(loss, batch)  # now FSDP's parameters are plain tensors
            loss.backward()
        run.log_mistakes(network, [(torch.rand(2, 8), torch.zeros(2))], classes=list("abcd"))
        with pytest.raises(ArgumentError, match="each rank has a part of network, and a checkpoi"):
            manager.save_checkpoint()
        manager.end_epoch()
        manager.end_run()

    assert calls == [1]
    assert len([text for text in caplog.messages if "which rank 0 alone cannot call" in text]) == 1
    assert "TensorBoard" not in caplog.text
    assert store.artifacts(store.run(), "network") == {"network/layers.csv"}
    assert not {"mistakes", "model.pt"} & store.artifacts(store.run())
    assert not getattr(store.run().outputs, "model_outputs", [])


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("placement", [Partial("sum"), Partial("avg"), Shard(0)])
def test_a_metric_of_which_each_rank_has_a_part_is_refused(
    store: Store, placement: Placement
) -> None:
    """Gathering it would wait for ranks that may not log it."""
    mesh = init_device_mesh("cpu", (2,))
    with RunManager(model=False) as manager:
        run = manager.begin_run({}, nn.Linear(1, 1), [])
        manager.begin_epoch()
        for log in (run.log_metrics, manager.end_epoch):
            with pytest.raises(ArgumentError, match="'x' is a DTensor of which each rank has a pa"):
                log({"x": DTensor.from_local(torch.ones(1), mesh, [placement])})
        run.log_metrics({"x": DTensor.from_local(torch.ones(1), mesh, [Replicate()])}, 3)
    assert store.history(store.run(), "x") == [(3, 1.0)]
