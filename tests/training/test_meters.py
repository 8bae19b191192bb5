"""An epoch's loss is the mean over its samples, its accuracy the share of right labels."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from tracker.errors import ArgumentError
from tracker.training.meters import EpochMeter, batch_size, num_correct

patient = settings(deadline=None)

LOSSES = st.floats(-1e6, 1e6)
SIZES = st.integers(1, 1000)


def samples(number: int) -> TensorDataset:
    """Samples of one float64 each, whose mean differs from that of most of their batches."""
    return TensorDataset(torch.arange(number, dtype=torch.float64) ** 2)


def epoch_over(loader: Any, batches: int | None = None) -> tuple[float, float]:
    """The loss that a meter finds, told only the loader, and the mean of the samples it saw."""
    meter, seen = EpochMeter(loader), []
    for number, (values,) in enumerate(loader):
        if number == batches:
            break
        meter.add_loss(values.mean())
        seen.append(values)
    return meter.compute()["loss"], torch.cat(seen).mean().item()


class Stream(IterableDataset[Any]):
    """Ten samples that come as they come."""

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return iter(samples(10))


# -- how the batches' losses are weighted --------------------------------------------------------


@given(st.lists(st.tuples(LOSSES, SIZES), min_size=1))
@patient
def test_losses_are_weighted_by_the_sizes_of_their_batches(
    batches: list[tuple[float, int]],
) -> None:
    meter = EpochMeter()
    for loss, size in batches:
        meter.add_loss(torch.tensor(loss, dtype=torch.float64), size)

    total = math.fsum(loss * size for loss, size in batches)
    assert meter.loss_sum == pytest.approx(total, rel=1e-12, abs=1e-3)
    assert meter.compute() == {
        "loss": pytest.approx(total / sum(size for _, size in batches), rel=1e-12, abs=1e-6)
    }
    assert meter.losses.tolist() == [loss for loss, _ in batches]
    assert meter.sizes.tolist() == [size for _, size in batches]
    assert len(meter) == len(batches)


@given(st.integers(1, 60), st.integers(1, 25), st.booleans())
@patient
def test_a_loader_knows_that_its_last_batch_is_smaller(
    number: int, size: int, drop_last: bool
) -> None:
    size = min(size, number)
    found, mean = epoch_over(DataLoader(samples(number), batch_size=size, drop_last=drop_last))

    assert found == pytest.approx(mean, rel=1e-12)


@given(st.integers(2, 60), st.integers(1, 25), st.integers(1, 60))
@patient
def test_an_epoch_that_is_left_early_had_full_batches(number: int, size: int, left: int) -> None:
    found, mean = epoch_over(DataLoader(samples(number), batch_size=size), left)

    assert found == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("size", [1, 4, 10, 32])
@pytest.mark.parametrize("drawn", [10, 11, 12, 16])
def test_a_sampler_decides_how_many_samples_there_are(drawn: int, size: int) -> None:
    data = samples(40)
    for sampler in (
        SubsetRandomSampler(range(drawn)),
        RandomSampler(data, num_samples=drawn),
        range(drawn),
    ):
        found, mean = epoch_over(DataLoader(data, batch_size=size, sampler=sampler))

        assert found == pytest.approx(mean, rel=1e-12)


def test_batches_of_a_stream_weigh_alike() -> None:
    loader = DataLoader(Stream(), batch_size=4)
    means = [values.mean().item() for (values,) in loader]

    found, _ = epoch_over(loader)

    assert found == pytest.approx(sum(means) / 3)


def test_batches_of_a_sampler_of_ones_own_weigh_alike() -> None:
    data = samples(10)
    loader = DataLoader(data, batch_sampler=[[0], [1, 2, 3], [4, 5]])
    means = [values.mean().item() for (values,) in loader]

    found, _ = epoch_over(loader)

    assert found == pytest.approx(sum(means) / 3)


@pytest.mark.parametrize("loader", [None, [1, 2], iter(())], ids=["none", "list", "iterator"])
def test_batches_of_who_knows_what_weigh_alike(loader: Any) -> None:
    meter = EpochMeter(loader)
    meter.add_loss(1.0)
    meter.add_loss(4.0)

    assert meter.compute() == {"loss": 2.5}
    assert meter.sizes.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(samples(10), batch_sampler=[[0], [1, 2, 3], [4, 5]]),
        DataLoader(samples(7), batch_sampler=BatchSampler(range(7), 3, drop_last=False)),
        DataLoader(Stream(), batch_size=4),
        DataLoader(samples(10), batch_size=4),
        [[torch.ones(3)], [torch.zeros(1)]],
    ],
    ids=["batches", "batch_sampler", "stream", "plain", "list"],
)
def test_labels_tell_the_sizes_whatever_the_loader(loader: Any) -> None:
    meter, seen = EpochMeter(loader), []
    for (values,) in loader:
        meter.add_loss(values.mean())
        meter.add_correct(torch.zeros(len(values), 2), torch.zeros(len(values), dtype=torch.int64))
        seen.append(values)

    mean = torch.cat(seen).mean().item()
    assert meter.compute() == {"loss": pytest.approx(mean, rel=1e-12), "accuracy": 1.0}


def test_labels_of_some_batches_only_tell_no_sizes() -> None:
    loader = DataLoader(samples(6), batch_size=4)
    meter = EpochMeter(loader)
    for (values,) in loader:
        meter.add_loss(values.mean())
    meter.add_correct(torch.zeros(100, 2), torch.zeros(100, dtype=torch.int64))

    assert meter.sizes.tolist() == [4, 2]


def test_a_size_that_was_said_comes_before_one_that_was_guessed() -> None:
    meter = EpochMeter(DataLoader(samples(10), batch_size=4))
    meter.add_loss(1.0, 100)
    meter.add_loss(1.0)
    meter.add_loss(1.0)

    assert meter.sizes.tolist() == [100, 4, 2]


# -- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        0.75,
        np.float32(0.75),
        np.array(0.75),
        torch.tensor(0.75),
        torch.tensor([0.75]),
        torch.tensor([[0.75]], dtype=torch.float64),
        torch.tensor(0.75, requires_grad=True) * 1,
        torch.tensor(0.75, dtype=torch.float16),
        torch.tensor(0.75, dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_a_loss_is_a_number_in_whatever_wrapping(loss: Any) -> None:
    meter = EpochMeter()
    meter.add_loss(loss, 3)

    assert meter.compute() == {"loss": 0.75}


def test_losses_of_several_precisions_are_one_epoch() -> None:
    meter = EpochMeter()
    for loss in (1.0, torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float16), 2):
        meter.add_loss(loss, 10)

    assert meter.losses.tolist() == [1.0, 2.0, 3.0, 2.0]
    assert meter.compute() == {"loss": 2.0}


def test_losses_in_half_precision_are_summed_in_double() -> None:
    """The sum would be infinite in float16, and stand still at 256 in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        meter = EpochMeter()
        for _ in range(1000):
            meter.add_loss(torch.tensor(100.0, dtype=dtype), 64)

        assert meter.compute() == {"loss": 100.0}
        assert meter.loss_sum == 6_400_000.0


