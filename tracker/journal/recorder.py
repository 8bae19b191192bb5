"""What a run logs, as records in the journal."""

from __future__ import annotations

import errno
import logging
import math
import os
import posixpath
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from tracker.errors import ArgumentError, CallOrderError, StoreError, stays_here
from tracker.journal import records
from tracker.journal.records import Point, Record, now
from tracker.journal.writer import JournalWriter
from tracker.redaction import (
    MASK,
    is_secret_name,
    public_argument,
    public_text,
    public_values,
)
from tracker.statuses import Status
from tracker.transfers import Arriving, local_copy, read_later
from tracker.validation import (
    Namer,
    Renamer,
    checked_local_path,
    checked_mapping,
    checked_name,
    checked_number,
    checked_params,
    checked_path,
    checked_step,
    checked_tags,
    fitted,
    flag,
    path_at_step,
)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_MASKED = "The secret in %s %r is stored as %s; TRACKER_REDACT=0 keeps such values."
_KEPT = "Param %r is stored, though it is named like a secret; TRACKER_REDACT=1 masks such params."
_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Recorder:
    """Writes params, metrics, tags and files of one run to the journal.

    Every logging method raises CallOrderError after the run has ended, or in a forked process.
    """

    __reduce__ = stays_here(
        "Run", "send its run_id, and begin a run of its own there with start_run(parent=run_id)"
    )

    def __init__(
        self,
        journal: JournalWriter,
        key: str,
        params: Mapping[str, str],
        last_steps: Mapping[str, int],
        rename: bool,
    ) -> None:
        """Record to a journal.

        Args:
            journal: The journal of this process.
            key: Key of the run in the journal.
            params: Params that a resumed run has.
            last_steps: Last step of each metric that a resumed run has.
            rename: Rename metrics, params and tags whose names MLflow does not allow.
        """
        self._journal = journal
        self._key = key
        self._pid = os.getpid()
        self._status: Status | None = None
        self._params = dict(params)
        self._resumed_params = dict(params)
        self._last_steps = dict(last_steps)
        self._warned: set[str] = set()
        self._redacts = flag("TRACKER_REDACT")
        self.name_of: Namer = Renamer() if rename else checked_name
        """Returns the name under which MLflow stores a metric, param or tag."""

    @property
    def is_kept(self) -> bool:
        """Whether what is logged is recorded: under torchrun, only the runs of rank 0 are."""
        return self._journal.is_kept

    def _check_open(self) -> bool:
        """Raise CallOrderError if nothing can be logged; return `is_kept`."""
        if os.getpid() != self._pid:
            raise CallOrderError(
                "a forked process cannot log to the run of its parent; log in the parent, or begin "
                "a run here with start_run(parent=run)."
            )
        if self._status is not None:
            raise CallOrderError(f"the run has ended ({self._status}); nothing can be added to it.")
        return self.is_kept

    def _append(self, record: Record) -> None:
        self._check_open()
        self._journal.append(self._key, record)

    def _without_secrets(self, pairs: Mapping[str, str], what: str) -> dict[str, str]:
        """Mask secrets as TRACKER_REDACT says, with one warning per name."""
        if self._redacts is False:
            return dict(pairs)
        public = public_values(pairs, by_name=what == "tag" or self._redacts is True)
        for name, value in pairs.items():
            if public[name] != value:
                self._warn_once(f"{what} {name}", _MASKED, what, name, MASK)
            elif what == "param" and is_secret_name(name):
                self._warn_once(f"{what} {name}", _KEPT, name)
        return public

    def _public_name(self, name: str | None) -> str | None:
        """Mask the secrets in a run's name, which may be made of its params."""
        if name is None or self._redacts is False:
            return name
        return public_argument(name) if self._redacts else public_text(name)

    def _warn_once(self, key: str, message: str, *values: object) -> None:
        if self.is_kept and key not in self._warned:
            self._warned.add(key)
            logger.warning(message, *values)

    def _read(self, read: Callable[[], _T], default: _T) -> _T:
        """Return what `read` reads from the journal, or `default` if its file is unreadable."""
        try:
            return read()
        except StoreError as error:
            self._warn_once("", "%s; training continues.", str(error).rstrip("."))
            return default

    @property
    def params(self) -> Mapping[str, str]:
        """The params logged so far, as text."""
        return dict(self._params)

    def log_param(self, key: str, value: Any) -> None:
        """Log one hyperparameter, see `log_params`."""
        self.log_params({key: value})

    def log_params(self, params: Any) -> None:
        """Log hyperparameters, a mapping, dataclass or namespace; values are stored as text.

        Raises:
            ArgumentError: A name or value is not allowed, or a param has another value already.
        """
        self._log_params(checked_params(params, self.name_of))

    def _log_params(self, params: Mapping[str, str]) -> None:
        params = self._without_secrets(params, "param")
        for name, value in params.items():
            if self._resumed_params.pop(name, value) != value:  # changed on resuming
                self._params[name] = value
                self._append(records.Tags({f"tracker.param.{name}": value}))
            elif (logged := self._params.get(name, value)) != value:
                raise ArgumentError(
                    f"param {name!r} is {logged!r} and cannot become {value!r}: "
                    "MLflow never changes a param."
                )
        if new := {name: value for name, value in params.items() if name not in self._params}:
            self._params |= new
            self._append(records.Params(new))

    def log_facts(self, facts: Mapping[str, Any]) -> None:
        """Log params about the training; one that the user has given stays, ours becomes a tag.

        The tag is `tracker.fact.NAME`.
        """
        checked = fitted(facts)
        free = self._resumed_params.keys() | (checked.keys() - self._params.keys())
        self._log_params({name: checked[name] for name in checked if name in free})
        if differ := {k: v for k, v in checked.items() if self._params[k] != v}:
            self.set_tags({f"tracker.fact.{name}": value for name, value in differ.items()})

    def log_metric(
        self, key: str, value: Any, step: int | None = 0, *, timestamp: int | None = None
    ) -> None:
        """Log one number, see `log_metrics`."""
        self.log_metrics({key: value}, step, timestamp=timestamp)

    def log_metrics(
        self, metrics: Mapping[str, Any], step: int | None = 0, *, timestamp: int | None = None
    ) -> None:
        """Log numbers at the time of this call, without waiting for a device.

        NaN and infinity are recorded, with one warning per name.

        Args:
            metrics: Numbers by name, or tensors that hold one number. One on a GPU is copied now,
                and read later; on MPS this waits for it.
            step: Step of all of them, a 64-bit integer; None is 0, as in MLflow.
            timestamp: When they were measured, in milliseconds since 1970; default now.

        Raises:
            ArgumentError: A name, a value, the step or the time is not allowed.
        """
        if not self._check_open():
            return
        at = now() if timestamp is None else checked_step(timestamp, "timestamp")
        step, name_of = 0 if step is None else checked_step(step), self.name_of
        points = []
        if type(metrics) is not dict:
            metrics = checked_mapping(metrics, "metrics")
        for name, value in metrics.items():
            number = value if type(value) is float else _number(name, value)
            points.append(Point(name_of(name, "metric"), number, step, at))
        self.append_points(points)

    def log_points(self, points: Sequence[Point]) -> None:
        """Log points with steps and times of their own.

        Raises:
            ArgumentError: A name, a value, a step or a time is not allowed; none is logged.
        """
        if not self._check_open():
            return
        self.append_points(
            [
                Point(
                    self.name_of(name, "metric"),
                    _number(name, value),
                    checked_step(step),
                    checked_step(time, "time"),
                )
                for name, value, step, time in points
            ]
        )

    def append_points(self, points: Sequence[Point]) -> None:
        """Log points that are checked already."""
        self._check_open()
        if last := self._last_steps:  # a resumed run does not log a step again
            points = [point for point in points if point.step > last.get(point.name, -math.inf)]
        self._journal.append_points(self._key, points)

    def set_tag(self, key: str, value: Any) -> None:
        """Set one tag, see `set_tags`."""
        self.set_tags({key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, which replace those of the same name.

        Raises:
            ArgumentError: A name or value is not allowed.
        """
        self._append(records.Tags(self._without_secrets(checked_tags(tags, self.name_of), "tag")))

    log_tags = set_tags  # the former name

    def log_artifact(self, local_path: str | Path, artifact_path: str | None = None) -> None:
        """Copy a file, or a folder with its content, to be logged as an artifact.

        Args:
            local_path: The file or folder.
            artifact_path: Folder of the run's artifacts; default their root.

        Raises:
            ArgumentError: `local_path` does not exist or cannot be read, or `artifact_path` is not
                allowed.
        """
        self._log_copy(local_path, "local_path", artifact_path)

    def log_artifacts(self, local_dir: str | Path, artifact_path: str | None = None) -> None:
        """Copy the content of a folder, to be logged as artifacts.

        Args:
            local_dir: The folder.
            artifact_path: Folder of the run's artifacts; default their root.

        Raises:
            ArgumentError: `local_dir` is not a folder or cannot be read, or `artifact_path` is not
                allowed.
        """
        self._log_copy(local_dir, "local_dir", artifact_path)

    def _log_copy(self, path: str | Path, argument: str, folder: str | None) -> None:
        if not self._check_open():  # the file may be on the machine of rank 0
            return
        source = Path(os.path.abspath(checked_local_path(path, argument)))
        if not source.exists():
            raise ArgumentError(f"{argument}={str(path)!r} does not exist.")
        is_dir = source.is_dir()
        if argument == "local_dir" and not is_dir:
            raise ArgumentError(
                f"local_dir={str(path)!r} is not a folder; log a file with log_artifact()."
            )
        target = checked_path(folder, "artifact_path") if folder else ""
        if is_dir and argument == "local_path":  # of a staged folder, the content is logged
            target = posixpath.join(target, source.name)

        def copy(staged: Path) -> None:
            if is_dir:
                shutil.copytree(source, staged, ignore=self._journals_in)
            else:
                shutil.copyfile(source, staged)

        try:
            self._log_file(posixpath.join(target, source.name), copy)
        except OSError as error:
            raise ArgumentError(f"{argument}={str(path)!r} cannot be read: {error}.") from error

    def _journals_in(self, folder: str, names: Sequence[str]) -> list[str]:
        """The folder of the journals, if it is in `folder`: a copy of it would have no end."""
        journals = self._journal.folder.parent
        is_here = os.path.realpath(folder) == os.path.realpath(journals.parent)
        return [journals.name] if is_here else []

    def log_text(self, text: str, artifact_file: str, *, step: int | None = None) -> None:
        """Log text as an artifact.

        Args:
            text: The text.
            artifact_file: Path in the run's artifacts, such as `folder/file.txt`.
            step: Step of the text; at step 3 the file is `folder/file/000003.txt`.

        Raises:
            ArgumentError: `text` is not text, or the path or the step is not allowed.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text is a {type(text).__name__}; it must be text.")
        content = text.encode("utf-8", errors="surrogatepass")
        path = path_at_step(artifact_file, step)
        self._log_file(path, lambda staged: staged.write_bytes(content))

    def _log_file(
        self, path: str, write: Callable[[Path], object], *, passing: bool = False
    ) -> Path | None:
        """Log what `write` writes as the artifact `path`; return None if it is not kept."""
        folder, name = posixpath.split(path)
        staged = self._stage(name, write)
        if staged is not None:
            self._append(records.File(self._relative(staged), folder or None, passing))
        return staged

    def _stage(self, name: str, write: Callable[[Path], object]) -> Path | None:
        """Write a file or folder into the journal; return None, after a warning, if it failed."""
        if not self._check_open():
            return None
        staged: Path | None = None
        try:
            staged = self._journal.stage(name)
            write(staged)
        except Exception as error:
            if staged is not None:
                shutil.rmtree(staged.parent, ignore_errors=True)
            if not isinstance(error, OSError) or (staged is not None and not _is_disk_error(error)):
                raise
            self._journal.lose(name, error)
            return None
        return staged

    def _relative(self, staged: Path) -> str:
        return staged.relative_to(self._journal.folder).as_posix()

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to the table `epochs.csv` and `epochs.json`.

        Args:
            row: Numbers by the names of their columns, with the integer `epoch`.

        Raises:
            ArgumentError: A value is not a number, or the epoch not an integer.
        """
        for name, value in checked_mapping(row, "row").items():
            checked_number(name, value)
        self._append(records.Epoch({**row, "epoch": checked_step(row.get("epoch"), "epoch")}))


def _number(name: str, value: Any) -> float | Arriving:
    """Convert a metric to a float, or let a device copy it that it would have to wait for."""
    if isinstance(value, Tensor) and (local := local_copy(value.detach())) is not None:
        value = local
        if not (value.is_cpu or value.is_meta or value.is_complex()) and value.numel() == 1:
            return read_later(value)
    return checked_number(name, value)


def _is_disk_error(error: OSError) -> bool:
    # shutil.copytree collects errors as text.
    text = str(error) if isinstance(error, shutil.Error) else ""
    return error.errno in _DISK_ERRORS or any(f"[Errno {code}]" in text for code in _DISK_ERRORS)
