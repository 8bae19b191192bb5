"""Saves models that load without this project and without CUDA.

A model is saved as a graph (torch.export, pt2) with weights on the CPU; if torch.export cannot
follow it, as weights and the source of its class. Nothing is pickled, unless the user asks for it.
`mlflow.pytorch.load_model` reads each.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tracker.capture.example import Example, as_example, path_names
from tracker.capture.exporting import (
    EXAMPLE_SIZE,
    Attempt,
    call,
    cpu_copy,
    difference,
    export,
    output_problem,
    plain,
    shapes_of,
    tolerance,
)
from tracker.capture.loaders import FILES as FILES
from tracker.capture.loaders import LOADER, PREDICTOR
from tracker.capture.sources import builder, copy_sources
from tracker.errors import ArgumentError, first_line
from tracker.logs import muted
from tracker.training.device import device_of, unwrap
from tracker.training.rng import preserve_rng

EXPORTED = "data/model.pt2"
"""The exported graph, below the model's folder; the path is mlflow.pytorch's."""
PICKLED = "data/model.pth"
"""The pickled network, if the user wanted one; the path is mlflow.pytorch's."""
_DATA = str(Path(EXPORTED).parent)
_EXPORTING = threading.Lock()  # torch.export works in one thread at a time

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
    example: Any,
    folder: Path,
    files: Mapping[str, str] | None = None,
    predictor: Predictor | None = None,
    *,
    pickle: bool = False,
) -> str | None:
    """Save a copy of `network` as an MLflow model, in evaluation mode on the CPU.

    The saved model is loaded and compared with the network on two batch sizes, or on the example
    alone if its tensors disagree on the batch. The live network's weights and modes and all random
    generators stay unchanged.

    Args:
        network: Returns tensors, in tuples, lists, mappings or dataclasses.
        example: A call of the network: an `Example`, or what `as_example` takes.
        folder: Must not exist yet.
        files: Texts by name, saved in the model's folder `extra_files`.
        predictor: Becomes the model's `pyfunc` if its predictions are correct after loading;
            otherwise a warning says why, and the network is the `pyfunc`.
        pickle: Save the network itself instead of its graph, with the source of the user's modules.
            Loading it runs code; it has `train()` and `eval()`.

    Returns:
        None, or why the model was not saved, as part of a sentence; `folder` is then incomplete.
    """
    network = unwrap(network)
    try:
        inputs = as_example(network, example).to("cpu")
    except ArgumentError as error:
        return str(error).rstrip(".")
    problem: str | None = None
    with _EXPORTING, preserve_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own deprecations
        for attempt in Attempt.all_for(inputs):
            shutil.rmtree(folder, ignore_errors=True)
            save = _save_pickle if pickle else _save_graph
            problem = save(network, attempt, folder)
            if problem is None:
                break
        else:
            for attempt in () if pickle else Attempt.all_for(inputs):
                shutil.rmtree(folder, ignore_errors=True)
                if (other := _save_source(network, attempt, folder, problem)) is None:
                    break
            else:
                return problem if pickle else f"{problem}, and {other}"
        _add_extras(folder, files or {}, predictor, tolerance(device_of(network)))
    return None


def _add_extras(
    folder: Path, files: Mapping[str, str], predictor: Predictor | None, rounding: float
) -> None:
    for name, content in files.items():
        (folder / FILES).mkdir(exist_ok=True)
        (folder / FILES / name).write_text(content, encoding="utf-8")
    if predictor is not None:
        try:
            reason = _add_predictor(folder, predictor, rounding)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - its code may raise anything
            reason = first_line(error)
        if reason is not None:
            logger.warning("The model is logged without its predictor: %s.", reason)


def _save_graph(network: nn.Module, attempt: Attempt, folder: Path) -> str | None:
    """Save the graph of `network`, and return what is wrong with it, if anything."""
    with _preserve_logging():
        import mlflow.pytorch  # takes a second, and is needed only when a run ends

    try:
        model = cpu_copy(network).eval()
        output = call(model, attempt.example.to("cpu"))
    except Exception as error:  # noqa: BLE001 - the user's own forward may raise anything
        inputs = attempt.described(attempt.example)
        return f"a copy of the network fails on {inputs}: {first_line(error)}"
    if (problem := output_problem(output)) is not None:
        return problem
    try:
        program = export(model, attempt, output)
        _write_graph(folder, program, attempt.example, attempt.example.names(network), output)
        saved = mlflow.pytorch.load_model(str(folder))
    except Exception as error:  # noqa: BLE001 - torch.export may raise anything
        return f"torch.export fails: {first_line(error)}"
    return difference(network, saved, attempt)


