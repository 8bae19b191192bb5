"""A recurrent network that tells texts of two classes apart."""

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
    """Embedding, LSTM, each state's maximum and mean over the words, one logit.

    The course's network takes the last state instead. Padding counts for nothing: the LSTMs that
    read backwards begin at a text's last word. `word_dropout` is the share of words that training
    leaves out, `dropout` that of numbers between the layers.
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
        """Take the size of the vocabulary, and the numbers of a word and of a state, each way."""
        super().__init__()
        self.embedding = nn.Embedding(words + FIRST, embedding, padding_idx=PADDING)
        ways = 1 + bidirectional
        sizes = [embedding] + [ways * hidden] * (layers - 1)
        self.forwards = nn.ModuleList(nn.LSTM(size, hidden, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(
            nn.LSTM(size, hidden, batch_first=True) for size in sizes if bidirectional
        )
        self.word_dropout = nn.Dropout1d(word_dropout)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(2 * ways * hidden, 1)

    def forward(self, words: Tensor) -> Tensor:
        """Logits (N,) of the second class, of the words' numbers, int64 (N, L), 0 at the end."""
        length = (words != PADDING).sum(dim=1, keepdim=True).clamp(min=1)
        place = torch.arange(words.shape[1], device=words.device).expand_as(words)
        # A text's words in reverse, then its padding: applied twice, it gives the text again.
        reverse = (length - 1 - place).remainder(words.shape[1])
        states = self.dropout(self.word_dropout(self.embedding(words)))
        for layer, forwards in enumerate(self.forwards):
            found = forwards(states)[0]
            if len(self.backwards):
                back = self.backwards[layer](_taken(states, reverse))[0]
                found = torch.cat([found, _taken(back, reverse)], dim=2)
            states = self.dropout(found)
        padding = (place >= length)[:, :, None]
        largest = states.masked_fill(padding, -torch.inf).amax(dim=1)
        mean = states.masked_fill(padding, 0).sum(dim=1) / length
        logits: Tensor = self.out(torch.cat([largest, mean], dim=1)).squeeze(1)
        return logits


def _taken(states: Tensor, place: Tensor) -> Tensor:
    """`states` (N, L, features) in the order that `place` (N, L) gives."""
    return states.gather(1, place[:, :, None].expand_as(states))


def _build(params: Params, facts: Facts) -> SentimentLSTM:
    sizes = ("embedding", "hidden", "layers", "dropout", "word_dropout", "bidirectional")
    return SentimentLSTM(len(facts["vocabulary"]), **{name: params[name] for name in sizes})


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy, in nats, of logits (N,) and class numbers (N,), 0 or 1."""
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))


def _scores(logits: Tensor) -> Tensor:
    """Scores (N, 2) of logits (N,): softmax gives the probabilities that they stand for."""
    return torch.stack([torch.zeros_like(logits), logits], dim=1)


def _optimizer(network: nn.Module, params: Params) -> Optimizer:
    return AdamW(network.parameters(), lr=params["lr"], weight_decay=params["weight_decay"])


RECIPE = Recipe(
    name="sentiment-lstm",
    summary="the course's sentiment RNN: texts to one of two classes",
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
            help="AdamW's learning rate",
            search=Range(low=1e-3, high=2e-2, log=True),
            grid=(0.002, 0.005),
        ),
        "batch_size": Parameter(
            default=64, most=1_000_000, help="texts in a batch", search=(32, 64, 128)
        ),
        "shuffle": Parameter(default=True, help="true or false"),
        "embedding": Parameter(
            default=64, most=16384, help="numbers for a word", search=(32, 64, 128), grid=(64, 128)
        ),
        "hidden": Parameter(
            default=32, most=16384, help="numbers in a state, each way", search=(16, 32, 64, 128)
        ),
        "layers": Parameter(default=1, most=16, help="LSTMs on top of each other", search=(1, 2)),
        "bidirectional": Parameter(default=True, help="read backwards too"),
        "dropout": Parameter(
            default=0.5, help="of the layers", least=0, most=0.9, search=Range(low=0.2, high=0.8)
        ),
        "word_dropout": Parameter(
            default=0.3, help="of whole words", least=0, most=0.9, search=Range(low=0.0, high=0.6)
        ),
        "weight_decay": Parameter(
            default=0.05, help="AdamW's", least=0, search=Range(low=0.01, high=1.0, log=True)
        ),
        "vocabulary": Parameter(default=20_000, help="words at most"),
        "min_count": Parameter(default=2, help="how often the training part has a word"),
        "length": Parameter(default=50, most=10_000, help="words of a text; the rest is cut"),
        "text_column": Parameter(default="text", help="of a CSV"),
        "label_column": Parameter(default="label", help="of a CSV"),
    },
)
