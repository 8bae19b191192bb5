"""Text files as streams of character numbers, in three parts."""

from __future__ import annotations

import codecs
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from models.errors import ModelsError
from models.recipe import Data, Source

STREAMS = 16
"""Largest number of streams of the validation and the test part."""
LENGTH = 50
"""Characters per window of the validation and the test part."""
# Constants, so that the loss does not depend on the hyperparameters batch_size and length.

_MAX_CONTROLS = 0.05  # with a larger share of control characters a file is binary
_LOGGER = logging.getLogger(__name__)


class Vocabulary:
    """Characters and their numbers; every other character gets the number after the last.

    Args:
        characters: Each character once, ordered by code point.
    """

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.unknown = len(characters)
        self._codes = _codes(characters)

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """Return the vocabulary of the characters in `text`."""
        return cls("".join(map(chr, np.unique(_codes(text)))))

    def encode(self, text: str) -> Tensor:
        """Return the characters' numbers, int32 (characters,)."""
        codes = _codes(text)
        places = np.searchsorted(self._codes, codes)
        known = self._codes.take(places, mode="clip") == codes
        return torch.from_numpy(np.where(known, places, self.unknown).astype(np.int32))

    def missing(self, text: str) -> list[str]:
        """Return the characters of `text` that the vocabulary lacks, each once, in order."""
        return [character for character in dict.fromkeys(text) if character not in self.characters]


def _codes(text: str) -> npt.NDArray[np.uint32]:
    # surrogatepass: command-line arguments may contain lone surrogates.
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """One part of a text, cut into streams of equal length, and those into windows.

    An item is the pair (inputs, targets), int64 (length,) each; targets are the characters after
    the inputs. Items are ordered for a DataLoader with batch size `streams`: row i of each batch
    continues row i of the batch before it. The text's last characters, fewer than one window per
    stream, are dropped.

    Args:
        name: The data set's name.
        text: At least streams * length + 1 characters.
        tokens: The characters' numbers, int32.
        streams: Number of streams.
        length: Characters per window.
    """

    def __init__(self, name: str, text: str, tokens: Tensor, streams: int, length: int) -> None:
        self.name = name
        self.digest_of = text
        """What the tracker hashes: the data, independent of the windows."""
        self.streams = streams
        self.length = length
        self.windows = (len(tokens) - 1) // (streams * length)
        """Windows per stream."""
        steps = self.windows * length
        rows = tokens.unfold(0, steps + 1, steps)[:streams]  # each overlaps the next by one
        self.data = rows[:, :-1]
        """Inputs, int32 (streams, steps)."""
        self.targets = rows[:, 1:]
        """Targets, int32 (streams, steps)."""

    def __len__(self) -> int:
        return self.streams * self.windows

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window, stream = divmod(index, self.streams)
        return self._cut(self.data[stream], window), self._cut(self.targets[stream], window)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield consecutive windows of all streams, inputs and targets int64 (streams, length)."""
        for window in range(self.windows):
            yield self._cut(self.data, window), self._cut(self.targets, window)

    def _cut(self, tokens: Tensor, window: int) -> Tensor:
        return tokens[..., window * self.length : (window + 1) * self.length].long()


@dataclass(frozen=True, kw_only=True)
class TextData(Data[Windows]):
    """A text in three consecutive parts. Facts: `characters` of the training part."""

    validation: Windows
    test: Windows
    seed: int


def load_text(source: Source, streams: int, length: int) -> TextData:
    """Load a text file and split it.

    The first 90 % of the characters are for training, the next 5 % for validation, the rest for
    testing. The vocabulary comes from the training part.

    Args:
        source: The path of a text file; `auto` is `data_dir`/text/anna.txt if it exists, else
            English text that comes with Python.
        streams: Number of streams of the training part.
        length: Characters per window of the training part.

    Raises:
        ModelsError: The file is absent, not text, or too short for one window per stream.
    """
    if source.dataset == "auto":
        name, text, origin = _auto(Path(source.data_dir))
    else:
        path = Path(source.dataset)
        text, encoding = read_text(path)
        name, origin = path.name, f"{path} ({encoding})"
    needed = max(-(-10 * (streams * length + 1) // 9), 20 * (LENGTH + 1))
    if len(text) < needed:
        raise ModelsError(
            f"dataset={source.dataset!r} has {len(text):,} characters; batch_size={streams} and "
            f"length={length} need at least {needed:,}."
        )
    first, second = len(text) * 9 // 10, len(text) * 9 // 10 + len(text) // 20
    vocabulary = Vocabulary.of(text[:first])
    tokens = vocabulary.encode(text)

    def part(start: int, end: int, streams: int, length: int) -> Windows:
        return Windows(name, text[start:end], tokens[start:end], streams, length)

    def held_out(start: int, end: int) -> Windows:
        return part(start, end, min(STREAMS, (end - start - 1) // LENGTH), LENGTH)

    return TextData(
        name=name,
        train=part(0, first, streams, length),
        validation=held_out(first, second),
        test=held_out(second, len(text)),
        source=origin,
        facts={"characters": vocabulary.characters},
        seed=source.seed,
    )


def read_text(path: Path, allowed: str = "a text file, or auto") -> tuple[str, str]:
    r"""Read a text file in UTF-8 (with or without a byte order mark), Windows-1252 or Latin-1.

    Args:
        path: The file.
        allowed: What the argument `dataset` may be, for messages.

    Returns:
        The text, its lines separated by `\n`, and the name of its encoding.

    Raises:
        ModelsError: The file is absent, empty or binary.
    """
    argument = f"dataset={str(path)!r}"
    if os.path.isdir(path):  # pathlib raises for names that are too long
        raise ModelsError(f"{argument} is a folder; allowed: {allowed}.")
    if not os.path.isfile(path):  # reading a pipe or /dev/zero would never end
        raise ModelsError(f"{argument} is not a file; allowed: {allowed}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelsError(
            f"{argument} cannot be read: {error.strerror}; allowed: {allowed}."
        ) from error
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content:
        raise ModelsError(f"{argument} is empty; allowed: {allowed}.")
    text, encoding = _decode(content)
    codes = _codes(text)
    white = np.isin(codes, [ord(character) for character in "\t\n\v\f\r"])
    controls = ((codes < 32) & ~white) | ((codes >= 127) & (codes < 160))
    if not codes.all() or controls.mean() > _MAX_CONTROLS:
        raise ModelsError(f"{argument} is binary; allowed: text in UTF-8 or Latin-1.")
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decode(content: bytes) -> tuple[str, str]:
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1"), "latin-1"  # accepts every byte


def _auto(root: Path) -> tuple[str, str, str]:
    """Name, text and source of the data set `auto`."""
    path = root / "text" / "anna.txt"
    if os.path.isfile(path):
        text, encoding = read_text(path)
        _LOGGER.warning("dataset='auto' is %s.", path)
        return path.name, text, f"{path} ({encoding})"
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some distributions leave it out
        raise ModelsError(
            f"dataset='auto' needs {path}, which does not exist, and this Python lacks pydoc_data; "
            "allowed: a text file."
        ) from error
    _LOGGER.warning("dataset='auto' is Python's help texts, because %s does not exist.", path)
    origin = f"pydoc_data.topics of Python {platform.python_version()}"
    return "pydoc-topics", "\n".join(topics[name] for name in sorted(topics)), origin
