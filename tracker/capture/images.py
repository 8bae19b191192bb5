"""Tensors and arrays as pictures."""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tracker.errors import ArgumentError
from tracker.extras import is_missing

if TYPE_CHECKING:
    from PIL import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PREVIEW = 256  # pixels of the longer side; mlflow.tracking.multimedia, 3.17
_PADDING = 2  # white pixels around each picture of a grid


def cannot_draw() -> bool:
    """Return whether Pillow is not installed, without which nothing is drawn."""
    return is_missing("PIL.Image", "vision", "Pictures are left out, as they need Pillow")


def is_picture(value: Any) -> bool:
    """Return whether this is a PIL image; without Pillow nothing is."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def to_pil(image: Any) -> Image.Image:
    """Convert a tensor or an array to a PIL image.

    Args:
        image: A PIL image, or a tensor or array of shape (H, W), (C, H, W) or (H, W, C) with 1, 3
            or 4 channels. If both orders fit, a tensor has its channels first, an array last.
            Values are uint8, masks of 0 and 1, or floats in [0, 1]; other floats are clipped.

    Raises:
        ArgumentError: The type, the dtype or the shape is not allowed.
    """
    if hasattr(image, "to_pil"):  # a mlflow.Image
        image = image.to_pil()
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ArgumentError(
            f"image={type(image).__name__} is not allowed; pass a tensor, an array or a PIL image."
        )
    is_bytes = image.dtype in (torch.uint8, np.dtype(np.uint8))
    is_whole = str(image.dtype).removeprefix("torch.").startswith(("int", "uint"))
    if is_whole and not is_bytes and bool((image > 1).any()):  # which value would be white?
        raise ArgumentError(
            f"image has the dtype {image.dtype}; allowed are floats, uint8 and masks of 0 and 1."
        )
    array = image.detach().cpu().float().numpy() if isinstance(image, Tensor) else image
    first, last = (array.shape[i] in _MODES if array.ndim == 3 else False for i in (0, -1))
    if first and (isinstance(image, Tensor) or not last):
        array = array.transpose(1, 2, 0)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in _MODES or 0 in array.shape:
        raise ArgumentError(
            f"image has the shape {tuple(image.shape)}; allowed are (H, W), (C, H, W) and "
            "(H, W, C) with 1, 3 or 4 channels."
        )
    if not is_bytes:
        array = np.nan_to_num(array, nan=0.0).clip(0, 1) * 255
    array = array.round().astype(np.uint8)
    return Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)


def image_grid(batch: Tensor) -> Image.Image | None:
    """Arrange a batch in a grid, scaled to the batch's own range of values.

    Args:
        batch: Pictures, (N, C, H, W) with 1 or 3 channels, of any dtype.

    Returns:
        The grid, enlarged by a whole factor if the pictures are small; None for another shape.
    """
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or 0 in batch.shape or cannot_draw():
        return None
    from PIL import Image

    pictures = to_range(batch.detach().cpu()).expand(-1, 3, -1, -1)
    number, _, height, width = pictures.shape
    columns = math.ceil(math.sqrt(number))
    grid = pictures[0]
    if number > 1:
        high, wide = height + _PADDING, width + _PADDING
        grid = torch.ones(3, -(-number // columns) * high + _PADDING, columns * wide + _PADDING)
        for place, picture in enumerate(pictures):
            top, left = place // columns * high + _PADDING, place % columns * wide + _PADDING
            grid[:, top : top + height, left : left + width] = picture
    shown = to_pil(grid)
    factor = max(1, 600 // max(shown.size))
    return shown.resize((shown.width * factor, shown.height * factor), Image.Resampling.NEAREST)


def to_range(pictures: Tensor) -> Tensor:
    """Scale pictures to [0, 1] by their lowest and highest number: data sets have various ranges.

    Args:
        pictures: Of any shape and dtype.

    Returns:
        Floats of the same shape; NaN stays NaN, and infinities become 0 and 1.
    """
    pictures = pictures.float()
    finite = pictures[pictures.isfinite()]
    if not len(finite):
        return pictures
    low, high = finite.min(), finite.max()
    return ((pictures - low) / (high - low).clamp(min=1e-5)).clamp(0, 1)


def mlflow_image_files(
    name: str, picture: Image.Image, step: int, milliseconds: int
) -> Iterator[tuple[str, Image.Image]]:
    """Yield the files that MLflow's UI shows by step, named as in `MlflowClient.log_image`, 3.17.

    Args:
        name: The key under which MLflow shows the picture.
        picture: The picture.
        step: The step of the picture.
        milliseconds: When it was made, since 1970.

    Yields:
        Artifact path and picture: first the picture itself, then its preview.
    """
    key = name.replace("/", "~")
    stem = f"images/{key}+step+{step}+timestamp+{milliseconds}+{uuid.uuid4()}"
    yield f"{stem}.png", picture
    yield f"{stem}+compressed.webp", preview(picture)


def preview(picture: Image.Image) -> Image.Image:
    """Return a copy of the size in which MLflow's UI lists pictures."""
    small = picture.copy()
    small.thumbnail((_PREVIEW, _PREVIEW))
    return small
