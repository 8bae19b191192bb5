"""Run: one tracked run, from its beginning to its final status."""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy.typing as npt
import torch
from torch import Tensor, nn

from tracker.capture.dataset import dataset_name, describe_dataset
from tracker.capture.histograms import HistogramState, network_histograms
from tracker.capture.images import mlflow_image_files, to_pil
from tracker.capture.provenance import environment_tags
from tracker.cells import when_cell_fails
from tracker.delivery.background import DEADLINE_SECONDS
from tracker.delivery.base import Delivery, mode_of, open_delivery
from tracker.errors import ArgumentError, StoreError
from tracker.journal import records
from tracker.journal.recorder import Recorder
from tracker.journal.records import now
from tracker.redaction import public_uri
from tracker.statuses import Outcome, Status, abandoned, outcome, uncaught_error
from tracker.store.history import CHECKPOINTS, ResumeState
from tracker.training.checkpoint import save_checkpoint
from tracker.training.device import unwrap
from tracker.training.distributed import is_main
from tracker.validation import (
    DIRECTORY,
    MAX_EXPERIMENT_NAME,
    MAX_RUN_NAME,
    RUN_TAG,
    checked_local_path,
    checked_model_name,
    checked_params,
    checked_path,
    checked_step,
    checked_tags,
    checked_text,
    fitted,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from tracker.capture.model import Predictor

ImageLike: TypeAlias = Union[Tensor, npt.NDArray[Any], "Image"]
logger = logging.getLogger(__name__)


def start_run(
    *,
    params: Any = None,
    experiment: str | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    parent: Run | str | None = None,
    tracking_uri: str | None = None,
    directory: str | Path = DIRECTORY,
    rename: bool = False,
    inline: bool | None = None,
    offline: bool | None = None,
    exit_timeout: float | None = None,
) -> Run:
    """Start one run, to be used in a `with` block, which sets its final status.

    Under torchrun only rank 0 writes it; the run of another rank takes every call and drops it.

    Args:
        params: Hyperparameters to log: a mapping, named tuple, dataclass or namespace.
        experiment: Name of the experiment; default as in MLflow.
        name: Name of the run; default one that MLflow chooses.
        tags: Tags to set.
        parent: Parent of the run, or its id.
        tracking_uri: Where the run is delivered; default as in MLflow.
        directory: Holds the journal while the run lasts.
        rename: Rename metrics, params and tags that MLflow refuses: `AR@100` to `AR_at_100`.
        inline: Deliver from this thread, not from a second process; default TRACKER_INLINE.
        offline: Keep the run on disk until `tracker sync`; default TRACKER_OFFLINE.
        exit_timeout: Seconds to wait for the delivery when the run and the program end; default
            TRACKER_EXIT_TIMEOUT, then 10.

    Raises:
        ArgumentError: An argument is not allowed; nothing has begun.
        StoreError: The store cannot be used; nothing has begun.
    """
    mode = mode_of(inline=inline, offline=offline)
    folder = checked_local_path(directory, "directory")
    delivery = open_delivery(folder, tracking_uri, mode, exit_timeout, writes=is_main())
    try:
        given = (delivery, params, experiment, name, tags, parent)
        run = Run(*given, owns_delivery=True, rename=rename)
    except BaseException:  # Ctrl-C must not leave a journal open either
        delivery.close()
        raise
    when_cell_fails(run.end)
    return run


class Run(Recorder):
    """One tracked run.

    Everything logged is on disk within a fifth of a second, and delivered from there to MLflow,
    for which only `flush` and `end` wait.
    """

    def __init__(
        self,
        delivery: Delivery,
        params: Any = None,
        experiment: str | None = None,
        name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent: Run | str | None = None,
        *,
        resume: ResumeState | None = None,
        owns_delivery: bool = False,
        rename: bool = False,
        key: str | None = None,
        parent_key: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Begin a run; `start_run` and `RunManager` call this.

        Args:
            delivery: Delivers the run to MLflow.
            params: Hyperparameters to log: a mapping, named tuple, dataclass or namespace.
            experiment: Name of the experiment.
            name: Name of the run.
            tags: Tags to set.
            parent: Parent of the run, or its id.
            resume: State of an earlier run that this one continues.
            owns_delivery: Close `delivery` when the run ends.
            key: Key that the caller owns. A run that MLflow has under it is continued.
            parent_key: Key of a parent that another process tracks.
            environment: Result of `environment_tags`, if the caller has it.

        Raises:
            ArgumentError: A param or tag is not allowed, or the parent is in another store.
            StoreError: The store cannot be used.
        """
        super().__init__(
            delivery.journal,
            key or uuid.uuid4().hex,
            resume.params if resume else {},
            resume.last_steps if resume else {},
            rename,
        )
        self._delivery, self._owns_delivery = delivery, owns_delivery
        self._checkpoints: dict[int, Path] = {}  # staged by this process
        self._histogram_state = HistogramState()
        self._delivered_id: str | None = None  # set when the run has ended
        self._error_before = uncaught_error()
        self.resume_state: ResumeState | None = resume
        """State of the earlier run that this one continues."""
        checked = checked_params(params or {}, self.name_of)
        if environment is None:
            environment = {"tracker.resumed": "true"} if resume else environment_tags()
        tags = {**fitted(environment), **checked_tags(tags or {}, self.name_of)}
        tags[RUN_TAG] = self._key
        checked_text(name or "-", "name", MAX_RUN_NAME)
        environ = os.environ
        named = experiment or environ.get("MLFLOW_EXPERIMENT_NAME")
        checked_text(named or "-", "experiment", MAX_EXPERIMENT_NAME)
        self._append(
            records.Begin(
                experiment=named or "Default",
                experiment_id=None if experiment else environ.get("MLFLOW_EXPERIMENT_ID") or None,
                name=name,
                tags=self._without_secrets(tags, "tag"),
                parent={"key": parent_key} if parent_key else self._parent(parent),
                adopt=environ.get("MLFLOW_RUN_ID") or None if key is None else None,
                keyed=key is not None,
                resume=resume.run_id if resume else None,
                samples=resume.samples if resume else 0,
                named=bool(named),
            )
        )
        if resume:
            for row in resume.rows:
                self.log_epoch(row)
            for old in resume.histograms:
                self._append(records.Histograms(old["step"], old["histograms"], there=True))
        self._log_params(checked)
        delivery.hold(self._key, self.abandon)

    def _parent(self, parent: Run | str | None) -> records.Parent | None:
        if parent is None:
            return None
        if not isinstance(parent, Run):
            return {"run_id": checked_text(parent, "parent", MAX_RUN_NAME)}
        if parent.tracking_uri != self.tracking_uri:
            raise ArgumentError(
                f"parent={parent.run_id!r} is in {public_uri(parent.tracking_uri)!r}; it must be "
                "in the store of its children."
            )
        return {"key": parent._key}

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, to use with MLflow's own functions; None until it is known."""
        if self._status is not None:
            return self._delivered_id
        return self._read(lambda: self._delivery.run_id(self._key), None)

    @property
    def tracking_uri(self) -> str:
        """The tracking URI of the store that the run is delivered to."""
        return self._delivery.tracking_uri

    @property
    def status(self) -> Status | None:
        """The final status; None until the run has ended."""
        return self._status

    def log_image(
        self, image: ImageLike | str, key: str | ImageLike, step: int | None = None
    ) -> None:
        """Log a picture; the order `log_image(key, image)` is accepted too.

        Args:
            image: PIL image, or floats in [0, 1] or bytes: (H, W), (C, H, W) or (H, W, C).
            key: With a step the name in MLflow's UI, else the path of the file.

        Raises:
            ArgumentError: The shape or the key is not allowed.
        """
        if not self._is_kept:
            return
        if isinstance(image, str):
            image, key = key, image
        if not isinstance(key, str):
            raise ArgumentError(f"key is a {type(key).__name__}; it must be text.")
        picture = to_pil(image)
        if step is None:
            checked_path(key, "key")
            try:
                self._log_file(key, picture.save)
            except (OSError, ValueError) as error:
                raise ArgumentError(
                    f"key={key!r} is not allowed; without a step it must be a path that ends in "
                    ".png, .jpg or another format of pictures."
                ) from error
            return
        if not re.fullmatch(r"[a-zA-Z0-9_\-./ ]+", key):
            raise ArgumentError(
                f"key={key!r} is not allowed; allowed are letters, digits, spaces and _ - . /"
            )
        for path, content in mlflow_image_files(key, picture, step, now()):
            self._log_file(path, content.save)
        self.set_tags({"mlflow.loggedImages": True})

    def log_dataset(
        self, dataset: Any, context: str = "training", name: str | None = None, digest: bool = True
    ) -> None:
        """Record a torch data set as an input of the run, without drawing a sample from it.

        Args:
            context: Its use: training, validation or test.
            name: Its name; default from the data set.
            digest: Whether its digest covers its data too, not only class and length.
        """
        if not self._is_kept:
            return
        described = describe_dataset(dataset, content=digest)
        fields = described.fields(str(name or dataset_name(dataset)))
        self._append(records.Dataset(fields, context))

    def log_network(self, network: nn.Module, example: Tensor | None) -> None:
        """Log `network/layers.csv` and `network/graph.svg`; the network does not change.

        Args:
            example: A batch of inputs; without one there are no shapes and no graph.
        """
        from tracker.capture.files import network_files

        for path, text in network_files(network, example).items() if self._is_kept else ():
            self.log_text(text, path)

    def log_mistakes(
        self,
        network: nn.Module,
        loader: Iterable[Any],
        *,
        classes: Sequence[str],
        scores: Callable[[Tensor], Tensor] | None = None,
        shown: Sequence[str] | None = None,
    ) -> None:
        """Log a classifier's confusion matrix and worst mistakes to the folder `mistakes`.

        Args:
            loader: Yields batches (inputs, labels).
            classes: Names of the classes.
            scores: Converts outputs to scores (N, classes), if they are something else.
            shown: A text for each sample, in the order of `loader`.

        Raises:
            ArgumentError: There are more or fewer classes than scores.
        """
        from tracker.capture.files import mistake_files

        if not self._is_kept:
            return
        files = mistake_files(network, loader, classes=classes, scores=scores, shown=shown)
        for path, content in files.items():
            self._log_file(path, partial(Path.write_bytes, data=content))

    def log_histograms(self, network: nn.Module, step: int) -> Mapping[str, Any]:
        """Log the histograms of all weights and gradients, and return their record, if it is kept.

        `tracker.load_histograms` reads them; the artifact `histograms.html` shows them.

        Args:
            network: The network. Frozen weights are logged again only if their norm or sum changes.
            step: Step of the histograms, usually an epoch.
        """
        if not self._is_kept:
            return {}
        record = network_histograms(network, checked_step(step), self._histogram_state)
        self._append(records.Histograms(**record))
        return record

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
        """Log an MLflow model that loads without this project and without CUDA.

        It is loaded and compared with `network` first. If that fails, a warning says why, and only
        the weights are logged, as `NAME.pt`.

        Args:
            network: The trained network.
            example: A batch of inputs.
            name: Name of the model.
            step: Step of the model.
            files: Texts by name that the model's folder `extra_files` holds, such as a vocabulary.
            predictor: Predicts from raw inputs in `pyfunc`; left out, with a warning, if wrong.

        Returns:
            Whether the model is logged, not only its weights.

        Raises:
            ArgumentError: The name is not allowed.
        """
        from tracker.capture.model import save_model

        checked_model_name(name)
        problem: str | None = "there is no example of its inputs"

        def save(folder: Path) -> None:
            nonlocal problem
            if example is not None:
                try:
                    problem = save_model(network, example, folder, files, predictor)
                except OSError as error:  # the disk has no room for temporary files
                    problem = str(error)

        folder = self._stage(name, save)
        if folder is None:
            return False
        if problem is None:
            self._append(records.Model(self._relative(folder), name, step))
            return True
        shutil.rmtree(folder.parent, ignore_errors=True)
        weights = io.BytesIO()
        torch.save(unwrap(network).state_dict(), weights)
        write = partial(Path.write_bytes, data=weights.getbuffer())
        if self._log_file(f"{name}.pt", write) is not None:
            logger.warning("Only the weights are logged, as %s.pt: %s.", name, problem)
        return False

    def log_checkpoint(self, step: int, **states: Any) -> bool:
        """Save a checkpoint as the artifact `checkpoints/STEP`.

        Args:
            step: Number of steps done.
            states: Arguments of `save_checkpoint`.

        Returns:
            Whether the disk had room for it.

        Raises:
            ArgumentError: A state holds more than tensors, numbers and text.
        """
        path = f"{CHECKPOINTS}/{step:08d}"
        write = partial(save_checkpoint, step=step, **states)
        try:  # `passing`: it may be superseded before it is uploaded
            staged = self._log_file(f"{path}/{step:08d}", write, passing=True)
        except StoreError as error:
            self._journal.lose(path, error)
            return False
        if staged is not None:
            self._checkpoints[step] = staged
        return staged is not None

    def delete_checkpoint(self, step: int) -> None:
        """Delete the checkpoint of a step, here and in MLflow."""
        if (staged := self._checkpoints.pop(step, None)) is not None:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self._append(records.Delete(f"{CHECKPOINTS}/{step:08d}"))

    def deliver(self) -> None:
        """With inline delivery, deliver what was logged so far; called after each epoch."""
        self._delivery.deliver()

    def flush(self, timeout: float = DEADLINE_SECONDS) -> bool:
        """Wait until everything logged so far is delivered; return False after `timeout` s."""
        return self._read(lambda: self._delivery.flush(timeout), False)

    def end(
        self,
        ended: Outcome = Outcome("FINISHED"),  # noqa: B008 - immutable
        *,
        wait: bool = True,
    ) -> None:
        """End the run; a second call does nothing.

        Args:
            ended: Final status, and the reason if it is not FINISHED.
            wait: Wait for the delivery, at most DEADLINE_SECONDS.
        """
        if self._status is not None or os.getpid() != self._pid:
            return  # a fork leaves its parent's run alone
        try:
            if ended.reason:
                self.set_tags({"tracker.failure": ended.reason})
        finally:
            self._append(records.End(ended.status))
            self._status = ended.status  # before the wait, which Ctrl-C may cut short
        try:
            self._read(lambda: self._delivery.release(self._key, wait=wait), None)
        finally:
            self._delivered_id = self._read(lambda: self._delivery.run_id(self._key), None)
            if self._owns_delivery:
                self._delivery.close()

    def abandoned_outcome(self, where: str) -> Outcome:
        """Return the outcome of a run abandoned without `end`; `where` says where or when."""
        error = uncaught_error()
        return abandoned(error if error is not self._error_before else None, where)

    def abandon(self) -> None:
        """End the run as abandoned, unless it has ended; called when the program ends."""
        self.end(self.abandoned_outcome("when the program ended"))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.end(outcome(error))
