"""Read the idx files of MNIST and its likes, file by file so that an error can name the file."""

from pathlib import Path
from typing import Literal

from torch import Tensor
from torchvision.datasets.mnist import (
    read_image_file,
    read_label_file,
)

from models.errors import ModelsError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# What the readers raise, found by trying: for a wrong magic number, an unknown type of element,
# another type than bytes, a header cut short or a wrong rank, and a body that is too short.
_DAMAGED = (AssertionError, KeyError, TypeError, ValueError, RuntimeError)


def read_part(folder: Path, part: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (N, 28, 28) and labels int64 (N,) of one part.

    Raises ModelsError, naming the file, where one is absent, damaged or not of ten classes.
    """
    image_file, label_file = (name for name in FILES if name.startswith(part))
    pixels = _read(folder / image_file)
    labels = _read(folder / label_file)
    if pixels.shape[1:] != (28, 28):
        raise ModelsError(
            f"{folder / image_file} holds pictures of {pixels.shape[1]}x{pixels.shape[2]} pixels; "
            f"allowed: 28x28."
        )
    if len(pixels) != len(labels):
        raise ModelsError(
            f"{folder / label_file} holds {len(labels)} labels for the {len(pixels)} pictures of "
            f"{image_file}; both must be of one set."
        )
    if int(labels.max()) > 9:
        raise ModelsError(
            f"{folder / label_file} holds the label {int(labels.max())}; allowed: 0 to 9."
        )
    return pixels, labels


def _read(path: Path) -> Tensor:
    read = read_image_file if "images" in path.name else read_label_file
    try:
        values: Tensor = read(path)
    except OSError as error:
        raise ModelsError(f"{path} cannot be read: {error.strerror}.") from error
    except _DAMAGED as error:
        raise ModelsError(
            f"{path} ({path.stat().st_size} bytes) is empty, cut short or not an idx file; "
            f"fetch it again, or remove it together with the other three."
        ) from error
    return values
