"""What a run logs of pictures, sound, figures and tables, as records in the journal."""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy.typing as npt
from torch import Tensor

from tracker.capture.images import cannot_draw, mlflow_image_files, preview, to_pil
from tracker.errors import ArgumentError, TrackerError, first_line
from tracker.journal.recorder import Recorder
from tracker.journal.records import now
from tracker.validation import TABLES_TAG, checked_path, checked_step, path_at_step

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

ImageLike: TypeAlias = Union[Tensor, npt.NDArray[Any], "Image"]

_NOT_IN_TABLES = "\"',:[]{}"  # in their paths; mlflow.tracking.client, 3.17
_MOST_HERTZ = 2**31


class MediaRecorder(Recorder):
    """Adds files that MLflow's UI opens to a recorder. Nothing that is logged is changed."""

    def __init__(self, *arguments: Any) -> None:
        """Create a recorder; the arguments are those of `Recorder`."""
        super().__init__(*arguments)
        self._tables: dict[str, pd.DataFrame] = {}
        self._staged_tables: dict[str, Path] = {}
        self._resumed_tables: dict[str, bytes] = {}

    def log_image(
        self,
        image: ImageLike | str,
        artifact_file: str | ImageLike | None = None,
        key: str | int | None = None,
        step: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """Log a picture: as the file `artifact_file`, or under `key` by step.

        The orders `log_image(image, key, step)` and `log_image(key, image, step)` are accepted too.

        Args:
            image: PIL image, or floats in [0, 1] or bytes: (H, W), (C, H, W) or (H, W, C).
            artifact_file: Path of the file, such as `grid.png`.
            key: The name of a series of pictures in MLflow's UI.
            step: Step of the picture in its series; default 0.
            timestamp: When it was made, in milliseconds since 1970; default now.

        Raises:
            ArgumentError: The shape, the path or the key is not allowed.
        """
        if not self._check_open():
            return
        if isinstance(image, str):
            image, artifact_file = artifact_file, image  # type: ignore[assignment]
        if isinstance(key, int) and step is None:
            key, step = None, key
        if step is not None and key is None:
            artifact_file, key = None, artifact_file
        for argument, value in (("artifact_file", artifact_file), ("key", key)):
            if not isinstance(value, (str, type(None))):
                raise ArgumentError(f"{argument} is a {type(value).__name__}; it must be text.")
        if cannot_draw():
            return
        picture = to_pil(image)
        if key is None:
            path = checked_path(artifact_file, "artifact_file")
            self._write(path, picture.save, "it must end in .png, .jpg or another picture format")
            return
        if artifact_file is not None:
            raise ArgumentError(
                f"artifact_file={artifact_file!r} is not allowed beside key={key!r}; pass one."
            )
        if isinstance(key, int) or not re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", key):
            raise ArgumentError(
                f"key={key!r} is not allowed; allowed are letters, digits, spaces and _ - . /"
            )
        at = now() if timestamp is None else checked_step(timestamp, "timestamp")
        for path, content in mlflow_image_files(key, picture, checked_step(step or 0), at):
            self._log_file(path, content.save)
        self.set_tags({"mlflow.loggedImages": True})

    def log_dict(self, dictionary: Any, artifact_file: str, *, step: int | None = None) -> None:
        """Log a mapping or list as a file: YAML if its name ends in .yaml or .yml, else JSON.

        Tensors and arrays become numbers and lists, and other objects their text.

        Args:
            dictionary: The values.
            artifact_file: Path in the run's artifacts, such as `folder/file.json`.
            step: Step of the values; at step 3 the file is `folder/file/000003.json`.

        Raises:
            ArgumentError: `dictionary` contains itself, or the path or the step is not allowed.
        """
        from tracker.capture.media import dict_text

        path = path_at_step(artifact_file, step)
        if self._check_open():
            self.log_text(dict_text(dictionary, as_yaml=path.endswith((".yaml", ".yml"))), path)

    def log_html(self, html: str, artifact_file: str, *, step: int | None = None) -> None:
        """Log a page that MLflow's UI opens; it runs scripts, and should hold all that it needs.

        Args:
            html: The page.
            artifact_file: Path in the run's artifacts, such as `page.html`.
            step: Step of the page; at step 3 the file is `page/000003.html`.

        Raises:
            ArgumentError: `html` is not text, or the path or the step is not allowed.
        """
        if not isinstance(html, str):
            raise ArgumentError(f"html is a {type(html).__name__}; it must be text.")
        self.log_text(html, _with_suffix(artifact_file, ".html"), step=step)

    def log_figure(
        self,
        figure: Any,
        artifact_file: str,
        *,
        save_kwargs: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Log a figure of matplotlib or plotly, which is neither closed nor changed.

        A plotly figure in an .html file can be turned and zoomed in MLflow's UI. The file holds
        plotly's script (5 MB); `save_kwargs={"include_plotlyjs": "cdn"}` leaves it out.

        Args:
            figure: The figure.
            artifact_file: Path in the run's artifacts, such as `loss.png` or `loss.html`.
            save_kwargs: Arguments of `savefig`, `write_html` or `write_image`.
            step: Step of the figure; at step 3 the file is `loss/000003.png`.

        Raises:
            ArgumentError: `figure` cannot be saved, or the path or the step is not allowed.
        """
        from tracker.capture.media import write_figure

        path = path_at_step(artifact_file, step)
        self._write(path, partial(write_figure, figure, options=dict(save_kwargs or {})))

    def log_table(self, data: Mapping[str, Any] | pd.DataFrame, artifact_file: str) -> None:
        """Log rows of a table that `mlflow.load_table` and MLflow's UI read.

        Further calls with the same path add their rows. Columns may hold PIL pictures.

        Args:
            data: Columns by name, a DataFrame, or one row as values by name.
            artifact_file: Path in the run's artifacts, ending in .json or .parquet.

        Raises:
            ArgumentError: `data` is not a table, or the path is not allowed.
        """
        from tracker.capture.media import read_table, table_of, write_table

        path = checked_path(artifact_file, "artifact_file")
        if not path.endswith((".json", ".parquet")) or any(sign in path for sign in _NOT_IN_TABLES):
            raise ArgumentError(
                f"artifact_file={path!r} is not allowed; it must end in .json or .parquet, and not "
                "contain \" ' , : [ ] { }"
            )
        if not self._check_open():
            return
        table = table_of(data, partial(self._log_cell, posixpath.splitext(path)[0]))
        if path in self._resumed_tables:
            self._tables[path] = read_table(self._resumed_tables.pop(path), path)
        if path in self._tables:
            import pandas as pd

            table = pd.concat([self._tables[path], table], ignore_index=True)
        # `passing`: the next call may supersede it before it is uploaded.
        staged = self._write(path, partial(write_table, table), passing=True)
        self._tables[path] = table
        if (before := self._staged_tables.pop(path, None)) is not None and staged is not None:
            shutil.rmtree(before.parent, ignore_errors=True)
        if staged is not None:
            self._staged_tables[path] = staged
        names = [*self._resumed_tables, *self._tables]
        self.set_tags({TABLES_TAG: json.dumps([{"path": one, "type": "table"} for one in names])})

    def _log_cell(self, table: str, picture: Image) -> Mapping[str, str]:
        """Log a picture of a table; return the cell by which MLflow's UI shows it."""
        stem = f"table_images/{table}/{uuid.uuid4()}"
        self._log_file(f"{stem}.png", picture.save)
        self._log_file(f"{stem}.webp", preview(picture).save)
        return {
            "type": "image",
            "filepath": f"{stem}.png",
            "compressed_filepath": f"{stem}.webp",
        }

    def log_audio(
        self, samples: Any, artifact_file: str, *, sample_rate: int, step: int | None = None
    ) -> None:
        """Log sound as a WAV file, which MLflow's UI plays.

        Args:
            samples: A tensor, array or list, (N,), (C, N) or (N, C): floats in [-1, 1], which are
                stored with 16 bits, or uint8, int16 or int32.
            artifact_file: Path in the run's artifacts, such as `voice.wav`.
            sample_rate: Samples per second.
            step: Step of the sound; at step 3 the file is `voice/000003.wav`.

        Raises:
            ArgumentError: `samples`, the path, the rate or the step is not allowed.
        """
        from tracker.capture.media import write_wav

        path = path_at_step(_with_suffix(artifact_file, ".wav"), step)
        rate = checked_step(sample_rate, "sample_rate")
        if not 0 < rate < _MOST_HERTZ:
            raise ArgumentError(f"sample_rate={rate} is not allowed; it must be above 0.")
        self._write(path, partial(write_wav, samples, sample_rate=rate))

    def log_video(
        self, frames: Any, artifact_file: str, *, fps: float = 10, step: int | None = None
    ) -> None:
        """Log moving pictures as an animated GIF, or PNG in all colours, which MLflow's UI shows.

        Log a file that exists (mp4, webm, mov) with `log_artifact`.

        Args:
            frames: Pictures as `log_image` takes them, or a tensor or array of them, such as
                (T, H, W) or (T, C, H, W).
            artifact_file: Path in the run's artifacts, such as `game.gif` or `game.png`.
            fps: Pictures per second; up to 50 in a GIF.
            step: Step of the pictures; at step 3 the file is `game/000003.gif`.

        Raises:
            ArgumentError: `frames`, the path, `fps` or the step is not allowed.
        """
        from tracker.capture.media import checked_fps, write_video

        path = path_at_step(_with_suffix(artifact_file, ".gif", ".png"), step)
        fps = checked_fps(fps, posixpath.splitext(path)[1])
        self._write(path, partial(write_video, frames, fps=fps))

    def _write(
        self,
        path: str,
        write: Callable[[Path], object],
        hint: str | None = None,
        *,
        passing: bool = False,
    ) -> Path | None:
        """Log what `write` writes, see `_log_file`; whatever it raises becomes an ArgumentError."""
        if not self._check_open():  # what is logged is read on rank 0 only
            return None
        try:
            return self._log_file(path, write, passing=passing)
        except TrackerError:
            raise
        except Exception as error:
            raise ArgumentError(
                f"artifact_file={path!r} cannot be written: {hint or first_line(error)}."
            ) from error


def _with_suffix(artifact_file: Any, *allowed: str) -> str:
    path = checked_path(artifact_file, "artifact_file")
    if not path.endswith(allowed):
        raise ArgumentError(
            f"artifact_file={path!r} is not allowed; it must end in {' or '.join(allowed)}."
        )
    return path
