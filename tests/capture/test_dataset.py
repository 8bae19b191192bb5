"""Reading a data set has no side effects, and equal data have equal digests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)
from torchvision import transforms

import tracker
from tracker.capture.dataset import dataset_name, describe_dataset, inputs_of, sample_batch

PROJECT = Path(tracker.__file__).parents[1]

patient = settings(deadline=None, max_examples=50)


class Items(Dataset[Any]):
    """A data set that creates its samples one by one."""

    def __init__(self, items: list[Any], transform: Callable[[Any], Any] | None = None) -> None:
        self.items, self.transform = items, transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        return self.transform(item) if self.transform else item


class Stream(IterableDataset[Any]):
    """Samples that can be read only once; their number is known."""

    def __init__(self, number: int) -> None:
        self.number, self.left = number, iter(range(number))

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(number) for number in self.left)


class Sample(NamedTuple):
    """A sample as a named tuple."""

    image: Tensor
    label: int


def noisy(value: Tensor) -> Tensor:
    """A transform that draws from every global generator."""
    return value + random.random() + np.random.rand() + torch.rand(())


def noise(number: int = 10) -> Items:
    return Items([torch.tensor(float(n)) for n in range(number)], noisy)


def generators() -> list[bytes]:
    """The states of all global generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()
    return [pickle.dumps(state) for state in states]


def python(*lines: str) -> str:
    """The output of a separate process, with other hashes and other addresses."""
    path = str(PROJECT)
    return subprocess.check_output(
        [sys.executable, "-c", "\n".join(lines)],
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "1"},
        text=True,
    )


def digest(dataset: Any) -> str:
    return describe_dataset(dataset).digest


# -- samples -------------------------------------------------------------------------------------


def test_samples_come_in_the_data_set_s_order() -> None:
    images, labels = torch.rand(20, 1, 4, 4), torch.arange(20)
    loader = DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True)

    first_images, first_labels = sample_batch(loader, 6)

    assert torch.equal(first_images, images[:6])
    assert torch.equal(first_labels, labels[:6])


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"batch_sampler": [[0, 1, 2], [3]]}])
def test_samples_are_batched_by_the_loader_s_collate_function(options: dict[str, Any]) -> None:
    loader = DataLoader(Items([{"n": n} for n in range(4)]), collate_fn=tuple, **options)

    assert sample_batch(loader, 3) == ({"n": 0}, {"n": 1}, {"n": 2})


def test_a_data_set_of_batches_returns_its_first_batch() -> None:
    batches = [(torch.full((5, 2), n), torch.full((5,), n)) for n in range(6)]
    loader = DataLoader(Items(batches), batch_size=None)

    images, labels = sample_batch(loader, 3)

    assert torch.equal(images, batches[0][0])
    assert torch.equal(labels, batches[0][1])


def test_only_the_requested_samples_are_created() -> None:
    made: list[int] = []
    loader = DataLoader(Items(list(range(100)), lambda n: made.append(n) or n), batch_size=50)

    batch = sample_batch(loader, 3)

    assert batch.tolist() == made == [0, 1, 2]


def test_a_small_data_set_returns_all_its_samples() -> None:
    assert sample_batch(DataLoader(Items([1, 2])), 10).tolist() == [1, 2]
    assert sample_batch(DataLoader(Items([])), 10) is None


