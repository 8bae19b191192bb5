"""Under torchrun, loss and accuracy cover the whole data set, and only rank 0 writes."""

from __future__ import annotations

import inspect
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from tests.helpers import Store
from tracker import Epoch, StoreError, evaluate, fit
from tracker.training.distributed import is_main, rank, rank_0_first, sum_over_ranks, world_size
from tracker.training.meters import EpochMeter

pytestmark = pytest.mark.timeout(700)  # the ranks start slowly on a busy machine

ROOT = Path(__file__).parents[2]
RUN_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE")

Batch = tuple[float | None, int, int | None]  # mean loss, samples, correct predictions
Case = list[list[Batch]]  # the batches of each rank


def points(number: int, seed: int) -> TensorDataset:
    """Points in a plane, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, 2, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(3, (number,), generator=generator))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()


# The ranks share this code, without importing pytest.
SHARED = "\n".join(
    [
        "from __future__ import annotations",
        "import torch",
        "from torch import nn",
        "from torch.utils.data import TensorDataset",
        *(inspect.getsource(made) for made in (points, classifier)),
    ]
)

RANKS = """
import json, os, sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, DistributedSampler, Subset

from shared import classifier, points
from tests.helpers import train_epoch
from tracker import RunManager, evaluate, fit, start_run
from tracker.training.distributed import is_main, rank, sum_over_ranks, world_size
from tracker.training.meters import EpochMeter

backend = sys.argv[1]
device = torch.device("cpu")
if backend != "gloo":
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.cuda.set_device(device)
who = [(rank(), world_size(), is_main())]
dist.init_process_group(backend, timeout=timedelta(seconds=600))
who.append((rank(), world_size(), is_main()))
me, ranks = rank(), world_size()

collectives = []
reduce = dist.all_reduce
dist.all_reduce = lambda tensor: (collectives.append(str(tensor.device)), reduce(tensor))

def computed(batches):
    meter = EpochMeter()
    for loss, size, right in batches:
        if loss is not None:
            meter.add_loss(torch.tensor(loss, dtype=torch.float64, device=device), size)
        if right is not None:
            guesses = torch.arange(size, device=device) >= right
            meter.add_correct(F.one_hot(guesses.long(), 2), torch.zeros_like(guesses).long())
    return meter.compute()

cases = json.loads(Path("cases.json").read_text())
results = {"cases": [computed(case[me]) for case in cases], "collectives": collectives}
results["large"] = sum_over_ranks([2.0**52 if me == 0 else 1.0, float(me)], device)

def of_dtensors():
    mesh, meter = init_device_mesh(device.type, (ranks,)), EpochMeter()
    for loss, part in ((me, Partial("sum")), (me, Partial("avg")), (7, Replicate())):
        local = torch.tensor(1.0 + 2 * loss, device=device, requires_grad=True)
        meter.add_loss(DTensor.from_local(local, mesh, [part]))
    return meter.losses.tolist()

results["dtensors"] = of_dtensors()

def drawn(number, size, drop_last):
    data = points(number, seed=2)
    sampler = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=size, sampler=sampler, drop_last=drop_last)
    meter = EpochMeter(loader)
    for inputs, _ in loader:
        meter.add_loss(inputs.mean())
    return meter.compute()

def trained():
    data, held_out = points(22, seed=0), points(15, seed=1)
    share = [Subset(held_out, range(13)), Subset(held_out, range(13, 15))][me]
    network = DistributedDataParallel(classifier())
    training = fit(
        network,
        DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False)),
        SGD(network.parameters(), lr=0.5),
        F.cross_entropy,
        epochs=3,
        val_loader=DataLoader(share, batch_size=5),
        accuracy=True,
    )
    epochs = [(epoch.metrics, epoch.batch_losses.tolist()) for epoch in training]
    alone = DataLoader(held_out, batch_size=4) if me == 0 else []
    return epochs, evaluate(network, alone, F.cross_entropy, accuracy=True)

