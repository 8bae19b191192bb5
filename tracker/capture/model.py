"""A model that loads anywhere: a graph (torch.export, pt2) with weights on the CPU, no classes.

`mlflow.pytorch.load_model` reads it on a machine without this project and without CUDA.
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from tracker.logs import muted
from tracker.training.device import device_of, evaluation_mode, unwrap
from tracker.training.rng import preserve_rng

EXPORTED = "data/model.pt2"
"""Where mlflow.pytorch saves what torch.export made, below the model's folder."""
FILES = "extra_files"
"""Where mlflow.pytorch puts what travels with a model."""
EXAMPLE_SIZE = 2  # torch.export takes a batch of one for a constant
_EXPORTING = threading.Lock()  # torch.export works in one thread at a time
_CHECKED_SIZES = (EXAMPLE_SIZE, EXAMPLE_SIZE + 1)

_LOADER = f'''

def _load_pyfunc(folder: str) -> object:
    """What mlflow.pyfunc.load_model calls, with the model's folder."""
    import mlflow.pytorch
    from pathlib import Path

    files = {{path.name: path.read_text("utf-8") for path in Path(folder, {FILES!r}).glob("*")}}
    return load(mlflow.pytorch.load_model(folder), files)
'''

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Predictor:
    """What predicts from raw inputs, such as texts: the `pyfunc` of a logged model."""

    file: Path
    """Python that imports nothing of this project, for it travels with the model. It has a function
    `load(network, files)`, of the saved network, which takes tensors, and the texts that travel
    with it; what that returns has a method `predict(inputs)`, which takes a list of texts, or a
    table with a column of them, and returns a table."""
    inputs: Sequence[str]
    expected: pd.DataFrame
    """What it must predict for `inputs`. Numbers may differ by rounding."""


def save_model(
    network: nn.Module,
    example: Tensor,
    folder: Path,
    files: Mapping[str, str] | None = None,
    predictor: Predictor | None = None,
) -> str | None:
    """Save `network` as an MLflow model in `folder`, which must not exist yet.

    `example` is a batch of inputs of which the first samples are used. What is saved is a copy in
    evaluation mode on the CPU; the live network's weights, modes and every random generator stay
    as they are. After saving, the model is loaded and compared with the network on two batch sizes.
    `files`, texts by name, travel with it in its folder `extra_files`. A `predictor` becomes its
    `pyfunc`, if it predicts what it must when it is loaded; if not, a warning says why, and the
    model's `pyfunc` is the network.

    Returns None, or one sentence that says why there is no such model: the network cannot be
    exported, or what was exported computes something else. `folder` is then left incomplete.
    """
    with _logging_as_it_was():
        import mlflow.pytorch  # takes a second, and only a run that ends needs it
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

    network = unwrap(network)
    if len(example) == 0:
        return "the example of its inputs is empty"
    with _EXPORTING, preserve_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        try:
            inputs = _batch(example, EXAMPLE_SIZE)
            model = _cpu_copy(network).eval()
            with torch.no_grad():
                output = model(inputs)
        except Exception as error:  # noqa: BLE001 - the user's own forward may raise anything
            return f"a copy of it does not take a batch of {EXAMPLE_SIZE}: {_line(error)}"
        if not isinstance(output, Tensor):
            return f"it returns {type(output).__name__}, where a model in MLflow returns a tensor"

        if torch.bfloat16 in (inputs.dtype, output.dtype):
            return "it takes or returns bfloat16, which MLflow's signatures do not have"

        def spec(tensor: Tensor) -> TensorSpec:
            return TensorSpec(tensor.numpy().dtype, (-1, *tensor.shape[1:]) if tensor.dim() else ())

        try:
            mlflow.pytorch.save_model(
                model,
                str(folder),
                input_example=inputs.numpy(),
                signature=ModelSignature(Schema([spec(inputs)]), Schema([spec(output)])),
                serialization_format="pt2",
                pip_requirements=_requirements(),
            )
            saved = mlflow.pytorch.load_model(str(folder))
        except Exception as error:  # noqa: BLE001 - torch.export raises anything on what it cannot follow
            return f"torch.export cannot follow the network: {_line(error)}"
        for name, content in (files or {}).items():
            (folder / FILES).mkdir(exist_ok=True)
            (folder / FILES / name).write_text(content, encoding="utf-8")
        problem = _difference(network, saved, example)
        if problem is None and predictor is not None:
            try:
                why = _add_predictor(folder, predictor, _tolerance(device_of(network)))
            except Exception as error:  # noqa: BLE001 - the predictor's own code may raise anything
                why = _line(error)
            if why is not None:
                logger.warning("The model is logged without its predictor: %s.", why)
        return problem


