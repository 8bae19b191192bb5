"""Training that is interrupted and resumed ends bit for bit where uninterrupted training does."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler, swa_utils
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    WeightedRandomSampler,
)

from tracker import ArgumentError, StoreError, set_seed
from tracker.training.checkpoint import (
    Checkpoint,
    Keep,
    Retention,
    load_checkpoint,
    save_checkpoint,
)
from tracker.training.rng import RandomStates

patient = settings(deadline=None, max_examples=60)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Points of two classes, with noise from Python's, NumPy's and torch's generators."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.gauss(0, 1) + np.random.normal() + torch.randn(3)
        return index + 0.1 * noise.float(), torch.tensor(index % 2)


def classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 2)
    )


def noisy_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=4, shuffle=True, **options)


# -- the same training, in one process and in two --------------------------------------------------

STEPS = 6  # an epoch of `noisy_loader`
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=0.01),
    "fused": lambda parameters: AdamW(parameters, lr=0.01, fused=True),
}
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, gamma=0.3),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 3, 3]),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)],
        milestones=[2],
    ),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.1, 3, mode="exp_range", cycle_momentum=False
    ),
}
CASES = [
    *(f"{optimizer}-StepLR" for optimizer in OPTIMIZERS),
    *(f"adam-{scheduler}" for scheduler in SCHEDULERS if scheduler != "StepLR"),
]


class Training:
    """A network, an optimizer and a scheduler, with their training loop."""

    def __init__(self, case: str) -> None:
        optimizer, scheduler = case.split("-")
        set_seed(3)
        self.network = classifier()
        self.optimizer = OPTIMIZERS[optimizer](self.network.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def parts(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }

    def step(self, batch: Any) -> float:
        loss = F.cross_entropy(self.network(batch[0]), batch[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def epoch(self, batches: Any) -> None:
        loss = sum(self.step(batch) for batch in batches)
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        else:
            self.scheduler.step()

    def states(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts().items()}


def resume(folder: Path) -> None:
    """Train two more epochs of every case, in the new process."""
    for case in CASES:
        training = Training(case)
        set_seed(99)
        load_checkpoint(folder / case).restore(**training.parts())
        for _ in range(2):
            training.epoch(noisy_loader())
        torch.save(training.states(), folder / case / "result")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """The states after four epochs of each case: in one process, and in two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    straight = {}
    for case in CASES:
        training = Training(case)
        for epoch in range(4):
            if epoch == 2:
                save_checkpoint(folder / case, **training.parts(), epoch=2, step=2 * STEPS)
            training.epoch(noisy_loader())
        straight[case] = training.states()
    child = multiprocessing.get_context("spawn").Process(target=resume, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0
    return {
        case: (straight[case], torch.load(folder / case / "result", weights_only=False))
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_continues_training_exactly(
    trained: dict[str, tuple[Any, Any]], case: str
) -> None:
    straight, resumed = trained[case]
    assert_same(resumed, straight)


def assert_same(found: Any, expected: Any) -> None:
    """Check that both are equal in every bit and type."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.numpy().tobytes() == expected.numpy().tobytes()
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
    elif isinstance(expected, float):
        assert struct.pack(">d", found) == struct.pack(">d", expected)
    elif isinstance(expected, dict):
        assert_same(list(found.items()), list(expected.items()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


# -- the middle of an epoch ------------------------------------------------------------------------


class Coins(BatchSampler):
    """Batches of random sizes, drawn one by one from its own generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(STEPS):
            size = int(torch.randint(2, 5, (), generator=self.generator))
            yield torch.randint(22, (size,), generator=self.generator).tolist()

    def __len__(self) -> int:
        return STEPS


def own_generator() -> torch.Generator:
    return torch.Generator().manual_seed(4)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffle": noisy_loader,
    "generator": lambda: noisy_loader(generator=own_generator()),
    "worker": lambda: noisy_loader(num_workers=1),
    "worker-generator": lambda: noisy_loader(num_workers=1, generator=own_generator()),
    "replacement": lambda: DataLoader(
        Noisy(), 4, sampler=RandomSampler(Noisy(), replacement=True, generator=own_generator())
    ),
    "weighted": lambda: DataLoader(Noisy(), 4, sampler=WeightedRandomSampler([1.0] * 22, 22)),
    "batch_sampler": lambda: DataLoader(
        Noisy(),
        batch_sampler=BatchSampler(RandomSampler(Noisy(), generator=own_generator()), 4, False),
    ),
    "coins": lambda: DataLoader(Noisy(), batch_sampler=Coins()),
    "coins-worker": lambda: DataLoader(Noisy(), batch_sampler=Coins(), num_workers=1),
    "list": lambda: [(torch.full((4, 3), float(i)), torch.arange(4) % 2) for i in range(STEPS)],
}


def draws() -> list[float]:
    return [random.random(), np.random.random(), float(torch.rand(()))]


def train_and_note(training: Training, batches: Any) -> list[Any]:
    """The batch and random numbers of each step, and the random numbers after the epoch."""
    seen = []
    for batch in batches:
        training.step(batch)
        seen.append((*batch, draws()))
    return [*seen, draws()]


@pytest.mark.parametrize(
    ("name", "position"),
    [
        (name, position)
        for name in LOADERS
        for position in ((0, 4) if "worker" in name else (0, 1, 4, STEPS))  # workers start slowly
    ],
)
def test_the_rest_of_an_interrupted_epoch_is_reproduced_exactly(
    tmp_path: Path, name: str, position: int
) -> None:
    training, loader = Training("sgd-StepLR"), LOADERS[name]()
    train_and_note(training, loader)
    expected = []
    epoch_start = RandomStates.capture(loader)
    options = {"loader": loader, "epoch_start": epoch_start, "epoch": 1, "step": STEPS + position}
    if not position:
        save_checkpoint(tmp_path / "saved", **training.parts(), **options)
    for done, batch in enumerate(loader, start=1):
        training.step(batch)
        expected.append((*batch, draws()))
        if done == position:
            expected.clear()
            save_checkpoint(tmp_path / "saved", **training.parts(), **options, position=position)
    expected = [*expected, draws(), *train_and_note(training, loader)]

    resumed, fresh = Training("sgd-StepLR"), LOADERS[name]()
    checkpoint = load_checkpoint(tmp_path / "saved")
    checkpoint.restore(**resumed.parts())
    draws()  # such as an evaluation in between
    found = train_and_note(resumed, checkpoint.remaining(fresh))

    assert_same([*found, *train_and_note(resumed, fresh)], expected)
    assert_same(resumed.states(), training.states())


@pytest.mark.parametrize("position", [0, 2])
def test_a_loader_with_persistent_workers_continues_in_the_same_order(
    tmp_path: Path, position: int
) -> None:
    """The workers' random numbers cannot be restored, but the sampler's order can."""

    def loader() -> DataLoader[Any]:
        return DataLoader(
            list(range(12)),
            3,
            shuffle=True,
            num_workers=1,
            persistent_workers=True,
            generator=own_generator(),
        )

    first = loader()
    list(first)
    epoch_start = RandomStates.capture(first)
    options: dict[str, Any] = {"loader": first, "epoch_start": epoch_start, "epoch": 1, "step": 1}
    if not position:
        save_checkpoint(tmp_path / "saved", network=classifier(), **options)
    batches = iter(first)
    for _ in range(position):
        next(batches)
    if position:
        save_checkpoint(tmp_path / "saved", network=classifier(), position=position, **options)
    expected = [*batches, *first]

    second = loader()
    checkpoint = load_checkpoint(tmp_path / "saved")
    assert_same([*checkpoint.remaining(second), *second], expected)
    with pytest.raises(ArgumentError, match=r"^loader\.persistent_workers is False"):
        checkpoint.remaining(noisy_loader(generator=own_generator()))


def test_a_loader_other_than_the_saved_one_is_refused(tmp_path: Path) -> None:
    start = RandomStates.capture()
    options: dict[str, Any] = {"network": classifier(), "epoch": 0, "step": 5}
    with pytest.raises(
        ArgumentError, match=r"^loader\.generator is a generator whose state was not captured"
    ):
        save_checkpoint(
            tmp_path / "a",
            **options,
            position=5,
            epoch_start=start,
            loader=noisy_loader(generator=own_generator()),
        )
    with pytest.raises(ArgumentError, match=r"^position=5 requires epoch_start"):
        save_checkpoint(tmp_path / "a", **options, position=5)
    assert not list(tmp_path.iterdir())

    save_checkpoint(tmp_path / "a", **options, position=5, epoch_start=start)
    checkpoint = load_checkpoint(tmp_path / "a")
    with pytest.raises(
        ArgumentError, match=r"^loader has only 2 batches, .* after batch 5 of an epoch"
    ):
        checkpoint.remaining([1, 2])
    for refused in (checkpoint.remaining, lambda loader: checkpoint.restore(loader=loader)):
        with pytest.raises(
            ArgumentError, match=r"^loader\.generator is a generator whose state was not captured"
        ):
            refused(noisy_loader(generator=own_generator()))


def test_restoring_a_loader_s_generator_restores_the_next_epoch_s_order(tmp_path: Path) -> None:
    first, second = noisy_loader(generator=own_generator()), noisy_loader(generator=own_generator())
    list(first)
    save_checkpoint(tmp_path / "a", network=classifier(), loader=first, epoch=1, step=STEPS)
    expected = list(first)

    load_checkpoint(tmp_path / "a").restore(loader=second)
    assert_same(list(second), expected)


def test_random_states_are_not_restored_if_not_requested(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", network=classifier(), epoch=1, step=1)
    set_seed(8)
    expected = draws()
    set_seed(8)
    load_checkpoint(tmp_path / "a").restore(random_states=False)
    assert draws() == expected


# -- what a state may hold -------------------------------------------------------------------------


class Holder(nn.Module):
    """A network with an extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def bits(number: int) -> float:
    return float(struct.unpack(">d", struct.pack(">Q", number))[0])


numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.integers(0x7FF0000000000000, 0x7FFFFFFFFFFFFFFF).map(bits),  # inf and NaN of all kinds
)
arrays = st.sampled_from(
    ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
).flatmap(lambda code: st.lists(st.integers(0, 1), max_size=4).map(lambda x: np.array(x, code)))
tensors = st.sampled_from(
    [torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8]
).flatmap(lambda dtype: st.lists(st.integers(0, 1)).map(lambda x: torch.tensor(x, dtype=dtype)))
leaves = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.text(),
    st.binary(),
    tensors,
    arrays,
    arrays.filter(len).map(lambda array: array[0]),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([2]), torch.tensor(math.nan)]),
    st.frozensets(st.integers()),
)
keys = st.one_of(
    st.text(), st.sampled_from(["!tuple", "!float", "!"]), numbers, st.booleans(), st.none()
)
states = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys | st.tuples(keys), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(keys, st.integers(), max_size=4).map(Counter),
    ),
    max_leaves=12,
)


@given(states)
@example({bits(0x7FF8000000000000): torch.ones(1), bits(0x7FF8000000000000): torch.ones(2)})
@patient
def test_every_supported_state_is_restored_exactly(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("state") / "a"
    save_checkpoint(folder, network=Holder(value), epoch=1, step=1)

    network = Holder(None)
    load_checkpoint(folder).restore(network=network)
    assert_same(network.extra, value)
    assert {path.name for path in folder.iterdir()} == {"tensors.pt", "state.json"}


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"f": lambda: 0}, r"\['f'\]", "function"),
        ([0, (1, object())], r"\[1\]\[1\]", "object"),
        ({1: {"x": 1j}}, r"\[1\]\['x'\]", "complex"),
        ({(1, Ellipsis): 1}, r" key\[1\]", "ellipsis"),
        ([np.longdouble(1)], r"\[0\]", "longdouble"),
        (np.array([None]), "", "ndarray"),
        ([np.array([1.0], ">f8")], r"\[0\]", "ndarray"),
        ([nn.UninitializedBuffer()], r"\[0\]", "UninitializedBuffer"),
    ],
)
def test_an_unsupported_value_is_named_before_anything_is_written(
    tmp_path: Path, value: Any, path: str, kind: str
) -> None:
    message = rf"^network\['_extra_state'\]{path} has the type {kind}; .*these\.$"
    with pytest.raises(ArgumentError, match=message):
        save_checkpoint(tmp_path / "a", network=Holder(value), epoch=1, step=1)
    assert not list(tmp_path.iterdir())


def test_a_network_with_uninitialized_parameters_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(
        ArgumentError, match=r"^network\['weight'\] has the type UninitializedParameter; "
    ):
        save_checkpoint(tmp_path / "a", network=nn.LazyLinear(2), epoch=1, step=1)


def test_a_function_in_a_scheduler_s_state_is_named(tmp_path: Path) -> None:
    optimizer = SGD(classifier().parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    scheduler.anneal_func = lambda x: x  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match=r"^scheduler\['anneal_func'\] has the type function; "):
        save_checkpoint(tmp_path / "a", network=classifier(), scheduler=scheduler, epoch=1, step=1)


def schedulers(optimizer: Optimizer) -> list[Any]:
    """One of each of torch's schedulers."""
    return [
        lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
        lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.9),
        lr_scheduler.ConstantLR(optimizer),
        lr_scheduler.PolynomialLR(optimizer),
        lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        lr_scheduler.CyclicLR(optimizer, 0.1, 0.2, scale_fn=lambda x: x, cycle_momentum=False),
        lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        ),
        swa_utils.SWALR(optimizer, 0.05),
        *(make(optimizer) for make in SCHEDULERS.values()),
    ]


