"""A network as seen in one forward pass: its layers in a table, its graph in a picture."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.overrides import TorchFunctionMode

from tracker.capture.graph_svg import Box, draw
from tracker.errors import ArgumentError
from tracker.training.device import device_of, evaluation_mode, unwrap
from tracker.training.rng import preserve_rng

Shape = tuple[int, ...]

_OPERATOR = re.compile(
    r"__[ri]?(add|sub|mul|div|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)__"
)


@dataclass(frozen=True)
class Call:
    """One call of a leaf module, or of a torch function outside one."""

    name: str
    """Dotted path of the module, `layer1.0.conv1`; empty for functions, inputs and outputs."""
    kind: str
    """Class of the module or name of the function: `Conv2d`, `relu`, `input`, `output`."""
    inputs: tuple[int, ...]
    """Indices of the calls it reads from, all smaller than its own."""
    input_shape: Shape | None
    """Shape of the first tensor that it is given, None where there is none."""
    shape: Shape | None
    """Shape of the first tensor that it returns, None where there is none."""
    parameters: int
    """Number of parameters of the module, at each of its calls; 0 for functions."""
    trainable: int
    """Number of those that require a gradient."""


@dataclass(frozen=True)
class Trace:
    """The calls of one forward pass in their order: inputs first, the output last."""

    calls: tuple[Call, ...]

    @property
    def batch(self) -> int | None:
        """Size of the first input's first dimension."""
        shape = self.calls[0].shape if self.calls else None
        return shape[0] if shape else None


def trace(network: nn.Module, example: Tensor | tuple[Tensor, ...]) -> Trace:
    """The calls that `network` makes on `example`, in evaluation mode and without gradients.

    `example` is a batch, or a tuple with one tensor per argument of forward; it is copied to the
    network's device. A leaf module (one without children, or torch's MultiheadAttention) is one
    call whatever happens inside it; outside, every torch function that returns a tensor is one.

    The network is left as it was found, also when forward raises: training modes, parameters,
    gradients, buffers, hooks and attributes, as are the random states. Parameters and buffers are
    copied for the pass, which needs as much memory as their gradients will. Beyond its reach are
    the user's own hooks, which are called, and plain attributes that are changed in place.

    Raises ArgumentError, a ValueError, for a network with lazy parameters: giving them a shape here
    would draw their initial values before training does. What forward raises passes through.
    """
    network = unwrap(network)
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    lazy = [name for name, tensor in state.items() if is_lazy(tensor)]
    if lazy:
        raise ArgumentError(
            f"network has parameters without a shape ({', '.join(lazy)}); "
            "run a batch through it before the run begins."
        )
    examples = (example,) if isinstance(example, Tensor) else example
    device = device_of(network)
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(preserve_rng())
        stack.enter_context(_attributes_kept(network))
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_uncompiled())
        # Embedding(max_norm=...) writes to its parameters in forward, batch norm to its buffers.
        copies = {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in state.items()
        }
        arguments = tuple(tensor.detach().to(device, copy=True) for tensor in examples)
        for argument in arguments:
            recorder.record("input", (), argument)
        for name, module in _modules_outside_leaves(network).items():
            if _is_leaf(module):
                stack.enter_context(recorder.collapsed(name, module))
        with recorder:
            output = functional_call(network, copies, arguments)
        recorder.record("output", output, output)
    return Trace(tuple(recorder.calls))


