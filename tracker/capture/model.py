"""Saves models that load without this project and without CUDA.

A model is saved as a graph (torch.export, pt2) with weights on the CPU; no classes are pickled.
`mlflow.pytorch.load_model` reads it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tracker.errors import first_line
from tracker.logs import muted
from tracker.training.device import device_of, evaluation_mode, unwrap
from tracker.training.rng import preserve_rng

EXPORTED = "data/model.pt2"
"""The exported graph, below the model's folder; the path is mlflow.pytorch's."""
FILES = "extra_files"
"""The folder of a model's extra files; the name is mlflow.pytorch's."""
EXAMPLE_SIZE = 2  # torch.export treats a batch of one as a constant
_CHECKED_SIZES = (EXAMPLE_SIZE, EXAMPLE_SIZE + 1)
_EXPORTING = threading.Lock()  # torch.export works in one thread at a time

_LOADER = f'''

def _load_pyfunc(folder: str) -> object:
    """Called by mlflow.pyfunc.load_model with the model's folder."""
    import mlflow.pytorch
    from pathlib import Path

    files = {{path.name: path.read_text("utf-8") for path in Path(folder, {FILES!r}).glob("*")}}
    return load(mlflow.pytorch.load_model(folder), files)
'''

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictor:
    """The `pyfunc` of a logged model: predicts from raw inputs, such as texts."""

    file: Path
    """A Python file that is saved with the model and imports nothing from this project. It defines
    `load(network, files)`: given the saved network, which takes tensors, and the model's extra
    files by name, it returns an object with a method `predict(inputs)`. That takes a list of texts,
    or a table with one column of texts, and returns a table."""
    inputs: Sequence[str]
    """Examples to verify the saved predictor with."""
    expected: pd.DataFrame
    """The predictions for `inputs`; numbers may differ by rounding."""


def save_model(
    network: nn.Module,
    example: Tensor,
    folder: Path,
    files: Mapping[str, str] | None = None,
    predictor: Predictor | None = None,
) -> str | None:
    """Save a copy of `network` as an MLflow model, in evaluation mode on the CPU.

    The saved model is loaded and compared with the network on two batch sizes. The live network's
    weights and modes and all random generators stay unchanged.

    Args:
        network: Takes one tensor, and returns tensors.
        example: A batch of inputs, (N, …); the first samples are used.
        folder: Must not exist yet.
        files: Texts by name, saved in the model's folder `extra_files`.
        predictor: Becomes the model's `pyfunc` if its predictions are correct after loading;
            otherwise a warning says why, and the network is the `pyfunc`.

    Returns:
        None, or why the model was not saved, as part of a sentence; `folder` is then incomplete.
    """
    with _preserve_logging():
        import mlflow.pytorch  # takes a second, and is needed only when a run ends
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

    network = unwrap(network)
    if not isinstance(example, Tensor) or not example.dim():
        return "its example is not a batch in one tensor"
    if len(example) == 0:
        return "the example batch is empty"
    with _EXPORTING, preserve_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        try:
            inputs = _batch(example, EXAMPLE_SIZE)
            model = _cpu_copy(network).eval()
            with torch.no_grad():
                output = model(inputs)
        except Exception as error:  # noqa: BLE001 - the user's own forward may raise anything
            return f"a copy of the network fails on a batch of {EXAMPLE_SIZE}: {first_line(error)}"
        outputs = _leaves(output)
        if not outputs or not all(isinstance(part, Tensor) for part in outputs):
            return f"the network returns {type(output).__name__}, which holds more than tensors"

        if torch.bfloat16 in (inputs.dtype, *(part.dtype for part in outputs)):
            return "the network takes or returns bfloat16, which MLflow's signatures do not support"

        def spec(tensor: Tensor) -> TensorSpec:
            return TensorSpec(tensor.numpy().dtype, (-1, *tensor.shape[1:]) if tensor.dim() else ())

        try:
            mlflow.pytorch.save_model(
                model,
                str(folder),
                input_example=inputs.numpy(),
                # MLflow describes one tensor, not several.
                signature=ModelSignature(
                    Schema([spec(inputs)]),
                    Schema([spec(output)]) if isinstance(output, Tensor) else None,
                ),
                serialization_format="pt2",
                pip_requirements=_requirements(),
            )
            saved = mlflow.pytorch.load_model(str(folder))
        except Exception as error:  # noqa: BLE001 - torch.export may raise anything
            return f"torch.export fails: {first_line(error)}"
        for name, content in (files or {}).items():
            (folder / FILES).mkdir(exist_ok=True)
            (folder / FILES / name).write_text(content, encoding="utf-8")
        problem = _difference(network, saved, example)
        if problem is None and predictor is not None:
            try:
                reason = _add_predictor(folder, predictor, _tolerance(device_of(network)))
            except Exception as error:  # noqa: BLE001 - the predictor's own code may raise anything
                reason = first_line(error)
            if reason is not None:
                logger.warning("The model is logged without its predictor: %s.", reason)
        return problem


def _add_predictor(folder: Path, predictor: Predictor, tolerance: float) -> str | None:
    """Make `predictor` the `pyfunc` of the model in `folder`, or return why it stays unchanged."""
    import mlflow.pyfunc
    from mlflow.models import Model, infer_signature

    inputs = list(predictor.inputs)
    source = predictor.file.read_text("utf-8") + _LOADER
    # Named by its content, so that it clashes with no module of another model or program.
    name = f"predictor_{hashlib.blake2b(source.encode(), digest_size=16).hexdigest()}"
    # On the same file system as the model, so that it can be renamed.
    with TemporaryDirectory(dir=folder.parent) as temporary:
        code, combined = Path(temporary, f"{name}.py"), Path(temporary, "model")
        code.write_text(source, encoding="utf-8")
        described = Model.load(str(folder))
        with muted("mlflow.pyfunc", logging.WARNING):
            mlflow.pyfunc.save_model(
                str(combined),
                loader_module=name,
                code_paths=[str(code)],
                mlflow_model=described,
                signature=infer_signature(inputs, predictor.expected),
                input_example=inputs[:EXAMPLE_SIZE],
                pip_requirements=_requirements(),
            )
        for part in (Path(EXPORTED).parent.name, FILES):
            if (folder / part).exists():
                shutil.copytree(folder / part, combined / part)
        files = [path for path in combined.rglob("*") if path.is_file()]
        described.model_size_bytes = sum(path.stat().st_size for path in files)
        described.save(str(combined / "MLmodel"))
        with _preserve_imports(), _preserve_logging():
            loaded = mlflow.pyfunc.load_model(str(combined), suppress_warnings=True)
            predictions = loaded.predict(inputs)
        try:
            pd.testing.assert_frame_equal(
                predictions, predictor.expected, rtol=tolerance, atol=tolerance
            )
        except AssertionError as error:
            return f"its predictions differ from the expected ones: {' '.join(str(error).split())}"
        folder.rename(Path(temporary, "network"))
        combined.rename(folder)
    return None


@contextmanager
def _preserve_imports() -> Iterator[None]:
    """Restore `sys.path` and `sys.modules` after mlflow.pyfunc; write no bytecode."""
    path, modules, bytecode = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        for name in set(sys.modules) - modules:
            if name.startswith("predictor_"):
                del sys.modules[name]


@contextmanager
def _preserve_logging() -> Iterator[None]:
    """Keep mlflow.pytorch 3.17 from setting the root logger to ERROR when it is imported.

    That does nothing if there is a handler. Other threads, whose warnings must not be lost, get the
    one that Python uses where there is none.
    """
    stand_in = None if logging.root.handlers else logging.lastResort
    if stand_in is not None:
        logging.root.addHandler(stand_in)
    try:
        yield
    finally:
        if stand_in is not None:
            logging.root.removeHandler(stand_in)


def _difference(network: nn.Module, saved: Any, example: Tensor) -> str | None:
    """Return how the saved model differs from the live network; None if it does not."""
    device = device_of(network)
    for size in _CHECKED_SIZES:
        inputs = _batch(example, size)
        try:
            with evaluation_mode(network), torch.no_grad():
                live = [part.cpu() for part in _leaves(network(inputs.to(device)))]
            problem = _mismatch(live, _leaves(saved(inputs)), _tolerance(device))
        except Exception as error:  # noqa: BLE001 - the user's forward, or a guard of the export
            return f"it fails on a batch of {size}: {first_line(error)}"
        if problem is not None:
            return f"the saved model {problem} on a batch of {size}"
    return None


def _mismatch(live: Sequence[Tensor], saved: Sequence[Tensor], tolerance: float) -> str | None:
    """Return what the saved model does with its outputs that the live network does not."""
    if len(live) != len(saved):
        return f"returns {len(saved)} instead of {len(live)} outputs"
    for one, other in zip(live, saved, strict=True):
        for what, is_now, was in (
            ("shape", tuple(other.shape), tuple(one.shape)),
            ("dtype", other.dtype, one.dtype),
        ):
            if is_now != was:
                return f"returns the {what} {is_now} instead of {was}"
        if not (one.is_floating_point() or one.is_complex()):  # bytes have no differences
            one, other = one.double(), other.double()
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"returns an output that differs by {(one - other).abs().max().item():.2g}"
    return None


def _leaves(output: Any) -> list[Any]:
    """The tensors, and anything else, in nested tuples, lists and mappings."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, (tuple, list)):
        return [output]
    return [leaf for part in output for leaf in _leaves(part)]


def _tolerance(device: torch.device) -> float:
    # Convolutions on CUDA may use TF32, which has ten bits of mantissa.
    return 1e-4 if device.type == "cpu" else 1e-2


def _cpu_copy(network: nn.Module) -> nn.Module:
    """A deep copy on the CPU that uses no memory on the network's device."""
    memo: dict[int, Any] = {}
    for module in network.modules():  # kept activations cannot be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().cpu()
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().cpu().clone(), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().cpu().clone()
    return copy.deepcopy(network, memo)


def _batch(example: Tensor, size: int) -> Tensor:
    """`size` samples on the CPU, repeated from `example` if it has fewer."""
    example = example.detach().cpu()
    repeats = -(-size // len(example))
    return torch.cat([example] * repeats)[:size].clone()


def _requirements() -> list[str]:
    packages = ("torch", "mlflow", "numpy")
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]
