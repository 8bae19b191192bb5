"""What a run logs of networks and data sets, as records in the journal."""

from __future__ import annotations

import io
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tracker.capture.dataset import dataset_name, describe_dataset
from tracker.capture.every import Every
from tracker.capture.network_histograms import (
    HistogramState,
    network_histograms,
    value_histogram,
)
from tracker.errors import ArgumentError, StoreError
from tracker.journal import records
from tracker.media_recorder import MediaRecorder
from tracker.store.history import CHECKPOINTS
from tracker.training.checkpoint import save_checkpoint
from tracker.training.device import is_sharded, unwrap
from tracker.training.networks import Networks
from tracker.validation import MAX_RUN_NAME, checked_model_name, checked_step, checked_text

if TYPE_CHECKING:
    from tracker.capture.model import Predictor

logger = logging.getLogger(__name__)


class TorchRecorder(MediaRecorder):
    """Adds what training consists of to a recorder. Nothing that is logged is changed."""

    def __init__(self, *arguments: Any) -> None:
        """Create a recorder; the arguments are those of `Recorder`."""
        super().__init__(*arguments)
        self._checkpoints: dict[int, Path] = {}  # staged by this process
        self._histogram_state = HistogramState()
        self._histogram_parts: Counter[tuple[str, int]] = Counter()  # by unit and step

    def log_dataset(
        self, dataset: Any, context: str = "training", name: str | None = None, digest: bool = True
    ) -> None:
        """Record a torch data set as an input of the run, without drawing a sample from it.

        Args:
            context: Its use: training, validation or test.
            name: Its name; default from the data set.
            digest: Whether its digest covers its data too, not only class and length.
        """
        if not self._check_open():
            return
        described = describe_dataset(dataset, content=digest)
        fields = described.fields(str(name or dataset_name(dataset)))
        self._append(records.Dataset(fields, context))

    def log_network(self, network: nn.Module, example: Any = None) -> None:
        """Log `network/layers.csv` and `network/graph.svg`; the network does not change.

        Args:
            example: A batch of inputs, as in `log_model`; without one there are no shapes and no
                graph.
        """
        from tracker.capture.files import network_files

        if not self._check_open():
            return
        if self._cannot_call(network):
            example = None
        if isinstance(network, Networks):
            for name, part in network.parts.items():
                for path, text in network_files(part, (example or {}).get(name)).items():
                    self.log_text(text, path.replace("/", f"/{name}/", 1))
            return
        for path, text in network_files(network, example).items():
            self.log_text(text, path)

    def _cannot_call(self, network: nn.Module) -> bool:
        """Return whether other ranks would have to call the network too; a warning says so once."""
        if not is_sharded(network):
            return False
        self._warn_once(
            "sharded",
            "Each rank has a part of the network, which rank 0 alone cannot call: the run gets the "
            "table of its layers, but no graph, no mistakes, no model and no weights; save them "
            "with torch.distributed.checkpoint.",
        )
        return True

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

        if not self._check_open() or self._cannot_call(network):
            return
        files = mistake_files(network, loader, classes=classes, scores=scores, shown=shown)
        for path, content in files.items():
            self._log_file(path, partial(Path.write_bytes, data=content))

    def log_histograms(
        self,
        network: nn.Module,
        step: int,
        every: Every | None = None,
        *,
        outputs: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Log the histograms of all weights and gradients, and return their record, if it is kept.

        `tracker.load_histograms` reads them; the artifact `histograms.html` shows them.

        Args:
            network: The network. Frozen weights are logged again only if their norm or sum changes.
            step: Step of the histograms: an epoch, unless `every` counts steps.
            every: Which weights and gradients to take; default all.
            outputs: The histograms of activations, which a RunManager counts.
        """
        if not self._check_open():
            return {}
        record = network_histograms(network, checked_step(step), self._histogram_state, every)
        record["histograms"] += outputs
        return self._log_histograms(record, "step" if every and every.steps else "epoch")

    def log_histogram(self, name: str, tensor: Any, step: int = 0) -> None:
        """Log the histogram of any tensor; this waits for its device.

        `tracker.load_histograms` reads it; the artifact `histograms.html` shows it.

        Args:
            name: Its name, such as `latent`.
            tensor: A tensor, an array or numbers in lists.
            step: Its step.

        Raises:
            ArgumentError: `tensor` has another type, or the name or the step is not allowed.
        """
        checked_text(name, "name", MAX_RUN_NAME)
        if not self._check_open():
            return
        if (step := checked_step(step)) < 0:
            raise ArgumentError(f"step={step} is not allowed; it must be at least 0.")
        histogram = value_histogram(name, tensor)
        self._log_histograms({"step": step, "histograms": [histogram]}, "step")

    def _log_histograms(
        self, record: dict[str, Any], unit: Literal["epoch", "step"]
    ) -> Mapping[str, Any]:
        part = self._histogram_parts[unit, record["step"]]
        self._histogram_parts[unit, record["step"]] += 1
        self._append(records.Histograms(**record, unit=unit, part=part))
        return record

    def log_model(
        self,
        network: nn.Module,
        example: Any,
        name: str = "model",
        step: int = 0,
        *,
        files: Mapping[str, str] | None = None,
        predictor: Predictor | None = None,
        pickle: bool = False,
    ) -> bool:
        """Log an MLflow model that loads without this project and without CUDA.

        It is loaded and compared with `network` first. If that fails, a warning says why, and only
        the weights are logged, as `NAME.pt`; nothing is logged of a network sharded over ranks.

        Args:
            network: The trained network.
            example: A batch of inputs: a tensor, a tuple of positional arguments, or a mapping of
                keyword arguments, of tensors in tuples, lists and dicts.
            name: Name of the model.
            step: Step of the model.
            files: Texts by name that the model's folder `extra_files` holds, such as a vocabulary.
            predictor: Predicts from raw inputs in `pyfunc`; left out, with a warning, if wrong.
            pickle: Log the network itself, as MLflow's `serialization_format="pickle"`, instead of
                its graph: it has `train()` and `eval()`, but loading it runs code.

        Returns:
            Whether the model is logged, not only its weights.

        Raises:
            ArgumentError: The name is not allowed.
        """
        from tracker.capture.model import save_model

        checked_model_name(name)
        if not self._check_open() or self._cannot_call(network):
            return False
        if isinstance(network, Networks):  # each becomes its own model
            log, examples = partial(self.log_model, files=files, pickle=pickle), example or {}
            parts = network.parts.items()
            done = [log(part, examples.get(key), f"{name}-{key}", step) for key, part in parts]
            return all(done)
        problem: str | None = "there is no example of its inputs, as begin_run(…, example=…)"

        def save(folder: Path) -> None:
            nonlocal problem
            if example is not None:
                try:
                    problem = save_model(network, example, folder, files, predictor, pickle=pickle)
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
            advice = "tracker.load_trained(run_id, into=network) restores them"
            if not pickle and example is not None:
                advice += (
                    '; log_model(…, pickle=True) or RunManager(model="pickle") logs the network'
                )
            logger.warning("Only the weights are logged, as %s.pt: %s; %s.", name, problem, advice)
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
