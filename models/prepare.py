"""What a network does to pictures first, so that whoever deploys it feeds plain ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.recipe import Facts, Parameter, Params


class Normalize(nn.Module):
    """Subtract a mean and divide by a deviation, for each channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: list[float], std: list[float]) -> None:
        """Take as many numbers as there are channels."""
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, channels, H, W) like `images`, normalised."""
        return (images - self.mean) / self.std


PREPARATION = {
    "normalize": Parameter(
        default=False, help="subtract the training part's mean, divide by its deviation"
    ),
}
"""The hyperparameters of `prepared`."""


def prepared(network: nn.Module, params: Params, facts: Facts) -> nn.Module:
    """`network`, behind what `params` ask for."""
    if not params["normalize"]:
        return network
    return nn.Sequential(Normalize([facts["mean"]], [facts["std"]]), network)