def _add_predictor(folder: Path, predictor: Predictor, tolerance: float) -> str | None:
    """Make `predictor` the `pyfunc` of the model in `folder`; why not, if it is left as it was."""
    import mlflow.pyfunc
    from mlflow.models import Model, infer_signature

    inputs = list(predictor.inputs)
    source = predictor.file.read_text("utf-8") + _LOADER
    # Named by what it holds: no other module, of another model or program, has its name.
    name = f"predictor_{hashlib.blake2b(source.encode(), digest_size=16).hexdigest()}"
    # Beside the model, so that it can be renamed to it.
    with TemporaryDirectory(dir=folder.parent) as temporary:
        code, whole = Path(temporary, f"{name}.py"), Path(temporary, "model")
        code.write_text(source, encoding="utf-8")
        described = Model.load(str(folder))
        with muted("mlflow.pyfunc", logging.WARNING):
            mlflow.pyfunc.save_model(
                str(whole),
                loader_module=name,
                code_paths=[str(code)],
                mlflow_model=described,
                signature=infer_signature(inputs, predictor.expected),
                input_example=inputs[:EXAMPLE_SIZE],
                pip_requirements=_requirements(),
            )
        for part in (Path(EXPORTED).parent.name, FILES):
            if (folder / part).exists():
                shutil.copytree(folder / part, whole / part)
        files = [path for path in whole.rglob("*") if path.is_file()]
        described.model_size_bytes = sum(path.stat().st_size for path in files)
        described.save(str(whole / "MLmodel"))
        with _imports_as_they_were(), _logging_as_it_was():
            loaded = mlflow.pyfunc.load_model(str(whole), suppress_warnings=True)
            found = loaded.predict(inputs)
        try:
            pd.testing.assert_frame_equal(found, predictor.expected, rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            return f"it predicts something else than it must: {' '.join(str(error).split())}"
        folder.rename(Path(temporary, "bare"))
        whole.rename(folder)
    return None


@contextmanager
def _imports_as_they_were() -> Iterator[None]:
    """mlflow.pyfunc puts a model's code on the path for good, and Python its bytecode beside it."""
    path, modules, bytecode = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = path, bytecode
        for name in [name for name in sys.modules if name.startswith("predictor_")]:
            if name not in modules:
                del sys.modules[name]


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """mlflow.pytorch 3.17 sets the root logger to ERROR when it is imported: warnings would go."""
    level, handlers = logging.root.level, list(logging.root.handlers)
    try:
        yield
    finally:
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers


def _difference(network: nn.Module, saved: Any, example: Tensor) -> str | None:
    """Why the saved model is not the live network; None if it computes the same."""
    device = device_of(network)
    for size in _CHECKED_SIZES:
        inputs = _batch(example, size)
        try:
            with evaluation_mode(network), torch.no_grad():
                live = network(inputs.to(device)).cpu()
            loaded = saved(inputs)
        except Exception as error:  # noqa: BLE001 - the user's forward, or a guard of the export
            return f"it does not take a batch of {size}: {_line(error)}"
        tolerance = _tolerance(device)
        if not torch.allclose(live, loaded, rtol=tolerance, atol=tolerance, equal_nan=True):
            worst = (live - loaded).abs().max().item()
            return f"what was saved differs by {worst:.2g} on a batch of {size}"
    return None


def _tolerance(device: torch.device) -> float:
    # Convolutions on CUDA may use TF32, with ten bits of mantissa.
    return 1e-4 if device.type == "cpu" else 1e-2


def _cpu_copy(network: nn.Module) -> nn.Module:
    """A deep copy on the CPU that takes no memory on the network's own device."""
    memo: dict[int, Any] = {}
    for module in network.modules():  # activations that forward kept: they cannot be copied
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().cpu()
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().cpu().clone(), requires_grad=False)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().cpu().clone()
    return copy.deepcopy(network, memo)


def _batch(example: Tensor, size: int) -> Tensor:
    """`size` samples made of the ones in `example`, on the CPU."""
    example = example.detach().cpu()
    repeats = -(-size // len(example))
    return torch.cat([example] * repeats)[:size].clone()


def _requirements() -> list[str]:
    return [_pin("torch"), _pin("mlflow"), _pin("numpy")]


def _pin(package: str) -> str:
    from importlib.metadata import version

    return f"{package}=={version(package).partition('+')[0]}"


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
