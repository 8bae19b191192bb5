"""Picture files as tensors."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from models.errors import ModelsError

MOST_PIXELS = 100_000_000
"""Larger files are refused: decoding takes 3 bytes a pixel, twice that where it is turned."""


def read_picture(path: str | Path, size: int | tuple[int, int]) -> Tensor:
    """The picture of a file, float32 (3, H, W) in [0, 1].

    `size` is the length of its longer side in pixels, which never grows, or (H, W), to which it is
    scaled and cropped. Raises ModelsError for a file that is absent, no picture, or too large.
    """
    too_large = ModelsError(f"{path} is too large; allowed are {MOST_PIXELS:,} pixels in all.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have our own limit
            with Image.open(path) as opened:
                if opened.width * opened.height > MOST_PIXELS:
                    raise too_large
                if opened.mode.startswith(("I", "F")):
                    raise ModelsError(
                        f"{path} has pixels of the kind {opened.mode}; allowed: 8 bits a colour."
                    )
                opened.draft("RGB", _enough(opened, size))  # a JPEG is decoded smaller at once
                ImageOps.exif_transpose(opened, in_place=True)
                picture = opened if opened.mode == "RGB" else opened.convert("RGB")
                if isinstance(size, int):
                    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
                else:
                    picture = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
                pixels: Tensor = pil_to_tensor(picture)
    except ModelsError:
        raise
    except UnidentifiedImageError as error:
        raise ModelsError(f"{path} is not a picture that can be decoded.") from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    except MemoryError as error:
        raise ModelsError(f"{path} is too large for this machine's memory.") from error
    except (OSError, SyntaxError, ValueError) as error:  # what decoders raise on damaged files
        why = getattr(error, "strerror", None) or error
        raise ModelsError(f"{path} cannot be read: {why}.") from error
    return pixels.to(torch.float32) / 255


def _enough(opened: Image.Image, size: int | tuple[int, int]) -> tuple[int, int]:
    """The size, width first, that a decoder must at least give."""
    if isinstance(size, tuple):
        scale = max(size[0] / opened.height, size[1] / opened.width)
    else:
        scale = size / max(opened.size)
    return tuple(max(1, round(side * scale)) for side in opened.size)  # type: ignore[return-value]
