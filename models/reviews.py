"""Texts of two classes, from files in the rt-polarity layout (one per class) or a CSV.

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
    "auto (DATA_DIR/text/rt-polarity), a folder or file stem with .neg and .pos files (one text "
    "per line), or a .csv"
)
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
_AUTO = Path("text", "rt-polarity")
_CLASSES = ("negative", "positive")
_ALLOWED = "a folder with .pos and .neg files, the stem of such files, or a .csv"


class Reviews(TensorDataset):
    """One part of a data set; an item is the pair (word numbers, class number).

    Args:
        name: The data set's name.
        texts: N texts.
        words: Their words' numbers, int64 (N, length).
        labels: Class numbers, int64 (N,), 0 or 1.
    """

    def __init__(self, name: str, texts: Sequence[str], words: Tensor, labels: Tensor) -> None:
        super().__init__(words, labels)
        self.name = name
        self.texts = list(texts)
        self.words = words
        self.labels = labels
        self.digest_of = (self.texts, labels)
        """What the tracker hashes: the data, independent of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class ReviewData(Data[Reviews]):
    """Texts in three parts. Facts: `classes`, `vocabulary` and `length`."""

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
    """Load texts and split them.

    A fifth of the texts is the test part, and a tenth of the rest the validation part. Both contain
    the same share of each class, and texts with the same tokens are in the same part. The
    vocabulary comes from the training part.

    Args:
        source: The data set (see `DATASETS`), its folder, and the seed of the split.
        params: `vocabulary`, the largest number of words; `min_count`, how often the training part
            must contain a word; `length` of a text in tokens; `text_column` and `label_column` of
            a CSV.

    Raises:
        ModelsError: The data is absent or unsuitable.
    """
    content = _read(source, params)
    tokens = [tokenise(text) for text in content.texts]
    labels = torch.tensor(content.labels)
    parts = _split(tokens, labels, source.seed)
    for index in parts:
        if len(labels[index].unique()) < len(content.classes):
            distinct = len({tuple(text) for text in tokens})
            raise ModelsError(
                f"dataset={source.dataset!r} has {distinct} distinct texts, too few to split; "
                "the training, validation and test part need some of each class."
            )
    training = parts[0].tolist()
    vocabulary = _vocabulary((tokens[i] for i in training), params)
    numbers = numbered(vocabulary)

    def part(index: Tensor) -> Reviews:
        chosen = index.tolist()
        words = encode((tokens[i] for i in chosen), numbers, params["length"])
        return Reviews(content.name, [content.texts[i] for i in chosen], words, labels[index])

    return ReviewData(
        name=content.name,
        train=part(parts[0]),
        validation=part(parts[1]),
        test=part(parts[2]),
        source=content.source,
        facts={
            "classes": list(content.classes),
            "vocabulary": vocabulary,
            "length": params["length"],
        },
    )


def _vocabulary(texts: Iterable[Sequence[str]], params: Params) -> list[str]:
    """The most frequent words, most frequent first, ties in alphabetical order."""
    counts = Counter(token for tokens in texts for token in tokens)
    frequent = [word for word, count in counts.items() if count >= params["min_count"]]
    if not frequent:
        raise ModelsError(
            f"min_count={params['min_count']} leaves no word of the training part; allowed: up to "
            f"{max(counts.values(), default=0)}."
        )
    return sorted(frequent, key=lambda word: (-counts[word], word))[: params["vocabulary"]]


def _split(tokens: Sequence[Sequence[str]], labels: Tensor, seed: int) -> tuple[Tensor, ...]:
    """Indices, ascending, of the training, the validation and the test part."""
    numbers: dict[tuple[str, ...], int] = {}
    groups = torch.tensor([numbers.setdefault(tuple(text), len(numbers)) for text in tokens])
    first = torch.full((len(numbers),), len(groups)).scatter_reduce(
        0, groups, torch.arange(len(groups)), "amin"
    )
    group_labels = labels[first]
    rest, test = split(group_labels, TEST_SHARE, seed=0)
    train, validation = (rest[part] for part in split(group_labels[rest], VALIDATION_SHARE, seed))
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
    """The negative and the positive files of a folder or stem."""
    if os.path.isdir(path):  # pathlib raises for names that are too long
        return sorted(path.glob("*.neg")), sorted(path.glob("*.pos"))
    return [path.with_name(f"{path.name}.neg")], [path.with_name(f"{path.name}.pos")]


def _read_files(path: Path) -> _Texts:
    by_class = _files(path)
    if not os.path.isdir(path) and not any(
        os.path.exists(file) for files in by_class for file in files
    ):
        why = "is another kind of file" if os.path.exists(path) else "does not exist"
        raise ModelsError(f"dataset='{path}' {why}; allowed: {_ALLOWED}.")
    texts, labels = [], []
    for number, (files, suffix) in enumerate(zip(by_class, (".neg", ".pos"), strict=True)):
        if not files:
            raise ModelsError(f"dataset='{path}' has no {suffix} file; allowed: {_ALLOWED}.")
        for file in files:
            # Not splitlines, which also splits at other characters, such as Latin-1's \x85.
            lines = read_text(file, _ALLOWED)[0].split("\n")
            stripped = [line.strip() for line in lines if line.strip()]
            texts += stripped
            labels += [number] * len(stripped)
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
                which = "two columns" if name in header else "not a column"
                raise ModelsError(
                    f"{parameter}={name!r} is {which} of {path}; allowed: {', '.join(header)}."
                )
        text_at, label_at = header.index(text_column), header.index(label_column)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header) or not row[label_at].strip():
                raise ModelsError(
                    f"dataset='{path}' has no label, or other columns than its header, in the row "
                    f"that ends in line {rows.line_num}; allowed: a value for each of "
                    f"{', '.join(header)}."
                )
            texts.append(row[text_at].strip())
            names.append(row[label_at].strip())
    except csv.Error as error:
        raise ModelsError(
            f"dataset='{path}' is not a valid CSV at line {rows.line_num} ({error}); "
            f"allowed: {_ALLOWED}."
        ) from error
    classes = sorted(set(names))
    if len(classes) != 2:
        shown = ", ".join(name[:20] for name in classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise ModelsError(
            f"label_column={label_column!r} of {path} has {len(classes)} distinct labels"
            f"{f' ({shown})' if classes else ''}; allowed: two."
        )
    return _Texts(path.stem, str(path), (*classes,), texts, [classes.index(name) for name in names])
