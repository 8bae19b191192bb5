"""The convolutional network of deeplizard's Fashion-MNIST tutorial."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.data import AUGMENTATION, DATASETS, load_images
from models.prepare import PREPARATION, prepared
from models.recipe import CLASSIFIER_PARAMETERS, DROPOUT, Parameter, Recipe


class FashionCNN(nn.Module):
    """Two convolutions and three linear layers, from 28x28 grey images to ten classes.

    Source: deeplizard, "Neural Network Programming - Deep Learning with PyTorch", which the
    defaults reproduce.

    Args:
        dropout: Share of hidden units dropped after each hidden linear layer in training.
        width: Multiplies the tutorial's 6 and 12 channels.
        batch_norm: Normalise between each convolution and its activation (Ioffe and Szegedy, 2015).
    """

    def __init__(self, dropout: float = 0.0, width: int = 1, batch_norm: bool = False) -> None:
        super().__init__()
        self.dropout = dropout
        first, second = 6 * width, 12 * width
        bias = not batch_norm  # normalisation would subtract it again
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=first, kernel_size=5, bias=bias)
        self.norm1 = nn.BatchNorm2d(first) if batch_norm else None
        self.conv2 = nn.Conv2d(in_channels=first, out_channels=second, kernel_size=5, bias=bias)
        self.norm2 = nn.BatchNorm2d(second) if batch_norm else None

        self.fc1 = nn.Linear(in_features=second * 4 * 4, out_features=120)
        self.fc2 = nn.Linear(in_features=120, out_features=60)
        self.out = nn.Linear(in_features=60, out_features=10)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for `images` (N, 1, 28, 28), both floating point."""
        t = images
        for convolution, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            t = convolution(t)
            t = t if norm is None else norm(t)
            t = F.max_pool2d(F.relu(t), kernel_size=2, stride=2)  # to 12x12, to 4x4

        t = t.flatten(start_dim=1)
        for layer in (self.fc1, self.fc2):
            t = F.dropout(F.relu(layer(t)), self.dropout, layer.training)
        logits: Tensor = self.out(t)
        return logits


RECIPE = Recipe(
    name="fashion-cnn",
    summary="the tutorial's network, two convolutions and three linear layers",
    load=load_images,
    build=lambda params, facts: prepared(
        FashionCNN(params["dropout"], params["width"], params["batch_norm"]), params, facts
    ),
    parameters={
        **CLASSIFIER_PARAMETERS,
        "dropout": DROPOUT,
        "width": Parameter(default=1, most=64, help="multiplies the tutorial's 6 and 12 channels"),
        "batch_norm": Parameter(default=False, help="batch normalisation after each convolution"),
        **PREPARATION,
        **AUGMENTATION,
    },
    datasets=", ".join(DATASETS),
)
