"""Tracking takes pictures, graph and example from the loop's first batch, and draws no sample."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)

from tests.helpers import Pictures, Store, train_epoch
from tracker import RunManager, fit
from tracker.capture.example import FirstInputs, inputs_of

ROWS = 12
GENERATOR = random.Random(1)  # of this module: no attribute of a data set leads to it


def row(index: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.full((4,), index / ROWS + noise), torch.tensor(index % 3)


class Rows(Dataset[Any]):
    """Rows that are made when they are asked for; subclasses remember being asked."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Any:
        return row(index, self.noise(index))

    def noise(self, index: int) -> float:
        return 0.0


class GlobalNoise(Rows):
    def noise(self, index: int) -> float:
        return float(torch.rand(()) + random.random() + np.random.rand())


class ModuleNoise(Rows):
    def noise(self, index: int) -> float:
        return GENERATOR.random()


class Holder(Rows):
    """Holds something that each sample moves on."""

    def __init__(self, held: Any, move: Callable[[Any, int], float]) -> None:
        self.held, self.move = held, move

    def noise(self, index: int) -> float:
        return self.move(self.held, index)


class Slots(Rows):
    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = random.Random(2)

    def noise(self, index: int) -> float:
        return self.generator.random()


class Counter(Rows):
    asked = 0

    def noise(self, index: int) -> float:
        self.asked += 1
        return self.asked / 100


class CountedLength(Rows):
    lengths = 0

    def __len__(self) -> int:
        self.lengths += 1
        return ROWS


class LazyFile(Rows):
    """Opens its file at the first sample, so that each worker has its own."""

    def __init__(self) -> None:
        self.file: Any = None

    def noise(self, index: int) -> float:
        if self.file is None:
            self.file = io.BytesIO(bytes(range(100)))
        return self.file.read(1)[0] / 100  # type: ignore[no-any-return]


class Batched(Rows):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        shared = random.random()
        return [row(index, shared) for index in indices]


class Batches(Rows):
    """Whole batches by index."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        shift = random.random()
        return torch.rand(4, 4) + shift, torch.tensor([0, 1, 2, 0])


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.rows = iter([row(index) for index in range(ROWS)])

    def __iter__(self) -> Iterator[Any]:
        return self.rows


class SizedStream(Stream):
    def __len__(self) -> int:
        return ROWS


class Dicts(Rows):
    def __getitem__(self, index: int) -> Any:
        return dict(zip(("inputs", "labels"), row(index, random.random()), strict=True))


class Mapped(Rows):
    def __init__(self, folder: Path) -> None:
        self.data: Any = np.memmap(folder / "data", np.float32, "w+", shape=(ROWS, 4))
        self.targets = [index % 3 for index in range(ROWS)]

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(self.data[index].copy()), torch.tensor(self.targets[index])


class Delegate(Rows):
    """Passes on what it does not have to something that may not be touched."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__[name] = "opened"
        return self.__dict__[name]


class Keyed(Rows):
    def __getitem__(self, key: Any) -> Any:
        return row({"a": 0, "b": 1}[key])


def closure() -> Holder:
    generator = np.random.default_rng(3)
    return Holder(None, lambda held, index: float(generator.random()))


def remember(held: dict[int, float], index: int) -> float:
    return held.setdefault(index, len(held) / 100)


def torch_number(held: torch.Generator, index: int) -> float:
    return float(torch.rand((), generator=held))