class Endless(Dataset[Any]):
    """Without a length: only the sampler knows the indices."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def test_a_data_set_without_a_length_does_not_fail() -> None:
    batch = sample_batch(DataLoader(Endless(), sampler=range(10), batch_size=2), 4)

    assert batch is None or batch.tolist() == [0, 1, 2, 3]


def test_a_list_of_batches_returns_its_first_batch() -> None:
    first, second = torch.ones(3), torch.zeros(3)

    assert sample_batch([first, second], 2) is first
    assert sample_batch((first, second), 2) is first
    assert sample_batch([], 2) is None


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(6), batch_size=2),
        DataLoader(Stream(6), batch_size=None),
        (torch.tensor([number, number]) for number in range(3)),
    ],
    ids=["batches", "samples", "generator"],
)
def test_a_stream_is_not_consumed(loader: Any) -> None:
    assert sample_batch(loader, 2) is None
    assert sum(batch.numel() for batch in loader) == 6


def test_sampling_and_digests_restore_every_generator() -> None:
    before = generators()

    sample_batch(DataLoader(noise(), batch_size=4, shuffle=True), 4)
    describe_dataset(noise())

    assert generators() == before


def test_a_failing_data_set_returns_no_samples_and_restores_generators(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(value: Tensor) -> Tensor:
        noisy(value)
        raise OSError("no such picture")

    before = generators()

    assert sample_batch(DataLoader(Items([torch.ones(1)], fail)), 1) is None
    assert generators() == before
    assert "no such picture" in caplog.text


def test_generators_held_by_a_data_set_are_restored() -> None:
    class Own(Items):
        def __init__(self) -> None:
            super().__init__([torch.ones(1)] * 4)
            self.torch = torch.Generator().manual_seed(1)
            self.others = [np.random.default_rng(1), np.random.RandomState(1), random.Random(1)]

        def __getitem__(self, index: int) -> Any:
            new, old, python = self.others
            drawn = (new.random(), old.rand(), python.random())
            return torch.rand(1, generator=self.torch) + sum(drawn)

    looked_at, other = Own(), Own()
    sample_batch(DataLoader(looked_at), 2)
    describe_dataset(looked_at)
    assert [float(item) for item in (looked_at[0], looked_at[1])] == [
        float(item) for item in (other[0], other[1])
    ]


def test_sampling_does_not_change_the_loader_s_order() -> None:
    def epochs(look: bool) -> list[Any]:
        torch.manual_seed(3)
        generator = torch.Generator().manual_seed(5)
        loader = DataLoader(noise(), batch_size=3, shuffle=True, generator=generator)
        if look:
            state = generator.get_state()
            sample_batch(loader, 4)
            assert torch.equal(generator.get_state(), state)
        random.seed(7)
        np.random.seed(7)
        return [batch.tolist() for _ in range(2) for batch in loader]

    assert epochs(look=True) == epochs(look=False)


def test_sampling_does_not_disturb_an_epoch_in_progress() -> None:
    loader = DataLoader(Items(list(range(6))), batch_size=2)
    batches = iter(loader)
    assert next(batches).tolist() == [0, 1]

    sample_batch(loader, 3)

    assert [batch.tolist() for batch in batches] == [[2, 3], [4, 5]]


def in_the_main_process(value: Tensor) -> Tensor:
    assert get_worker_info() is None
    return noisy(value)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
@pytest.mark.parametrize("persistent", [False, True])
def test_no_worker_is_started(persistent: bool) -> None:
    loader = DataLoader(
        Items([torch.ones(1)] * 8, in_the_main_process),
        batch_size=4,
        num_workers=2,
        persistent_workers=persistent,
    )
    before = generators()

    assert len(sample_batch(loader, 4)) == 4

    assert multiprocessing.active_children() == []
    assert generators() == before


@pytest.mark.parametrize(
    ("batch", "shape"),
    [
        (torch.ones(5, 2), (3, 2)),
        ((torch.ones(5, 2), torch.ones(5)), (3, 2)),
        ([[torch.ones(5, 4), torch.ones(5)], torch.ones(5)], (3, 4)),
        (Sample(torch.ones(2, 7), 1), (2, 7)),
        (torch.tensor(1.0), None),
        ([], None),
        (["text"], None),
        (None, None),
    ],
    ids=repr,
)
def test_the_inputs_of_a_batch_are_its_first_tensor(
    batch: Any, shape: tuple[int, ...] | None
) -> None:
    inputs = inputs_of(batch, 3)

    assert (None if inputs is None else tuple(inputs.shape)) == shape


# -- names and profiles --------------------------------------------------------------------------


def test_a_data_set_s_name_is_its_attribute_or_its_class() -> None:
    named = Items([1, 2, 3])
    named.name = "numbers"  # type: ignore[attr-defined]

    assert dataset_name(named) == "numbers"
    assert dataset_name(Items([1])) == "Items"
    assert dataset_name(Subset(Subset(named, [0, 1]), [0])) == "numbers"
    assert dataset_name(Subset(Items([1, 2]), [0])) == "Items"
    assert dataset_name([torch.ones(1)]) == "list"


def test_a_profile_has_class_and_length() -> None:
    described = describe_dataset(TensorDataset(torch.ones(7, 2)))

    assert described.profile == {"class": "TensorDataset", "samples": 7}
    assert describe_dataset(Stream(3)).profile == {"class": "Stream", "samples": 3}
    assert describe_dataset(Endless()).profile == {"class": "Endless"}
    assert len(described.digest) <= 36
    assert int(described.digest, 16) >= 0


# -- digests -------------------------------------------------------------------------------------


class Folder(Dataset[Any]):
    """Data and labels in the attributes of torchvision's data sets."""

    def __init__(self, data: Any, targets: Any) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index], self.targets[index]


