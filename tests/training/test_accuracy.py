"""Accuracy of classifiers of several kinds: the reading that fits their values is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tracker.errors import ArgumentError
from tracker.training.meters import EpochMeter, compute_all

GENERATOR = torch.Generator().manual_seed(3)


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def numbers(classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=GENERATOR)


def classes_of(preds: Any, labels: Any, axis: int = 1) -> float:
    return float((np.asarray(preds).argmax(axis=axis) == np.asarray(labels)).mean())


def flags_of(preds: Any, labels: Any, threshold: float = 0.0) -> float:
    yes = np.asarray(preds).reshape(-1) > threshold
    return float((yes == (np.asarray(labels).reshape(-1) > 0.5)).mean())


S, L = scores(12, 3), numbers(3, 12)
P, Y = scores(12), numbers(2, 12)
MASKS, PIXELS = scores(2, 3, 4, 5), numbers(3, 2, 4, 5)
ONE, MASK = scores(2, 1, 4, 5), numbers(2, 2, 1, 4, 5)
MANY = numbers(2, 12, 3)
SOFT = torch.softmax(scores(12, 3), 1)

KINDS: dict[str, tuple[Tensor, Tensor, float]] = {
    "one logit, labels (N,)": (P, Y, flags_of(P, Y)),
    "one logit (N, 1), labels (N, 1)": (P[:, None], Y[:, None], flags_of(P, Y)),
    "one logit (N, 1), labels (N,)": (P[:, None], Y.float(), flags_of(P, Y)),
    "one logit (N,), labels (N, 1)": (P, Y[:, None].float(), flags_of(P, Y)),
    "one logit, bool labels": (P, Y.bool(), flags_of(P, Y)),
    "one logit, half precision": (P.half(), Y, flags_of(P, Y)),
    "labels of -1 and 1": (P, 2 * Y - 1, flags_of(P, Y)),
    "one probability": (P.sigmoid(), Y.float(), flags_of(P, Y)),
    "one of two": (P.sigmoid()[:, None], Y, flags_of(P, Y)),
    "a batch of one, squeezed": (torch.tensor(-1.5), Y[:1] * 0, 1.0),
    "decisions": ((P > 0).long(), Y, flags_of(P, Y)),
    "bool decisions": (P > 0, Y.float(), flags_of(P, Y)),
    "class numbers for both": (S.argmax(1), L, classes_of(S, L)),
    "labels in a column": (S, L[:, None], classes_of(S, L)),
    "the wrong order": (L, S, classes_of(S, L)),
    "multi-label": (S, MANY.float(), flags_of(S, MANY)),
    "multi-label, int labels": (S, MANY, flags_of(S, MANY)),
    "multi-label probabilities": (S.sigmoid(), MANY.float(), flags_of(S, MANY)),
    "one-hot": (S, F.one_hot(L, 3), classes_of(S, L)),
    "one-hot floats": (S.softmax(1), F.one_hot(L, 3).float(), classes_of(S, L)),
    "soft labels": (S, SOFT, classes_of(S, SOFT.argmax(1))),
    "segmentation": (MASKS, PIXELS, classes_of(MASKS, PIXELS)),
    "segmentation, labels with a channel": (MASKS, PIXELS[:, None], classes_of(MASKS, PIXELS)),
    "one-hot segmentation": (
        MASKS,
        F.one_hot(PIXELS, 3).movedim(-1, 1),
        classes_of(MASKS, PIXELS),
    ),
    "a mask of logits": (ONE, MASK.float(), flags_of(ONE, MASK)),
    "a mask, labels without a channel": (ONE, MASK[:, 0], flags_of(ONE, MASK)),
    "ignored pixels": (
        MASKS,
        PIXELS.masked_fill(PIXELS == 2, -100),
        float((MASKS.argmax(1) == PIXELS)[PIXELS != 2].double().mean()),
    ),
    "ignored labels, class numbers for both": (
        S.argmax(1),
        torch.cat([L[:4], L[4:] * 0 - 1]),
        classes_of(S[:4], L[:4]),
    ),
    "ignored labels": (S, torch.cat([L[:4], L[4:] * 0 - 1]), classes_of(S[:4], L[:4])),
    "tokens, classes last": (MASKS.movedim(1, -1), PIXELS, classes_of(MASKS, PIXELS)),
    "a flag for each token": (scores(4, 6, 1) - 9, numbers(2, 4, 6) * 0, 1.0),
}


@pytest.mark.parametrize("name", KINDS)
def test_accuracy_is_right_for_each_kind_of_classifier(name: str) -> None:
    preds, labels, expected = KINDS[name]
    meter = EpochMeter()
    meter.add_loss(1.0)
    meter.add_correct(preds.clone().requires_grad_(preds.is_floating_point()), labels)
    found = meter.compute()
    assert found["accuracy"] == pytest.approx(expected, abs=1e-12)
    size = len(labels) if labels.dim() else 1
    assert meter.sizes.tolist() == [size]
    assert EpochMeter.of(meter.state(), None, set()).compute() == found


@given(st.integers(1, 40), st.integers(1, 5), st.sampled_from(["logits", "sigmoid"]), st.data())
@settings(deadline=None, max_examples=40)
def test_the_epoch_decides_what_a_batch_alone_leaves_open(
    samples: int, size: int, kind: str, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    preds = torch.randn(samples, generator=generator)
    preds[0] = -1.5  # a logit by its sign
    labels = torch.randint(2, (samples,), generator=generator).float()
    shown = preds if kind == "logits" else preds.sigmoid()
    meter = EpochMeter()
    for part in range(0, samples, size):
        meter.add_correct(shown[part : part + size], labels[part : part + size])
    right = int(((preds > 0) == (labels > 0.5)).sum())
    assert meter.compute() == {"accuracy": right / samples}
    assert meter.correct == right


def test_one_batch_of_several_labels_makes_the_whole_epoch_multi_label() -> None:
    one_hot, several = F.one_hot(L, 3), MANY
    meter = EpochMeter()
    meter.add_correct(S, one_hot)
    meter.add_correct(S, several)
    expected = (flags_of(S, one_hot) + flags_of(S, several)) / 2
    assert meter.compute()["accuracy"] == pytest.approx(expected)
    later = EpochMeter(said=meter.said)  # a later epoch is read in the same way
    later.add_correct(S, one_hot)
    assert later.compute()["accuracy"] == pytest.approx(flags_of(S, one_hot))


def test_logits_stay_logits_in_an_epoch_where_all_are_between_0_and_1() -> None:
    said: set[str] = set()
    for preds in (torch.tensor([-1.0, 2.0]), torch.tensor([0.25, 0.75])):
        meter = EpochMeter(said=said)
        meter.add_correct(preds, torch.tensor([1.0, 1.0]))
        found = meter.compute()
    assert found == {"accuracy": 1.0}
    meters = {"": EpochMeter(said=said), "val_": EpochMeter(said=said)}
    meters["val_"].add_correct(torch.tensor([0.25, 0.75]), torch.tensor([1.0, 1.0]))
    assert compute_all(meters) == {"val_accuracy": 0.5}


@pytest.mark.parametrize(
    ("preds", "labels", "sentence"),
    [
        (P, Y, "preds are taken for logits: above 0 is a yes"),
        (P.sigmoid(), Y, "preds are taken for probabilities: above 0.5 is a yes"),
        (S, F.one_hot(L, 3), "labels are taken for one-hot or soft ones: the highest is the class"),
        (
            P,
            P * 100,
            "there is no accuracy: labels are no class numbers and not in [-1, 1]",
        ),
        (
            torch.zeros(2, 3, 3),
            L[:6].view(2, 3),
            "preds (2, 3, 3) have their classes in dimension 1, not in the last one",
        ),
    ],
)
def test_what_was_assumed_is_said_once(
    preds: Tensor, labels: Tensor, sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    said: set[str] = set()
    for _ in range(3):
        meter = EpochMeter(said=said)
        meter.add_correct(preds, labels)
        found = meter.compute()
    assert caplog.messages == [
        f"track_num_correct(): {sentence}; RunManager(accuracy=…) counts otherwise."
    ]
    assert ("accuracy" in found) == ("no accuracy" not in sentence)


@pytest.mark.parametrize(
    ("preds", "labels"),
    [
        (S, L[:5]),
        (S, scores(12, 4)),
        (S, scores(3, 12)),
        (MASKS, PIXELS[:, :2]),
        (P, L[:1]),
        (P.to(torch.complex64), P.to(torch.complex64)),
    ],
)
def test_other_shapes_are_refused(preds: Tensor, labels: Tensor) -> None:
    meter = EpochMeter()
    with pytest.raises(ArgumentError, match=r"^preds has the shape .*accuracy=…\) counts other"):
        meter.add_correct(preds, labels)
    assert meter.compute() == {}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_read_from_the_device_in_the_loop(name: str) -> None:
    preds, labels, _ = KINDS[name]
    meter = EpochMeter()
    for _ in range(2):
        meter.add_correct(preds.to("meta"), labels.to("meta"))  # which has no values


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", KINDS)
def test_no_kind_waits_for_the_gpu(name: str) -> None:
    preds, labels, expected = KINDS[name]
    on_gpu, meter = (preds.cuda(), labels.cuda()), EpochMeter()
    EpochMeter().add_correct(*on_gpu)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meter.add_correct(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.compute()["accuracy"] == pytest.approx(expected, abs=1e-12)


# -- functions of the user's -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "labels", "accuracy"),
    [
        (3, L, 3 / 12),
        (torch.tensor(3), L, 3 / 12),
        (torch.tensor([3.0], requires_grad=True), L, 3 / 12),
        (np.int64(3), L, 3 / 12),
        (True, L[:2], 1 / 2),
        ((3, 6), L, 1 / 2),
        ((torch.tensor(3), torch.tensor(4)), L, 3 / 4),
        (0.5, None, 0.5),
        (1, {"labels": L, "mask": L}, 1 / 12),
    ],
    ids=repr,
)
def test_a_function_s_count_is_out_of_the_batch_or_of_what_it_says(
    counted: Any, labels: Any, accuracy: float
) -> None:
    meter = EpochMeter()
    for _ in range(2):
        meter.add_counted(counted, labels)
    assert meter.compute() == {"accuracy": accuracy}
    assert EpochMeter.of(meter.state(), None, set()).compute() == {"accuracy": accuracy}


@pytest.mark.parametrize("counted", [None, "3", S, (1, None), [1, 2]], ids=repr)
def test_a_count_is_a_number(counted: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^the function that counts correct predictions ret"):
        EpochMeter().add_counted(counted if counted != "3" else "three", L)
