"""Preprocessing inside the network, so that an exported model takes plain images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.recipe import Facts, Parameter, Params


class Normalize(nn.Module):
    """Subtract a mean from each channel and divide it by a standard deviation.

    Args:
        mean: One number per channel.
        std: One number per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Return `images` (N, channels, H, W), normalised."""
        return (images - self.mean) / self.std


PREPARATION = {
    "normalize": Parameter(
        default=False, help="normalise images by the training set's mean and standard deviation"
    )
}
"""The hyperparameters of `prepared`."""


def prepared(network: nn.Module, params: Params, facts: Facts) -> nn.Module:
    """Return `network` behind the preprocessing that `params` asks for.

    Args:
        network: Takes images (N, 1, H, W).
        params: A value for each parameter in `PREPARATION`.
        facts: `mean` and `std` of the training set.
    """
    if not params["normalize"]:
        return network
    return nn.Sequential(Normalize([facts["mean"]], [facts["std"]]), network)