@pytest.mark.parametrize("batches", [511, 512, 513, 1024, 1300])
def test_an_epoch_has_as_many_batches_as_it_likes(batches: int) -> None:
    meter = EpochMeter()
    for number in range(batches):
        meter.add_loss(torch.tensor(float(number)), 1 + number % 3)
        meter.add_correct(torch.eye(2), torch.tensor([0, number % 2]))

    numbers, sizes = np.arange(batches), 1 + np.arange(batches) % 3
    assert len(meter) == batches
    assert meter.losses.tolist() == numbers.tolist()
    assert meter.sizes.tolist() == sizes.tolist()
    assert meter.compute()["loss"] == pytest.approx(np.average(numbers, weights=sizes), rel=1e-12)
    assert meter.correct == batches + batches // 2


def test_a_loss_that_is_not_finite_shows() -> None:
    for loss in (math.nan, math.inf):
        meter = EpochMeter()
        meter.add_loss(torch.tensor(1.0), 4)
        meter.add_loss(torch.tensor(loss), 4)

        assert meter.compute()["loss"] == pytest.approx(loss, nan_ok=True)


def test_reading_in_the_middle_of_an_epoch_changes_nothing() -> None:
    meter = EpochMeter()
    for number in range(600):
        meter.add_loss(torch.tensor(float(number)), 1)
        if number % 100 == 0:
            assert meter.losses.tolist() == list(range(number + 1))

    assert meter.compute() == {"loss": 299.5}


def test_a_loss_that_is_written_over_later_counts_as_it_was() -> None:
    """A CUDA graph writes the loss of every step to the same memory."""
    meter = EpochMeter()
    loss = torch.tensor(1.0)
    meter.add_loss(loss, 1)
    loss.fill_(3.0)
    meter.add_loss(loss, 1)

    assert meter.losses.tolist() == [1.0, 3.0]


def test_the_graph_of_a_loss_is_let_go() -> None:
    meter = EpochMeter()
    activations = torch.ones(3, requires_grad=True) * 2
    kept = weakref.ref(activations)
    meter.add_loss(activations.square().mean(), 3)

    del activations
    gc.collect()

    assert kept() is None


@pytest.mark.parametrize("loss", [torch.ones(2), torch.ones(3, 1), torch.ones(0)], ids=repr)
def test_a_loss_per_sample_is_refused(loss: Tensor) -> None:
    meter = EpochMeter()

    with pytest.raises(ArgumentError, match=r"^loss has the shape \(\d.*\); it must be one number"):
        meter.add_loss(loss)
    assert len(meter) == 0


