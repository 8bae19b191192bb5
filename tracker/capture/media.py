"""Dictionaries, tables, figures, sound and moving pictures, as files that MLflow's UI opens.

Its artifact viewer (3.17) shows jpg, bmp, jpeg, png, gif and svg; plays m4a, mp3, wav, aac, wma,
flac, opus, ogg, mp4, mov, mkv, webm and avi, as far as the browser can; and opens html, json,
yaml, csv, md and pdf. Of moving pictures Pillow writes GIF and animated PNG.
"""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracker.capture.images import is_picture, to_pil
from tracker.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

_BYTES = {"uint8": 1, "int16": 2, "int32": 4}  # per sample of a WAV file
_LOUDEST = 2**15 - 1
_MOST_FPS = {".gif": 50.0, ".png": 1000.0}  # browsers slow faster GIFs down


# -- dictionaries --------------------------------------------------------------------------------


def dict_text(value: Any, *, as_yaml: bool) -> str:
    """Return a mapping or list as JSON or YAML; other objects become their text.

    Raises:
        ArgumentError: `value`, the argument `dictionary`, contains itself.
    """
    try:
        plain = _plain(value)
    except RecursionError as error:
        raise ArgumentError("dictionary contains itself, so that it has no end.") from error
    if not as_yaml:
        return json.dumps(plain, indent=2, ensure_ascii=False)
    import yaml  # type: ignore[import-untyped]  # comes with MLflow

    text: str = yaml.safe_dump(plain, indent=2, sort_keys=False, allow_unicode=True)
    return text


def _plain(value: Any) -> Any:
    """Convert tensors, arrays and containers to JSON types."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    elif isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key if _is_plain(key) else str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    return value if _is_plain(value) else str(value)


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


# -- tables --------------------------------------------------------------------------------------


def table_of(
    data: Mapping[str, Any] | pd.DataFrame, save_image: Callable[[Image.Image], Any]
) -> pd.DataFrame:
    """Return rows as a new table.

    Args:
        data: Columns by name, or a table; a mapping without columns is one row.
        save_image: Saves a picture, and returns the cell that stands for it.

    Raises:
        ArgumentError: `data` is neither, or its columns have several lengths.
    """
    import pandas as pd  # takes a third of a second

    if isinstance(data, pd.DataFrame):
        table = data.copy()
    elif isinstance(data, Mapping):
        columns = {str(name): _column(values) for name, values in data.items()}
        if not any(isinstance(values, list) for values in columns.values()):
            columns = {name: [value] for name, value in columns.items()}
        try:
            table = pd.DataFrame(columns)
        except ValueError as error:
            sizes = {name: len(one) for name, one in columns.items() if isinstance(one, list)}
            raise ArgumentError(
                f"data has columns of several lengths, {sizes}; all must have the same."
            ) from error
    else:
        raise ArgumentError(
            f"data is a {type(data).__name__}; it must be a mapping of columns or a DataFrame."
        )
    for name in table.columns:
        pictures = [is_picture(cell) for cell in table[name]]
        if any(pictures):
            if not all(pictures):
                raise ArgumentError(f"data has pictures and other values in the column {name!r}.")
            table[name] = [save_image(cell) for cell in table[name]]
    return table


def _column(values: Any) -> Any:
    """A column as a list, or one value for all rows."""
    if isinstance(values, (list, tuple)):
        return [_cell(value) for value in values]
    if hasattr(values, "tolist"):  # a tensor, an array or a Series
        return _cell(values)
    return values


def _cell(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    return value.tolist() if hasattr(value, "tolist") else value


def read_table(content: bytes, path: str) -> pd.DataFrame:
    """Read a table that `write_table` or MLflow has written; `path` says in which format."""
    import io

    import pandas as pd

    if path.endswith(".parquet"):
        return pd.read_parquet(io.BytesIO(content))
    return pd.read_json(io.BytesIO(content), orient="split")


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table as `mlflow.log_table` does (3.17)."""
    if path.suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_json(path, orient="split", index=False, date_format="iso")


# -- figures -------------------------------------------------------------------------------------