IN_ORDER: dict[str, Any] = {"batch_size": 4}
SHUFFLED: dict[str, Any] = {"batch_size": 4, "shuffle": True}
KINDS: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "tensors": lambda _: (TensorDataset(torch.eye(ROWS)[:, :4], torch.arange(ROWS) % 3), SHUFFLED),
    "rows": lambda _: (Rows(), SHUFFLED),
    "list": lambda _: ([row(index) for index in range(ROWS)], SHUFFLED),
    "global generators": lambda _: (GlobalNoise(), SHUFFLED),
    "a module's generator": lambda _: (ModuleNoise(), IN_ORDER),
    "a generator": lambda _: (Holder(random.Random(1), lambda g, _: g.random()), SHUFFLED),
    "torch's generator": lambda _: (
        Holder(torch.Generator().manual_seed(1), torch_number),
        SHUFFLED,
    ),
    "a generator in a dict": lambda _: (
        Holder({"noise": random.Random(1)}, lambda held, _: held["noise"].random()),
        SHUFFLED,
    ),
    "a generator in a closure": lambda _: (closure(), SHUFFLED),
    "a generator in slots": lambda _: (Slots(), SHUFFLED),
    "a counter": lambda _: (Counter(), SHUFFLED),
    "a counter in a list": lambda _: (
        Holder([], lambda held, index: held.append(index) or len(held) / 100),
        SHUFFLED,
    ),
    "a counter in an array": lambda _: (
        Holder(np.zeros(1), lambda held, _: float(held.__iadd__(1)[0]) / 100),
        SHUFFLED,
    ),
    "a counted length": lambda _: (CountedLength(), {"batch_sampler": [[0, 1], [2, 3]]}),
    "an iterator": lambda _: (Holder(iter(range(100)), lambda held, _: next(held) / 9), IN_ORDER),
    "a cache": lambda _: (Holder({}, remember), SHUFFLED),
    "a queue": lambda _: (Holder(list(range(99)), lambda held, _: held.pop() / 99), SHUFFLED),
    "a file": lambda _: (LazyFile(), IN_ORDER),
    "an open file": lambda _: (
        Holder(io.BytesIO(bytes(99)), lambda held, _: float(held.tell() + len(held.read(1)))),
        IN_ORDER,
    ),
    "a batch at once": lambda _: (Batched(), SHUFFLED),
    "batches": lambda _: (Batches(), {"batch_size": None}),
    "a stream": lambda _: (Stream(), IN_ORDER),
    "a stream of rows": lambda _: (SizedStream(), IN_ORDER),
    "mappings": lambda _: (Dicts(), SHUFFLED),
    "a file in memory": lambda folder: (Mapped(folder), SHUFFLED),
    "any attribute": lambda _: (Delegate(), SHUFFLED),
    "texts as indices": lambda _: (Keyed(), {"batch_size": 2, "sampler": ["a", "b"]}),
    "a part": lambda _: (Subset(Counter(), [5, 3, 1, 7]), SHUFFLED),
    "a random part": lambda _: (
        random_split(Counter(), [8, 4], torch.Generator().manual_seed(1))[0],
        SHUFFLED,
    ),
    "several": lambda _: (ConcatDataset([Counter(), GlobalNoise(), LazyFile()]), IN_ORDER),
    "a part of several": lambda _: (
        Subset(ConcatDataset([Counter(), LazyFile()]), [1, 14, 15, 2]),
        IN_ORDER,
    ),
    "workers": lambda _: (Counter(), {"batch_size": 4, "num_workers": 1}),
}


