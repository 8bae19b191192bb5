"""A network as a graph (torch.export), and whether a saved model computes the same as it does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from tracker.capture.example import Example
from tracker.errors import first_line
from tracker.logs import muted
from tracker.training.device import device_of, evaluation_mode

EXAMPLE_SIZE = 2  # torch.export treats a batch of one as a constant


@dataclass(frozen=True)
class Attempt:
    """One way to export a network: with which example, and on which inputs to check the result."""

    example: Example
    checked: tuple[Example, ...]
    every_dimension: bool
    """Whether torch.export decides which dimensions may vary, not only the batch."""

    @classmethod
    def all_for(cls, example: Example) -> tuple[Attempt, ...]:
        """The ways to try for an example on the CPU, best first."""
        sizes = tuple(example.resized(EXAMPLE_SIZE + more) for more in range(2))
        by_batch = cls(sizes[0], sizes, every_dimension=False)
        if example.is_certain:
            return (by_batch,)
        return cls(example, (example,), every_dimension=True), by_batch

    def described(self, inputs: Example) -> str:
        """Name inputs in a message."""
        return "its example" if self.every_dimension else f"a batch of {inputs.size}"


def call(network: Any, example: Example) -> Any:
    """Call a network or a saved model, without gradients."""
    with torch.no_grad():
        return network(*example.args, **example.kwargs)


def plain(output: Any) -> Any:
    """Return dicts and tuples in place of other mappings, dataclasses and named tuples."""
    if isinstance(output, Mapping):
        return {key: plain(value) for key, value in output.items()}
    if is_dataclass(output) and not isinstance(output, type):
        return {field.name: plain(getattr(output, field.name)) for field in fields(output)}
    if isinstance(output, (tuple, list)):
        return (list if isinstance(output, list) else tuple)(map(plain, output))
    return output


def output_problem(output: Any) -> str | None:
    """Return why a graph cannot return `output`, if it cannot."""
    leaves = pytree.tree_leaves(plain(output))
    allowed = (Tensor, bool, int, float, type(None))
    others = [leaf for leaf in leaves if not isinstance(leaf, allowed)]
    if not others and any(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    what = f", which holds a {type(others[0]).__name__}" if others else " without a tensor"
    return f"the network returns {type(output).__name__}{what}"


def export(model: nn.Module, attempt: Attempt, output: Any) -> ExportedProgram:
    """Export a network; raises whatever torch.export raises.

    Args:
        model: On the CPU, in evaluation mode; its `forward` may be replaced.
        attempt: The example, and the dimensions that may vary.
        output: What the model returns for it.
    """
    if pytree.tree_structure(output) != pytree.tree_structure(plain(output)):
        forward = model.forward
        model.forward = functools.wraps(forward)(
            lambda *args, **kwargs: plain(forward(*args, **kwargs))
        )
    shapes = ShapesCollection()
    for tensor in attempt.example.tensors:
        if attempt.every_dimension:
            shapes[tensor] = dict.fromkeys(range(tensor.dim()), Dim.AUTO)
        elif attempt.example.has_batch(tensor):
            shapes[tensor] = {0: Dim.AUTO}
    arguments = attempt.example
    with _without_printing():
        return torch.export.export(model, arguments.args, arguments.kwargs, dynamic_shapes=shapes)


@contextmanager
def _without_printing() -> Iterator[None]:
    """Keep torch.export from printing the graph of a network that it cannot follow.

    Its function `print` is replaced, not sys.stderr, on which other threads may write.
    """
    from torch.export import _trace  # imports torch's compiler, which takes seconds

    with muted("torch.fx.experimental.symbolic_shapes"):
        vars(_trace)["print"] = lambda *unused, **named: None
        try:
            yield
        finally:
            vars(_trace).pop("print", None)


def shapes_of(program: ExportedProgram) -> tuple[list[Any], list[Any]]:
    """Return the shapes of inputs and outputs, with -1 where they vary; None for constants."""

    def described(names: Sequence[Any], nodes: Mapping[str, Any]) -> list[Any]:
        values = [nodes[name].meta.get("val") if name in nodes else None for name in names]
        return [
            tuple(-1 if _varies(size) else int(size) for size in value.shape)
            if isinstance(value, Tensor)
            else None
            for value in values
        ]

    nodes = {node.name: node for node in program.graph.nodes}
    signature = program.graph_signature
    return described(signature.user_inputs, nodes), described(signature.user_outputs, nodes)


def _varies(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def difference(network: nn.Module, saved: Any, attempt: Attempt) -> str | None:
    """Return how a saved model differs from the live network; None if it does not."""
    device = device_of(network)
    for inputs in attempt.checked:
        name = attempt.described(inputs)
        try:
            with evaluation_mode(network):
                live = pytree.tree_leaves(plain(call(network, inputs.to(device))))
            found = pytree.tree_leaves(plain(call(saved, inputs.to("cpu"))))
            problem = _mismatch(live, found, tolerance(device))
        except Exception as error:  # noqa: BLE001 - the user's forward, or a guard of the export
            return f"it fails on {name}: {first_line(error)}"
        if problem is not None:
            return f"the saved model {problem} on {name}"
    return None


def _mismatch(live: Sequence[Any], saved: Sequence[Any], least: float) -> str | None:
    """Return what the saved model does with its outputs that the live network does not."""
    if len(live) != len(saved):
        return f"returns {len(saved)} instead of {len(live)} outputs"
    for one, other in zip(live, saved, strict=True):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            if type(one) is type(other) and (one == other or one != one):
                continue
            return f"returns {other!r:.50} instead of {one!r:.50}"
        one = one.cpu()
        for what, is_now, was in (
            ("shape", tuple(other.shape), tuple(one.shape)),
            ("dtype", other.dtype, one.dtype),
        ):
            if is_now != was:
                return f"returns the {what} {is_now} instead of {was}"
        within = least
        if not (one.is_floating_point() or one.is_complex()):  # bytes have no differences
            one, other = one.double(), other.double()
        else:  # half precision
            within = max(least, 4 * torch.finfo(one.dtype).eps)
        if not torch.allclose(one, other, rtol=within, atol=within, equal_nan=True):
            return f"returns an output that differs by {(one - other).abs().max().item():.2g}"
    return None


def tolerance(device: torch.device) -> float:
    """Return the difference that rounding may make."""
    # Convolutions on CUDA may use TF32, which has ten bits of mantissa.
    return 1e-4 if device.type == "cpu" else 1e-2


def cpu_copy(network: nn.Module) -> nn.Module:
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
