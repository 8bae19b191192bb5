"""Any text file as streams of character numbers, in three parts."""

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
"""Streams of the validation and the test part, at most."""
LENGTH = 50
"""Characters in their windows."""
# Both are constants: a loss must not depend on the hyperparameters batch_size and length.

_CONTROLS = 0.05  # a share of control characters above which a file is no text
_LOGGER = logging.getLogger(__name__)


class Vocabulary:
    """Characters and their numbers; the number after the last is that of all other characters."""

    def __init__(self, characters: str) -> None:
        """Take each character once, in the order of code points."""
        self.characters = characters
        self.unknown = len(characters)
        self._codes = _codes(characters)

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The characters of `text`."""
        return cls("".join(map(chr, np.unique(_codes(text)))))

    def encode(self, text: str) -> Tensor:
        """The numbers, int32 (characters,), of `text`."""
        codes = _codes(text)
        places = np.searchsorted(self._codes, codes)
        known = self._codes.take(places, mode="clip") == codes
        return torch.from_numpy(np.where(known, places, self.unknown).astype(np.int32))

    def missing(self, text: str) -> list[str]:
        """The characters of `text` that are not in it, each once, in order."""
        return [character for character in dict.fromkeys(text) if character not in self.characters]


def _codes(text: str) -> npt.NDArray[np.uint32]:
    # A lone surrogate, which an argument may hold, is a character as any other here.
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """One part of a text, cut into streams of equal length, and these into windows.

    An item is the pair (inputs, targets), int64 (length,) each; targets are the characters that
    follow the inputs. The items come in the order in which a DataLoader of batch size `streams`
    has in row i of each batch what follows row i of the batch before. The last characters, less
    than one window of each stream, are left out.
    """

    def __init__(self, name: str, text: str, tokens: Tensor, streams: int, length: int) -> None:
        """Take a text of at least streams * length + 1 characters, and `tokens`, int32, of it."""
        self.name = name
        self.digest_of = text
        """What the data is, however it is cut: for the tracker."""
        self.streams = streams
        self.length = length
        self.windows = (len(tokens) - 1) // (streams * length)
        """Windows in each stream."""
        steps = self.windows * length
        rows = tokens.unfold(0, steps + 1, steps)[:streams]  # each ends where the next begins
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
        """One window of every stream at a time, int64 (streams, length), consecutive ones."""
        for window in range(self.windows):
            yield self._cut(self.data, window), self._cut(self.targets, window)

    def _cut(self, tokens: Tensor, window: int) -> Tensor:
        return tokens[..., window * self.length : (window + 1) * self.length].long()


@dataclass(frozen=True, kw_only=True)
class TextData(Data[Windows]):
    """A text in three consecutive parts. Its facts: `characters`, those of the training part."""

    validation: Windows
    test: Windows
    seed: int


def load_text(source: Source, streams: int, length: int) -> TextData:
    """The text file that `source.dataset` names, its training part in `streams` of `length`.

    `auto` is `data_dir`/text/anna.txt where that is there, else English text that comes with
    Python. The first 90 % of the characters are for training, the next 5 % for validation, the
    rest for testing: no character is in two parts, and the vocabulary is the training part's.

    Raises ModelsError for a file that is not there, no text, or too short for one window of
    every stream.
    """
    if source.dataset == "auto":
        name, text, whence = _choose(Path(source.data_dir))
    else:
        path = Path(source.dataset)
        text, encoding = read_text(path)
        name, whence = path.name, f"{path} ({encoding})"
    needed = max(-(-10 * (streams * length + 1) // 9), 20 * (LENGTH + 1))
    if len(text) < needed:
        raise ModelsError(
            f"dataset={source.dataset!r} has {len(text):,} characters; with batch_size={streams} "
            f"and length={length} it must have at least {needed:,}."
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
        source=whence,
        facts={"characters": vocabulary.characters},
        seed=source.seed,
    )


def read_text(path: Path, allowed: str = "a text file, or auto") -> tuple[str, str]:
    r"""The text in the file `path`, its lines ended by `\n`, and the encoding that it is in.

    That is UTF-8, with or without a byte order mark, else Windows-1252, else Latin-1.
    Raises ModelsError, which says what is `allowed`, where there is no such file, it is empty, or
    what it holds is no text.
    """
    told = f"dataset={str(path)!r}"
    if os.path.isdir(path):  # pathlib raises for names that are too long
        raise ModelsError(f"{told} is a folder; allowed: {allowed}.")
    if not os.path.isfile(path):  # a pipe or /dev/zero would never end
        raise ModelsError(f"{told} is not a file; allowed: {allowed}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelsError(
            f"{told} cannot be read: {error.strerror}; allowed: {allowed}."
        ) from error
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content:
        raise ModelsError(f"{told} is empty; allowed: {allowed}.")
    text, encoding = _decode(content)
    codes = _codes(text)
    white = np.isin(codes, [ord(character) for character in "\t\n\v\f\r"])
    controls = ((codes < 32) & ~white) | ((codes >= 127) & (codes < 160))
    if not codes.all() or controls.mean() > _CONTROLS:
        raise ModelsError(f"{told} is binary; allowed: text in UTF-8 or Latin-1.")
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def _decode(content: bytes) -> tuple[str, str]:
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding), encoding
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1"), "latin-1"  # it takes every byte


def _choose(root: Path) -> tuple[str, str, str]:
    """Name, text and source of what `auto` is."""
    path = root / "text" / "anna.txt"
    if os.path.isfile(path):
        text, encoding = read_text(path)
        _LOGGER.warning("dataset='auto' is %s.", path)
        return path.name, text, f"{path} ({encoding})"
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # some systems' Python comes without it
        raise ModelsError(
            f"dataset='auto' needs {path}, which is not there, and this Python has no pydoc_data; "
            "allowed: a text file."
        ) from error
    _LOGGER.warning("dataset='auto' is the help texts of Python, because %s is not there.", path)
    whence = f"pydoc_data.topics of Python {platform.python_version()}"
    return "pydoc-topics", "\n".join(topics[name] for name in sorted(topics)), whence
