"""Read image files as tensors."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.errors import ModelsError

MAX_PIXELS = 100_000_000
"""Larger files are refused: decoding takes 3 bytes a pixel, 6 if EXIF rotates the image."""


def read_image(path: str | Path, size: int | tuple[int, int]) -> Tensor:
    """Read an image file.

    Args:
        path: A file in any format that Pillow decodes, 8 bits per channel.
        size: The length of the longer side in pixels, to which a larger image is scaled down; or
            (H, W), to which every image is scaled and cropped.

    Returns:
        float32 (3, H, W) in [0, 1].

    Raises:
        ModelsError: The file is absent, not an image, or too large.
    """
    from torchvision.transforms.functional import pil_to_tensor  # takes seconds

    too_large = ModelsError(f"{path} is too large; allowed are {MAX_PIXELS:,} pixels in all.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS decides
            with Image.open(path) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise too_large
                if opened.mode.startswith(("I", "F")):
                    raise ModelsError(
                        f"{path} has pixels of mode {opened.mode}; allowed: 8 bits per channel."
                    )
                opened.draft("RGB", _decoded_size(opened, size))  # JPEG: decode at reduced size
                ImageOps.exif_transpose(opened, in_place=True)
                image = opened if opened.mode == "RGB" else opened.convert("RGB")
                if isinstance(size, int):
                    image.thumbnail((size, size), Image.Resampling.LANCZOS)
                else:
                    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)
                pixels: Tensor = pil_to_tensor(image)
    except ModelsError:
        raise
    except UnidentifiedImageError as error:
        raise ModelsError(f"{path} is not an image that can be decoded.") from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    except MemoryError as error:
        raise ModelsError(f"{path} is too large for this machine's memory.") from error
    except (OSError, SyntaxError, ValueError) as error:  # what decoders raise on damaged files
        why = getattr(error, "strerror", None) or error
        raise ModelsError(f"{path} cannot be read: {why}.") from error
    return pixels.to(torch.float32) / 255


def _decoded_size(opened: Image.Image, size: int | tuple[int, int]) -> tuple[int, int]:
    """The smallest size, width first, from which `size` can be reached without enlarging."""
    if isinstance(size, tuple):
        scale = max(size[0] / opened.height, size[1] / opened.width)
    else:
        scale = size / max(opened.size)
    width, height = (max(1, round(side * scale)) for side in opened.size)
    return width, height
