"""Confusion matrix and worst misclassifications: computed, and logged with the run."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import Store
from tracker import ArgumentError, start_run
from tracker.capture.mistakes import WORST, find_mistakes

CLASSES = ["cat", "dog", "bird"]


class Scores(nn.Module):
    """Returns the scores contained in a sample."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(start_dim=1)[:, :3]


def loader(inputs: Tensor, labels: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(inputs, labels), batch_size=7)


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(deadline=None, max_examples=30)
def test_counts_equal_scikit_learn_s_and_the_worst_come_first(seed: int, samples: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, 3, generator=generator)
    labels = torch.randint(3, (samples,), generator=generator)
    mistakes = find_mistakes(Scores(), loader(scores, labels), classes=CLASSES)
    predicted = scores.argmax(1)
    expected = confusion_matrix(labels, predicted, labels=range(3))
    assert mistakes.confusion.to_numpy().tolist() == expected.tolist()
    assert list(mistakes.confusion.index) == list(mistakes.confusion.columns) == CLASSES
    wrong = int((predicted != labels).sum())
    assert len(mistakes.worst) == min(WORST, wrong)
    assert mistakes.worst["loss"].is_monotonic_decreasing
    for row in mistakes.worst.itertuples():
        assert CLASSES.index(row.label) == labels[row.sample] != predicted[row.sample]
        assert CLASSES.index(row.predicted) == predicted[row.sample]
        assert row.probability == pytest.approx(
            scores[row.sample].softmax(0).max().item(), abs=1e-5
        )
    assert not mistakes.pictures


def test_scores_can_be_made_of_one_logit_and_samples_have_texts() -> None:
    logits = torch.tensor([[2.0], [-3.0], [0.5]])
    mistakes = find_mistakes(
        nn.Identity(),
        loader(logits, torch.tensor([1, 1, 0])),
        classes=["bad", "good"],
        scores=lambda outputs: torch.cat([torch.zeros_like(outputs), outputs], dim=1),
        shown=["fine", "gorgeous", "dull"],
    )
    assert mistakes.confusion.to_numpy().tolist() == [[0, 1], [1, 1]]
    assert mistakes.worst["text"].tolist() == ["gorgeous", "dull"]


def test_tables_and_pictures_are_logged(store: Store, workdir: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(40, 1, 8, 8, generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    network = Scores()
    with start_run() as run:
        run.log_mistakes(network, loader(pictures, labels), classes=CLASSES)
    assert network.training
    logged = store.run()
    names = {
        f"mistakes/{name}" for name in ("confusion.csv", "confusion.png", "worst.csv", "worst.png")
    }
    assert names <= store.artifacts(logged)
    table = pd.read_csv(
        io.StringIO(store.text(logged, "mistakes/confusion.csv", workdir)), index_col=0
    )
    assert table.to_numpy().sum() == 40
    worst = pd.read_csv(io.StringIO(store.text(logged, "mistakes/worst.csv", workdir)))
    assert len(worst) > 9
    for name in ("confusion", "worst"):
        path = store.client.download_artifacts(
            logged.info.run_id, f"mistakes/{name}.png", str(workdir)
        )
        with Image.open(path) as picture:
            assert np.ptp(np.asarray(picture)) > 100  # it is not blank


def test_a_shuffled_loader_shows_the_misclassified_samples() -> None:
    pictures = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 3
    shuffled = DataLoader(TensorDataset(pictures, labels), batch_size=7, shuffle=True)
    mistakes = find_mistakes(Scores(), shuffled, classes=CLASSES)
    assert len(mistakes.pictures) == WORST
    for picture, row in zip(mistakes.pictures, mistakes.worst.itertuples(), strict=True):
        assert CLASSES[int(Scores()(picture[None]).argmax())] == row.predicted
        (at,) = (pictures == picture).flatten(1).all(1).nonzero()
        assert CLASSES[labels[at]] == row.label


def test_an_empty_loader_has_no_mistakes() -> None:
    mistakes = find_mistakes(Scores(), [], classes=CLASSES)
    assert mistakes.confusion.to_numpy().sum() == len(mistakes.worst) == len(mistakes.pictures) == 0


def test_a_perfect_classifier_has_no_picture_of_mistakes(store: Store) -> None:
    perfect = torch.eye(3).repeat(4, 1)
    with start_run() as run:
        run.log_mistakes(Scores(), loader(perfect, torch.arange(12) % 3), classes=CLASSES)
    assert "mistakes/worst.png" not in store.artifacts(store.run())


def test_a_wrong_number_of_classes_is_refused() -> None:
    scores = torch.eye(3)
    with pytest.raises(ArgumentError, match=r"^classes has 2 names, but the scores have the shape"):
        find_mistakes(Scores(), loader(scores, torch.arange(3)), classes=["a", "b"])
