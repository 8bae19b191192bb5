"""Run: one tracked run, from its beginning to its final status."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import posixpath
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tracker.capture.dataset import dataset_name, describe_dataset
from tracker.capture.histograms import network_histograms
from tracker.capture.images import mlflow_image_files, to_pil
from tracker.capture.provenance import environment_tags
from tracker.delivery.background import DEADLINE_SECONDS
from tracker.delivery.base import Delivery, delivery, mode_of
from tracker.errors import ArgumentError, CallOrderError, StoreError
from tracker.journal import records
from tracker.journal.records import Point, Record, now
from tracker.redaction import is_secret_name, public_uri, public_values
from tracker.statuses import Outcome, Status, abandoned, outcome
from tracker.store.history import CHECKPOINTS, ResumeState
from tracker.training.checkpoint import save_checkpoint
from tracker.training.device import unwrap
from tracker.validation import (
    DIRECTORY,
    checked_model_name,
    checked_name,
    checked_number,
    checked_params,
    checked_path,
    checked_step,
    checked_tags,
)
from tracker.views.files import json_text

if TYPE_CHECKING:
    from PIL.Image import Image

    from tracker.capture.model import Predictor

_DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

logger = logging.getLogger(__name__)


def start_run(
    *,
    params: Mapping[str, Any] | None = None,
    experiment: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: Run | str | None = None,
    tracking_uri: str | None = None,
    directory: str | Path = DIRECTORY,
    inline: bool | None = None,
    offline: bool | None = None,
) -> Run:
    """Start one run; use it in a `with` block, which gives it its true status.

    `tracking_uri` and `experiment` are by default what MLflow itself would use, `name` is then one
    of MLflow's own, `parent` is the run that this one is a child of, or its id, and `directory`
    holds the journal while the run lasts. A second process delivers the journal; with `inline`
    (or TRACKER_INLINE=1) this thread does when the run ends, with `offline` (TRACKER_OFFLINE=1)
    nobody does before `tracker sync`. Raises ArgumentError or StoreError, with nothing half-made,
    where an argument is not allowed or the store cannot be what was meant.
    """
    way = delivery(Path(directory), tracking_uri, mode_of(inline=inline, offline=offline))
    try:
        return Run(way, params, experiment, name, tags, parent, owns_delivery=True)
    except BaseException:  # Ctrl-C too leaves nothing behind
        way.close()
        raise


class Run:
    """One tracked run.

    Everything logged is on disk within a fifth of a second, and delivered to MLflow from there;
    nothing here waits for it but `flush` and the run's end.
    """

    def __init__(
        self,
        delivery: Delivery,
        params: Mapping[str, Any] | None = None,
        experiment: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: Run | str | None = None,
        *,
        resume: ResumeState | None = None,
        owns_delivery: bool = False,
        key: str | None = None,
        parent_key: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Begin a run that `delivery` takes to MLflow; `start_run` makes one that stands alone.

        `resume` is an earlier run that goes on as this one. Under a `key` of the caller's, another
        process may have created the run: it is looked up first, and is not that of MLFLOW_RUN_ID.
        `environment` are the tags of `environment_tags`, where they are known.
        """
        self._delivery = delivery
        self._journal = delivery.journal
        self._owns_delivery = owns_delivery
        self._pid = os.getpid()
        self._key = key or uuid.uuid4().hex
        self._params: dict[str, str] = dict(resume.params) if resume else {}
        self._resumed = dict(self._params)
        self._last_steps = dict(resume.last_steps) if resume else {}
        self._checkpoints: dict[int, Path] = {}  # where those of this process are staged
        self._frozen: dict[str, tuple[float, ...]] = {}  # norm and sum, of those logged
        self._warned: set[str] = set()
        self._status: Status | None = None
        self.resume_state: ResumeState | None = resume
        """The state of the earlier run that this one continues."""
        self._delivered_id: str | None = None  # once it has ended
        self._raised_before = _last_uncaught()
        checked = checked_params(params or {})
        if environment is None:
            environment = {"tracker.resumed": "true"} if resume else environment_tags()
        tags = checked_tags({**environment, **(tags or {}), "tracker.run": self._key})
        experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        by_id = None if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID")
        if isinstance(parent, Run):
            if parent.tracking_uri != delivery.tracking_uri:
                raise ArgumentError(
                    f"parent={parent.run_id!r} is in {public_uri(parent.tracking_uri)!r}; it must "
                    "be in the store of its children."
                )
            above: records.Parent | None = {"key": parent._key}
        elif parent_key is not None:
            above = {"key": parent_key}
        else:
            above = None if parent is None else {"run_id": parent}
        self._append(
            records.Begin(
                experiment=experiment or "Default",
                experiment_id=by_id,
                name=name,
                tags=self._without_secrets(tags, "tag"),
                parent=above,
                adopt=os.environ.get("MLFLOW_RUN_ID") if key is None else None,
                keyed=key is not None,
                resume=resume.run_id if resume else None,
                samples=resume.samples if resume else 0,
            )
        )
        if resume:
            for row in resume.rows:
                self.log_epoch(row)
            for one in resume.histograms:
                self._append(records.Histograms(one["step"], one["histograms"], there=True))
        self._log_params(checked)
        delivery.hold(self._key, self.abandon)

    def _without_secrets(self, pairs: Mapping[str, str], what: str) -> dict[str, str]:
        """`pairs` as others may see them, with a warning for each value that is left out."""
        for name in pairs:
            if is_secret_name(name) and name not in self._warned:
                self._warned.add(name)
                logger.warning("The value of %s %r is not stored: a secret by name.", what, name)
        return public_values(pairs)

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise CallOrderError("a forked process cannot log to the run of its parent.")
        if self._status is not None:
            raise CallOrderError(f"the run has ended ({self._status}); nothing can be added to it.")

    def _append(self, record: Record) -> None:
        self._check_open()
        self._journal.append(self._key, record)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, for calls of your own; None while it exists only here."""
        if self._status is not None:
            return self._delivered_id
        return self._delivery.run_id(self._key)

    @property
    def tracking_uri(self) -> str:
        """The tracking URI that the run is delivered to."""
        return self._delivery.tracking_uri

    @property
    def status(self) -> Status | None:
        """The final status; None while the run lasts."""
        return self._status

    @property
    def params(self) -> Mapping[str, str]:
        """The params logged so far, as MLflow holds them."""
        return dict(self._params)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters; their values are stored as text.

        Raises ArgumentError for a name that MLflow refuses, a value of over 6,000 characters, or
        another value for a param that was logged before.
        """
        self._log_params(checked_params(params))

    def _log_params(self, checked: Mapping[str, str]) -> None:
        checked = self._without_secrets(checked, "param")
        for name, value in checked.items():
            if self._resumed.pop(name, value) != value:  # a value that was changed to go on with
                self._params[name] = value
                self._append(records.Tags({f"tracker.param.{name}": value}))
            elif (had := self._params.get(name, value)) != value:
                raise ArgumentError(
                    f"param {name!r} is {had!r} and cannot become {value!r}: "
                    "MLflow never changes a param."
                )
        if new := {k: v for k, v in checked.items() if k not in self._params}:
            self._params |= new
            self._append(records.Params(new))

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Log numbers, or tensors that hold one, at `step`, under the time of this call.

        A tensor on a GPU is waited for. NaN and infinity are recorded, and warned of once a name.
        Raises ArgumentError for a name that MLflow refuses or a value that is not a number.
        """
        at, step = now(), checked_step(step)
        self._append_points(
            [
                Point(checked_name(name, "metric"), checked_number(name, value), step, at)
                for name, value in metrics.items()
            ]
        )

    def log_series(
        self,
        name: str,
        values: Sequence[Any] | npt.NDArray[np.float64],
        first_step: int,
        times: Sequence[int] | None = None,
    ) -> None:
        """Log one metric at consecutive steps.

        Args:
            name: Name of the metric.
            values: Numbers, or scalar tensors that do not change: they are read later.
            first_step: Step of the first value.
            times: Time of each value in milliseconds since 1970; default now.
        """
        checked_name(name, "metric")
        if times is None:
            times = [now()] * len(values)
        self._append_points(
            [
                Point(name, value if isinstance(value, Tensor) else float(value), step, at)
                for step, (value, at) in enumerate(zip(values, times, strict=True), first_step)
            ]
        )

    def _append_points(self, points: Sequence[Point]) -> None:
        self._check_open()
        for name, value, step, _ in points:
            if not isinstance(value, Tensor) and not math.isfinite(value):
                self._warn_nonfinite(name, value, step)
        if self._last_steps:  # what the run that is continued has logged already
            points = [p for p in points if p.step > self._last_steps.get(p.name, p.step - 1)]
        self._journal.append_points(self._key, points)

    def _warn_nonfinite(self, name: str, value: float, step: int) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        stored = "" if math.isnan(value) else " (MLflow shows infinity as 1.797e+308)"
        logger.warning("%s is %s at step %d%s.", name, value, step, stored)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag may be set again.

        Raises ArgumentError for a name that MLflow refuses or a value of over 8,000 characters.
        """
        self._append(records.Tags(self._without_secrets(checked_tags(tags), "tag")))

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags: the old name of `set_tags`."""
        self.set_tags(tags)

    def log_image(
        self,
        image: Tensor | npt.NDArray[Any] | Image | str,
        key: str | Tensor | npt.NDArray[Any] | Image,
        step: int | None = None,
    ) -> None:
        """Log a picture: by step under `name`, as MLflow's UI shows it, or as the file `name`.

        `image` is a PIL image, or a tensor or array of floats in [0, 1] or of bytes: (H, W), or
        with 1, 3 or 4 channels (C, H, W) as torch has them, or (H, W, C).
        Raises ArgumentError for any other shape, or a name that MLflow refuses.
        """
        if isinstance(image, str):
            image, key = key, image
        name = str(key)
        picture = to_pil(image)
        if step is None:
            folder, file = posixpath.split(checked_path(name, "name"))
            try:
                self._log_file(file, picture.save, folder)
            except (OSError, ValueError) as error:
                raise ArgumentError(
                    f"image name {name!r} is not a file's; without a step it must end in .png, "
                    ".jpg or another format that pictures have."
                ) from error
            return
        if not re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", name):
            raise ArgumentError(
                f"image name {name!r} is not allowed; allowed are letters, digits, _ - . / and "
                "spaces."
            )
        for path, content in mlflow_image_files(name, picture, step, now()):
            folder, file = posixpath.split(path)
            self._log_file(file, content.save, folder)
        self.set_tags({"mlflow.loggedImages": True})

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Log a file, or a folder with all it holds, into `folder` of the run's artifacts.

        A copy is made: the file may change or go after this call.
        Raises ArgumentError where `path` does not exist or `folder` leaves the run's artifacts.
        """
        given, path = path, Path(path).absolute()
        if not path.exists():
            raise ArgumentError(f"path={str(given)!r} does not exist.")
        if folder is not None:
            checked_path(folder, "folder")
        if path.is_dir():
            inside = posixpath.join(folder or "", path.name)
            self._log_file(path.name, lambda staged: shutil.copytree(path, staged), inside)
        else:
            self._log_file(path.name, lambda staged: shutil.copyfile(path, staged), folder)

    def log_text(self, text: str, name: str) -> None:
        """Log `text` as the artifact `name`, `folder/file.ext`."""
        folder, file = posixpath.split(checked_path(name, "name"))
        content = text.encode("utf-8", errors="surrogatepass")
        self._log_file(file, lambda staged: staged.write_bytes(content), folder)

    def _log_file(
        self,
        name: str,
        write: Callable[[Path], object],
        folder: str | None,
        *,
        passing: bool = False,
    ) -> Path | None:
        """Log what `write` writes to the path it is given; None where the disk took nothing."""
        self._check_open()
        staged: Path | None = None
        try:
            staged = self._journal.stage(name)
            write(staged)
        except OSError as error:
            if staged is not None:
                shutil.rmtree(staged.parent, ignore_errors=True)
            if not _disk_fails(error):
                raise
            self._journal.lose(name, error)
            return None
        self._append(records.File(self._relative(staged), folder or None, passing))
        return staged

    def _relative(self, staged: Path) -> str:
        return staged.relative_to(self._journal.folder).as_posix()

    def log_dataset(self, dataset: Any, context: str = "training", name: str | None = None) -> None:
        """Record a torch data set as an input of the run, with a digest of what it holds."""
        described = describe_dataset(dataset)
        fields = {
            "name": (name or dataset_name(dataset))[:500],  # what MLflow keeps
            "digest": described.digest,
            "source_type": "code",
            "source": json_text({"tags": {"mlflow.source.name": sys.argv[0] or "notebook"}}),
            "profile": json_text(described.profile),
        }
        self._append(records.Dataset(fields, context))

    def log_network(self, network: nn.Module, example: Tensor | None) -> None:
        """Log the network: `network/layers.csv` with shapes and counts, `network/graph.svg`.

        `example` is a batch of inputs; without one there are no shapes and there is no graph.
        The network, its buffers and every random generator stay as they are.
        """
        from tracker.capture.layers import graph_svg, layer_table, trace

        traced = None
        if example is not None:
            try:
                traced = trace(network, example[:2])
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                logger.warning("The network's graph is missing: %s", error)
        self.log_text(layer_table(network, traced).to_csv(index=False), "network/layers.csv")
        if traced is not None:
            self.log_text(graph_svg(traced, type(unwrap(network)).__name__), "network/graph.svg")

    def log_mistakes(
        self,
        network: nn.Module,
        loader: Iterable[Any],
        *,
        classes: Sequence[str],
        scores: Callable[[Tensor], Tensor] | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:
        """Log what a classifier takes for what, over the batches (inputs, labels) of `loader`.

        Writes `mistakes/confusion.csv` and `.png`, and of the worst mistakes `worst.csv` and, of
        pictures, `worst.png`. `classes` are the classes' names; `scores` makes scores (N, classes)
        of outputs that are none; `shown` is a text for each sample, in the order of `loader`.
        Raises ArgumentError where classes and scores differ.
        """
        from tracker.capture.mistakes import confusion_picture, find_mistakes, worst_picture

        found = find_mistakes(network, loader, classes=classes, scores=scores, shown=shown)
        self.log_text(found.confusion.to_csv(), "mistakes/confusion.csv")
        self.log_text(found.worst.to_csv(index=False), "mistakes/worst.csv")
        drawn = {"confusion": confusion_picture(found.confusion), "worst": worst_picture(found)}
        for name, png in drawn.items():
            if png is not None:
                self._log_file(f"{name}.png", partial(Path.write_bytes, data=png), "mistakes")

    def log_histograms(self, network: nn.Module, step: int) -> Mapping[str, Any]:
        """Log the histograms of all weights and gradients of `network` at `step`.

        Weights that need no gradient are logged again only when their norm or sum has changed.
        `tracker.load_histograms` reads them back; the artifact `histograms.html` shows them.
        """
        record = network_histograms(network, step, self._frozen)
        self._append(records.Histograms(**record))
        return record

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to the table `epochs.csv` and `epochs.json`."""
        self._append(records.Epoch(dict(row)))

    def log_model(
        self,
        network: nn.Module,
        example: Tensor | None,
        name: str = "model",
        step: int = 0,
        *,
        files: Mapping[str, str] | None = None,
        predictor: Predictor | None = None,
    ) -> bool:
        """Log `network` as an MLflow model that loads without this project and without CUDA.

        `example` is a batch of inputs. The model is loaded and compared with the live network
        before it is logged. Where that fails, the weights alone are logged as `NAME.pt` with one
        warning that says why. Returns whether it is a model.

        `files`, texts by name, travel with it, in its folder `extra_files`: a vocabulary, say. A
        `predictor` makes predictions of raw inputs, such as texts, with MLflow's `pyfunc`; where it
        does not predict what it must, the model is logged without it, with one warning.
        """
        from tracker.capture.model import save_model

        checked_model_name(name)
        self._check_open()
        try:
            folder = self._journal.stage(name)
        except OSError as error:
            self._journal.lose(name, error)
            return False
        problem: str | None = "there is no example of its inputs"
        if example is not None:
            try:
                problem = save_model(network, example, folder, files, predictor)
            except OSError as error:  # without room for temporary files it cannot even be tried
                problem = str(error)
        if problem is None:
            self._append(records.Model(self._relative(folder), name, step))
            return True
        shutil.rmtree(folder.parent, ignore_errors=True)
        weights = io.BytesIO()
        torch.save(unwrap(network).state_dict(), weights)
        content = weights.getbuffer()
        if self._log_file(f"{name}.pt", lambda path: path.write_bytes(content), None) is not None:
            logger.warning("Only the weights are logged, as %s.pt: %s.", name, problem)
        return False

    def log_checkpoint(self, step: int, **states: Any) -> bool:
        """Save a checkpoint, as `save_checkpoint` takes it, as the artifact `checkpoints/STEP`.

        Returns whether there was room for it.
        """
        folder = f"{CHECKPOINTS}/{step:08d}"

        def write(staged: Path) -> None:
            save_checkpoint(staged, step=step, **states)

        try:
            # Its upload is no loss if it was superseded by then.
            staged = self._log_file(f"{step:08d}", write, folder, passing=True)
        except StoreError as error:
            self._journal.lose(folder, error)
            return False
        if staged is None:
            return False
        self._checkpoints[step] = staged
        return True

    def delete_checkpoint(self, step: int) -> None:
        """Delete the checkpoint of a step, delivered or not."""
        if (staged := self._checkpoints.pop(step, None)) is not None:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self._append(records.Delete(f"{CHECKPOINTS}/{step:08d}"))

    def deliver(self) -> None:
        """An epoch has ended: a moment for delivering in-line. With an uploader, nothing."""
        self._delivery.deliver()

    def flush(self, timeout: float = DEADLINE_SECONDS) -> bool:
        """Wait until what was logged so far is delivered; whether it was within `timeout` s."""
        return self._delivery.flush(timeout)

    def end(
        self,
        ended: Outcome = Outcome("FINISHED"),  # noqa: B008 - immutable
        *,
        wait: bool = True,
    ) -> None:
        """End the run with its final status; a second call does nothing.

        Waits until the run is delivered, at most DEADLINE_SECONDS, unless told not to.
        """
        if self._status is not None or os.getpid() != self._pid:
            return  # a fork has nothing to say about its parent's run
        if ended.reason:
            self.set_tags({"tracker.failure": ended.reason})
        self._append(records.End(ended.status))
        self._status = ended.status  # from here on it has, even if somebody tires of waiting
        try:
            self._delivery.release(self._key, wait=wait)
        finally:
            self._delivered_id = self._delivery.run_id(self._key)
            if self._owns_delivery:
                self._delivery.close()

    def abandoned_outcome(self, where: str) -> Outcome:
        """Return the outcome of a run that is abandoned `where`."""
        error = _last_uncaught()
        known = error if error is not self._raised_before else None
        return abandoned(known, where)

    def abandon(self) -> None:
        """Close the run at the program's end, if nothing else has."""
        self.end(self.abandoned_outcome("when the program ended"))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(outcome(error))


def _disk_fails(error: OSError) -> bool:
    """Whether it is the disk's fault: shutil.copytree tells of that as text."""
    several = str(error) if isinstance(error, shutil.Error) else ""
    return any(error.errno == code or f"[Errno {code}]" in several for code in _DISK_FAILS)


def _last_uncaught() -> BaseException | None:
    """The last exception that nobody caught: in this notebook's cells, or that ends the program."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return error if isinstance(error, BaseException) else None