def layer_table(network: nn.Module, trace: Trace | None) -> pd.DataFrame:
    """One row per call of a leaf module, in order, then one per layer that was not called.

    Columns: layer, type, input shape, output shape, parameters, trainable. Shapes are text,
    `Nx6x24x24` with N for the batch, and empty for what was not called: everything if `trace` is
    None. A module with children and parameters of its own has a row before theirs. The last row,
    `total`, counts each parameter once however often its module is called; lazy ones count 0.
    """
    network = unwrap(network)
    modules = _modules_outside_leaves(network)
    leaves = {path for path, module in modules.items() if _is_leaf(module)}
    batch = trace.batch if trace else None

    order: list[tuple[str, Call | None]] = []
    owners = [
        path
        for path, module in modules.items()
        if path not in leaves and next(module.parameters(recurse=False), None) is not None
    ]
    for call in trace.calls if trace else ():
        if call.name in leaves and not _is_terminal(call):
            above = [path for path in owners if call.name.startswith(f"{path}." if path else "")]
            owners = [path for path in owners if path not in above]
            order += [*((path, None) for path in above), (call.name, call)]
    rest = leaves.difference(path for path, _ in order).union(owners)
    order += [(path, None) for path in modules if path in rest]

    rows = [
        (
            path or "(network)",
            _class_name(modules[path]),
            _text(call.input_shape, batch) if call else "",
            _text(call.shape, batch) if call else "",
            *_count(modules[path].parameters(recurse=path in leaves)),
        )
        for path, call in order
    ]
    rows.append(("total", "", "", "", *_count(network.parameters())))
    columns = ["layer", "type", "input shape", "output shape", "parameters", "trainable"]
    return pd.DataFrame(rows, columns=columns)


def graph_svg(trace: Trace, title: str) -> str:
    """The graph of `trace` from inputs down to the output, as a self-contained SVG document.

    Functions whose result reaches neither a layer nor the output are left out.
    """
    useful = {i for i, call in enumerate(trace.calls) if call.name or call.parameters}
    useful |= {i for i, call in enumerate(trace.calls) if _is_terminal(call)}
    for index in reversed(range(len(trace.calls))):
        if index in useful:
            useful.update(trace.calls[index].inputs)
    position = {index: place for place, index in enumerate(sorted(useful))}
    boxes = [
        _box(trace.calls[index], tuple(position[i] for i in trace.calls[index].inputs), trace.batch)
        for index in position
    ]
    return draw(boxes, title, "N = batch size" if trace.batch is not None else "")


class _Recorder(TorchFunctionMode):
    """Notes the calls made while it is active, and which call made each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._maker: dict[int, int] = {}
        self._made: list[Tensor] = []  # kept, or another tensor could get the id of one
        self._depth = 0  # of leaf modules
        self._before: dict[int, int] = {}  # versions of what the leaf was given

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._depth > 0:
            return func(*args, **(kwargs or {}))
        before = _versions((args, kwargs))
        result = _distinct(func(*args, **(kwargs or {})), before)
        # `x[i] = y` returns nothing: its result is x.
        made = args[0] if func == Tensor.__setitem__ else result
        if next(_tensors(made), None) is not None:
            self.record(_function_name(func), (args, kwargs), made)
        return result

    @contextmanager
    def collapsed(self, name: str, module: nn.Module) -> Iterator[None]:
        """Note each call of `module` as one call, and none of those made inside it."""
        kind = _class_name(module)
        counts = _count(module.parameters())

        def enter(module: nn.Module, args: object, kwargs: object) -> None:
            self._depth += 1
            if self._depth == 1:
                self._before = _versions((args, kwargs))

        def leave(module: nn.Module, args: object, kwargs: object, result: object) -> object:
            if self._depth == 1:
                result = _distinct(result, self._before)
                self.record(kind, (args, kwargs), result, name, counts)
            self._depth -= 1
            return result

        # Around the user's own hooks; also after an exception, which the network may catch.
        before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        after = module.register_forward_hook(leave, with_kwargs=True, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def record(
        self,
        kind: str,
        read: object,
        made: object,
        name: str = "",
        counts: tuple[int, int] = (0, 0),
    ) -> None:
        """Append the call that made the tensors in `made` from those in `read`."""
        given, returned = tuple(_tensors(read)), tuple(_tensors(made))
        makers = dict.fromkeys(self._maker[id(t)] for t in given if id(t) in self._maker)
        self._maker.update((id(tensor), len(self.calls)) for tensor in returned)
        self._made.extend(returned)
        self.calls.append(
            Call(name, kind, tuple(makers), _first_shape(given), _first_shape(returned), *counts)
        )


@contextmanager
def _attributes_kept(network: nn.Module) -> Iterator[None]:
    """Give each module its attributes back, and each of its dicts its entries.

    A recurrent state kept from the example, for one, would have the wrong batch size in training.
    """
    mappings = [
        mapping
        for module in network.modules()
        for mapping in (vars(module), *vars(module).values())
        if isinstance(mapping, dict)
    ]
    before = [(mapping, dict(mapping)) for mapping in mappings]
    try:
        yield
    finally:
        for mapping, entries in before:
            mapping.clear()
            mapping.update(entries)


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled parts as plain Python: compiling them for the example would take minutes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def _modules_outside_leaves(network: nn.Module) -> dict[str, nn.Module]:
    """Modules by path, less those inside a leaf: parametrisations, MultiheadAttention's output."""
    leaves = [module for module in network.modules() if _is_leaf(module)]
    inside = {id(part) for leaf in leaves for part in leaf.modules() if part is not leaf}
    return {path: module for path, module in network.named_modules() if id(module) not in inside}


