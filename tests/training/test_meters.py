"""The loss of an epoch is the mean over its samples; accuracy is the share of correct labels."""

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

from tests.devices import a_device, away
from tracker.errors import ArgumentError
from tracker.training.accuracy import num_correct
from tracker.training.meters import EpochMeter

patient = settings(deadline=None)

LOSSES = st.floats(-1e6, 1e6)
SIZES = st.integers(1, 1000)


def samples(number: int) -> TensorDataset:
    """Samples of one float64 each; most batches have another mean than the whole."""
    return TensorDataset(torch.arange(number, dtype=torch.float64) ** 2)


def epoch_over(loader: Any, batches: int | None = None) -> tuple[float, float]:
    """The loss by a meter that knows only the loader, and the mean of the samples it saw."""
    meter, seen = EpochMeter(loader), []
    for number, (values,) in enumerate(loader):
        if number == batches:
            break
        meter.add_loss(values.mean())
        seen.append(values)
    return meter.compute()["loss"], torch.cat(seen).mean().item()


class Stream(IterableDataset[Any]):
    """Ten samples in a stream."""

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
def test_a_smaller_last_batch_is_weighted_by_its_size(
    number: int, size: int, drop_last: bool
) -> None:
    size = min(size, number)
    result, mean = epoch_over(DataLoader(samples(number), batch_size=size, drop_last=drop_last))

    assert result == pytest.approx(mean, rel=1e-12)


@given(st.integers(2, 60), st.integers(1, 25), st.integers(1, 60))
@patient
def test_batches_before_a_break_count_as_full(number: int, size: int, left: int) -> None:
    result, mean = epoch_over(DataLoader(samples(number), batch_size=size), left)

    assert result == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("size", [1, 4, 10, 32])
@pytest.mark.parametrize("drawn", [10, 11, 12, 16])
def test_the_sampler_determines_the_size_of_the_last_batch(drawn: int, size: int) -> None:
    data = samples(40)
    for sampler in (
        SubsetRandomSampler(range(drawn)),
        RandomSampler(data, num_samples=drawn),
        range(drawn),
    ):
        result, mean = epoch_over(DataLoader(data, batch_size=size, sampler=sampler))

        assert result == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=4),
        DataLoader(samples(10), batch_sampler=[[0], [1, 2, 3], [4, 5]]),
        [[torch.tensor([1.0, 3.0])], [torch.tensor([8.0])]],
    ],
    ids=["stream", "batch_sampler", "list"],
)
def test_batches_of_unknown_size_have_equal_weight(loader: Any) -> None:
    means = [values.mean().item() for (values,) in loader]

    loss, _ = epoch_over(loader)

    assert loss == pytest.approx(sum(means) / len(means))


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
def test_tracked_labels_determine_batch_sizes_for_any_loader(loader: Any) -> None:
    meter, seen = EpochMeter(loader), []
    for (values,) in loader:
        meter.add_loss(values.mean())
        meter.add_correct(torch.zeros(len(values), 2), torch.zeros(len(values), dtype=torch.int64))
        seen.append(values)

    mean = torch.cat(seen).mean().item()
    assert meter.compute() == {"loss": pytest.approx(mean, rel=1e-12), "accuracy": 1.0}


def test_labels_of_only_some_batches_are_ignored_for_sizes() -> None:
    loader = DataLoader(samples(6), batch_size=4)
    meter = EpochMeter(loader)
    for (values,) in loader:
        meter.add_loss(values.mean())
    meter.add_correct(torch.zeros(100, 2), torch.zeros(100, dtype=torch.int64))

    assert meter.sizes.tolist() == [4, 2]


def test_a_given_size_takes_precedence_over_the_loader_s() -> None:
    meter = EpochMeter(DataLoader(samples(10), batch_size=4))
    meter.add_loss(1.0, 100)
    meter.add_loss(1.0)
    meter.add_loss(1.0)

    assert meter.sizes.tolist() == [100, 4, 2]