def pictures(shade: int) -> list[Any]:
    return [(Image.new("RGB", (4, 3), (shade, number, 0)), number) for number in range(5)]


def palette(*colours: int) -> Image.Image:
    picture = Image.new("P", (2, 2))
    picture.putpalette(colours)
    return picture


# Pairs of functions that create different data, the same at each call.
DIFFERENT: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "values": (
        lambda: TensorDataset(torch.arange(6.0)),
        lambda: TensorDataset(torch.tensor([0.0, 1, 2, 3, 4, 6])),
    ),
    "order": (
        lambda: TensorDataset(torch.arange(6.0)),
        lambda: TensorDataset(torch.arange(6.0).flip(0)),
    ),
    "dtype": (
        lambda: TensorDataset(torch.zeros(6)),
        lambda: TensorDataset(torch.zeros(6, dtype=torch.int32)),
    ),
    "shape": (
        lambda: TensorDataset(torch.arange(6.0).reshape(2, 3)),
        lambda: TensorDataset(torch.arange(6.0).reshape(3, 2)),
    ),
    "labels": (
        lambda: TensorDataset(torch.ones(3, 2), torch.tensor([0, 1, 2])),
        lambda: TensorDataset(torch.ones(3, 2), torch.tensor([0, 1, 1])),
    ),
    "half precision": (
        lambda: TensorDataset(torch.ones(3).half()),
        lambda: TensorDataset(torch.ones(3).bfloat16()),
    ),
    "strides": (
        lambda: TensorDataset(torch.arange(9.0).reshape(3, 3)),
        lambda: TensorDataset(torch.arange(9.0).reshape(3, 3).T),
    ),
    "torchvision's pixels": (
        lambda: Folder(torch.zeros(3, 2, 2, dtype=torch.uint8), torch.arange(3)),
        lambda: Folder(torch.ones(3, 2, 2, dtype=torch.uint8), torch.arange(3)),
    ),
    "torchvision's labels": (
        lambda: Folder(np.zeros((3, 2, 2), np.uint8), [0, 1, 2]),
        lambda: Folder(np.zeros((3, 2, 2), np.uint8), [0, 1, 3]),
    ),
    "part": (
        lambda: Subset(TensorDataset(torch.arange(6)), [0, 1, 2]),
        lambda: Subset(TensorDataset(torch.arange(6)), [0, 1, 3]),
    ),
    "part of another": (
        lambda: Subset(TensorDataset(torch.arange(6)), [0, 1, 2]),
        lambda: Subset(TensorDataset(torch.arange(1, 7)), [0, 1, 2]),
    ),
    "class": (lambda: TensorDataset(torch.arange(3)), lambda: Items([torch.arange(3)])),
    "length": (lambda: Items([1, 2]), lambda: Items([1, 2, 2])),
    "integers and floats": (lambda: Items([1]), lambda: Items([1.0])),
    "booleans and integers": (lambda: Items([True]), lambda: Items([1])),
    "numpy's and torch's": (lambda: Items([np.ones(2)]), lambda: Items([np.ones(2, np.float32)])),
    "numpy's scalars": (lambda: Items([np.int64(1)]), lambda: Items([np.uint64(1)])),
    "complex numbers": (lambda: Items([torch.tensor(1j)]), lambda: Items([torch.tensor(2j)])),
    "pixels": (lambda: Items(pictures(1)), lambda: Items(pictures(2))),
    "proportions": (
        lambda: Items([Image.new("L", (4, 1))]),
        lambda: Items([Image.new("L", (1, 4))]),
    ),
    "palettes": (lambda: Items([palette(0, 0, 0)]), lambda: Items([palette(255, 0, 0)])),
    "modes": (
        lambda: Items([Image.new("L", (2, 2))]),
        lambda: Items([Image.new("P", (2, 2))]),
    ),
    "keys": (lambda: Items([{"image": 1}]), lambda: Items([{"label": 1}])),
    "fields": (
        lambda: Items([{"ids": torch.arange(3), "text": "a"}]),
        lambda: Items([{"ids": torch.arange(3), "text": "b"}]),
    ),
    "nesting": (lambda: Items([[1, [2, "a"]]]), lambda: Items([[1, 2, ["a"]]])),
    "text": (lambda: Items(["ab", "c"]), lambda: Items(["a", "bc"])),
    "bytes": (lambda: Items([b"ab"]), lambda: Items(["ab"])),
    "nothing": (lambda: Items([None]), lambda: Items(["None"])),
    "strings of numpy's": (
        lambda: Items([np.array(["a", "b"])]),
        lambda: Items([np.array(["a", "c"])]),
    ),
    "ragged rows": (
        lambda: Items([np.array([np.zeros(2000), np.ones(1)], dtype=object)]),
        lambda: Items(
            [np.array([np.where(np.arange(2000) == 1000, 5.0, 0.0), np.ones(1)], dtype=object)]
        ),
    ),
}


