"""Read the idx files of MNIST-like data sets, one by one so that an error can name the file."""

from pathlib import Path
from typing import Literal

from torch import Tensor

from models.errors import ModelsError

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# What torchvision's readers raise for a wrong magic number, an unknown element type, elements
# other than bytes, a truncated header or wrong rank, and a truncated body.
_DAMAGED = (AssertionError, KeyError, TypeError, ValueError, RuntimeError)


def read_part(folder: Path, part: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """Read the images and labels of one part.

    Args:
        folder: Holds the unpacked `FILES`.
        part: "train" for the training part, "t10k" for the test part.

    Returns:
        Pixels, uint8 (N, 28, 28), and labels, int64 (N,).

    Raises:
        ModelsError: A file is absent, damaged, or has other than ten classes; it is named.
    """
    image_file, label_file = (name for name in FILES if name.startswith(part))
    pixels = _read(folder / image_file)
    labels = _read(folder / label_file)
    if pixels.shape[1:] != (28, 28):
        raise ModelsError(
            f"{folder / image_file} holds images of {pixels.shape[1]}x{pixels.shape[2]} pixels; "
            f"allowed: 28x28."
        )
    if len(pixels) != len(labels):
        raise ModelsError(
            f"{folder / label_file} holds {len(labels)} labels for the {len(pixels)} images of "
            f"{image_file}; both files must belong to one data set."
        )
    if int(labels.max()) > 9:
        raise ModelsError(
            f"{folder / label_file} holds the label {int(labels.max())}; allowed: 0 to 9."
        )
    return pixels, labels


def _read(path: Path) -> Tensor:
    from torchvision.datasets.mnist import read_image_file, read_label_file  # takes seconds

    read = read_image_file if "images" in path.name else read_label_file
    try:
        values: Tensor = read(path)
    except OSError as error:
        raise ModelsError(f"{path} cannot be read: {error.strerror}.") from error
    except _DAMAGED as error:
        raise ModelsError(
            f"{path} ({path.stat().st_size} bytes) is empty, truncated or not an idx file; "
            f"download it again, or remove it together with the other three."
        ) from error
    return values