@pytest.mark.parametrize("number", range(8 + len(SCHEDULERS)))
def test_each_torch_scheduler_continues_with_the_same_learning_rates(
    tmp_path: Path, number: int
) -> None:
    outcomes = []
    for half in (False, True):
        network = nn.Linear(1, 1)
        optimizer = SGD(network.parameters(), lr=torch.tensor(0.2) if number % 2 else 0.2)
        scheduler = schedulers(optimizer)[number]
        rates = []
        if half:
            load_checkpoint(tmp_path / "a").restore(optimizer=optimizer, scheduler=scheduler)
        for step in range(2 if half else 0, 4):
            if step == 2 and not half:
                save_checkpoint(
                    tmp_path / "a",
                    network=network,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    epoch=step,
                    step=step,
                )
            optimizer.step()
            scheduler.step(*[1.0] if "Plateau" in type(scheduler).__name__ else [])
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
        outcomes.append((rates[-2:], scheduler.state_dict()))
    straight, resumed = outcomes
    assert resumed[0] == straight[0]
    if "lr_lambdas" not in straight[1]:
        assert_same(resumed[1].keys(), straight[1].keys())


def test_only_an_enabled_scaler_is_saved(tmp_path: Path) -> None:
    def scaler(enabled: bool = True, scale: float = 2.0) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)

    first = scaler(scale=32.0)
    first.scale(torch.ones(()))
    save_checkpoint(tmp_path / "a", network=classifier(), scaler=first, epoch=1, step=1)
    second = scaler()
    load_checkpoint(tmp_path / "a").restore(scaler=second)
    assert second.state_dict() == first.state_dict()
    load_checkpoint(tmp_path / "a").restore(scaler=scaler(enabled=False))

    save_checkpoint(tmp_path / "b", network=classifier(), scaler=scaler(False), epoch=1, step=1)
    with pytest.raises(ArgumentError, match=r"^scaler is not in the checkpoint; it has network\."):
        load_checkpoint(tmp_path / "b").restore(scaler=scaler())


