"""Equal data have equal digests, and no sample is drawn for one."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    ChainDataset,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

import tracker
from tracker.capture.dataset import _slices, dataset_name, describe_dataset
from tracker.views.base import length_of

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


class Endless(Dataset[Any]):
    """Without a length: only the sampler knows the indices."""

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


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
    "class": (lambda: TensorDataset(torch.arange(3)), lambda: Folder([0, 1, 2], [])),
    "length": (lambda: [1, 2], lambda: [1, 2, 2]),
    "integers and floats": (lambda: [1], lambda: [1.0]),
    "booleans and integers": (lambda: [True], lambda: [1]),
    "numpy's and torch's": (lambda: [np.ones(2)], lambda: [np.ones(2, np.float32)]),
    "numpy's scalars": (lambda: [np.int64(1)], lambda: [np.uint64(1)]),
    "complex numbers": (lambda: [torch.tensor(1j)], lambda: [torch.tensor(2j)]),
    "pixels": (lambda: list(pictures(1)), lambda: list(pictures(2))),
    "proportions": (
        lambda: [Image.new("L", (4, 1))],
        lambda: [Image.new("L", (1, 4))],
    ),
    "palettes": (lambda: [palette(0, 0, 0)], lambda: [palette(255, 0, 0)]),
    "modes": (
        lambda: [Image.new("L", (2, 2))],
        lambda: [Image.new("P", (2, 2))],
    ),
    "keys": (lambda: [{"image": 1}], lambda: [{"label": 1}]),
    "fields": (
        lambda: [{"ids": torch.arange(3), "text": "a"}],
        lambda: [{"ids": torch.arange(3), "text": "b"}],
    ),
    "nesting": (lambda: [[1, [2, "a"]]], lambda: [[1, 2, ["a"]]]),
    "text": (lambda: ["ab", "c"], lambda: ["a", "bc"]),
    "bytes": (lambda: [b"ab"], lambda: ["ab"]),
    "nothing": (lambda: [None], lambda: ["None"]),
    "strings of numpy's": (
        lambda: [np.array(["a", "b"])],
        lambda: [np.array(["a", "c"])],
    ),
    "ragged rows": (
        lambda: [np.array([np.zeros(2000), np.ones(1)], dtype=object)],
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
def test_digests_are_equal_only_if_data_are(one: list[Any], other: list[Any]) -> None:
    same = repr(one) == repr(other)  # NaN is NaN here, and 1 is neither 1.0 nor True

    assert (digest(one) == digest(other)) == same


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


def test_sparse_data_have_a_digest() -> None:
    def rows(value: float) -> TensorDataset:
        return TensorDataset(torch.eye(3).mul(value).to_sparse())

    assert digest(rows(1.0)) == digest(rows(1.0))
    assert digest(rows(1.0)) != digest(rows(2.0))


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
    assert digest([wrap(one)]) == digest([wrap(other)])


def some_digests() -> list[str]:
    thing = {"text": "a", "ids": torch.arange(3), "thing": Thing(), "names": {"x", "y", "z"}}
    return [
        digest(TensorDataset(torch.arange(12.0).reshape(3, 4), torch.arange(3))),
        digest(Subset(TensorDataset(torch.arange(9)), [4, 2])),
        digest(pictures(3)),
        digest([thing]),
        digest([len, Thing, Thing(), lambda: 0, object(), np.float32(1), None]),
        digest(Items([1, 2, 3])),
    ]


def test_every_process_computes_the_same_digests() -> None:
    printed = python("from tests.capture import test_dataset; print(*test_dataset.some_digests())")

    assert printed.split() == some_digests()
    assert len(set(some_digests())) == 6


# -- what a digest does not read -----------------------------------------------------------------


def test_a_digest_covers_attributes_and_not_caches() -> None:
    one, other = Items([1, 2]), Items([1, 2])
    other.cache = {0: torch.ones(1)}  # type: ignore[attr-defined]
    other.opened = [torch.ones(1), None]  # type: ignore[attr-defined]
    other.count = 7  # type: ignore[attr-defined]

    assert digest(one) == digest(other)
    other.weights = np.ones(3)  # type: ignore[attr-defined]
    assert digest(one) != digest(other)
    assert describe_dataset(one, content=False) == describe_dataset(Items([3, 4]), content=False)


@pytest.mark.parametrize("kind", [ConcatDataset, ChainDataset])
def test_the_digest_of_several_data_sets_is_that_of_their_data(kind: Any) -> None:
    def several(last: int) -> Any:
        return kind([Items([1, 2]), Items([3, last])])

    assert digest(several(4)) == digest(several(4))
    assert digest(several(4)) != digest(several(5))


def test_an_array_is_read_in_slices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tracker.capture.dataset._SLICE", 64)
    rows = np.arange(120, dtype=np.float32).reshape(20, 6)
    mapped: Any = np.memmap(tmp_path / "rows", np.float32, "w+", shape=rows.shape)
    mapped[:] = rows
    fortran = np.asfortranarray(rows)
    whole = digest(Folder(rows, [1]))

    assert digest(Folder(mapped, [1])) == digest(Folder(fortran, [1])) == whole
    mapped[19, 5] = -1
    assert digest(Folder(mapped, [1])) != whole


def test_of_a_very_large_array_only_slices_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracker.capture.dataset._SLICE", 8)
    numbers = torch.arange(1000)
    read = [part.start for part in _slices(len(numbers), 8)]

    assert len(read) == 63
    assert digest(TensorDataset(numbers)) != digest(TensorDataset(numbers[:-1]))


def test_a_length_that_opens_a_file_leaves_the_data_set_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_bytes(b"12345")

    class Lazy(Items):
        def __init__(self) -> None:
            super().__init__([])
            self.file: Any = None

        def __len__(self) -> int:
            if self.file is None:
                self.file = file.open("rb")
            return file.stat().st_size

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} is asked of the file")

    lazy = Lazy()
    loader = DataLoader(lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert describe_dataset(lazy).profile["samples"] == 5
        assert length_of(loader) == 5
        assert dataset_name(lazy) == "Lazy"
    assert lazy.file is None
