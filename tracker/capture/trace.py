"""The calls of layers and functions in one forward pass of a network."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.overrides import TorchFunctionMode

from tracker.capture.example import as_example
from tracker.errors import ArgumentError
from tracker.training.device import device_of, evaluation_mode, unwrap
from tracker.training.rng import preserve_rng

Shape = tuple[int, ...]

_OPERATOR = re.compile(
    r"__[ri]?(add|sub|mul|div|floordiv|mod|pow|matmul|and|or|xor|lshift|rshift)__"
)


@dataclass(frozen=True)
class Call:
    """One call of a leaf module, or of a torch function outside any leaf module."""

    name: str
    """Dotted path of the module, `layer1.0.conv1`; empty for functions, inputs and outputs."""
    kind: str
    """Class of the module or name of the function: `Conv2d`, `relu`, `input`, `output`."""
    inputs: tuple[int, ...]
    """Indices of the calls whose results it reads, all smaller than its own."""
    input_shape: Shape | None
    """Shape of the first tensor argument."""
    shape: Shape | None
    """Shape of the first tensor in the result."""
    parameters: int
    """Number of parameters of the module, at each of its calls; 0 for functions."""
    trainable: int
    """Number of those that require a gradient."""

    @property
    def is_terminal(self) -> bool:
        """Whether this is an input or the output of the network."""
        return not self.name and self.kind in ("input", "output")


@dataclass(frozen=True)
class Trace:
    """The calls of one forward pass in order: inputs first, the output last."""

    calls: tuple[Call, ...]

    @property
    def batch(self) -> int | None:
        """Size of the first input's first dimension."""
        shape = self.calls[0].shape if self.calls else None
        return shape[0] if shape else None


def trace(network: nn.Module, example: Any) -> Trace:
    """Run `network` on `example` in evaluation mode without gradients, and record its calls.

    A leaf module (one without children, or torch's MultiheadAttention) counts as one call.
    Outside leaf modules, every torch function that returns a tensor is a call.

    The network stays unchanged even if forward raises: modes, parameters, gradients, buffers, hooks
    and attributes, as well as all random states. Only objects in attributes other than tensors can
    change, if forward modifies them, and the user's own hooks are called. The pass copies
    parameters, buffers and other tensors.

    Args:
        network: Wrapped or not.
        example: A call of the network, as `as_example` takes it; copied to the network's device.

    Raises:
        ArgumentError: The network has lazy parameters; initialising them here would consume random
            numbers. Or the example is not allowed. Errors of forward are passed through.
    """
    network = unwrap(network)
    state = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    lazy = [name for name, tensor in state.items() if is_lazy(tensor)]
    if lazy:
        raise ArgumentError(
            f"network has parameters without a shape ({', '.join(lazy)}); "
            "run a batch through it before the run begins."
        )
    inputs = as_example(network, example).to(device_of(network))
    recorder = _Recorder()
    with ExitStack() as stack:
        stack.enter_context(preserve_rng())
        stack.enter_context(_preserve_attributes(network))
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_without_compilation())
        # Embedding(max_norm=...) modifies its parameters in forward, batch norm its buffers.
        copies = {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in state.items()
        }
        for leaf in inputs.leaves:
            if next(tensors_in(leaf), None) is not None:
                recorder.record("input", (), leaf)
        for name, module in modules_outside_leaves(network).items():
            if is_leaf(module):
                stack.enter_context(recorder.collapsed(name, module))
        with recorder:
            output = functional_call(network, copies, inputs.args, inputs.kwargs)
        recorder.record("output", output, output)
    return Trace(tuple(recorder.calls))