def tracked():
    data, validated = points(22, seed=0), []
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, shuffle=False))
    network = DistributedDataParallel(classifier())
    optimizer = SGD(network.parameters(), lr=0.5)
    with RunManager(batch_loss=True) as manager:
        run = manager.begin_run({"lr": 0.5}, network, loader)
        manager.run_id
        run.run_id
        for _ in range(2):
            manager.begin_epoch()
            train_epoch(network, loader, optimizer, manager)
            if me == 0:
                manager.track_val_loss(2.0, 3)
                manager.track_val_num_correct(torch.eye(2), torch.tensor([0, 0]))
            manager.track_test_loss(1.0 + me, 1 + 2 * me)
            validated.append(manager.end_epoch({"lr_now": 0.5}))
        for epoch in fit(network, loader, optimizer, F.cross_entropy, epochs=1, accuracy=True):
            manager.log_epoch(epoch)
        run.log_params({"writer": me})
        run.log_metrics({"writer": me}, step=1)
        run.set_tags({"writer": me})
        run.log_text(f"rank {me}", "writer.txt")
        run.log_image(torch.zeros(4, 4), "writer.png")
        run.log_artifact("shared.py", f"rank{me}")
        run.log_dataset(data, "validation")
        manager.save(f"results{me}")
        manager.end_run()
        manager.run_id
    with start_run(experiment="plain", params={"lr": 0.5}, tags={"writer": me}) as run:
        run.log_metrics({"loss": 0.5 + me})
    return validated

if backend == "gloo":
    results["drawn"] = [drawn(*arguments) for arguments in json.loads(sys.argv[2])]
    results["fit"], results["evaluate"] = trained()
    results["collectives"] = list(collectives)
    results["validated"] = tracked()

