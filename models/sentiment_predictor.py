"""Classify raw texts with a network on word numbers.

This file is logged with the model as its `pyfunc`, so it must stand alone: it imports torch, pandas
and the standard library, nothing of this project. Training encodes texts with the same functions.
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
"""The numbers of padding, of a word outside the vocabulary, and of the vocabulary's first word."""
_TOKEN = re.compile(r"\w+(?:'\w+)*|[!?]")
_BATCH = 256


def tokenise(text: str) -> list[str]:
    """Return the lower-case tokens of `text`: words (it's is one word), `!` and `?`."""
    return _TOKEN.findall(text.lower())


def encode(texts: Iterable[Sequence[str]], numbers: Mapping[str, int], length: int) -> Tensor:
    """Return the texts as word numbers, int64 (N, length).

    Args:
        texts: The tokens of each text; a text without tokens becomes one unknown word.
        numbers: The number of each word in the vocabulary.
        length: Texts are cut to this length, or padded at the end with `PADDING`.
    """
    rows = [
        [numbers.get(token, UNKNOWN) for token in tokens[:length]] or [UNKNOWN] for tokens in texts
    ]
    return torch.tensor([row + [PADDING] * (length - len(row)) for row in rows]).view(-1, length)


def numbered(vocabulary: Sequence[str]) -> dict[str, int]:
    """Return the number of each word."""
    return {word: number for number, word in enumerate(vocabulary, FIRST)}


class SentimentPredictor:
    """Predicts which of two classes a text belongs to.

    Args:
        network: Takes word numbers, int64 (N, length), and returns logits (N,) of the second class.
        facts: `classes`, `vocabulary` and `length` of the data it was trained on.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], facts: Mapping[str, Any]) -> None:
        self._network = network
        self._numbers = numbered(facts["vocabulary"])
        self._length: int = facts["length"]
        self._classes: list[str] = facts["classes"]

    @torch.no_grad()
    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Classify texts.

        Args:
            model_input: Texts, or a table whose only column, or column `text`, holds them. A
                missing text counts as an empty one.
            params: Ignored; MLflow passes it.

        Returns:
            The columns `label`, the name of a class, and `probability` of that class.

        Raises:
            ValueError: The texts' column is ambiguous, or a cell is not a text.
        """
        texts = _texts(model_input)
        labels: list[str] = []
        probabilities: list[float] = []
        for start in range(0, len(texts), _BATCH):
            tokens = map(tokenise, texts[start : start + _BATCH])
            second = self._network(encode(tokens, self._numbers, self._length)).double().sigmoid()
            for probability in second.tolist():
                labels.append(self._classes[probability > 0.5])
                probabilities.append(max(probability, 1 - probability))
        return pd.DataFrame({"label": labels, "probability": pd.Series(probabilities, dtype=float)})


def _texts(model_input: Any) -> list[str]:
    column = model_input
    if isinstance(model_input, pd.DataFrame):
        names = list(model_input.columns)
        if len(names) != 1 and names.count("text") != 1:
            raise ValueError(f"the columns are {names}; allowed: one column, or one named `text`.")
        column = model_input[names[0] if len(names) == 1 else "text"]
    texts = []
    for cell in column:
        missing = cell is None or cell is pd.NA or (isinstance(cell, float) and cell != cell)
        if not (missing or isinstance(cell, str)):
            raise ValueError(f"{cell!r} is of type {type(cell).__name__}; it must be a str.")
        texts.append("" if missing else cell)
    return texts


def load(network: Callable[[Tensor], Tensor], files: Mapping[str, str]) -> SentimentPredictor:
    """Return the predictor of a logged model.

    Args:
        network: The model's network.
        files: The contents of the text files logged with it, by name; `recipe.json` is read.
    """
    return SentimentPredictor(network, json.loads(files["recipe.json"])["facts"])
