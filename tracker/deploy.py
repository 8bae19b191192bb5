"""Writes a logged model as one file for other programs, checked against the model.

No file needs a Python class, and each takes any batch size.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.export import ExportedProgram

from tracker.errors import TrackerError, first_line
from tracker.exported import load_exported
from tracker.extras import install
from tracker.logs import muted

Model = Callable[[Tensor], Tensor]

TOLERANCE = 1e-5
"""Maximum difference, relative to the largest output if that is above 1."""
CHECKED_SIZES = (1, 2, 3, 7)
"""Sizes of the batches on which a file is compared with the model."""


class DeployError(TrackerError):
    """A model cannot be written in a format, or the written file computes something else."""


class Format(Protocol):
    """A file format, and the runtime that loads it."""

    suffix: str
    summary: str
    """Programs that read it, and its drawbacks."""

    def missing(self) -> str | None:
        """Return what this machine lacks, if anything, and how to install it."""

    def write(self, program: ExportedProgram, path: Path) -> None:
        """Write `program` to the new file `path`; raises whatever torch raises."""

    def load(self, path: Path) -> Model:
        """Return the model in the file, run by the format's own runtime."""


class TorchScript:
    """A script with its weights."""

    suffix = ".pt"
    summary = "libtorch in C++; torch has deprecated it"

    def missing(self) -> str | None:  # noqa: D102
        return None

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        torch.jit.save(torch.jit.script(_scriptable(program)), path)

    def load(self, path: Path) -> Model:  # noqa: D102
        return cast(Model, torch.jit.load(path))


class Pt2:
    """The graph, as torch.export saves it."""

    suffix = ".pt2"
    summary = "torch.export.load in Python"

    def missing(self) -> str | None:  # noqa: D102
        return None

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        torch.export.save(program, path)

    def load(self, path: Path) -> Model:  # noqa: D102
        return load_exported(path).module()


class Onnx:
    """The graph in the Open Neural Network Exchange format."""

    suffix = ".onnx"
    summary = "ONNX Runtime and others, without torch"

    def missing(self) -> str | None:  # noqa: D102
        names = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
        return f"{' and '.join(names)}; {install('onnx')}" if names else None

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        exported = torch.onnx.export(program, dynamo=True, verbose=False)
        assert exported is not None  # only with dynamo=False
        exported.save(path)

    def load(self, path: Path) -> Model:  # noqa: D102
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = (each.name for each in session.get_inputs())
        return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])


class Aoti:
    """The model compiled to machine code by AOTInductor."""

    suffix = ".aoti.pt2"
    summary = "libtorch in C++; machine code for processors like this one"

    def missing(self) -> str | None:  # noqa: D102
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        return None if shutil.which(compiler) else f"the C++ compiler {compiler!r}."

    def write(self, program: ExportedProgram, path: Path) -> None:  # noqa: D102
        # It warns about a CUDA toolkit without a GPU, which a model on the CPU does not need.
        with muted("torch.utils.cpp_extension"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))

    def load(self, path: Path) -> Model:  # noqa: D102
        return cast(Model, torch._inductor.aoti_load_package(str(path)))


FORMATS: Mapping[str, Format] = {
    "torchscript": TorchScript(),
    "pt2": Pt2(),
    "onnx": Onnx(),
    "aoti": Aoti(),
}


def deploy(program: ExportedProgram, path: Path, to: str) -> float:
    """Write `program` to a file, which it replaces only if the new one computes the same.

    Args:
        program: The exported model.
        path: The file to write.
        to: Its format, a key of `FORMATS`.

    Returns:
        The largest difference between an output of the file and of the model.

    Raises:
        DeployError: The format cannot express the model, or the file cannot be written.
    """
    target = FORMATS[to]
    if (missing := target.missing()) is not None:
        raise DeployError(f"format={to!r} needs {missing}")
    if os.path.isdir(path):
        raise DeployError(f"output={str(path)!r} is a folder; it must be a file.")
    batches = _batches(program)
    with _writing(path) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and exporters are talkative
        file = folder / f"model{target.suffix}"
        try:
            target.write(program, file)
            loaded = target.load(file)
        except Exception as error:  # exporters and runtimes raise errors of any kind
            raise DeployError(
                f"The model cannot be written as {to}: {first_line(error)}."
            ) from error
        worst = _compare(program.module(), loaded, batches, to)
        file.replace(path)
    return worst


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Make a temporary folder next to `path`."""
    try:
        with TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise DeployError(f"output={str(path)!r} cannot be written: {error.strerror}.") from error


def _batches(program: ExportedProgram) -> Iterator[Tensor]:
    """Make the batches to check from the model's example.

    Each sample is one of the example with its values rotated: all differ, yet pixels remain pixels
    and tokens remain in the vocabulary.
    """
    inputs: Any = program.example_inputs or ((), {})
    arguments, keywords = inputs
    if keywords or len(arguments) != 1 or not isinstance(arguments[0], Tensor):
        raise DeployError("The model must have one tensor as its input, with an example of it.")
    example = arguments[0]

    def sample(number: int) -> Tensor:
        values = example[number % len(example)]
        return values.flatten().roll(number // len(example)).reshape(values.shape)

    return (torch.stack([sample(i) for i in range(size)]) for size in CHECKED_SIZES)


def _compare(live: Model, loaded: Model, batches: Iterator[Tensor], to: str) -> float:
    """Return the largest difference; raise DeployError if it is too large."""
    worst = 0.0
    for batch in batches:
        size = f"a batch of {len(batch)}"
        try:
            expected = live(batch)
        except Exception as error:  # torch.export may have required a batch of at least 2
            if len(batch) == 1:
                continue
            raise DeployError(f"The model does not accept {size}: {first_line(error)}.") from error
        try:
            output = loaded(batch)
        except Exception as error:  # each runtime has its own errors
            raise DeployError(
                f"The model as {to} does not accept {size}: {first_line(error)}."
            ) from error
        if output.shape != expected.shape or output.dtype != expected.dtype:
            raise DeployError(
                f"The model as {to} returns {output.dtype} {tuple(output.shape)} for {size}; it "
                f"must be {expected.dtype} {tuple(expected.shape)}."
            )
        same = (output == expected) | (output.isnan() & expected.isnan())
        difference = _largest(torch.where(same, 0, output.double() - expected))
        # NaN, which compares as false, must be refused.
        if not difference <= TOLERANCE * max(1.0, _largest(expected.nan_to_num(0, 0, 0))):
            raise DeployError(
                f"The model as {to} differs by {difference:.2g} on {size}; nothing was written."
            )
        worst = max(worst, difference)
    return worst


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0


def _scriptable(program: ExportedProgram) -> torch.fx.GraphModule:
    """Return the program as a module that torch.jit.script can read.

    torch.jit.trace would fix the sizes that a graph reads from its input, such as an LSTM's batch.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    graph = module.graph
    graph.set_codegen(torch.fx.graph.CodeGen())  # tensors in and out, not trees
    end = graph.output_node()
    (outputs,) = end.args
    assert isinstance(outputs, tuple | list)
    end.args = (outputs[0],)
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket  # TorchScript resolves the overload
        device = node.kwargs.get("device")
        if isinstance(device, torch.device):  # TorchScript does not know its repr
            node.kwargs = {**node.kwargs, "device": str(device)}
    return torch.fx.GraphModule(module, graph)
