"""The number of samples in a batch, for everything that loaders and collate functions yield."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

from tracker.errors import ArgumentError
from tracker.training.batches import batch_size
from tracker.training.meters import EpochMeter


def picture(width: int = 8) -> Tensor:
    """A picture with three channels."""
    return torch.ones(3, 8, width)


def ragged(number: int) -> list[Tensor]:
    """Sequences of different lengths, of five features each."""
    return [torch.ones(7 + extra, 5) for extra in range(number)]


KINDS: dict[str, Any] = {
    "tensor": lambda n: torch.ones(n, 2),
    "array": lambda n: np.ones((n, 2)),
    "inputs and labels": lambda n: [torch.ones(n, 2), torch.ones(n)],
    "arrays": lambda n: (np.ones((n, 2)), np.ones(n)),
    "one field": lambda n: [torch.ones(n, 2)],
    "autoencoder": lambda n: (torch.ones(n, 9), torch.ones(n, 9)),
    "two views": lambda n: [torch.ones(n, 3, 9, 9), torch.ones(n, 3, 9, 9)],
    "inputs, labels, epoch": lambda n: (torch.ones(n, 2), torch.ones(n), 3),
    "two inputs": lambda n: ((torch.ones(n, 2), torch.ones(n, 3)), torch.ones(n)),
    "two inputs and nothing": lambda n: ((torch.ones(n), torch.ones(n)), None),
    "two inputs of one shape": lambda n: ([torch.ones(n, 2)] * 2, torch.ones(n)),
    "mapping": lambda n: {"image": torch.ones(n, 1), "label": torch.ones(n)},
    "mapping in a list": lambda n: [{"ids": torch.ones(n, 9)}, torch.ones(n)],
    "mapping, texts first": lambda n: {"id": ["a"] * n, "x": torch.ones(n, 2)},
    "mapping, one text first": lambda n: {"name": "train", "x": torch.ones(n, 2)},
    "mapping, 0-d first": lambda n: {"epoch": torch.tensor(1), "x": torch.ones(n, 2)},
    "mapping, number first": lambda n: {"epoch": 7, "x": torch.ones(n, 2)},
    "mapping of lists": lambda n: {"ids": [[1, 2, 3]] * n, "text": ["a"] * n},
    "mapping, sequence first": lambda n: {"x": torch.ones(9, n, 2), "labels": torch.ones(n)},
    "mapping in a mapping": lambda n: {"inputs": {"ids": torch.ones(n, 3)}, "name": "a"},
    "pictures": lambda n: [picture() for _ in range(n)],
    "pictures of different sizes": lambda n: [picture(8 + extra) for extra in range(n)],
    "detection": lambda n: ([picture()] * n, [{"boxes": torch.ones(2, 4)}] * n),
    "detection, zipped": lambda n: tuple(zip(*[(picture(), {"boxes": 1})] * n, strict=True)),
    "detection, boxes joined": lambda n: (torch.ones(n, 3, 8, 8), torch.ones(17, 6)),
    "pictures and labels": lambda n: ([picture()] * n, torch.ones(n)),
    "sequences and labels": lambda n: (ragged(n), torch.ones(n)),
    "equal sequences and labels": lambda n: ([torch.ones(7, 5)] * n, torch.ones(n)),
    "samples, not joined": lambda n: [(picture(), 1)] * n,
    "samples with mappings": lambda n: [(picture(), {"boxes": torch.ones(2, 4)})] * n,
    "samples as mappings": lambda n: [{"x": torch.ones(9)}] * n,
    "texts and labels": lambda n: (("ab",) * n, torch.ones(n)),
    "texts": lambda n: ["ab"] * n,
    "numbers": lambda n: ([0.1] * n, [1] * n),
    "scalars": lambda n: [torch.tensor(1.0)] * n,
    "packed sequence": lambda n: pack_sequence(ragged(n), enforce_sorted=False),
    "packed and labels": lambda n: (pack_sequence(ragged(n)[::-1]), torch.ones(n)),
    "sequences to sequences": lambda n: (torch.ones(n, 9, 8), torch.ones(n, 9, 8)),
    "sequences to other ones": lambda n: (torch.ones(n, 9, 8), torch.ones(n, 9, 10)),
    "sequences in a list, labels": lambda n: ([torch.ones(n, 9, 8)] * 2, torch.ones(n)),
    "pictures and labels, zipped": lambda n: ((picture(),) * n, torch.ones(n)),
    "time first": lambda n: (torch.ones(9, n, 2), torch.ones(n)),
    "speech": lambda n: (torch.ones(n, 9, 4), torch.ones(31), torch.ones(n), torch.ones(n)),
    "nested": lambda n: (torch.nested.nested_tensor(ragged(n)), torch.ones(n)),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=6)
@given(number=st.integers(1, 12))
def test_a_batch_has_as_many_samples_as_it_was_made_of(kind: str, number: int) -> None:
    assert batch_size(KINDS[kind](number)) == number


@pytest.mark.parametrize(
    ("batch", "size"),
    [(5, 5), (np.int64(5), 5), (torch.ones(0, 2), 0), (ragged(4), 4), ([torch.ones(7, 5)] * 8, 8)],
    ids=["number", "numpy", "empty", "sequences", "equal sequences"],
)
def test_a_batch_that_is_not_a_collection_of_fields_has_its_own_length(
    batch: Any, size: int
) -> None:
    assert batch_size(batch) == size


def test_a_guess_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    said: set[str] = set()
    for _ in range(2):
        meter = EpochMeter(said=said)
        assert [meter.size_of(KINDS["time first"](4)) for _ in range(3)] == [4, 4, 4]

    assert [record.getMessage() for record in caplog.records] == [
        "the batch can be read in several ways and is taken for 4 samples; "
        "pass the number of samples to track_loss()."
    ]


@pytest.mark.parametrize("lists", [True, False])
@settings(deadline=None, max_examples=10)
@given(number=st.integers(1, 5), fields=st.integers(1, 3), more=st.integers(0, 2))
def test_tensors_that_may_be_pictures_or_fields_are_a_guess_unless_the_loader_joined_them(
    lists: bool, number: int, fields: int, more: int
) -> None:
    batch: Any = [torch.ones(number, 8 + more * field, 8) for field in range(fields)]
    batch = batch if lists else tuple(batch)
    said: list[int] = []
    size = batch_size(batch, said.append)
    assert size == number or said == [size]

    meter = EpochMeter(DataLoader([0]))
    assert meter.size_of(batch) == number
    assert not meter.said


@pytest.mark.parametrize("kind", ["detection", "detection, zipped", "pictures and labels"])
@pytest.mark.parametrize("number", range(1, 5))
def test_pictures_with_as_many_labels_need_no_guess(kind: str, number: int) -> None:
    said: list[int] = []
    assert batch_size(KINDS[kind](number), said.append) == number
    assert said == []


@pytest.mark.parametrize(
    "batch",
    [None, "batch", 3.5, True, torch.tensor(3), [], (), {}, [[]], {"name": "a"}, object, -3],
    ids=repr,
)
def test_a_batch_without_a_size_is_refused(batch: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^batch=-?[\w.]+ has no size; allowed: .*\.$"):
        batch_size(batch)
