"""Texts of two classes: the rt-polarity layout (a file for each class), or a CSV.

rt-polarity v1.0: Pang and Lee, "Seeing stars", ACL 2005; 5,331 snippets of each class, Latin-1.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from models.data import split
from models.errors import ModelsError
from models.recipe import Data, Params, Source
from models.sentiment_predictor import encode, numbered, tokenise
from models.text import read_text

DATASETS = (
    "auto (DATA_DIR/text/rt-polarity), a folder or file stem with .neg and .pos (a text a line), "
    "or a .csv"
)
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
_AUTO = Path("text", "rt-polarity")
_CLASSES = ("negative", "positive")
_ALLOWED = "a folder with .pos and .neg files, the stem of such files, or a .csv"


class Reviews(TensorDataset):
    """One part of a data set; an item is the pair (words' numbers, class number)."""

    def __init__(self, name: str, texts: Sequence[str], words: Tensor, labels: Tensor) -> None:
        """Take N texts, `words` int64 (N, length) and `labels` int64 (N,), 0 or 1."""
        super().__init__(words, labels)
        self.name = name
        self.texts = list(texts)
        self.words = words
        self.labels = labels
        self.digest_of = (self.texts, labels)
        """What the data is, whatever the vocabulary: for the tracker."""


@dataclass(frozen=True, kw_only=True)
class ReviewData(Data[Reviews]):
    """Texts in three parts. Its facts: `classes`, `vocabulary` and `length`."""

    validation: Reviews
    test: Reviews
    """The same under every seed."""


class _Texts(NamedTuple):
    name: str
    source: str
    classes: tuple[str, ...]
    texts: list[str]
    labels: list[int]


def load_reviews(source: Source, params: Params) -> ReviewData:
    """The texts that `source` names, split by its seed: see `DATASETS` for what it may name.

    A fifth of the texts is the test part, a tenth of the rest the validation part; each class gives
    alike, and texts with the same tokens lie in one part. The vocabulary is of the training part.

    `params`: `vocabulary`, how many words at most, each of which the training part has at least
    `min_count` times; `length` in tokens; `text_column` and `label_column` of a CSV.

    Raises ModelsError where there is no such data, or it is not fit.
    """
    found = _read(source, params)
    tokens = [tokenise(text) for text in found.texts]
    labels = torch.tensor(found.labels)
    parts = _split(tokens, labels, source.seed)
    for index in parts:
        if len(labels[index].unique()) < len(found.classes):
            different = len({tuple(text) for text in tokens})
            raise ModelsError(
                f"dataset={source.dataset!r} has {different} different texts, too few to split; "
                "each class must give some to the training, the validation and the test part."
            )
    training = parts[0].tolist()
    vocabulary = _vocabulary((tokens[i] for i in training), params)
    numbers = numbered(vocabulary)

    def part(index: Tensor) -> Reviews:
        chosen = index.tolist()
        words = encode((tokens[i] for i in chosen), numbers, params["length"])
        return Reviews(found.name, [found.texts[i] for i in chosen], words, labels[index])

    return ReviewData(
        name=found.name,
        train=part(parts[0]),
        validation=part(parts[1]),
        test=part(parts[2]),
        source=found.source,
        facts={
            "classes": list(found.classes),
            "vocabulary": vocabulary,
            "length": params["length"],
        },
    )


def _vocabulary(texts: Iterable[Sequence[str]], params: Params) -> list[str]:
    """The words that occur most often, the most frequent first; ties by the alphabet."""
    counts = Counter(token for tokens in texts for token in tokens)
    often = [word for word, count in counts.items() if count >= params["min_count"]]
    if not often:
        raise ModelsError(
            f"min_count={params['min_count']} leaves no word of the training part; allowed: up to "
            f"{max(counts.values(), default=0)}."
        )
    return sorted(often, key=lambda word: (-counts[word], word))[: params["vocabulary"]]


def _split(tokens: Sequence[Sequence[str]], labels: Tensor, seed: int) -> tuple[Tensor, ...]:
    """Indices, ascending, of the training, the validation and the test part."""
    numbers: dict[tuple[str, ...], int] = {}
    groups = torch.tensor([numbers.setdefault(tuple(text), len(numbers)) for text in tokens])
    first = torch.full((len(numbers),), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)), "amin"
    )
    of_group = labels[first]
    rest, test = split(of_group, TEST_SHARE, seed=0)
    train, validation = (rest[part] for part in split(of_group[rest], VALIDATION_SHARE, seed))
    return tuple(torch.isin(groups, part).nonzero().flatten() for part in (train, validation, test))


