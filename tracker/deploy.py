"""A logged model as one file for other programs, checked against the model before it is there.

No file needs a Python class, and each takes any batch size. `FORMATS` has what can be written.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tracker.errors import TrackerError
from tracker.logs import muted

TOLERANCE = 1e-5
"""The largest difference allowed, as a share of the largest output, or of 1 below that."""
CHECKED_SIZES = (1, 2, 3, 7)
"""The batches on which a file is compared with the model."""


class DeployError(TrackerError):
    """A model cannot be written in a format, or what was written computes something else."""


class Format(Protocol):
    """A kind of file, and the runtime that reads it."""

    suffix: str
    summary: str
    """Who reads it."""

    def lacks(self) -> str | None:
        """What this machine needs for it and does not have; None if it has all."""

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write `program` to the new file `path`. Raises whatever torch does."""

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:
        """What is in the file, run by the format's own runtime."""


class TorchScript:
    """The model as a script with its weights."""

    suffix = ".pt"
    summary = "libtorch in C++; torch has deprecated it"

    def lacks(self) -> str | None:  # noqa: D102
        return None

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        torch.jit.save(torch.jit.script(_scriptable(program)), path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:  # noqa: D102
        loaded: Callable[[Tensor], Tensor] = torch.jit.load(path)
        return loaded


class Pt2:
    """The graph itself."""

    suffix = ".pt2"
    summary = "torch.export.load in Python"

    def lacks(self) -> str | None:  # noqa: D102
        return None

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        torch.export.save(program, path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:  # noqa: D102
        return torch.export.load(path).module()


class Onnx:
    """The graph in the Open Neural Network Exchange format."""

    suffix = ".onnx"
    summary = "ONNX Runtime and others, without torch"

    def lacks(self) -> str | None:  # noqa: D102
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
        if not missing:
            return None
        return f"{' and '.join(missing)}: pip install 'mlflow-runmanager[onnx]'"

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None  # it is None with dynamo=False
        exported.save(path)

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:  # noqa: D102
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = (one.name for one in session.get_inputs())

        def run(batch: Tensor) -> Tensor:
            (output,) = session.run(None, {name: batch.numpy()})
            return torch.from_numpy(output)

        return run


class Aoti:
    """The model compiled to machine code by AOTInductor."""

    suffix = ".aoti.pt2"
    summary = "libtorch in C++; machine code for processors like this one"

    def lacks(self) -> str | None:  # noqa: D102
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler):
            return None
        return f"a C++ compiler, and there is no {compiler!r}"

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        # It warns of a CUDA toolkit without a GPU: nothing to a model on the CPU.
        with muted("torch.utils.cpp_extension"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    def load(self, path: Path) -> Callable[[Tensor], Tensor]:  # noqa: D102
        loaded: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(str(path))
        return loaded


FORMATS: Mapping[str, Format] = {
    "torchscript": TorchScript(),
    "pt2": Pt2(),
    "onnx": Onnx(),
    "aoti": Aoti(),
}


def deploy(program: ExportedProgram, path: Path, to: str) -> float:
    """Write `program` to the file `path` in the format `to`, one of `FORMATS`.

    A file that is there is replaced, in one step and only by one that computes what `program` does.
    Returns the largest difference found. Raises DeployError, in one sentence; nothing is then
    written.
    """
    form = FORMATS[to]
    if (lacking := form.lacks()) is not None:
        raise DeployError(f"format={to!r} needs {lacking}.")
    if os.path.isdir(path):
        raise DeployError(f"output={str(path)!r} is a folder; it must be a file.")
    batches = _batches(program)
    try:
        beside = TemporaryDirectory(prefix=".export-", dir=path.parent)
    except OSError as error:
        raise DeployError(f"output={str(path)!r} cannot be written: {error.strerror}.") from error
    with beside as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's deprecation, and what its exporters tell
        file = Path(folder, f"model{form.suffix}")
        try:
            form.write(program, file)
            loaded = form.load(file)
        except Exception as error:  # what exporters and runtimes raise on what they do not have
            raise DeployError(f"The model cannot be written as {to}: {_line(error)}.") from error
        worst = _compare(program.module(), loaded, batches, to)
        try:
            file.replace(path)
        except OSError as error:
            raise DeployError(
                f"output={str(path)!r} cannot be written: {error.strerror}."
            ) from error
    return worst


def _batches(program: ExportedProgram) -> Iterator[Tensor]:
    """Batches of the sizes to check, of values that the model's own example has.

    A sample is one of the example's with its values moved on: none is like another, pixels stay
    pixels and tokens stay within the vocabulary.
    """
    given: Any = program.example_inputs or ((), {})
    arguments, keywords = given
    if keywords or len(arguments) != 1 or not isinstance(arguments[0], Tensor):
        raise DeployError("The model does not have one tensor as its input, with an example of it.")
    example = arguments[0]

    def sample(number: int) -> Tensor:
        values = example[number % len(example)]
        return values.flatten().roll(number // len(example)).reshape(values.shape)

    return (torch.stack([sample(i) for i in range(size)]) for size in CHECKED_SIZES)


def _compare(
    live: Callable[[Tensor], Tensor],
    loaded: Callable[[Tensor], Tensor],
    batches: Iterator[Tensor],
    to: str,
) -> float:
    """The largest difference. Raises DeployError where it is too large, or a batch is refused."""
    worst = 0.0
    for batch in batches:
        try:
            expected = live(batch)
        except Exception as error:  # torch.export may have taken two for the least, in any words
            if len(batch) == 1:
                continue
            raise DeployError(
                f"The model itself does not take a batch of {len(batch)}: {_line(error)}."
            ) from error
        try:
            got = loaded(batch)
        except Exception as error:  # each runtime has its own
            raise DeployError(
                f"The model as {to} does not take a batch of {len(batch)}: {_line(error)}."
            ) from error
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise DeployError(
                f"The model as {to} returns {got.dtype} {tuple(got.shape)} for a batch of "
                f"{len(batch)}; it must be {expected.dtype} {tuple(expected.shape)}."
            )
        difference = _largest(torch.where(_same(got, expected), 0, got.double() - expected))
        # Written so that NaN, which compares as false, is refused.
        if not difference <= TOLERANCE * max(1.0, _largest(expected.nan_to_num(0, 0, 0))):
            raise DeployError(
                f"The model as {to} differs by {difference:.2g} on a batch of {len(batch)}; "
                "nothing was written."
            )
        worst = max(worst, difference)
    return worst


def _same(one: Tensor, other: Tensor) -> Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _scriptable(program: ExportedProgram) -> torch.fx.GraphModule:
    """The program as a module that torch.jit.script can read.

    Not torch.jit.trace: it makes constants of the sizes that a graph reads from its input, and an
    LSTM's batch would be fixed.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())  # takes and returns tensors, not trees of them
    end = graph.output_node()
    (outputs,) = end.args
    assert isinstance(outputs, tuple | list)
    end.args = (outputs[0],)
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket  # TorchScript finds the overload by the types
        device = node.kwargs.get("device")
        if isinstance(device, torch.device):  # written as `device(type='cpu')`, unknown to it
            node.kwargs = {**node.kwargs, "device": str(device)}
    return torch.fx.GraphModule(module, graph)


def _line(error: Exception) -> str:
    """The first line of what an error says, without its full stop."""
    said = (line.strip() for line in str(error).splitlines())
    return next((line for line in said if line), type(error).__name__)[:200].rstrip(".:")