class _Recorder(TorchFunctionMode):
    """Records the calls made while it is active, and which call produced each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._producer: dict[int, int] = {}  # index of the call, by id of the tensor
        self._produced: list[Tensor] = []  # kept alive, so that no other tensor gets its id
        self._depth = 0  # of nested leaf modules
        self._before: dict[int, int] = {}  # versions of the leaf's arguments

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
        produced = args[0] if func == Tensor.__setitem__ else result
        if next(tensors_in(produced), None) is not None:
            self.record(_function_name(func), (args, kwargs), produced)
        return result

    @contextmanager
    def collapsed(self, name: str, module: nn.Module) -> Iterator[None]:
        """Record each call of `module` as one call, without the calls inside it."""
        kind = class_name(module)
        counts = count_parameters(module.parameters())

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

        # Outside the user's own hooks, and even after an exception, which the network may catch.
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
        arguments: object,
        result: object,
        name: str = "",
        counts: tuple[int, int] = (0, 0),
    ) -> None:
        """Append the call that produced the tensors in `result` from those in `arguments`."""
        read, produced = tuple(tensors_in(arguments)), tuple(tensors_in(result))
        inputs = dict.fromkeys(self._producer[id(t)] for t in read if id(t) in self._producer)
        self._producer.update((id(tensor), len(self.calls)) for tensor in produced)
        self._produced.extend(produced)
        self.calls.append(
            Call(name, kind, tuple(inputs), _first_shape(read), _first_shape(produced), *counts)
        )


@contextmanager
def _preserve_attributes(network: nn.Module) -> Iterator[None]:
    """Restore the attributes of each module, and the entries of its dicts, on exit.

    For example, a recurrent state kept from the example would have the wrong batch size later.
    """
    mappings = [
        mapping
        for module in network.modules()
        for mapping in (vars(module), *vars(module).values())
        if isinstance(mapping, dict)
    ]
    before = [(mapping, dict(mapping)) for mapping in mappings]
    tensors = {id(tensor) for each in (network.parameters(), network.buffers()) for tensor in each}
    for mapping, entries in before:  # forward may modify them, and a backward pass may need them
        for name, value in entries.items():
            if isinstance(value, Tensor) and id(value) not in tensors:
                mapping[name] = value.detach().clone()
    try:
        yield
    finally:
        for mapping, entries in before:
            mapping.clear()
            mapping.update(entries)


def _without_compilation() -> AbstractContextManager[object]:
    """Run compiled parts as plain Python: compiling them for the example would take minutes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        return nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


def modules_outside_leaves(network: nn.Module) -> dict[str, nn.Module]:
    """Return modules by path, without parts of leaves such as MultiheadAttention's projection."""
    leaves = [module for module in network.modules() if is_leaf(module)]
    inside = {id(part) for leaf in leaves for part in leaf.modules() if part is not leaf}
    return {path: module for path, module in network.named_modules() if id(module) not in inside}


def is_leaf(module: nn.Module) -> bool:
    """Return whether a call of `module` counts as one call."""
    if isinstance(module, nn.MultiheadAttention):  # uses its child's weights without calling it
        return True
    return all(name == "parametrizations" for name, _ in module.named_children())


def class_name(module: nn.Module) -> str:
    """Return the class of a module, ignoring parametrisations."""
    return type_before_parametrizations(module).__name__


def count_parameters(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return the number of elements, and of those that require a gradient."""
    sizes = [(p.numel(), p.requires_grad) for p in parameters if not is_lazy(p)]
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def _function_name(function: Any) -> str:
    """The plain name: `relu` for relu_, `sub` for __rsub__, `T` for the attribute T."""
    name = getattr(function, "__name__", type(function).__name__)
    if name == "__get__":
        name = function.__self__.__name__
    operator = _OPERATOR.fullmatch(name)
    return operator[1] if operator else name.strip("_")


def _versions(value: object) -> dict[int, int]:
    """How many times each tensor in `value` was modified in place, by its id."""
    return {id(t): t._version for t in tensors_in(value) if not t.is_inference()}


def _distinct(result: Any, before: dict[int, int]) -> Any:
    """Give `result` a new identity if it is an unmodified argument.

    Otherwise other readers of an nn.Identity's input, or a dropout's, would seem to read its
    output.
    """
    if not isinstance(result, Tensor) or id(result) not in before or result.requires_grad:
        return result
    return result.detach() if result._version == before[id(result)] else result


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, sets, mappings and dataclasses, in order."""
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
        yield from tensors_in(item)


def _first_shape(tensors: tuple[Tensor, ...]) -> Shape | None:
    # A nested tensor does not have a single shape.
    return tuple(tensors[0].shape) if tensors and not tensors[0].is_nested else None
