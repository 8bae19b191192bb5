"""Tensors and arrays as pictures."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from tracker.errors import ArgumentError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_PREVIEW = 256  # pixels of the longer side; mlflow.tracking.multimedia, 3.17


def to_pil(image: Any) -> Image.Image:
    """A PIL image from one, or from a tensor or array of floats in [0, 1] or of bytes.

    Shapes: (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels; where both fit, a tensor has
    its channels first and an array last. Floats beyond [0, 1] are clipped. Raises ArgumentError
    for any other shape.
    """
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (Tensor, np.ndarray)):
        raise ArgumentError(
            f"image={type(image).__name__} is not allowed; allowed are a tensor, an array and a "
            "PIL image."
        )
    is_bytes = image.dtype in (torch.uint8, np.dtype(np.uint8))
    is_whole = str(image.dtype).removeprefix("torch.").startswith(("int", "uint"))
    if is_whole and not is_bytes and bool((image > 1).any()):  # no mask; is 255 white, then?
        raise ArgumentError(
            f"image has the type {image.dtype}; allowed are floats, uint8 and masks of 0 and 1."
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
    """The pictures of a batch (N, C, H, W) in rows, scaled to their own range; None if it is none.

    Small pictures are enlarged by a whole factor, so that pixels stay pixels.
    """
    if batch.dim() != 4 or batch.shape[1] not in (1, 3) or 0 in batch.shape:
        return None
    grid = make_grid(
        batch.detach().cpu().float(),
        nrow=math.ceil(math.sqrt(len(batch))),
        normalize=True,  # data sets come normalised to all sorts of ranges
        padding=2,
        pad_value=1.0,
    )
    picture = to_pil(grid)
    factor = max(1, 600 // max(picture.size))
    return picture.resize(
        (picture.width * factor, picture.height * factor), Image.Resampling.NEAREST
    )


def mlflow_image_files(
    name: str, picture: Image.Image, step: int, milliseconds: int
) -> Iterator[tuple[str, Image.Image]]:
    """The files (artifact name, picture) that MLflow's UI shows by step.

    Their names are those of `MlflowClient.log_image(key=…)`, MLflow 3.17.
    """
    stem = "+".join(
        (
            f"images/{name.replace('/', '~')}",
            *("step", str(step), "timestamp", str(milliseconds)),
            str(uuid.uuid4()),
        )
    )
    yield f"{stem}.png", picture
    preview = picture.copy()
    preview.thumbnail((_PREVIEW, _PREVIEW))
    yield f"{stem}+compressed.webp", preview
