"""Normalisation within the network, so that whoever deploys it feeds plain pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.recipe import Facts, Params


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


def normalized(network: nn.Module, params: Params, facts: Facts) -> nn.Module:
    """`network` behind a normalisation by the training part, if `params` ask for one."""
    if not params["normalize"]:
        return network
    return nn.Sequential(Normalize([facts["mean"]], [facts["std"]]), network)