def _is_leaf(module: nn.Module) -> bool:
    """Whether calls of `module` are shown as one thing."""
    if isinstance(module, nn.MultiheadAttention):  # uses its child's weights without calling it
        return True
    return all(name == "parametrizations" for name, _ in module.named_children())


def _is_terminal(call: Call) -> bool:
    return not call.name and call.kind in ("input", "output")


def _class_name(module: nn.Module) -> str:
    return type_before_parametrizations(module).__name__


def _count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Number of elements, and of those that require a gradient."""
    sizes = [(p.numel(), p.requires_grad) for p in parameters if not is_lazy(p)]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def _function_name(function: Any) -> str:
    """`relu` for relu_, `sub` for __rsub__, `T` for the attribute T."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        name = function.__self__.__name__
    operator = _OPERATOR.fullmatch(name)
    return operator[1] if operator else name.strip("_")


def _versions(value: object) -> dict[int, int]:
    """By id, how often each tensor in `value` has been written to."""
    return {id(t): t._version for t in _tensors(value) if not t.is_inference()}


def _distinct(result: Any, before: dict[int, int]) -> Any:
    """`result`, under a new identity if it is a tensor that was given and not written to.

    The input of an nn.Identity, or of a dropout, must not look like its output to other readers.
    """
    if not isinstance(result, Tensor) or id(result) not in before or result.requires_grad:
        return result
    return result.detach() if result._version == before[id(result)] else result


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in `value`, a nest of tuples, lists, sets, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[object] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        items = value
    elif is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, field.name) for field in fields(value))
    for item in items:
        yield from _tensors(item)


def _first_shape(tensors: tuple[Tensor, ...]) -> Shape | None:
    # A nested tensor has no one shape.
    return tuple(tensors[0].shape) if tensors and not tensors[0].is_nested else None


def _text(shape: Shape | None, batch: int | None) -> str:
    """`Nx6x24x24`, with multiplication signs, for (2, 6, 24, 24) in a batch of 2."""
    if shape is None:
        return ""
    sizes = [str(size) for size in shape]
    if sizes and shape[0] == batch:
        sizes[0] = "N"
    return "\N{MULTIPLICATION SIGN}".join(sizes) or "scalar"


def _box(call: Call, inputs: tuple[int, ...], batch: int | None) -> Box:
    details = [call.kind] if call.name else []
    if call.parameters:
        details.append(f"{call.parameters:,} param{'s' if call.parameters > 1 else ''}")
        if not call.trainable:
            details.append("frozen")
    return Box(
        heading=call.name or call.kind,
        shape=_text(call.shape, batch),
        detail=" · ".join(details),
        role="terminal" if _is_terminal(call) else "layer" if call.parameters else "function",
        inputs=inputs,
    )
