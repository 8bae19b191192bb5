"""A multi-layer perceptron for 28x28 images."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.data import AUGMENTATION, DATASETS, load_images
from models.prepare import PREPARATION, prepared
from models.recipe import CLASSIFIER_PARAMETERS, DROPOUT, Recipe


class FashionMLP(nn.Module):
    """Four linear layers, 784-256-128-64-10, from 28x28 grey images to ten classes.

    Source: Udacity, "Intro to Deep Learning with PyTorch", part 4, "Fashion-MNIST"; dropout after
    each hidden layer, part 5, "Inference and Validation".

    Args:
        dropout: Share of hidden units dropped in each training step.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(784, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for `images` (N, 1, 28, 28), both floating point."""
        t = images.flatten(start_dim=1)
        for layer in (self.fc1, self.fc2, self.fc3):
            t = F.dropout(F.relu(layer(t)), self.dropout, layer.training)
        logits: Tensor = self.out(t)
        return logits


RECIPE = Recipe(
    name="fashion-mlp",
    summary="multi-layer perceptron, 784-256-128-64-10",
    load=load_images,
    build=lambda params, facts: prepared(FashionMLP(params["dropout"]), params, facts),
    parameters={**CLASSIFIER_PARAMETERS, "dropout": DROPOUT, **PREPARATION, **AUGMENTATION},
    datasets=", ".join(DATASETS),
)