def state(value: Any, depth: int = 3) -> Any:
    """The attributes of a data set and what they hold, as text that shows no address."""
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, io.BytesIO):
        return "file", value.tell()
    if isinstance(value, dict):
        return {str(key): state(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [state(item, depth - 1) for item in value]
    if depth and hasattr(type(value), "__getitem__") and isinstance(value, Dataset):
        return type(value).__name__, state(vars(value), depth - 1)
    return repr(value) if isinstance(value, (int, float, str, np.ndarray, Tensor)) else type(value)


def train(dataset: Any, options: dict[str, Any], manager: RunManager | None) -> list[Tensor]:
    """Train for two epochs; the weights."""
    GENERATOR.seed(1)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    loader = DataLoader(dataset, **options)
    if manager:
        manager.begin_run({}, network, loader)
    for _ in range(2):
        if manager:
            manager.begin_epoch()
        for batch in loader:
            inputs, labels = batch.values() if isinstance(batch, dict) else batch
            loss = F.cross_entropy(network(inputs), labels)
            if manager:
                manager.track_loss(loss, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if manager:
            manager.end_epoch()
    return [tensor.clone() for tensor in network.state_dict().values()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracked_training_has_the_weights_and_the_data_set_of_an_untracked_one(
    kind: str, tmp_path: Path
) -> None:
    plain, options = KINDS[kind](tmp_path)
    expected = train(plain, options, None)
    tracked, options = KINDS[kind](tmp_path)
    with RunManager(offline=True, model=False, directory=tmp_path / "journal") as manager:
        weights = train(tracked, options, manager)

    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert state(tracked) == state(plain)


def test_begin_run_draws_no_sample_and_asks_for_nothing(tmp_path: Path) -> None:
    class Untouched(Rows):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("a sample was drawn")

    dataset = Untouched()
    with RunManager(offline=True, model=False, directory=tmp_path) as manager:
        manager.begin_run({}, nn.Linear(4, 3), DataLoader(dataset, 4))
        manager.run.log_dataset(dataset, "test")
    assert vars(dataset) == {}


# -- the hook ------------------------------------------------------------------------------------


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in network.modules())


def test_the_hook_goes_with_the_first_call_and_changes_no_output() -> None:
    network = nn.Linear(4, 3)
    inputs = torch.rand(100, 4, requires_grad=True)
    expected = network(inputs)
    first = FirstInputs(network)

    assert torch.equal(network(inputs), expected)
    assert hooks(network) == 0
    network(torch.zeros(2, 4))
    assert first.inputs is not None
    (kept,) = first.inputs.leaves
    assert torch.equal(kept, inputs[: len(kept)])
    assert len(kept) <= 64
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() < inputs.untyped_storage().nbytes()


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))]
)
def test_a_network_with_the_hook_can_be_copied(copied: Callable[[Any], Any]) -> None:
    network = nn.Linear(4, 3)
    first = FirstInputs(network)
    inputs = torch.rand(2, 4)
    other = copied(network)

    assert torch.equal(other(inputs), nn.Linear.forward(network, inputs))
    assert copied is copy.copy or first.inputs is None


def test_wrapped_and_exported_networks_are_called_as_before() -> None:
    inputs = torch.rand(3, 4)
    plain = nn.Linear(4, 3)
    for network in (
        torch.compile(plain, backend="eager"),
        nn.DataParallel(plain),
        torch.export.export(plain, (inputs,)).module(),
    ):
        before = hooks(network)
        first = FirstInputs(network)
        assert torch.equal(network(inputs), plain(inputs))
        assert first.inputs is not None
        assert hooks(network) == before


@pytest.mark.parametrize("tracked", [False, True])
def test_a_network_compiled_after_the_run_began_is_compiled_once(
    tracked: bool, tmp_path: Path
) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, example: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    manager = RunManager(offline=True, model=False, directory=tmp_path)
    if tracked:
        manager.begin_run({}, network, DataLoader(Rows(), 4))
        manager.begin_epoch()
    fast = torch.compile(network, backend=backend, fullgraph=True)
    for _ in range(3):
        inputs = torch.rand(3, 4)
        loss = fast(inputs).sum()
        if tracked:
            manager.track_loss(loss, (inputs, 3))
        loss.backward()
    assert len(compiled) == 1
    manager.close()
    assert hooks(network) == 0


def test_inputs_of_a_transform_are_left_alone() -> None:
    network = nn.Linear(4, 3)
    first = FirstInputs(network)
    torch.func.vmap(network)(torch.rand(5, 4))

    assert first.inputs is None


