"""Classifies raw texts with a network on numbers of words.

It travels with the logged model as its `pyfunc`, and so stands alone: it imports torch, pandas and
the standard library, nothing of this project. Training reads texts with the same functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

PADDING, UNKNOWN, FIRST = 0, 1, 2
"""The number of no word, of a word that is not in the vocabulary, and of its first word."""
_TOKEN = re.compile(r"\w+(?:'\w+)*|[!?]")
_BATCH = 256


def tokenise(text: str) -> list[str]:
    """The tokens of `text` in lower case: words, with the apostrophes within them, `!` and `?`."""
    return _TOKEN.findall(text.lower())


def encode(texts: Iterable[Sequence[str]], numbers: Mapping[str, int], length: int) -> Tensor:
    """The texts' tokens as int64 (N, length): cut, or filled up at the end with `PADDING`.

    A text without a token becomes one unknown word.
    """
    rows = [
        [numbers.get(token, UNKNOWN) for token in tokens[:length]] or [UNKNOWN] for tokens in texts
    ]
    return torch.tensor([row + [PADDING] * (length - len(row)) for row in rows]).view(-1, length)


def numbered(vocabulary: Sequence[str]) -> dict[str, int]:
    """Each word's number."""
    return {word: number for number, word in enumerate(vocabulary, FIRST)}


class SentimentPredictor:
    """Which of two classes a text is of."""

    def __init__(self, network: Callable[[Tensor], Tensor], facts: Mapping[str, Any]) -> None:
        """Take a network, int64 (N, length) to logits (N,) of the second class, and its facts."""
        self._network = network
        self._numbers = numbered(facts["vocabulary"])
        self._length: int = facts["length"]
        self._classes: list[str] = facts["classes"]

    @torch.no_grad()
    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The columns `label`, a class's name, and `probability`, of that label.

        `model_input` is texts, or a table with one column, or one called `text`; a text that is
        missing is taken for an empty one. Raises ValueError for anything else.
        """
        texts = _texts(model_input)
        labels: list[str] = []
        sure: list[float] = []
        for start in range(0, len(texts), _BATCH):
            tokens = map(tokenise, texts[start : start + _BATCH])
            second = self._network(encode(tokens, self._numbers, self._length)).double().sigmoid()
            for probability in second.tolist():
                labels.append(self._classes[probability > 0.5])
                sure.append(max(probability, 1 - probability))
        return pd.DataFrame({"label": labels, "probability": pd.Series(sure, dtype=float)})


def _texts(model_input: Any) -> list[str]:
    column = model_input
    if isinstance(model_input, pd.DataFrame):
        names = list(model_input.columns)
        if len(names) != 1 and names.count("text") != 1:
            raise ValueError(f"the columns are {names}; it must be one, or one of them `text`.")
        column = model_input[names[0] if len(names) == 1 else "text"]
    texts = []
    for cell in column:
        missing = cell is None or cell is pd.NA or (isinstance(cell, float) and cell != cell)
        if not (missing or isinstance(cell, str)):
            raise ValueError(f"{cell!r} is a {type(cell).__name__}; it must be a text.")
        texts.append("" if missing else cell)
    return texts


def load(network: Callable[[Tensor], Tensor], files: Mapping[str, str]) -> SentimentPredictor:
    """The predictor of a logged model, from its network and the texts that travel with it."""
    return SentimentPredictor(network, json.loads(files["recipe.json"])["facts"])