def test_saving_a_view_does_not_save_its_base(tmp_path: Path) -> None:
    network = Holder(torch.zeros(1_000_000)[:2])
    save_checkpoint(tmp_path / "a", network=network, epoch=1, step=1)
    assert (tmp_path / "a" / "tensors.pt").stat().st_size < 50_000


def test_a_checkpoint_can_be_restored_more_than_once(tmp_path: Path) -> None:
    """Training after the first restore does not change it."""
    training = Training("adam-StepLR")
    training.epoch(noisy_loader())
    save_checkpoint(tmp_path / "a", **training.parts(), epoch=1, step=STEPS)
    expected = load_checkpoint(tmp_path / "a")
    checkpoint, first = load_checkpoint(tmp_path / "a"), Training("adam-StepLR")
    checkpoint.restore(**first.parts())
    first.epoch(noisy_loader())

    second, third = Training("adam-StepLR"), Training("adam-StepLR")
    checkpoint.restore(**second.parts())
    expected.restore(**third.parts())
    assert_same(second.states(), third.states())


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_and_plain_networks_are_interchangeable(
    tmp_path: Path, wrap: Callable[[nn.Module], Any]
) -> None:
    network, plain, wrapped = classifier(), classifier(), wrap(classifier())
    save_checkpoint(tmp_path / "a", network=wrap(network), epoch=1, step=1)
    load_checkpoint(tmp_path / "a").restore(network=plain)
    load_checkpoint(tmp_path / "a").restore(network=wrapped)
    assert_same(dict(plain.state_dict()), dict(network.state_dict()))
    again = dict(wrapped.state_dict())
    assert_same(list(again.values()), list(network.state_dict().values()))