def test_a_network_that_takes_no_hook_is_trained_with_one_warning(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Closed(nn.Linear):
        def register_forward_pre_hook(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("closed")

    network = Closed(4, 3)
    with RunManager(offline=True, model=False, directory=tmp_path) as manager:
        manager.begin_run({}, network, DataLoader(Rows(), 4))
        manager.begin_epoch()
        manager.track_loss(network(torch.rand(2, 4)).sum(), 2)
        manager.end_epoch()
        manager.end_run()
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "The inputs of Closed cannot be seen (closed)" in record.getMessage()


def test_a_run_that_ends_or_is_forgotten_leaves_no_hook(tmp_path: Path) -> None:
    network, loader = nn.Linear(4, 3), DataLoader(Rows(), 4)
    manager = RunManager(offline=True, model=False, directory=tmp_path)
    manager.begin_run({}, network, loader)
    manager.begin_run({}, network, loader)
    assert hooks(network) == 1
    manager.end_run()
    assert hooks(network) == 0
    manager.begin_run({}, network, loader)
    del manager
    assert hooks(network) == 0


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (torch.ones(5, 2), (4, 2)),
        ((torch.ones(5, 2), torch.ones(5)), (4, 2)),
        ([[torch.ones(5, 4), torch.ones(5)], torch.ones(5)], (4, 4)),
        (torch.ones(100, 3, 2, 2), (64, 3, 2, 2)),
        ({"name": ["a", "b"], "image": torch.ones(3, 7)}, (3, 7)),
        (torch.tensor(1.0), None),
        (torch.ones(0, 3), None),
        (torch.ones(2, 3, device="meta"), None),
        (torch.eye(3).to_sparse(), None),
        ([], None),
        (["text"], None),
        (None, None),
        (7, None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_the_inputs_of_a_batch_are_copies_of_its_first_tensor(
    batch: Any, shape: tuple[int, ...] | None
) -> None:
    inputs = inputs_of(batch)

    assert (None if inputs is None else tuple(inputs.shape)) == shape


# -- what a run has of it ------------------------------------------------------------------------


def test_pictures_and_graph_are_those_of_the_batch_and_of_the_network_s_inputs(
    store: Store, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Linear(784, 10))
    loader = DataLoader(Pictures(40), 20)
    with RunManager(tensorboard=tmp_path / "events") as manager:
        manager.begin_run({}, network, loader)
        manager.begin_epoch()
        for batch in loader:
            loss = F.cross_entropy(network(batch[0].flatten(1)), batch[1])
            manager.track_loss(loss, batch)
        manager.end_epoch()
        manager.end_run()
    run = store.run()
    assert {"samples.png", "network/graph.svg"} <= store.artifacts(run)
    assert len(run.outputs.model_outputs) == 1
    assert [*tmp_path.glob("events/*/*")]


@pytest.mark.parametrize("samples", [True, False])
def test_a_loop_that_passes_no_batch_has_pictures_unless_it_wants_none(
    store: Store, network: nn.Module, loader: Any, samples: bool
) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with RunManager(samples=samples, digest=False) as manager:
        manager.begin_run({}, network, loader)
        for epoch in fit(network, loader, optimizer, F.cross_entropy, epochs=1):
            manager.log_epoch(epoch)
        manager.end_run()
    run = store.run()
    assert ("samples.png" in store.artifacts(run)) == samples
    assert "network/graph.svg" in store.artifacts(run)
    assert len(run.outputs.model_outputs) == 1


def test_a_run_without_a_batch_has_its_layers_and_its_weights(
    store: Store, network: nn.Module, loader: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with RunManager() as manager:
        manager.begin_run({}, network, loader)
        manager.end_run()
    assert {"network/layers.csv", "model.pt"} <= store.artifacts(store.run())
    assert "there is no example of its inputs" in caplog.text


def test_a_resumed_run_has_its_model(store: Store, network: nn.Module, loader: Any) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    manager = RunManager()
    run = manager.begin_run({}, network, loader)
    manager.begin_epoch()
    train_epoch(network, loader, optimizer, manager)
    manager.end_epoch()
    manager.save_checkpoint(optimizer=optimizer)
    manager.close()
    resumed = RunManager.resume(str(run.run_id))
    resumed.begin_run({}, network, loader)
    resumed.begin_epoch()
    train_epoch(network, loader, optimizer, resumed)
    resumed.end_epoch()
    resumed.end_run()
    assert len(store.run().outputs.model_outputs) == 1