@pytest.mark.parametrize("make", [pair[0] for pair in DIFFERENT.values()], ids=DIFFERENT)
def test_equal_data_have_equal_digests(make: Callable[[], Any]) -> None:
    assert digest(make()) == digest(make())


@pytest.mark.parametrize(("one", "other"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_data_have_different_digests(
    one: Callable[[], Any], other: Callable[[], Any]
) -> None:
    assert digest(one()) != digest(other())


SAMPLES = st.lists(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(SAMPLES, SAMPLES)
@example([1.0, 10.0], [1.01, 0.0])
@example([True, 1], [1, 1])
@patient
def test_digests_are_equal_only_if_samples_are(one: list[Any], other: list[Any]) -> None:
    same = repr(one) == repr(other)  # NaN is NaN here, and 1 is neither 1.0 nor True

    assert (digest(Items(one)) == digest(Items(other))) == same


@given(
    st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.floats(width=32)), min_size=1),
    st.integers(0, 100),
)
@patient
def test_a_single_changed_number_changes_the_digest(
    rows: list[tuple[int, float]], where: int
) -> None:
    integers, floats = map(list, zip(*rows, strict=True))
    data = torch.tensor(integers), torch.tensor(floats)
    changed = data[0].clone()
    changed[where % len(changed)] ^= 1

    assert digest(TensorDataset(*data)) == digest(TensorDataset(*(part.clone() for part in data)))
    assert digest(TensorDataset(*data)) != digest(TensorDataset(changed, data[1]))
    assert digest(TensorDataset(*data)) != digest(TensorDataset(*reversed(data)))


def test_strides_do_not_change_the_digest() -> None:
    wide = torch.arange(40.0).reshape(10, 4)

    assert digest(TensorDataset(wide[:, ::2])) == digest(TensorDataset(wide[:, ::2].contiguous()))
    assert digest(TensorDataset(wide.T[:2].T)) == digest(
        TensorDataset(wide[:, :2].clone().requires_grad_())
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        torch.empty(0, 3),
        torch.empty(3, 0),
        torch.tensor([True, False]),
        torch.ones(2, 3).to(torch.float8_e5m2),
    ],
    ids=["conjugate", "negative", "no rows", "no columns", "booleans", "float8"],
)
def test_any_tensor_has_a_digest(tensor: Tensor) -> None:
    assert digest(TensorDataset(tensor)) == digest(TensorDataset(tensor.clone()))


