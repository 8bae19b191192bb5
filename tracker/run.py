"""Run: one tracked run, from its beginning to its final status."""

from __future__ import annotations

import atexit
import logging
import math
import os
import posixpath
import re
import shutil
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from tracker.checks import (
    checked_model_name,
    checked_name,
    checked_number,
    checked_params,
    checked_path,
    checked_step,
    checked_tags,
)
from tracker.environment import environment_tags, unwrap
from tracker.errors import ArgumentError, CallOrderError
from tracker.histograms import network_histograms
from tracker.images import mlflow_image_files, to_pil
from tracker.journal import Kind, now
from tracker.samples import dataset_name, describe_dataset
from tracker.statuses import Outcome, Status, never_ended, outcome
from tracker.uploader import InlineDelivery
from tracker.views.files import json_text

if TYPE_CHECKING:
    from PIL.Image import Image

DIRECTORY = ".tracker"
"""Where journals lie by default, below the current directory."""

logger = logging.getLogger(__name__)


def start_run(
    *,
    params: Mapping[str, Any] | None = None,
    experiment: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    tracking_uri: str | None = None,
    directory: str | Path = DIRECTORY,
) -> Run:
    """Start one run; use it in a `with` block, which gives it its true status.

    `tracking_uri` and `experiment` are by default what MLflow itself would use, `name` is then one
    of MLflow's own, and `directory` holds the journal while the run lasts. Raises ArgumentError or
    StoreError, with nothing half-made, where an argument is not allowed or the store does not open.
    """
    delivery = InlineDelivery(Path(directory), tracking_uri)
    try:
        run = Run(delivery, params, experiment, name, tags, owns_delivery=True)
    except BaseException:  # Ctrl-C too leaves nothing behind
        delivery.close()
        raise
    atexit.register(run.abandon)
    return run


