"""The network of deeplizard's Fashion-MNIST tutorial."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.data import AUGMENTATION, DATASETS, load_images
from models.prepare import PREPARATION, prepared
from models.recipe import CLASSIFIER_PARAMETERS, DROPOUT, Recipe


class FashionCNN(nn.Module):
    """Two convolutions and three linear layers: 28x28 grey pictures to ten classes.

    Source: deeplizard, "Neural Network Programming - Deep Learning with PyTorch"; dropout, which
    is none by default as there, behind each hidden linear layer.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        """Take the share of hidden units that are left out in a step of training."""
        super().__init__()
        self.dropout = dropout
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=6, kernel_size=5)
        self.conv2 = nn.Conv2d(in_channels=6, out_channels=12, kernel_size=5)

        self.fc1 = nn.Linear(in_features=12 * 4 * 4, out_features=120)
        self.fc2 = nn.Linear(in_features=120, out_features=60)
        self.out = nn.Linear(in_features=60, out_features=10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of `images` (N, 1, 28, 28), both floating point."""
        t = F.max_pool2d(F.relu(self.conv1(images)), kernel_size=2, stride=2)  # (N, 6, 12, 12)
        t = F.max_pool2d(F.relu(self.conv2(t)), kernel_size=2, stride=2)  # (N, 12, 4, 4)

        t = t.flatten(start_dim=1)
        for layer in (self.fc1, self.fc2):
            t = F.dropout(F.relu(layer(t)), self.dropout, layer.training)
        logits: Tensor = self.out(t)
        return logits


RECIPE = Recipe(
    name="fashion-cnn",
    summary="the tutorial's network: two convolutions, three linear layers",
    load=load_images,
    build=lambda params, facts: prepared(FashionCNN(params["dropout"]), params, facts),
    parameters={**CLASSIFIER_PARAMETERS, "dropout": DROPOUT, **PREPARATION, **AUGMENTATION},
    datasets=", ".join(DATASETS),
)