def test_sparse_samples_have_a_digest() -> None:
    def rows(value: float) -> Items:
        return Items([torch.eye(3).mul(value).to_sparse()])

    assert digest(rows(1.0)) == digest(rows(1.0))
    assert digest(rows(1.0)) != digest(rows(2.0))


def test_random_transforms_have_a_stable_digest() -> None:
    augmented = transforms.Compose(
        [
            transforms.RandomCrop(2),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            noisy,
        ]
    )
    items = [Image.fromarray(np.arange(n, n + 16, dtype=np.uint8).reshape(4, 4)) for n in range(9)]
    random.seed(1)
    first = digest(Items(items, augmented))
    random.seed(2)
    np.random.seed(2)
    torch.manual_seed(2)

    assert digest(Items(items, augmented)) == first
    assert digest(Items(items[1:], augmented)) != first


@pytest.mark.parametrize(("length", "number"), [(100, 50), (10_000, 64)])
def test_a_large_data_set_is_identified_by_samples_spread_over_it(length: int, number: int) -> None:
    made: list[int] = []
    describe_dataset(Items(list(range(length)), lambda n: made.append(n) or n))

    assert len(made) == number
    assert made == sorted(set(made))
    assert made[0] < length / 50
    assert made[-1] > length * 0.97


def test_a_stream_is_identified_by_its_class_and_not_consumed() -> None:
    stream = Stream(5)

    assert digest(stream) == digest(Stream(5))
    assert len(list(stream)) == 5


class Thing:
    """Without its own repr: the default one shows the address."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda thing: thing,
        lambda thing: [thing, 1],
        lambda thing: {"thing": thing},
        lambda thing: {thing},
        lambda thing: np.array([thing], dtype=object),
        lambda thing: np.array([[1, "a"], [2, thing]], dtype=object),
    ],
    ids=["sample", "list", "dict", "set", "array", "table"],
)
def test_a_digest_does_not_depend_on_memory_addresses(wrap: Callable[[Any], Any]) -> None:
    one, other = Thing(), Thing()

    assert repr(one) != repr(other)
    assert digest(Items([wrap(one)])) == digest(Items([wrap(other)]))


def some_digests() -> list[str]:
    thing = {"text": "a", "ids": torch.arange(3), "thing": Thing(), "names": {"x", "y", "z"}}
    return [
        digest(TensorDataset(torch.arange(12.0).reshape(3, 4), torch.arange(3))),
        digest(Subset(TensorDataset(torch.arange(9)), [4, 2])),
        digest(Items(pictures(3))),
        digest(Items([thing])),
        digest(Items([len, Thing, Thing(), lambda: 0, object(), np.float32(1), None])),
        digest(noise()),
    ]


def test_every_process_computes_the_same_digests() -> None:
    printed = python("from tests.capture import test_dataset; print(*test_dataset.some_digests())")

    assert printed.split() == some_digests()
    assert len(set(some_digests())) == 6


@pytest.mark.cuda
def test_a_digest_made_before_cuda_starts_does_not_seed_it() -> None:
    printed = python(
        "import torch; from tests.capture import test_dataset",
        "torch.manual_seed(7)",
        "test_dataset.describe_dataset(test_dataset.noise())",
        "print(torch.cuda.initial_seed())",
    )

    assert printed == "7\n"
