"""The first inputs that a training loop passes to its network."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracker.transfers import is_capturing

logger = logging.getLogger(__name__)

_PICTURES = 64  # in the sample grid
_SAMPLES = 4  # for the graph and the logged model


def inputs_of(batch: Any) -> Tensor | None:
    """Return a copy of the first samples of a batch's first tensor, detached.

    Args:
        batch: A tensor (N, …), a list or tuple that begins with one, or a mapping that has one.

    Returns:
        64 pictures (N, C, H, W) or 4 other samples, or fewer; None without such a tensor.
    """
    while isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        found = (inputs_of(value) for value in batch.values())
        return next((inputs for inputs in found if inputs is not None), None)
    if not isinstance(batch, Tensor) or not _can_be_copied(batch):
        return None
    size = _PICTURES if batch.dim() == 4 and batch.shape[1] in (1, 3) else _SAMPLES
    return batch.detach().as_subclass(Tensor)[:size].clone()


def _can_be_copied(tensor: Tensor) -> bool:
    """Whether this is a plain batch, not one of a transform, a trace or several devices."""
    return (
        tensor.dim() > 0
        and tensor.layout == torch.strided
        and not (tensor.is_nested or tensor.is_meta)
        and tensor.shape[0] > 0
        and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not is_capturing(tensor.device)
    )


class FirstInputs:
    """A forward pre-hook that keeps a copy of the first inputs, and removes itself."""

    def __init__(self, network: nn.Module) -> None:
        self.inputs: Tensor | None = None
        """The first samples of the first argument, on their device; None before."""
        self.is_wanted = True
        """Set to False if the inputs are known from elsewhere."""
        self._handle: RemovableHandle | None = None
        try:
            self._handle = network.register_forward_pre_hook(self)
        except Exception as error:  # noqa: BLE001 - a network may be any module
            logger.warning(
                "The inputs of %s cannot be seen (%s); pass the batch to track_loss().",
                type(network).__name__,
                error,
            )

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Copy the inputs, which stay as they are."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return  # removing the hook from a compiled network would compile it again
        self.remove()
        try:
            first = arguments[0] if arguments and self.is_wanted else None
            self.inputs = inputs_of(first) if isinstance(first, Tensor) else None
        except Exception as error:  # noqa: BLE001 - training must go on
            logger.warning("The first inputs of the network are not kept: %s", error)

    def remove(self) -> None:
        """Remove the hook from the network."""
        if self._handle is not None:
            self._handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled network gets a hook that does nothing and loads without this project.
        return getattr, (nullcontext(), "__exit__")