def write_figure(figure: Any, path: Path, options: Mapping[str, Any]) -> None:
    """Write a figure of matplotlib or plotly, without changing it.

    Args:
        figure: A figure, or another object that saves itself like one, such as pyplot.
        path: The file, whose suffix is the format.
        options: Arguments of `savefig`, `write_html` or `write_image`.

    Raises:
        ArgumentError: `figure` cannot be saved.
    """
    if hasattr(figure, "savefig"):
        figure.savefig(path, **options)
    elif hasattr(figure, "write_html") and hasattr(figure, "write_image"):
        if path.suffix == ".html":  # with plotly's script, as a server may be offline
            figure.write_html(path, **{"include_plotlyjs": True, "auto_open": False, **options})
        else:
            figure.write_image(path, **options)
    else:
        raise ArgumentError(
            f"figure is a {type(figure).__name__}; allowed are figures of matplotlib and plotly."
        )


# -- sound ---------------------------------------------------------------------------------------


def write_wav(samples: Any, path: Path, sample_rate: int) -> None:
    """Write sound as a WAV file.

    Args:
        samples: (N,), (C, N) or (N, C), of which the shorter side is the channels. Floats in
            [-1, 1], which are clipped and written with 16 bits, or uint8, int16 or int32.
        path: The file.
        sample_rate: Samples per second.

    Raises:
        ArgumentError: The shape or the dtype is not allowed.
    """
    array = _array(samples, "samples")
    if array.ndim not in (1, 2) or array.size == 0:
        raise ArgumentError(
            f"samples has the shape {array.shape}; allowed are (N,), (C, N) and (N, C)."
        )
    if array.ndim == 2 and array.shape[0] < array.shape[1]:
        array = array.T
    if array.dtype.kind == "f":
        array = np.nan_to_num(array.astype(np.float64), nan=0.0).clip(-1, 1)
        array = np.rint(array * _LOUDEST).astype(np.int16)
    if (width := _BYTES.get(array.dtype.name)) is None:
        raise ArgumentError(
            f"samples has the dtype {array.dtype}; allowed are floats in [-1, 1], uint8, int16 "
            "and int32."
        )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if array.ndim == 1 else array.shape[1])
        file.setsampwidth(width)
        file.setframerate(sample_rate)
        file.writeframes(array.astype(array.dtype.newbyteorder("<")).tobytes())


def _array(values: Any, argument: str) -> npt.NDArray[Any]:
    """A tensor, an array or a list as an array."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"{argument} is a {type(values).__name__}; it must be a tensor, an array or a list of "
            "numbers."
        ) from error


# -- moving pictures -----------------------------------------------------------------------------


def checked_fps(fps: Any, suffix: str) -> float:
    """Check how many pictures a file with this suffix shows in a second."""
    most = _MOST_FPS[suffix]
    if isinstance(fps, (int, float)) and math.isfinite(fps) and 0 < fps <= most:
        return float(fps)
    raise ArgumentError(
        f"fps={fps!r} is not allowed; it must be a number above 0 and up to {most:.0f}."
    )


def write_video(frames: Any, path: Path, fps: float) -> None:
    """Write pictures as an animated GIF, or as an animated PNG, which keeps all colours.

    Args:
        frames: Pictures as `to_pil` takes them, all of one size: a list, an iterator, or a tensor
            or array whose first dimension is time.
        path: The file, whose suffix is the format.
        fps: Pictures per second.

    Raises:
        ArgumentError: There is no picture, or one is not allowed.
    """
    pictures = list(_pictures(frames))
    if not pictures:
        raise ArgumentError("frames is empty; there must be at least one picture.")
    if not all(picture.mode == "L" for picture in pictures):
        pictures = [picture.convert("RGB") for picture in pictures]
    first, *others = pictures
    forever = 0
    first.save(path, save_all=True, append_images=others, duration=1000 / fps, loop=forever)


def _pictures(frames: Any) -> Iterator[Image.Image]:
    if isinstance(frames, (Tensor, np.ndarray)):
        if frames.ndim not in (3, 4):
            raise ArgumentError(
                f"frames has the shape {tuple(frames.shape)}; allowed are (T, H, W), "
                "(T, C, H, W) and (T, H, W, C)."
            )
        frames = frames.detach().cpu() if isinstance(frames, Tensor) else frames
    elif not isinstance(frames, Iterable) or isinstance(frames, (str, bytes, Mapping)):
        raise ArgumentError(
            f"frames is a {type(frames).__name__}; it must be pictures, or a tensor or array of "
            "them."
        )
    size = None
    for frame in frames:
        picture = to_pil(frame)
        if size not in (None, picture.size):
            raise ArgumentError(
                f"frames has pictures of the sizes {size} and {picture.size}; all must have the "
                "same."
            )
        size = picture.size
        yield picture