@pytest.mark.parametrize("flag", [1, 3])
def test_labels_are_believed_before_a_number_that_contradicts_them(
    flag: int, caplog: pytest.LogCaptureFixture
) -> None:
    meter = EpochMeter()
    for size, loss in ((8, 1.0), (8, 1.0), (4, 4.0)):
        meter.add_loss(loss, meter.size_of(flag))
        meter.add_correct(torch.zeros(size, 2), torch.zeros(size, dtype=torch.int64))

    assert meter.compute()["loss"] == pytest.approx(1.6)
    assert meter.sizes.tolist() == [8, 8, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "the labels of track_num_correct() are counted, not the batch of track_loss(); "
        "pass the number of samples to track_loss()."
    ]


def test_labels_of_each_word_do_not_contradict_the_number_of_sentences(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter = EpochMeter()
    for size in (4, 2):
        meter.add_loss(1.0, meter.size_of(torch.zeros(size, 7)))
        meter.add_correct(torch.zeros(size * 7, 2), torch.zeros(size * 7, dtype=torch.int64))

    assert meter.sizes.tolist() == [4, 2]
    assert caplog.records == []


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
def test_a_loss_may_be_any_kind_of_single_number(loss: Any) -> None:
    meter = EpochMeter()
    meter.add_loss(loss, 3)

    assert meter.compute() == {"loss": 0.75}


def test_losses_of_different_precisions_can_be_mixed() -> None:
    meter = EpochMeter()
    for loss in (1.0, torch.tensor(2.0), torch.tensor(3.0, dtype=torch.float16), 2):
        meter.add_loss(loss, 10)

    assert meter.losses.tolist() == [1.0, 2.0, 3.0, 2.0]
    assert meter.compute() == {"loss": 2.0}


def test_half_precision_losses_are_summed_in_float64() -> None:
    """The sum would be infinite in float16, and stop at 256 in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        meter = EpochMeter()
        for _ in range(1000):
            meter.add_loss(torch.tensor(100.0, dtype=dtype), 64)

        assert meter.compute() == {"loss": 100.0}
        assert meter.loss_sum == 6_400_000.0


@pytest.mark.parametrize("batches", [511, 512, 513, 1024, 1300])
def test_an_epoch_may_have_any_number_of_batches(batches: int) -> None:
    meter = EpochMeter()
    for number in range(batches):
        meter.add_loss(torch.tensor(float(number)), 1 + number % 3)
        meter.add_correct(torch.eye(2), torch.tensor([0, number % 2]))
    meter.add_correct(torch.eye(2), torch.tensor([1, 0]))  # not as many as losses

    numbers, sizes = np.arange(batches), 1 + np.arange(batches) % 3
    assert len(meter) == batches
    assert meter.losses.tolist() == numbers.tolist()
    assert meter.sizes.tolist() == sizes.tolist()
    assert meter.compute()["loss"] == pytest.approx(np.average(numbers, weights=sizes), rel=1e-12)
    assert meter.correct == batches + batches // 2


def test_a_loss_that_is_not_finite_makes_the_mean_not_finite() -> None:
    for loss in (math.nan, math.inf):
        meter = EpochMeter()
        meter.add_loss(torch.tensor(1.0), 4)
        meter.add_loss(torch.tensor(loss), 4)

        assert meter.compute()["loss"] == pytest.approx(loss, nan_ok=True)


def test_reading_losses_in_the_middle_of_an_epoch_changes_nothing() -> None:
    meter = EpochMeter()
    for number in range(600):
        meter.add_loss(torch.tensor(float(number)), 1)
        if number % 100 == 0:
            assert meter.losses.tolist() == list(range(number + 1))

    assert meter.compute() == {"loss": 299.5}


def test_a_loss_modified_in_place_later_counts_with_its_first_value() -> None:
    """A CUDA graph writes the loss of every step to the same memory."""
    meter = EpochMeter()
    loss = torch.tensor(1.0)
    meter.add_loss(loss, 1)
    loss.fill_(3.0)
    meter.add_loss(loss, 1)

    assert meter.losses.tolist() == [1.0, 3.0]


def test_a_tracked_loss_does_not_keep_its_graph_alive() -> None:
    meter = EpochMeter()
    activations = torch.ones(3, requires_grad=True) * 2
    kept = weakref.ref(activations)
    meter.add_loss(activations.square().mean(), 3)

    del activations
    gc.collect()

    assert kept() is None


@pytest.mark.parametrize(
    "loss", [torch.ones(2), torch.ones(3, 1), torch.ones(0), np.ones(2), [1.0, 2.0]], ids=repr
)
def test_a_loss_per_sample_is_refused(loss: Any) -> None:
    meter = EpochMeter()

    with pytest.raises(ArgumentError, match=r"^loss has the shape \(\d.*\); it must be one number"):
        meter.add_loss(loss)
    assert len(meter) == 0


# -- accuracy ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50))
@patient
def test_accuracy_is_the_share_of_labels_with_the_highest_score(
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
def test_accuracy_is_per_label_and_size_is_per_sample(shape: tuple[int, ...]) -> None:
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


def test_counting_predictions_detaches_them() -> None:
    scores = torch.eye(3, requires_grad=True) * 2

    result = num_correct(scores, torch.tensor([0, 1, 0]))

    assert result.item() == 2
    assert result.dim() == 0
    assert not result.requires_grad


def test_an_epoch_without_anything_tracked_has_no_metrics() -> None:
    meter = EpochMeter()

    assert meter.compute() == {}
    assert len(meter) == 0
    assert meter.losses.tolist() == []
    assert meter.sizes.tolist() == []
    assert (meter.loss_sum, meter.correct) == (0.0, 0)


# -- losses on devices ---------------------------------------------------------------------------


LOSSES_ANYWHERE = st.lists(
    st.tuples(st.floats(-6e4, 6e4, width=16), st.sampled_from(["number", "cpu", "away", "half"])),
    max_size=40,
)


@given(LOSSES_ANYWHERE, st.sampled_from([3, 7, 512]))
@patient
def test_numbers_and_losses_of_several_devices_and_dtypes_can_be_mixed(
    given: list[tuple[float, str]], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, a_device(patch) as stream:
        patch.setattr("tracker.training.meters._CHUNK", chunk)
        meter = EpochMeter()
        stream.refuses_waits = True
        for number, place in given:
            if place == "number":
                meter.add_loss(number, 2)
            elif place == "cpu":
                meter.add_loss(torch.tensor(number), 2)
            else:
                meter.add_loss(away(number, torch.float16 if place == "half" else None), 2)
        stream.refuses_waits = False

        assert meter.losses.tolist() == [number for number, _ in given]
        again = EpochMeter.of(meter.state(), None, set())
        again.add_loss(7.0, 2)
        assert again.losses.tolist() == [*(number for number, _ in given), 7.0]


def test_an_unreadable_loss_among_numbers_does_not_raise_in_the_loop() -> None:
    meter = EpochMeter()
    for number in range(1300):
        meter.add_loss(torch.zeros((), device="meta") if number % 3 == 0 else 1.0, 1)

    assert len(meter) == 1300


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
    track(EpochMeter(), losses, scores, labels)  # loads the kernels

    meter = EpochMeter()
    torch.cuda.set_sync_debug_mode("error")
    try:
        track(meter, losses, scores, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert meter.compute() == {"loss": 649.5, "accuracy": pytest.approx(0.1)}


@pytest.mark.cuda
def test_labels_may_be_on_the_cpu() -> None:
    assert num_correct(torch.eye(3, device="cuda"), torch.tensor([0, 1, 0])).item() == 2


@pytest.mark.cuda
def test_losses_on_different_devices_can_be_mixed() -> None:
    meter = EpochMeter()
    for _ in range(600):
        meter.add_loss(torch.tensor(1.0, device="cuda"), 1)
        meter.add_loss(3.0, 1)
        meter.add_loss(torch.tensor(5.0, device="cuda", dtype=torch.float16), 1)

    assert meter.losses.tolist() == [1.0, 3.0, 5.0] * 600
    assert meter.compute() == {"loss": 3.0}