class Run:
    """One tracked run.

    Everything logged goes to the journal and is on disk within a fifth of a second; it is
    delivered to MLflow when `flush` is called and when the run ends.
    """

    def __init__(
        self,
        delivery: InlineDelivery,
        params: Mapping[str, Any] | None = None,
        experiment: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        owns_delivery: bool = False,
    ) -> None:
        """Begin a run that `delivery` takes to MLflow; `start_run` makes one that stands alone."""
        self._delivery = delivery
        self._journal = delivery.journal
        self._owns_delivery = owns_delivery
        self._pid = os.getpid()
        self._key = uuid.uuid4().hex
        self._params: dict[str, str] = {}
        self._warned: set[str] = set()
        self._status: Status | None = None
        self._raised_before = _last_uncaught()
        checked = checked_params(params or {})
        tags = {**environment_tags(), **(tags or {}), "tracker.run": self._key}
        self._append(
            "begin",
            experiment=experiment,
            name=name,
            tags=checked_tags(tags),
            adopt=os.environ.get("MLFLOW_RUN_ID"),
        )
        self._log_params(checked)
        delivery.begin(self._key)

    def _append(self, kind: Kind, **body: Any) -> None:
        if self._status is not None:
            raise CallOrderError(f"the run has ended ({self._status}); nothing can be added to it.")
        self._journal.append(self._key, kind, body)

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, for calls of your own; None while it exists only here."""
        return self._delivered_id if self._status else self._journal.run_id(self._key)

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
        for name, value in checked.items():
            if (had := self._params.get(name, value)) != value:
                raise ArgumentError(
                    f"param {name!r} is {had!r} and cannot become {value!r}: "
                    "MLflow never changes a param."
                )
        if new := {k: v for k, v in checked.items() if k not in self._params}:
            self._params |= new
            self._append("params", params=new)

    def log_metrics(self, metrics: Mapping[str, Any], step: int = 0) -> None:
        """Log numbers, or tensors that hold one, at `step`, under the time of this call.

        A tensor on a GPU is waited for. NaN and infinity are recorded, and warned of once a name.
        Raises ArgumentError for a name that MLflow refuses or a value that is not a number.
        """
        at, step = now(), checked_step(step)
        points = [
            (checked_name(k, "metric"), checked_number(k, v), step, at) for k, v in metrics.items()
        ]
        for name, value, _, _ in points:
            self._warn_nonfinite(name, value, step)
        self._append("metrics", metrics=points)

    def log_series(self, name: str, values: Any, first_step: int, times: list[int]) -> None:
        """Log one metric at consecutive steps, each with its own time in milliseconds."""
        checked_name(name, "metric")
        points = [
            (name, float(value), first_step + offset, at)
            for offset, (value, at) in enumerate(zip(values, times, strict=True))
        ]
        for _, value, step, _ in points:
            self._warn_nonfinite(name, value, step)
        self._append("metrics", metrics=points)

    def _warn_nonfinite(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value) or name in self._warned:
            return
        self._warned.add(name)
        stored = "" if math.isnan(value) else " (MLflow shows infinity as 1.797e+308)"
        logger.warning("%s is %s at step %d%s.", name, value, step, stored)

    def log_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag may be set again.

        Raises ArgumentError for a name that MLflow refuses or a value of over 8,000 characters.
        """
        self._append("tags", tags=checked_tags(tags))

    def log_image(
        self, name: str, image: Tensor | npt.NDArray[Any] | Image, step: int | None = None
    ) -> None:
        """Log a picture: by step under `name`, as MLflow's UI shows it, or as the file `name`.

        `image` is a PIL image, or a tensor or array of floats in [0, 1] or of bytes: (H, W), or
        with 1, 3 or 4 channels (C, H, W) as torch has them, or (H, W, C).
        Raises ArgumentError for any other shape, or a name that MLflow refuses.
        """
        picture = to_pil(image)
        if step is None:
            folder, file = posixpath.split(checked_path(name, "name"))
            staged = self._journal.stage(file)
            try:
                picture.save(staged)
            except (OSError, ValueError) as error:
                raise ArgumentError(
                    f"image name {name!r} is not a file's; without a step it must end in .png, "
                    ".jpg or another format that pictures have."
                ) from error
            self._add_file(staged, folder)
            return
        if not re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", name):
            raise ArgumentError(
                f"image name {name!r} is not allowed; allowed are letters, digits, _ - . / and "
                "spaces."
            )
        for path, content in mlflow_image_files(name, picture, step, now()):
            folder, file = posixpath.split(path)
            staged = self._journal.stage(file)
            content.save(staged)
            self._add_file(staged, folder)
        self.log_tags({"mlflow.loggedImages": True})

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
        staged = self._journal.stage(path.name)
        if path.is_dir():
            shutil.copytree(path, staged)
            folder = posixpath.join(folder or "", path.name)
        else:
            shutil.copyfile(path, staged)
        self._add_file(staged, folder)

    def log_text(self, text: str, name: str) -> None:
        """Log `text` as the artifact `name`, `folder/file.ext`."""
        folder, file = posixpath.split(checked_path(name, "name"))
        staged = self._journal.stage(file)
        staged.write_text(text, encoding="utf-8", errors="surrogatepass")
        self._add_file(staged, folder)

    def _add_file(self, staged: Path, folder: str | None) -> None:
        self._append("file", staged=self._relative(staged), folder=folder or None)

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
        self._append("dataset", dataset=fields, context=context)

    def log_network(self, network: nn.Module, example: Tensor | None) -> None:
        """Log the network: `network/layers.csv` with shapes and counts, `network/graph.svg`.

        `example` is a batch of inputs; without one there are no shapes and there is no graph.
        The network, its buffers and every random generator stay as they are.
        """
        from tracker.network import graph_svg, layer_table, trace

        traced = None
        if example is not None:
            try:
                traced = trace(network, example[:2])
            except Exception as error:  # noqa: BLE001 - the user's forward may raise anything
                logger.warning("The network's graph is missing: %s", error)
        self.log_text(layer_table(network, traced).to_csv(index=False), "network/layers.csv")
        if traced is not None:
            self.log_text(graph_svg(traced, type(unwrap(network)).__name__), "network/graph.svg")

    def log_histograms(self, network: nn.Module, step: int) -> Mapping[str, Any]:
        """Log the histograms of all weights and gradients of `network` at `step`.

        `tracker.load_histograms` reads them back; the artifact `histograms.html` shows them.
        """
        record = network_histograms(network, step)
        self._append("histograms", **record)
        return record

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Add a row to the table `epochs.csv` and `epochs.json`."""
        self._append("epoch", row=dict(row))

    def log_model(
        self, network: nn.Module, example: Tensor | None, name: str = "model", step: int = 0
    ) -> bool:
        """Log `network` as an MLflow model that loads without this project and without CUDA.

        `example` is a batch of inputs. The model is loaded and compared with the live network
        before it is logged. Where that fails, the weights alone are logged as `NAME.pt` with one
        warning that says why. Returns whether it is a model.
        """
        from tracker.export import save_model

        checked_model_name(name)
        folder = self._journal.stage(name)
        problem: str | None = "there is no example of its inputs"
        if example is not None:
            problem = save_model(network, example, folder)
        if problem is None:
            self._append("model", staged=self._relative(folder), name=name, step=step)
            return True
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("Only the weights are logged, as %s.pt: %s.", name, problem)
        staged = self._journal.stage(f"{name}.pt")
        torch.save(unwrap(network).state_dict(), staged)
        self._add_file(staged, None)
        return False

    def flush(self) -> None:
        """Deliver what was logged so far."""
        self._delivery.drain()

    def end(self, ended: Outcome = Outcome("FINISHED")) -> None:  # noqa: B008 - immutable
        """End the run with its final status; a second call does nothing."""
        if self._status is not None:
            return
        if ended.reason:
            self.log_tags({"tracker.failure": ended.reason})
        self._append("end", status=ended.status)
        self._delivery.drain()
        self._delivered_id = self._journal.run_id(self._key)
        self._status = ended.status
        if self._owns_delivery:
            atexit.unregister(self.abandon)
            self._delivery.close()

    def left(self, when: str, where: str | None = None) -> Outcome:
        """What the run comes to if it was left, at `when`, and its end never called."""
        error = _last_uncaught()
        known = error if error is not self._raised_before else None
        return never_ended(known, f"{where}, {when}" if where else when)

    def abandon(self) -> None:
        """Close the run at the program's end, if nothing else has."""
        if os.getpid() == self._pid:  # a fork has nothing to say about its parent's run
            self.end(self.left("when the program ended"))

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(outcome(error))


def _last_uncaught() -> BaseException | None:
    """The last exception that nobody caught: in this notebook's cells, or that ends the program."""
    error = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    return error if isinstance(error, BaseException) else None
