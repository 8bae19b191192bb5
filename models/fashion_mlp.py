"""The course's multi-layer perceptron."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.data import DATASETS, load_images
from models.prepare import PREPARATION, prepared
from models.recipe import CLASSIFIER_PARAMETERS, Recipe


class FashionMLP(nn.Module):
    """Four linear layers, 784-256-128-64-10: 28x28 grey pictures to ten classes.

    Source: Udacity, "Intro to Deep Learning with PyTorch", part 4, "Fashion-MNIST".
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of `images` (N, 1, 28, 28), both floating point."""
        t = F.relu(self.fc1(images.flatten(start_dim=1)))
        t = F.relu(self.fc2(t))
        t = F.relu(self.fc3(t))
        logits: Tensor = self.out(t)
        return logits


RECIPE = Recipe(
    name="fashion-mlp",
    summary="the course's multi-layer perceptron, 784-256-128-64-10",
    load=load_images,
    build=lambda params, facts: prepared(FashionMLP(), params, facts),
    parameters={**CLASSIFIER_PARAMETERS, **PREPARATION},
    datasets=", ".join(DATASETS),
)
