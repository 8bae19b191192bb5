"""A recurrent network that classifies texts into two classes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from models import sentiment_predictor
from models.recipe import Facts, Parameter, Params, Range, Recipe
from models.reviews import DATASETS, load_reviews
from models.sentiment_predictor import FIRST, PADDING


class SentimentLSTM(nn.Module):
    """Embedding, LSTM, maximum and mean of the states over the words, one logit.

    Source: Udacity, "Intro to Deep Learning with PyTorch", "Sentiment RNN", which pools by the last
    state instead. Padding has no influence: backward LSTMs start at a text's last word.

    Args:
        words: Size of the vocabulary.
        embedding: Size of a word's vector.
        hidden: Size of a state, per direction.
        layers: Number of LSTM layers.
        dropout: Share of values dropped between layers in training.
        bidirectional: Also read the texts backwards.
        word_dropout: Share of words dropped in training.
    """

    def __init__(
        self,
        words: int,
        *,
        embedding: int,
        hidden: int,
        layers: int,
        dropout: float,
        bidirectional: bool,
        word_dropout: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words + FIRST, embedding, padding_idx=PADDING)
        directions = 1 + bidirectional
        sizes = [embedding] + [directions * hidden] * (layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(
            nn.LSTM(size, hidden, batch_first=True) for size in sizes if bidirectional
        )
        self.word_dropout = nn.Dropout1d(word_dropout)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(2 * directions * hidden, 1)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (N,) of the second class.

        Args:
            words: Word numbers, int64 (N, L), padded with 0 at the end.
        """
        length = (words != PADDING).sum(dim=1, keepdim=True).clamp(min=1)
        position = torch.arange(words.shape[1], device=words.device).expand_as(words)
        # A text's words in reverse, then its padding; its own inverse.
        reverse = (length - 1 - position).remainder(words.shape[1])
        states = self.dropout(self.word_dropout(self.embedding(words)))
        for layer, forwards in enumerate(self.forwards):
            outputs = forwards(states)[0]
            if len(self.backwards):
                backward = self.backwards[layer](_reordered(states, reverse))[0]
                outputs = torch.cat([outputs, _reordered(backward, reverse)], dim=2)
            states = self.dropout(outputs)
        padding = (position >= length)[:, :, None]
        largest = states.masked_fill(padding, -torch.inf).amax(dim=1)
        mean = states.masked_fill(padding, 0).sum(dim=1) / length
        logits: Tensor = self.out(torch.cat([largest, mean], dim=1)).squeeze(1)
        return logits


def _reordered(states: Tensor, order: Tensor) -> Tensor:
    """`states` (N, L, features) at the positions `order` (N, L)."""
    return states.gather(1, order[:, :, None].expand_as(states))


def _build(params: Params, facts: Facts) -> SentimentLSTM:
    sizes = ("embedding", "hidden", "layers", "dropout", "word_dropout", "bidirectional")
    return SentimentLSTM(len(facts["vocabulary"]), **{name: params[name] for name in sizes})


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy in nats, of logits (N,) and class numbers (N,), 0 or 1."""
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def _scores(logits: Tensor) -> Tensor:
    """Scores (N, 2) whose softmax is the probabilities given by logits (N,)."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def _optimizer(network: nn.Module, params: Params) -> Optimizer:
    return AdamW(network.parameters(), lr=params["lr"], weight_decay=params["weight_decay"])


RECIPE = Recipe(
    name="sentiment-lstm",
    summary="classify texts into two classes with an LSTM",
    load=load_reviews,
    build=_build,
    epochs=10,
    datasets=DATASETS,
    loss=_loss,
    scores=_scores,
    optimizer=_optimizer,
    predictor=Path(sentiment_predictor.__file__),
    parameters={
        "lr": Parameter(
            default=0.005,
            help="learning rate of AdamW",
            search=Range(low=1e-3, high=2e-2, log=True),
            grid=(0.002, 0.005),
        ),
        "batch_size": Parameter(
            default=64, most=1_000_000, help="texts per batch", search=(32, 64, 128)
        ),
        "shuffle": Parameter(default=True, help="shuffle the training set each epoch"),
        "embedding": Parameter(
            default=64,
            most=16384,
            help="size of a word's embedding",
            search=(32, 64, 128),
            grid=(64, 128),
        ),
        "hidden": Parameter(
            default=32, most=16384, help="units per direction", search=(16, 32, 64, 128)
        ),
        "layers": Parameter(default=1, most=16, help="number of LSTM layers", search=(1, 2)),
        "bidirectional": Parameter(default=True, help="also read the texts backwards"),
        "dropout": Parameter(
            default=0.5,
            help="share of values dropped between layers in training",
            least=0,
            most=0.9,
            search=Range(low=0.2, high=0.8),
        ),
        "word_dropout": Parameter(
            default=0.3,
            help="share of words dropped in training",
            least=0,
            most=0.9,
            search=Range(low=0.0, high=0.6),
        ),
        "weight_decay": Parameter(
            default=0.05,
            help="weight decay of AdamW",
            least=0,
            search=Range(low=0.01, high=1.0, log=True),
        ),
        "vocabulary": Parameter(default=20_000, help="largest number of words"),
        "min_count": Parameter(default=2, help="ignore words rarer than this in the training set"),
        "length": Parameter(default=50, most=10_000, help="words per text; longer ones are cut"),
        "text_column": Parameter(default="text", help="column of a CSV with the texts"),
        "label_column": Parameter(default="label", help="column of a CSV with the classes"),
    },
)