def _save_pickle(network: nn.Module, attempt: Attempt, folder: Path) -> str | None:
    """Save the network itself in MLflow's format `pickle`, as `_save_graph` does the graph."""
    with _preserve_logging():
        import mlflow.pytorch
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

    example = attempt.example
    try:
        model = cpu_copy(network).eval()
        output = call(model, example.to("cpu"))
        for copied, parameter in zip(model.parameters(), network.parameters(), strict=True):
            copied.requires_grad_(parameter.requires_grad)
        options: dict[str, Any] = {"signature": False}
        if len(example.args) == len(example.leaves) == 1 and isinstance(output, Tensor):
            with suppress(TypeError):  # of a dtype that NumPy lacks
                sides = [
                    Schema([TensorSpec(each.numpy().dtype, (-1, *each.shape[1:]))])
                    for each in (*example.tensors, output)
                ]
                options["signature"] = ModelSignature(sides[0], sides[1])
                options["input_example"] = example.tensors[0].numpy()
        with TemporaryDirectory(dir=folder.parent) as temporary, muted("mlflow"):
            mlflow.pytorch.save_model(
                model,
                str(folder),
                serialization_format="pickle",
                code_paths=copy_sources(network, Path(temporary)) or None,
                pip_requirements=[*_requirements(), f"cloudpickle=={version('cloudpickle')}"],
                **options,
            )
        with _preserve_imports():
            saved = mlflow.pytorch.load_model(str(folder))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's modules may raise anything
        return f"it cannot be pickled: {first_line(error)}"
    return difference(network, saved, attempt)


def _save_source(
    network: nn.Module, attempt: Attempt, folder: Path, reason: str | None
) -> str | None:
    """Save weights and source of `network`, as `_save_graph` does the graph; a warning says so.

    mlflow.pytorch lets a module of the model's own read `model.pth`; that module makes the network.

    Args:
        network: Its class can be imported, or is defined by the program itself.
        attempt: On which inputs to compare.
        folder: Must not exist yet.
        reason: Why there is no graph.
    """
    import mlflow.pytorch
    from mlflow.models import Model

    described = Model()
    flavor = {"model_data": _DATA, "pytorch_version": str(torch.__version__), "code": "code"}
    described.add_flavor("pytorch", **flavor)
    try:
        source, called = builder(network)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            reader = _module(temporary, "network", source)
            code = [str(reader), *copy_sources(network, Path(temporary), source)]
            _write(folder, "mlflow.pytorch", code, mlflow_model=described)
        (folder / _DATA).mkdir()
        (folder / _DATA / "pickle_module_info.txt").write_text(reader.stem)
        torch.save(cpu_copy(network).state_dict(), folder / PICKLED)
        described.flavors["python_function"] |= {"data": _DATA, "config": {"device": "cpu"}}
        _describe(folder, described)
        with _preserve_imports():
            saved = mlflow.pytorch.load_model(str(folder))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's modules may raise anything
        return f"its class cannot be made again: {first_line(error)}"
    if (problem := difference(network, saved, attempt)) is not None:
        return f"{called} is another network: {problem}"
    logger.warning(
        "The model is logged as weights and source, because %s; mlflow.pytorch.load_model makes "
        "%.200s.",
        reason,
        re.sub(r"_module\('([^']*)'\)", r"\1", called),
    )
    return None