def test_module_state_versions_are_restored(tmp_path: Path) -> None:
    seen = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
            seen.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    save_checkpoint(tmp_path / "a", network=nn.Sequential(Versioned(1, 1)), epoch=1, step=1)
    load_checkpoint(tmp_path / "a").restore(network=nn.Sequential(Versioned(1, 1)))
    assert seen == [7]


def test_a_network_s_state_may_be_a_plain_dict(tmp_path: Path) -> None:
    class Plain(nn.Linear):
        def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
            return dict(super().state_dict(*args, **options))

    first, second = Plain(2, 2), Plain(2, 2)
    save_checkpoint(tmp_path / "a", network=first, epoch=1, step=1)
    load_checkpoint(tmp_path / "a").restore(network=second)
    assert_same(second.state_dict(), first.state_dict())


# -- mismatches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"network": nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(6))},
            "network does not match the checkpoint (0.weight: expected [5, 3], got [5, 2]; "
            "1.weight: expected [5], got [6]; 1.bias: expected [5], got [6]; and 4 more).",
        ),
        (
            {"network": nn.Sequential(*classifier(), nn.Linear(1, 1, bias=False))},
            "network does not match the checkpoint (5.weight: expected nothing, got [1, 1]).",
        ),
        (
            {"optimizer": Adam(classifier().parameters())},
            "optimizer does not match the checkpoint (class: expected SGD, got Adam).",
        ),
        (
            {"optimizer": SGD([{"params": [torch.ones(5, 3)]}, {"params": [torch.ones(2)]}])},
            "optimizer does not match the checkpoint (parameter 1 of group 0: expected [5], got "
            "nothing; parameter 2 of group 0: expected [5], got nothing; parameter 3 of group 0: "
            "expected [5], got nothing; and 3 more).",
        ),
        (
            {"scheduler": lr_scheduler.ConstantLR(SGD(classifier().parameters()))},
            "scheduler does not match the checkpoint (class: expected StepLR, got ConstantLR).",
        ),
        (
            {"scaler": torch.amp.GradScaler("cpu")},
            "scaler is not in the checkpoint; it has network, optimizer, scheduler.",
        ),
        (
            {"loader": noisy_loader(generator=own_generator())},
            "loader.generator is a generator whose state was not captured; pass the same loader "
            "when capturing random states and saving checkpoints.",
        ),
    ],
)  # fmt: skip
def test_a_mismatch_is_described_and_nothing_is_changed(
    tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    training = Training("sgd-StepLR")
    training.epoch(noisy_loader())
    save_checkpoint(tmp_path / "a", **training.parts(), epoch=1, step=STEPS)
    fresh, untouched = Training("sgd-StepLR"), Training("sgd-StepLR")
    set_seed(1)
    expected = draws()

    set_seed(1)
    with pytest.raises(ArgumentError) as caught:
        load_checkpoint(tmp_path / "a").restore(**fresh.parts() | parts)
    assert str(caught.value) == message
    assert draws() == expected
    for name in fresh.parts().keys() - parts.keys():
        assert_same(fresh.states()[name], untouched.states()[name])


def test_a_lazy_network_takes_its_shapes_from_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", network=nn.Linear(3, 2), epoch=1, step=1)
    lazy = nn.LazyLinear(2)
    load_checkpoint(tmp_path / "a").restore(network=lazy)
    assert lazy.weight.shape == (2, 3)


@pytest.mark.parametrize("name", ["epoch", "step", "position"])
@pytest.mark.parametrize("value", [-1, 1.5, "1"])
def test_epoch_step_and_position_must_be_whole_numbers(
    tmp_path: Path, name: str, value: Any
) -> None:
    counts: dict[str, Any] = {"epoch": 1, "step": 1} | {name: value}
    with pytest.raises(ArgumentError, match=f"^{name}={value!r} is not allowed; .* 0 or more"):
        save_checkpoint(tmp_path / "a", network=classifier(), **counts)


# -- files -----------------------------------------------------------------------------------------


def save_number(folder: Path, number: int, size: int = 3) -> None:
    network = nn.Linear(size, 1, bias=False)
    nn.init.constant_(network.weight, number)
    save_checkpoint(folder, network=network, epoch=number, step=number, metrics={"loss": number})


def whole_number(folder: Path, size: int = 3) -> int:
    """The number of the checkpoint in `folder`, which must be complete."""
    network = nn.Linear(size, 1, bias=False)
    checkpoint = load_checkpoint(folder)
    checkpoint.restore(network=network)
    assert bool((network.weight == checkpoint.step).all())
    assert checkpoint.metrics == {"loss": checkpoint.step}
    return checkpoint.step


def test_a_checkpoint_is_two_files_and_replaces_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "checkpoint"
    for number in (1, 2):
        save_number(folder, number)
        assert whole_number(folder) == number
        assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
        assert {path.name for path in folder.iterdir()} == {"tensors.pt", "state.json"}
    flat = torch.load(folder / "tensors.pt", weights_only=True)
    assert flat["network['weight']"].tolist() == [[2.0, 2.0, 2.0]]
    json.loads((folder / "state.json").read_text(), parse_constant=pytest.fail)


def test_metrics_are_saved_and_read_as_floats(tmp_path: Path) -> None:
    metrics = {"loss": math.inf, "accuracy": 0.1, "odd": math.nan}
    given = metrics | {"t": torch.ones(())}
    save_checkpoint(tmp_path / "a", network=classifier(), epoch=3, step=7, metrics=given)
    checkpoint = load_checkpoint(tmp_path / "a")
    assert_same(checkpoint.metrics, metrics | {"t": 1.0})
    assert (checkpoint.epoch, checkpoint.step, checkpoint.position) == (3, 7, 0)


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("...")
    with pytest.raises(ArgumentError, match=r"^folder='.*' contains other files; "):
        save_number(tmp_path, 1)
    with pytest.raises(StoreError, match=r"^folder='.*thesis\.tex' cannot be written: "):
        save_number(tmp_path / "thesis.tex", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    save_number(folder, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StoreError, match=r"^folder='.*' cannot be written: .*\.$"):
            save_number(folder, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert whole_number(folder) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_symbolic_link_to_a_checkpoint_is_followed(tmp_path: Path) -> None:
    save_number(tmp_path / "a", 1)
    (tmp_path / "latest").symlink_to("a")
    save_number(tmp_path / "latest", 2)
    assert (tmp_path / "latest").is_symlink()
    assert whole_number(tmp_path / "a") == whole_number(tmp_path / "latest") == 2


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def save_something_else(folder: Path) -> None:
    torch.save({"x": nn.Linear(1, 1)}, folder / "tensors.pt")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove("state.json"), "state.json does not exist"),
        (remove("tensors.pt"), "tensors.pt does not exist"),
        (rewrite("state.json", lambda data: data[:-9]), "state.json is damaged"),
        (rewrite("state.json", lambda data: b""), "state.json is damaged"),
        (rewrite("state.json", lambda data: b"\xff\x00"), "state.json is damaged"),
        (rewrite("state.json", lambda data: b"[" * 100_000), "state.json is damaged"),
        (rewrite("state.json", lambda data: b'{"checkpoint": 1}'), "state.json is damaged"),
        (
            rewrite("state.json", lambda data: data.replace(b'"epoch": 1', b'"epoch": 2')),
            "state.json is damaged",
        ),
        (rewrite("state.json", lambda data: b"{}"), "state.json does not belong to a checkpoint"),
        (rewrite("state.json", lambda data: b"[1]"), "state.json does not belong to a checkpoint"),
        (
            rewrite("state.json", lambda data: data.replace(b'point": 1', b'point": 9')),
            "its version is 9; only 1 is supported",
        ),
        (rewrite("tensors.pt", lambda data: data[:-1]), "tensors.pt is damaged"),
        (rewrite("tensors.pt", lambda data: b""), "tensors.pt is damaged"),
        (save_something_else, "tensors.pt is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_with_the_reason(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "a"
    save_number(folder, 1)
    damage(folder)
    with pytest.raises(StoreError) as caught:
        load_checkpoint(folder)
    assert str(caught.value).startswith(f"folder={str(folder)!r} ")
    assert str(caught.value).endswith(f": {reason}.")


@given(st.data())
@patient
def test_a_flipped_bit_never_changes_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Either the state is read exactly as written, or it is refused."""
    folder = tmp_path_factory.mktemp("bits") / "a"
    save_number(folder, 1)
    path = folder / data.draw(st.sampled_from(["tensors.pt", "state.json"]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 1_000_000)) % len(content)
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        assert whole_number(folder) == 1
    except StoreError:
        pass


def test_a_missing_folder_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"^folder='.*none' is not a checkpoint: it does not exist"
    ):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"^folder='.*file' cannot be read as a checkpoint: "):
        load_checkpoint(tmp_path / "file")


# -- crashes ---------------------------------------------------------------------------------------


def forked(work: Callable[[], None]) -> int:
    """Return the pid of a child process that runs `work`."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def killed(pid: int) -> bool:
    """Wait for the child's end; return whether SIGKILL ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def die_at(event_number: int) -> None:
    """Kill this process before the file system call with that number, from 0."""
    left = [event_number]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

    sys.addaudithook(hook)


@pytest.mark.parametrize("there", [True, False], ids=["replaces", "new"])
def test_a_crash_at_any_system_call_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, there: bool
) -> None:
    seen = []
    for event_number in range(100):
        folder = tmp_path / f"{event_number}" / "a"
        if there:
            save_number(folder, 1)

        def work(folder: Path = folder, event_number: int = event_number) -> None:
            die_at(event_number)
            save_number(folder, 2)

        if not killed(forked(work)):
            break
        try:
            seen.append(whole_number(folder))
        except StoreError:
            assert not there
            seen.append(0)
        for second in range(100 if there and not folder.exists() else 0):
            again = tmp_path / f"{event_number}-{second}" / "a"
            shutil.copytree(folder.parent, again.parent)
            if not killed(forked(partial(work, again, second))):
                break
            assert whole_number(again) in (1, 2)
        save_number(folder, 3)
        assert whole_number(folder) == 3
        assert [path.name for path in folder.parent.iterdir()] == ["a"]
    assert len(seen) > 5
    assert seen == sorted(seen)
    assert set(seen) <= ({1, 2} if there else {0, 2})
    assert seen[-1] == 2 or not there
    assert whole_number(folder) == 2


def test_a_kill_at_any_time_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    folder, size = tmp_path / "a", 200_000
    save_number(folder, 0, size)

    def work() -> None:
        for number in range(1, 10_000):
            save_number(folder, number, size)

    for attempt in range(15):
        pid = forked(work)
        time.sleep(0.02 + 0.007 * attempt)  # at any moment of a save
        os.kill(pid, signal.SIGKILL)
        assert killed(pid)
        whole_number(folder, size)
        assert {path.name for path in tmp_path.iterdir()} <= {"a", ".a.writing", ".a.replaced"}


# -- retention -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"last": 0}, {"last": 1.5}, {"best": ""}, {"best": 3}, {"mode": "most"}]
)
def test_invalid_retention_settings_are_refused(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ArgumentError, match=f"^{name}={value!r} is not allowed; "):
        Keep(**options)


def test_the_latest_and_the_best_checkpoints_are_kept() -> None:
    losses = {10: 3.0, 20: 1.0, 30: 1.0, 40: math.nan, 50: 2.0}
    checkpoints = {step: {"loss": loss} for step, loss in losses.items()} | {60: {"other": 0.0}}
    assert Keep().superseded(checkpoints) == [10, 20, 30, 40, 50]
    assert Keep(last=2).superseded(checkpoints) == [10, 20, 30, 40]
    assert Keep(best="loss").superseded(checkpoints) == [10, 30, 40, 50]
    assert Keep(best="loss", mode="max").superseded(checkpoints) == [20, 30, 40, 50]
    assert Keep(last=9).superseded(checkpoints) == []
    assert Keep(best="loss").superseded({}) == []
    assert Keep(best="loss").superseded({1: {"loss": math.nan}, 2: {"loss": math.nan}}) == [1]
    with pytest.raises(ArgumentError, match=r"^best='val' is not a metric of any .* loss, other"):
        Keep(best="val").superseded(checkpoints)


@given(
    st.dictionaries(st.integers(0, 99), st.floats() | st.none(), min_size=1),
    st.integers(1, 5),
    st.sampled_from(["min", "max"]),
)
@patient
def test_no_deleted_checkpoint_is_better_than_the_kept_ones(
    losses: dict[int, float | None], last: int, mode: Any
) -> None:
    checkpoints = {step: {} if loss is None else {"x": loss} for step, loss in losses.items()}
    if all(loss is None for loss in losses.values()):
        return
    superseded = Keep(last=last, best="x", mode=mode).superseded(checkpoints)
    kept = checkpoints.keys() - superseded
    assert set(sorted(checkpoints)[-last:]) <= kept
    assert len(kept) <= last + 1
    sign = 1 if mode == "min" else -1
    values = [sign * loss for loss in losses.values() if loss is not None and loss == loss]
    if values:
        assert min(values) in [sign * checkpoints[step].get("x", math.nan) for step in kept]


def test_retention_names_each_superseded_checkpoint_once() -> None:
    retention = Retention(Keep(last=2, best="loss"), {1: {"loss": 0.5}, 2: {"loss": 2.0}})
    assert retention.add(3, {"loss": 3.0}) == []
    assert retention.add(4, {"loss": 4.0}) == [2]
    assert retention.add(5, {"loss": 0.1}) == [1, 3]
    assert retention.add(5, {"loss": 0.1}) == []


# -- CUDA ------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(("first", "second"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_checkpoint_can_be_restored_on_another_device(
    tmp_path: Path, first: str, second: str
) -> None:
    def training(device: str) -> tuple[nn.Module, Optimizer, Any]:
        set_seed(2)
        network = classifier().to(device)
        optimizer = AdamW(network.parameters(), lr=torch.tensor(0.01, device=device), foreach=False)
        return network, optimizer, lr_scheduler.StepLR(optimizer, 1)

    def epoch(parts: tuple[nn.Module, Optimizer, Any], device: str) -> None:
        for inputs, labels in noisy_loader():
            loss = F.cross_entropy(parts[0](inputs.to(device)), labels.to(device))
            parts[1].zero_grad()
            loss.backward()
            parts[1].step()
        parts[2].step()

    def restore(checkpoint: Checkpoint, parts: tuple[nn.Module, Optimizer, Any]) -> None:
        checkpoint.restore(network=parts[0], optimizer=parts[1], scheduler=parts[2])

    one, other = training(first), training(second)
    epoch(one, first)
    save_checkpoint(
        tmp_path / "a", network=one[0], optimizer=one[1], scheduler=one[2], epoch=1, step=STEPS
    )
    restore(load_checkpoint(tmp_path / "a"), other)
    for mine, saved in zip(other[0].parameters(), one[0].parameters(), strict=True):
        assert mine.device.type == second
        assert torch.equal(mine.cpu(), saved.cpu())
    assert other[1].param_groups[0]["lr"].device.type == second
    epoch(one, first)
    restore(load_checkpoint(tmp_path / "a"), other)
    epoch(other, second)
    if first == second:
        for mine, saved in zip(other[0].parameters(), one[0].parameters(), strict=True):
            assert torch.equal(mine, saved)


@pytest.mark.cuda
def test_cuda_random_states_are_restored(tmp_path: Path) -> None:
    torch.rand(3, device="cuda")
    save_checkpoint(tmp_path / "a", network=classifier(), epoch=1, step=1)
    expected = torch.rand(3, device="cuda")
    load_checkpoint(tmp_path / "a").restore()
    assert torch.equal(torch.rand(3, device="cuda"), expected)


class Average:
    """An average of weights; not an nn.Module."""

    def __init__(self, **shadow: Any) -> None:
        self.shadow = {"decay": 0.9, **shadow}

    def state_dict(self) -> dict[str, Any]:
        return self.shadow

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state


def adversaries(seed: int) -> dict[str, Any]:
    """Two networks with two optimizers, and averages of one: what a GAN has to save."""
    torch.manual_seed(seed)
    generator, critic = nn.Linear(3, 4), nn.Linear(4, 1)
    optimizers = {"g": Adam(generator.parameters(), 0.1), "d": SGD(critic.parameters(), 0.1, 0.9)}
    for optimizer in optimizers.values():
        critic(generator(torch.rand(2, 3))).sum().backward()
        optimizer.step()
    ema = swa_utils.AveragedModel(generator)
    return {
        "network": (generator, critic),
        "optimizer": optimizers,
        "ema": ema,
        "schedulers": [lr_scheduler.StepLR(each, 2 + seed) for each in optimizers.values()],
        "average": Average(weight=torch.rand(2)),
        "scaler": [torch.amp.GradScaler("cpu", enabled=False)],
    }


def states_of(given: Any) -> Any:
    if hasattr(given, "state_dict"):
        return given.state_dict()
    items = given.values() if isinstance(given, dict) else given
    return [states_of(item) for item in items]


def test_several_networks_and_optimizers_are_restored_by_their_names(tmp_path: Path) -> None:
    first, second = adversaries(1), adversaries(2)
    others = {name: first[name] for name in ("ema", "schedulers", "average")}
    usual = {name: first[name] for name in ("network", "optimizer", "scaler")}
    save_checkpoint(tmp_path / "c", **usual, objects=others, epoch=1, step=3)
    load_checkpoint(tmp_path / "c").restore(**second)
    for name in first:
        if name != "scaler":
            assert_same(states_of(second[name]), states_of(first[name]))
    one, other = load_checkpoint(tmp_path / "c"), nn.Linear(4, 1)
    with pytest.raises(ArgumentError, match=r"^ema does not match the checkpoint"):
        one.restore(ema=other)
    with pytest.raises(
        ArgumentError, match=r"^network is not in the checkpoint; it has network\[0\]"
    ):
        one.restore(network=other)


@pytest.mark.parametrize("given", [3, "text", [nn.Linear(1, 1), 3]], ids=str)
def test_what_has_no_state_is_refused(given: Any, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="allowed are objects with state_dict"):
        save_checkpoint(
            tmp_path / "c", network=nn.Linear(1, 1), objects={"epoch": given}, epoch=1, step=3
        )
    assert not (tmp_path / "c").exists()


def test_a_state_with_an_object_is_named(tmp_path: Path) -> None:
    average = {"average": Average(weight=object())}
    with pytest.raises(ArgumentError, match=r"^average\['weight'\] has the type object; a checkp"):
        save_checkpoint(tmp_path / "c", network=nn.Linear(1, 1), objects=average, epoch=1, step=3)