def _read(source: Source, params: Params) -> _Texts:
    if source.dataset != "auto":
        path = Path(source.dataset)
        return _read_csv(path, params) if path.suffix.lower() == ".csv" else _read_files(path)
    path = Path(source.data_dir) / _AUTO
    if not all(os.path.isfile(file) for files in _files(path) for file in files):
        raise ModelsError(
            f"dataset='auto' is not in data_dir='{source.data_dir}': it has no {_AUTO}.neg and "
            f".pos; allowed: {_ALLOWED}."
        )
    return _read_files(path)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """The files of either class that `path`, a folder or a stem, stands for."""
    if os.path.isdir(path):  # pathlib raises for names that are too long
        return sorted(path.glob("*.neg")), sorted(path.glob("*.pos"))
    return [path.with_name(f"{path.name}.neg")], [path.with_name(f"{path.name}.pos")]


def _read_files(path: Path) -> _Texts:
    every = _files(path)
    if not os.path.isdir(path) and not any(
        os.path.exists(file) for files in every for file in files
    ):
        why = "is none of these" if os.path.exists(path) else "is not there"
        raise ModelsError(f"dataset='{path}' {why}; allowed: {_ALLOWED}.")
    texts, labels = [], []
    for number, (files, suffix) in enumerate(zip(every, (".neg", ".pos"), strict=True)):
        if not files:
            raise ModelsError(f"dataset='{path}' has no {suffix} file; allowed: {_ALLOWED}.")
        for file in files:
            # Not splitlines: it takes more for a line's end than that, such as Latin-1's \x85.
            lines = read_text(file, _ALLOWED)[0].split("\n")
            found = [line.strip() for line in lines if line.strip()]
            texts += found
            labels += [number] * len(found)
        if number not in labels:
            raise ModelsError(f"dataset='{path}' has no text in its {suffix} file.")
    return _Texts(path.name, str(path), _CLASSES, texts, labels)


def _read_csv(path: Path, params: Params) -> _Texts:
    text_column, label_column = params["text_column"], params["label_column"]
    rows = csv.reader(io.StringIO(read_text(path, _ALLOWED)[0], newline=""))
    texts: list[str] = []
    names: list[str] = []
    try:
        header = [name.strip() for name in next(rows, [])]
        for parameter, name in (("text_column", text_column), ("label_column", label_column)):
            if header.count(name) != 1:
                which = "two columns" if name in header else "no column"
                raise ModelsError(
                    f"{parameter}={name!r} is {which} of {path}; allowed: {', '.join(header)}."
                )
        text_at, label_at = header.index(text_column), header.index(label_column)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header) or not row[label_at].strip():
                raise ModelsError(
                    f"dataset='{path}' has no label, or another number of columns than its "
                    f"header, in the row that ends in line {rows.line_num}; allowed: a value for "
                    f"each of {', '.join(header)}."
                )
            texts.append(row[text_at].strip())
            names.append(row[label_at].strip())
    except csv.Error as error:
        raise ModelsError(
            f"dataset='{path}' is no CSV at line {rows.line_num} ({error}); allowed: {_ALLOWED}."
        ) from error
    classes = sorted(set(names))
    if len(classes) != 2:
        shown = ", ".join(name[:20] for name in classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ModelsError(
            f"label_column={label_column!r} of {path} has {len(classes)} different labels"
            f"{f' ({shown})' if classes else ''}; allowed: two."
        )
    return _Texts(path.stem, str(path), (*classes,), texts, [classes.index(name) for name in names])