def _write_graph(
    folder: Path, program: ExportedProgram, example: Example, names: list[str], output: Any
) -> None:
    """Write a graph as an MLflow model; its `pyfunc` takes and returns arrays, by name if several.

    MLflow knows no bfloat16, so a model that takes or returns it has no signature.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    def specs(names: Sequence[str], leaves: Sequence[Any], shapes: Sequence[Any]) -> list[Any]:
        return [
            TensorSpec(torch.empty(0, dtype=leaf.dtype).numpy().dtype, shape, name or None)
            for name, leaf, shape in zip(names, leaves, shapes, strict=False)  # see `difference`
            if isinstance(leaf, Tensor)
        ]

    shapes = shapes_of(program)
    inputs, outputs = example.leaves, pytree.tree_leaves(plain(output))
    names = [""] if len(example.args) == len(inputs) == 1 else names
    results = [""] if isinstance(output, Tensor) else path_names(plain(output))
    described = Model()
    described.add_flavor("pytorch", model_data=_DATA, pytorch_version=str(torch.__version__))
    options: dict[str, Any] = {"mlflow_model": described}
    try:
        arrays = {
            name: leaf.numpy()
            for name, leaf in zip(names, inputs, strict=True)
            if isinstance(leaf, Tensor)
        }
        options["signature"] = ModelSignature(
            Schema(specs(names, inputs, shapes[0])), Schema(specs(results, outputs, shapes[1]))
        )
        options["input_example"] = arrays.get("", arrays)
    except TypeError:  # of a dtype that NumPy lacks
        options.pop("input_example", None)
    is_simple = "signature" in options and names == results == [""]
    source = PREDICTOR.format(
        inputs=[
            (name, None) if isinstance(leaf, Tensor) else (None, leaf)
            for name, leaf in zip(names, inputs, strict=True)
        ],
        outputs=results,
    )
    with TemporaryDirectory(dir=folder.parent) as temporary:
        loader = None if is_simple else _module(temporary, "predictor", source + LOADER)
        _write(
            folder,
            loader.stem if loader else "mlflow.pytorch",
            [str(loader)] if loader else None,
            **options,
        )
    (folder / _DATA).mkdir()
    torch.export.save(program, folder / EXPORTED)
    pyfunc = described.flavors["python_function"]
    pyfunc |= {"config": {"device": "cpu"}, "data": _DATA} if is_simple else {}
    _describe(folder, described)


def _module(folder: str, prefix: str, source: str) -> Path:
    """Write a module named by its content, so that it clashes with none of another model."""
    digest = hashlib.blake2b(source.encode(), digest_size=16).hexdigest()
    path = Path(folder, f"{prefix}_{digest}.py")
    path.write_text(source, encoding="utf-8")
    return path


def _write(folder: Path, loader: str, code: list[str] | None, **options: Any) -> None:
    """Write the files of an MLflow model, without its data.

    Args:
        folder: Must not exist yet.
        loader: The module that defines `_load_pyfunc`.
        code: The files that are saved with it.
        options: More arguments of `mlflow.pyfunc.save_model`.
    """
    import mlflow.pyfunc

    with muted("mlflow", logging.WARNING):
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=loader,
            code_paths=code,
            pip_requirements=_requirements(),
            **options,
        )


def _describe(folder: Path, model: Any) -> None:
    """Write the `MLmodel` of a folder whose files have changed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    model.model_size_bytes = sum(path.stat().st_size for path in files)
    model.save(str(folder / "MLmodel"))


def _add_predictor(folder: Path, predictor: Predictor, rounding: float) -> str | None:
    """Make `predictor` the `pyfunc` of the model in `folder`, or return why it stays unchanged."""
    import mlflow.pyfunc
    from mlflow.models import Model, infer_signature

    inputs = list(predictor.inputs)
    source = predictor.file.read_text("utf-8") + LOADER
    # On the same file system as the model, so that it can be renamed.
    with TemporaryDirectory(dir=folder.parent) as temporary:
        combined = Path(temporary, "model")
        described = Model.load(str(folder))
        loader = _module(temporary, "predictor", source)
        _write(
            combined,
            loader.stem,
            [str(loader)],
            mlflow_model=described,
            signature=infer_signature(inputs, predictor.expected),
            input_example=inputs[:EXAMPLE_SIZE],
        )
        for part in (_DATA, FILES):
            if (folder / part).exists():
                shutil.copytree(folder / part, combined / part)
        _describe(combined, described)
        with _preserve_imports(), _preserve_logging():
            loaded = mlflow.pyfunc.load_model(str(combined), suppress_warnings=True)
            predictions = loaded.predict(inputs)
        try:
            pd.testing.assert_frame_equal(
                predictions, predictor.expected, rtol=rounding, atol=rounding
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
            if name.startswith(("predictor_", "network_")):
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


def _requirements() -> list[str]:
    packages = ("torch", "mlflow", "numpy")
    return [f"{package}=={version(package).partition('+')[0]}" for package in packages]
