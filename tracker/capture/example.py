"""A call of a network, as an example of its inputs, and the first call that a loop makes."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from tracker.errors import ArgumentError
from tracker.training.device import unwrap
from tracker.transfers import is_capturing

logger = logging.getLogger(__name__)

_PICTURES = 64  # in the sample grid
_SAMPLES = 4  # for the graph and the logged model
_CONSTANTS = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a network: tensors in tuples, lists and dicts, and constants."""

    args: tuple[Any, ...]
    """The positional arguments."""
    kwargs: dict[str, Any]
    """The keyword arguments."""
    agrees: bool | None = None
    """`is_certain` of the whole call, if this one has fewer samples."""

    @property
    def leaves(self) -> list[Any]:
        """Tensors, packed sequences and constants, in the order of the arguments."""
        return pytree.tree_leaves((self.args, self.kwargs), is_leaf=_is_packed)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, without those in packed sequences."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def size(self) -> int | None:
        """The first dimension of the first tensor that has one: usually the batch."""
        if any(map(_is_packed, self.leaves)):
            return None
        return next((tensor.shape[0] for tensor in self.tensors if tensor.dim()), None)

    @property
    def is_certain(self) -> bool:
        """Whether all tensors agree on the batch; then a few samples stand for all of them.

        A mask (T, T) beside a sequence of T words, a state (layers, N, H) and the pictures
        (C, H, W) in a list have no samples.
        """
        if self.agrees is not None:
            return self.agrees
        parts = pytree.tree_leaves(
            (self.args, self.kwargs), is_leaf=lambda part: type(part) is list
        )
        if any(isinstance(part, list) for part in parts):
            return False
        shapes = [tensor.shape for tensor in self.tensors if tensor.dim()]
        if len(shapes) == 1 and self.size is not None:
            return True
        are_square = any(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)
        return not are_square and {shape[0] for shape in shapes} == {self.size}

    def has_batch(self, tensor: Any) -> bool:
        """Return whether the first dimension of one of the tensors is the batch."""
        return isinstance(tensor, Tensor) and tensor.dim() > 0 and tensor.shape[0] == self.size

    def map(self, change: Callable[[Any], Any]) -> Example:
        """Return a copy with `change` of each tensor and packed sequence."""

        def changed(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, (Tensor, PackedSequence)) else leaf

        args, kwargs = pytree.tree_map(changed, (self.args, self.kwargs), is_leaf=_is_packed)
        return Example(args, kwargs, self.is_certain)

    def to(self, device: torch.device | str) -> Example:
        """Return a copy on a device, which a network may change in place."""
        return self.map(
            lambda leaf: (
                leaf.to(device) if _is_packed(leaf) else leaf.detach().to(device, copy=True)
            )
        )

    def first(self, samples: int) -> Example:
        """Return a copy of the first samples, or of all if the tensors disagree on the batch."""
        few = self.is_certain

        def kept(leaf: Any) -> Any:
            if _is_packed(leaf):
                return leaf._replace(data=leaf.data.detach().clone())
            leaf = leaf.detach().as_subclass(Tensor)
            return (leaf[:samples] if few and self.has_batch(leaf) else leaf).clone()

        return self.map(kept)

    def resized(self, size: int) -> Example:
        """Return a copy with `size` samples, repeated if there are fewer."""

        def sized(leaf: Any) -> Any:
            if not self.has_batch(leaf):
                return leaf
            return torch.cat([leaf] * -(-size // len(leaf)))[:size].clone()

        return self.map(sized)

    def zeros(self) -> Example:
        """Return a copy without its data."""
        return self.map(
            lambda leaf: (
                leaf._replace(data=torch.zeros_like(leaf.data))
                if _is_packed(leaf)
                else torch.zeros_like(leaf)
            )
        )

    def names(self, network: nn.Module) -> list[str]:
        """Return a name for each leaf: `input_ids`, or `hidden.0` for a part of an argument."""
        names = _parameters(network)
        named = {names.get(place, str(place)): value for place, value in enumerate(self.args)}
        return path_names(named | self.kwargs)


def path_names(tree: Any) -> list[str]:
    """Return the path to each leaf as a name: `hidden.0`."""
    paths, _ = pytree.tree_flatten_with_path(tree, is_leaf=_is_packed)
    return [".".join(str(_step(key)) for key in path) for path, _ in paths]


def as_example(network: nn.Module, given: Any) -> Example:
    """Return what a user passed as an example of the inputs as a call of the network.

    Args:
        network: Wrapped or not; its `forward` decides between several arguments and one.
        given: One argument, a tuple of positional arguments, or a mapping of keyword arguments.

    Raises:
        ArgumentError: It holds something other than tensors and constants, or no tensor.
    """
    if isinstance(given, Example):
        return given
    example = Example((_plain(given),), {})
    if type(given) is tuple and _accepts(network, given, {}):
        example = Example(_plain(given), {})
    elif isinstance(given, Mapping) and all(isinstance(key, str) for key in given):
        example = Example((), _plain(given)) if _accepts(network, (), given) else example
    if (problem := _problem(example)) is not None:
        raise ArgumentError(
            f"example {problem}; it must be a tensor, a tuple of positional arguments or a mapping "
            "of keyword arguments, of tensors in tuples, lists and dicts."
        )
    return example


def inputs_of(batch: Any) -> Tensor | None:
    """Return a copy of the first samples of a batch's first tensor, detached.

    Args:
        batch: A tensor (N, …), or nested lists, tuples and mappings that hold one. Labels (N,)
            before the inputs are passed over.

    Returns:
        64 pictures (N, C, H, W) or 4 other samples, or fewer; None without such a tensor.
    """
    tensors: list[Tensor] = list(filter(_can_be_copied, pytree.tree_leaves(_plain(batch))))
    tensor = next((tensor for tensor in tensors if tensor.dim() > 1), (*tensors, None)[0])
    if tensor is None:
        return None
    return Example((tensor,), {}).first(_kept(tensor)).tensors[0]


def pictures_of(batch: Any) -> Tensor | None:
    """Return a copy of the first pictures (N, C, H, W) in nested lists, tuples and mappings."""
    for leaf in pytree.tree_leaves(_plain(batch)):
        if _can_be_copied(leaf) and _is_picture(leaf):
            pictures: Tensor = leaf.detach()[:_PICTURES].cpu()
            return pictures
    return None


def _kept(tensor: Tensor) -> int:
    return _PICTURES if _is_picture(tensor) else _SAMPLES


def _is_picture(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.shape[1] in (1, 3) and tensor.numel() > 0


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _plain(value: Any) -> Any:
    """Return mappings of other classes as dicts, which torch.export can take apart."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(map(_plain, value))
    return value


def _problem(example: Example) -> str | None:
    """Return what cannot be kept of the arguments of a call, if anything."""
    leaves = example.leaves
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.dim() and not _can_be_copied(leaf):
            return f"holds a tensor that cannot be copied ({_described(leaf)})"
        if not isinstance(leaf, (Tensor, PackedSequence, *_CONSTANTS)):
            return f"holds an object of the class {type(leaf).__name__}"
    if not any(isinstance(leaf, (Tensor, PackedSequence)) for leaf in leaves):
        return "holds no tensor"
    return None


def _described(tensor: Tensor) -> str:
    kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    return f"{kind}, {tensor.device.type}" + ("" if tensor.numel() else ", empty")


def _can_be_copied(tensor: Any) -> bool:
    """Whether this is a plain batch, not one of a transform, a trace or several devices."""
    return (
        isinstance(tensor, Tensor)
        and tensor.dim() > 0
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_meta)
        and tensor.shape[0] > 0
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not is_capturing(tensor.device)
    )


def _accepts(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the signature of the network's `forward` has these arguments."""
    try:
        inspect.signature(unwrap(network).forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a forward in C has no signature
        return False
    return True


def _parameters(network: nn.Module) -> dict[int, str]:
    """The names of the positional parameters of `forward`, by their places."""
    try:
        parameters = inspect.signature(unwrap(network).forward).parameters.values()
    except (TypeError, ValueError):
        return {}
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {place: each.name for place, each in enumerate(parameters) if each.kind in named}


def _step(key: Any) -> Any:
    return next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))


class FirstInputs:
    """A forward pre-hook that keeps a copy of the first inputs, and removes itself."""

    def __init__(self, network: nn.Module, known: Example | None = None) -> None:
        """Wait for the first call of `network`, unless its inputs are `known`."""
        self.inputs = known
        """The first samples of the first call's arguments, on their device; None before."""
        self.is_wanted = known is None
        """Set to False if the inputs are known from elsewhere."""
        self._handle: RemovableHandle | None = None
        if known is not None:
            return
        try:
            self._handle = network.register_forward_pre_hook(self, with_kwargs=True)
        except Exception as error:  # noqa: BLE001 - a network may be any module
            logger.warning(
                "The inputs of %s cannot be seen (%s); pass begin_run(…, example=…).",
                type(network).__name__,
                error,
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the inputs without changing them."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return  # removing the hook from a compiled network would compile it again
        self.remove()
        if not self.is_wanted:
            return
        try:
            example = Example(_plain(args), _plain(kwargs))
            problem = _problem(example)
            if problem is None:
                self.inputs = example.first(max(map(_kept, example.tensors), default=_SAMPLES))
        except Exception as error:  # noqa: BLE001 - training must go on
            problem = f"raised {error!r}"
        if problem is not None:
            logger.warning(
                "The first inputs of %s are not kept, because the call %s; pass inputs that "
                "torch.export can follow as begin_run(…, example=…).",
                type(unwrap(module)).__name__,
                problem,
            )

    def remove(self) -> None:
        """Remove the hook from the network."""
        if self._handle is not None:
            self._handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled network gets a hook that does nothing and loads without this project.
        return getattr, (nullcontext(), "__exit__")
