"""Histograms of activations: the outputs of a network's leaf modules, seen by forward hooks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracker.capture.every import Every
from tracker.capture.histograms import Counts, Histogram, added, count, decoded
from tracker.capture.network_histograms import histogram_fields, plain_name, say_left_out
from tracker.capture.trace import class_name, is_leaf, modules_outside_leaves, tensors_in
from tracker.training.device import unwrap
from tracker.training.networks import Networks
from tracker.transfers import is_capturing

_COMPILED = "%s has no histograms of activations, because torch.compile or torch.jit runs it whole."
_NO_MODULE = "There are no histograms of activations: only=%r is the name of no leaf module."
_COMPILING = "The step in which torch.compile compiles has no histograms of activations."
_UNSEEN = (
    "Activations have no histograms in a step without a forward pass in training mode, with "
    "gradients and outside torch.compile."
)

logger = logging.getLogger(__name__)


class Activations:
    """Counts the outputs of the leaf modules of a network from `start` to `stop`.

    Several calls of a module add up. Calls in evaluation mode, without gradients or by a backward
    pass do not count; a compiled module is left as it is. Nothing waits for a device before `take`.
    """

    def __init__(self, every: Every, said: set[str]) -> None:
        """Watch nothing yet.

        Args:
            every: Which modules are wanted.
            said: The warnings that were given.
        """
        self._every, self._said = every, said
        self._handles: list[RemovableHandle] = []
        self._counts: dict[str, list[Counts]] = {}  # in the order of the calls
        self._problems: dict[str, Exception] = {}
        self._waits = False  # for a first call

    def start(self, network: nn.Module | None) -> None:
        """Forget what was counted, and count the outputs of the next calls.

        Args:
            network: The network, wrapped or not, or several as `Networks`.
        """
        self.stop()
        self._counts, self._problems = {}, {}
        try:
            for name, module, root in self._modules(network):
                hook = _Hook(self, name, root)
                self._handles.append(module.register_forward_hook(hook))
        except Exception as error:  # noqa: BLE001 - a network may be any module
            self._problems["the network"] = error.with_traceback(None)
        self._waits = bool(self._handles)
        if self._handles and (compiler := _compiler()) is not None:
            compiler.register_start_callback(self._make_way)

    def _modules(self, network: nn.Module | None) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Yield name and module of each leaf that is wanted, and the network that it is in."""
        are_any = network is None
        parts = network.parts if isinstance(network, Networks) else {"": network}
        for prefix, part in parts.items():
            if part is None:
                break
            root = unwrap(part)
            compiled = [""] if any(map(_is_compiled, _wrappers(part))) else []  # paths
            for path, module in modules_outside_leaves(root).items():
                if _is_compiled(module):
                    compiled.append(path)
                if not is_leaf(module) or ".parametrizations." in f".{path}.":
                    continue
                name = _name(prefix, path, root)
                if not self._every.takes(name, "activation"):
                    continue
                are_any = True
                outer = next((each for each in compiled if _is_within(path, each)), None)
                if outer is None:
                    yield name, module, root
                else:
                    self._say(_COMPILED % _name(prefix, outer, root))
        if not are_any:
            self._say(_NO_MODULE % self._every.only)

    def add(self, name: str, output: Any) -> None:
        """Count the first floating-point tensor in the output of a module."""
        self._waits = False
        floats = (t for t in tensors_in(output) if t.is_floating_point() or t.is_complex())
        try:
            if (tensor := next(floats, None)) is None:
                return
            if (problem := _problem(tensor)) is not None:
                raise ValueError(problem)
            new, counts = count(tensor), self._counts.setdefault(name, [])
            for old in counts:
                if old.layout == new.layout and old.cells.device == new.cells.device:
                    old.cells.add_(new.cells)
                    return
            counts.append(new)
        except Exception as error:  # noqa: BLE001 - training must go on
            self._problems[name] = error.with_traceback(None)  # which holds tensors

    def stop(self) -> None:
        """Remove the hooks; what was counted is kept."""
        self._remove_hooks()
        if (compiler := _compiler()) is not None:
            with suppress(ValueError):  # not registered
                compiler.remove_start_callback(self._make_way)

    def _remove_hooks(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _make_way(self, compilation: object) -> None:
        """Called when torch.compile begins: what it compiled with hooks, it would compile again."""
        if self._handles:
            self._remove_hooks()
            self._counts, self._waits = {}, False
            self._say(_COMPILING)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)

    def take(self) -> list[dict[str, Any]]:
        """Stop, and return the histograms, as in a journal record; this waits for the devices."""
        self.stop()
        taken, self._counts = self._counts, {}
        parts: dict[str, list[Histogram]] = {name: [] for name in taken}
        flat = [(name, counts) for name, several in taken.items() for counts in several]
        for device in {counts.cells.device for _, counts in flat}:
            there = [(name, counts) for name, counts in flat if counts.cells.device == device]
            try:
                histograms = decoded([counts for _, counts in there])
            except Exception as error:  # noqa: BLE001 - such as a device that is lost
                self._problems[f"the device {device}"] = error
                continue
            for (name, _), histogram in zip(there, histograms, strict=True):
                parts[name].append(histogram)
        if self._waits:
            self._say(_UNSEEN)
        problems, self._problems = self._problems, {}
        say_left_out({f"{name} (activation)": one for name, one in problems.items()}, self._said)
        return [
            histogram_fields(name, "activation", added(some))
            for name, some in parts.items()
            if some
        ]


class _Hook:
    """A forward hook of one module."""

    def __init__(self, activations: Activations, name: str, root: nn.Module) -> None:
        self._activations, self._name, self._root = activations, name, root

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return
        is_training = self._root.training and torch.is_grad_enabled()
        if is_training and torch._C._current_graph_task_id() == -1:  # not a recomputation
            self._activations.add(self._name, output)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled network gets a hook that does nothing and loads without this project.
        return getattr, (nullcontext(), "__exit__")


def _compiler() -> Any:
    """What tells of compilations; None if torch.compile is not imported, which takes seconds."""
    return getattr(sys.modules.get("torch._dynamo"), "callback_handler", None)


def _wrappers(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, and those inside it down to the network that it wraps."""
    inner = unwrap(network)
    for module in network.modules():
        yield module
        if module is inner:
            return


def _is_compiled(module: nn.Module) -> bool:
    """Whether its calls, or those of the modules inside it, are not Python's."""
    return (
        isinstance(module, torch.jit.ScriptModule)
        or getattr(module, "_orig_mod", None) is not None
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _is_within(path: str, outer: str) -> bool:
    return not outer or f"{path}.".startswith(f"{outer}.")


def _name(prefix: str, path: str, root: nn.Module) -> str:
    """Return the name of a module in a network; a network without a name has that of its class."""
    return plain_name(f"{prefix}.{path}".strip(".")) or class_name(root)


def _problem(tensor: Tensor) -> str | None:
    """Return why the elements of a tensor cannot be counted now, if so."""
    if is_capturing(tensor.device):
        return "they are captured in a graph"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "they are inside a transform of torch.func"
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if is_plain or tensor.is_nested or hasattr(tensor, "placements"):
        return None
    return f"they are tensors of the class {type(tensor).__name__}"