dist.barrier()
dist.destroy_process_group()
who.append((rank(), world_size(), is_main()))
Path(f"rank{me}.json").write_text(json.dumps(results | {"who": who}))
"""

DRAWN = [(11, 4, False), (11, 4, True), (12, 3, False), (5, 8, True), (1, 2, False)]


def torchrun(folder: Path, *arguments: str, processes: int = 2) -> list[dict[str, Any]]:
    """The contents of each rank's `rankN.json`, after RANKS has run under torchrun."""
    (folder / "cases.json").write_text(json.dumps(cases(processes)))
    (folder / "program.py").write_text(RANKS)
    (folder / "shared.py").write_text(SHARED)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), "program.py", *arguments),
        ],
        cwd=folder,
        env={
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRACKER_INLINE": "1"},
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # a kill would leave the ranks behind
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return [json.loads((folder / f"rank{n}.json").read_text()) for n in range(processes)]


# -- the sums of several ranks -------------------------------------------------------------------


def cases(ranks: int) -> list[Case]:
    """Batches of various sizes; some ranks have no batch, no loss or no labels."""
    dice = random.Random(0)

    def batches() -> list[Batch]:
        sizes = [dice.randint(1, 40) for _ in range(dice.randint(0, 5))]
        return [(dice.gauss(0, 5), size, dice.randint(0, size)) for size in sizes]

    def others(*share: Batch) -> Case:
        return [list(share)] * (ranks - 1)

    some: list[Batch] = [(1.0, 100, 31), (3.0, 50, 50)]
    return [
        [some, *others()],
        [*others(), some],
        [[], *others()],
        [[(2.0, 7, None)], *others((None, 3, 2))],
        [[(1.0, 64, 1)] * 600, *others((4.0, 3, 3))],
        *([batches() for _ in range(ranks)] for _ in range(20)),
    ]


def by_hand(case: Case) -> dict[str, float]:
    """The metrics of a single process with all batches."""
    batches = [batch for share in case for batch in share]
    losses = [(loss, size) for loss, size, _ in batches if loss is not None]
    answers = [(right, size) for _, size, right in batches if right is not None]
    metrics = {}
    if losses:
        total = math.fsum(loss * size for loss, size in losses)
        metrics["loss"] = total / sum(size for _, size in losses)
    if answers:
        metrics["accuracy"] = sum(n for n, _ in answers) / sum(size for _, size in answers)
    return metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks ran."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    """The results of two ranks for all tests below: a launch takes many seconds."""
    return torchrun(folder, "gloo", json.dumps(DRAWN))


def test_every_rank_computes_the_loss_and_accuracy_of_all_samples(
    results: list[dict[str, Any]],
) -> None:
    first, second = results
    assert first["cases"] == second["cases"]
    for metrics, case in zip(first["cases"], cases(2), strict=True):
        assert metrics == pytest.approx(by_hand(case), rel=1e-12, abs=1e-12), case
        if "accuracy" in metrics:
            assert metrics["accuracy"] == by_hand(case)["accuracy"]


def test_an_epoch_costs_one_collective(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["collectives"][: len(cases(2))] == ["cpu"] * len(cases(2))
        # Then one sum, the loaders, three epochs of training and validation, one evaluation.
        assert len(result["collectives"]) == len(cases(2)) + 1 + len(DRAWN) + 2 * 3 + 1


def test_counts_are_exact(results: list[dict[str, Any]]) -> None:
    assert [result["large"] for result in results] == [[2.0**52 + 1, 1.0]] * 2


def test_the_rank_is_known_before_during_and_after_the_process_group(
    results: list[dict[str, Any]],
) -> None:
    assert [result["who"] for result in results] == [[[0, 2, True]] * 3, [[1, 2, False]] * 3]


# -- loaders that draw a share -------------------------------------------------------------------


def share(data: Dataset[Any], size: int, number: int, drop_last: bool) -> DataLoader[Any]:
    """The loader of one of two ranks."""
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=number, shuffle=False)
    return DataLoader(data, batch_size=size, sampler=sampler, drop_last=drop_last)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 10])
@pytest.mark.parametrize("number", [1, 8, 11, 16])
def test_the_last_batch_of_a_rank_s_share_counts_as_smaller(
    number: int, size: int, drop_last: bool
) -> None:
    loader = share(points(number, 2), size, 1, drop_last)
    meter = EpochMeter(loader)
    sizes = []
    for inputs, _ in loader:
        meter.add_loss(inputs.mean())
        sizes.append(len(inputs))

    assert meter.sizes.tolist() == sizes


def test_a_sample_seen_by_two_ranks_counts_twice(results: list[dict[str, Any]]) -> None:
    """A DistributedSampler repeats some samples if their number is odd."""
    for number, arguments in enumerate(DRAWN):
        samples, size, drop_last = arguments
        data = points(samples, 2)
        shares = [share(data, size, rank, drop_last) for rank in (0, 1)]
        seen = [inputs for loader in shares for inputs, _ in loader]
        expected = {"loss": pytest.approx(torch.cat(seen).mean().item(), rel=1e-9)} if seen else {}
        for result in results:
            assert result["drawn"][number] == expected, arguments


# -- the training loop ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone() -> tuple[nn.Module, list[Epoch]]:
    """A network trained by one process on all the data: two batches of 4 make one of 8."""
    network = classifier()
    training = fit(
        network,
        DataLoader(points(22, 0), batch_size=8),
        SGD(network.parameters(), lr=0.5),
        F.cross_entropy,
        epochs=3,
        val_loader=DataLoader(points(15, 1), batch_size=15),
        accuracy=True,
    )
    return network, list(training)


def test_fit_and_evaluate_equal_one_process_on_all_the_data(
    results: list[dict[str, Any]], alone: tuple[nn.Module, list[Epoch]]
) -> None:
    network, epochs = alone
    for number, epoch in enumerate(epochs):
        expected = {k: v for k, v in epoch.metrics.items() if k != "epoch_duration"}
        for result in results:
            metrics, _ = result["fit"][number]
            assert metrics.pop("epoch_duration") > 0
            assert metrics == pytest.approx(expected, rel=1e-9), number
        each = [result["fit"][number][1] for result in results]  # a rank's own batches
        np.testing.assert_allclose(np.mean(each, axis=0), epoch.batch_losses)
    held_out = DataLoader(points(15, 1), batch_size=15)
    whole = evaluate(network, held_out, F.cross_entropy, accuracy=True)
    assert [result["evaluate"] for result in results] == [pytest.approx(whole, rel=1e-9)] * 2


def test_the_loss_of_ranks_that_have_a_part_each_is_that_of_the_whole(results: list[Any]) -> None:
    """The sum and the mean of 1 and 3, and a number that both have."""
    assert [result["dtensors"] for result in results] == [[4.0, 2.0, 15.0]] * 2


@pytest.mark.usefixtures("results")
def test_two_ranks_are_one_run_written_by_rank_0(
    folder: Path, tmp_path: Path, alone: tuple[nn.Module, list[Epoch]]
) -> None:
    store = Store(f"sqlite:///{folder / 'mlflow.db'}")
    run = store.run()
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.5"
    assert run.data.params["writer"] == run.data.tags["writer"] == "0"
    assert store.history(run, "writer") == [(1, 0.0)]
    assert len(store.history(run, "batch_loss")) == 3 * 3  # those of rank 0
    assert len(run.outputs.model_outputs) == 1
    assert store.history(run, "lr_now") == [(1, 0.5), (2, 0.5)]
    artifacts = store.artifacts(run)
    assert {"writer.txt", "writer.png", "rank0/shared.py"} <= artifacts
    assert not any(path.startswith("rank1") for path in artifacts)
    assert store.text(run, "writer.txt", tmp_path) == "rank 0"
    assert (folder / "results0.csv").exists()
    assert not (folder / "results1.csv").exists()

    (plain,) = store.runs("plain")
    assert plain.info.status == "FINISHED"
    assert (plain.data.tags["writer"], plain.data.metrics) == ("0", {"loss": 0.5})

    for name in ("loss", "accuracy"):
        expected = {epoch.number: epoch.metrics[name] for epoch in alone[1]}
        assert dict(store.history(run, name)) == pytest.approx(expected, rel=1e-9)


def test_all_ranks_know_the_sums_of_those_that_validate(results: list[dict[str, Any]]) -> None:
    expected = {"val_loss": 2.0, "val_accuracy": 0.5, "test_loss": (1.0 + 2.0 * 3) / 4}
    for result in results:
        for metrics in result["validated"]:
            assert {name: metrics[name] for name in expected} == expected
            assert "test_accuracy" not in metrics


# -- taking turns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [None, 0, 1])
def test_rank_0_reads_a_run_before_the_others_and_waits_for_them(
    failing: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads stand for the ranks: otherwise one would find that rank 0 tracks the run already."""
    ranks, together = 3, threading.Barrier(3)
    me = threading.local()
    done: list[str] = []

    def all_reduce(values: Sequence[float], device: torch.device) -> list[float]:
        together.wait(60)
        return list(values)

    monkeypatch.setattr("tracker.training.distributed.sum_over_ranks", all_reduce)
    monkeypatch.setattr("tracker.training.distributed.is_main", lambda: me.rank == 0)

    def resume(number: int) -> None:
        me.rank = number
        try:
            with rank_0_first():
                done.append(f"rank {number} reads")
                if number == failing:
                    raise StoreError("the run does not exist")
        except StoreError:
            done.append(f"rank {number} fails")
        done.append(f"rank {number} begins")

    threads = [threading.Thread(target=resume, args=(number,)) for number in reversed(range(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert done[0] == "rank 0 reads"
    assert {*done[1:3]} == {"rank 1 reads", "rank 2 reads"}
    assert {*done[3:]} == {
        *(f"rank {number} begins" for number in range(ranks)),
        *(() if failing is None else (f"rank {failing} fails",)),
    }


# -- one process ---------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """A process group with one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


@pytest.fixture
def no_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective, in one process")

    monkeypatch.setattr(dist, "all_reduce", refuse)


@pytest.mark.usefixtures("no_collective")
def test_a_single_process_is_rank_0_without_any_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    before = {name for name in sys.modules if name.startswith("torch.distributed")}
    meter = EpochMeter()
    meter.add_loss(3.0, 2)

    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert sum_over_ranks([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]
    assert meter.compute() == {"loss": 3.0}
    assert not dist.is_initialized()
    assert {name for name in sys.modules if name.startswith("torch.distributed")} == before


@pytest.mark.usefixtures("group", "no_collective")
def test_a_process_group_of_one_needs_no_collective() -> None:
    assert (rank(), world_size(), is_main()) == (0, 1, True)
    assert sum_over_ranks([1.5, 2.0], torch.device("cpu")) == [1.5, 2.0]


@pytest.mark.usefixtures("group")
def test_the_process_group_takes_precedence_over_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in zip(RUN_VARIABLES, ("1", "5", "8"), strict=True):
        monkeypatch.setenv(name, value)

    assert (rank(), world_size(), is_main()) == (0, 1, True)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("labels_too", [True, False])
def test_losses_and_predictions_may_be_dtensors(labels_too: bool) -> None:
    """As in tensor parallel training."""
    mesh = init_device_mesh("cpu", (1,))

    def distributed(tensor: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)] if tensor.dim() else [Replicate()])

    labels = torch.tensor([0, 1, 0])
    meter = EpochMeter()
    meter.add_loss(distributed(torch.tensor(0.5)), 3)
    meter.add_correct(distributed(torch.eye(3)), distributed(labels) if labels_too else labels)

    assert meter.compute() == {"loss": 0.5, "accuracy": pytest.approx(2 / 3)}


def test_torchrun_s_variables_count_only_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(RUN_VARIABLES, ("1", "5", "8"), strict=True):
        monkeypatch.setenv(name, value)
    assert (rank(), world_size(), is_main()) == (5, 8, False)

    for name in RUN_VARIABLES:
        with monkeypatch.context() as context:
            context.delenv(name)
            assert (rank(), world_size(), is_main()) == (0, 1, True)


# -- on GPUs -------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_ranks_on_gpus_compute_the_same_sums(backend: str, tmp_path: Path) -> None:
    """NCCL needs one GPU per rank; with both backends the CPU computes the sums."""
    ranks = torch.cuda.device_count() if backend == "nccl" else 2

    for result in torchrun(tmp_path, backend, processes=ranks):
        for metrics, case in zip(result["cases"], cases(ranks), strict=True):
            assert metrics == pytest.approx(by_hand(case), rel=1e-12, abs=1e-12), case
        kinds = {device.partition(":")[0] for device in result["collectives"]}
        assert kinds == (set() if ranks == 1 else {"cuda"} if backend == "nccl" else {"cpu"})