@pytest.mark.parametrize("loss", [np.ones(2), [1.0, 2.0]], ids=repr)
def test_several_numbers_are_no_loss(loss: Any) -> None:
    meter = EpochMeter()

    with pytest.raises(ArgumentError, match=r"^loss"):
        meter.add_loss(loss)
    assert len(meter) == 0


# -- right predictions ---------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50))
@patient
def test_accuracy_is_the_share_of_labels_that_have_the_highest_score(
    pairs: list[tuple[int, int]],
) -> None:
    guesses, labels = torch.tensor(pairs).T
    scores = F.one_hot(guesses, 3) * 2.5 - 1
    right = sum(guess == label for guess, label in pairs)

    meter = EpochMeter()
    for part in range(0, len(pairs), 7):
        meter.add_correct(scores[part : part + 7], labels[part : part + 7])

    assert num_correct(scores, labels).item() == right
    assert meter.correct == right
    assert meter.compute() == {"accuracy": right / len(pairs)}


@pytest.mark.parametrize("shape", [(), (5,), (4, 6)], ids=["labels", "sequences", "pictures"])
def test_labels_have_the_shape_of_scores_without_classes(shape: tuple[int, ...]) -> None:
    """Accuracy is that of labels, a pixel's for one; the size of a batch is that of samples."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 3, *shape, generator=generator)
    labels = torch.randint(3, (8, *shape), generator=generator)

    meter = EpochMeter()
    meter.add_loss(2.0)
    meter.add_correct(scores, labels)

    expected = (scores.numpy().argmax(axis=1) == labels.numpy()).mean()
    assert meter.compute() == {"loss": 2.0, "accuracy": pytest.approx(expected)}
    assert meter.sizes.tolist() == [8]


def test_predictions_in_a_graph_are_counted_without_it() -> None:
    scores = torch.eye(3, requires_grad=True) * 2

    found = num_correct(scores, torch.tensor([0, 1, 0]))

    assert found.item() == 2
    assert found.dim() == 0
    assert not found.requires_grad


def test_an_epoch_without_anything_tracked_has_no_metrics() -> None:
    meter = EpochMeter()

    assert meter.compute() == {}
    assert len(meter) == 0
    assert meter.losses.tolist() == []
    assert meter.sizes.tolist() == []
    assert (meter.loss_sum, meter.correct) == (0.0, 0)


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (5, 5),
        (torch.ones(5, 2), 5),
        (torch.ones(0, 2), 0),
        ([torch.ones(4, 2), torch.ones(3)], 4),
        ((torch.ones(4, 2), torch.ones(4)), 4),
        ({"image": torch.ones(6, 1), "label": torch.ones(6)}, 6),
        ([{"ids": torch.ones(3, 9)}, torch.ones(3)], 3),
        (((torch.ones(2), torch.ones(2)), None), 2),
    ],
    ids=repr,
)
def test_the_size_of_a_batch_is_that_of_what_it_begins_with(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    "batch",
    [None, "batch", 3.5, torch.tensor(3), [], (), {}, [[]], ["a", "b"], {"name": "a"}, object],
    ids=repr,
)
def test_a_batch_without_a_size_is_refused(batch: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^batch=\w+ has no size; allowed: .*\.$"):
        batch_size(batch)


def test_a_number_of_samples_is_not_negative() -> None:
    with pytest.raises(ArgumentError, match=r"^batch=-3 .*\.$"):
        batch_size(-3)


# -- on a GPU ------------------------------------------------------------------------------------


def track(meter: EpochMeter, losses: Sequence[Tensor], scores: Tensor, labels: Tensor) -> None:
    for loss in losses:
        meter.add_loss(loss, len(labels))
        meter.add_correct(scores, labels)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_step_waits_for_the_gpu() -> None:
    losses = list(torch.arange(1300.0, device="cuda"))
    scores = torch.eye(10, device="cuda")
    labels = torch.zeros(10, dtype=torch.int64, device="cuda")
    track(EpochMeter(), losses, scores, labels)  # the first use of a kernel loads it

    meter = EpochMeter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        track(meter, losses, scores, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert meter.compute() == {"loss": 649.5, "accuracy": pytest.approx(0.1)}


@pytest.mark.cuda
def test_labels_may_have_stayed_on_the_cpu() -> None:
    assert num_correct(torch.eye(3, device="cuda"), torch.tensor([0, 1, 0])).item() == 2


@pytest.mark.cuda
def test_losses_from_several_devices_are_one_epoch() -> None:
    meter = EpochMeter()
    meter.add_loss(torch.tensor(1.0, device="cuda"), 1)
    meter.add_loss(3.0, 1)

    assert meter.compute() == {"loss": 2.0}
