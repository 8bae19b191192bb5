"""Transfer learning: a pretrained backbone with a new head."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones import (
    BACKBONE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WEIGHTS,
    backbone,
    first_weights,
    is_tracked,
    load_weights,
)
from models.data import AUGMENTATION, DATASETS, load_images
from models.errors import ModelsError, first_line
from models.prepare import Normalize
from models.recipe import CLASSIFIER_PARAMETERS, Facts, Parameter, Params, Range, Recipe


class Transfer(nn.Module):
    """A backbone behind its preprocessing, its last linear layer replaced by a new head.

    Args:
        backbone: The network to modify.
        classes: Outputs of the new head.
        prepare: Turns images into what the backbone takes.

    Raises:
        ModelsError: The backbone has no linear layer.
    """

    def __init__(self, backbone: nn.Module, classes: int, prepare: nn.Module) -> None:
        super().__init__()
        self.prepare = prepare
        self.backbone = backbone
        layers = [name for name, m in backbone.named_modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise ModelsError(
                f"backbone={type(backbone).__name__!r} has no linear layer to replace with a head."
            )
        self.head_name = layers[-1]
        """The head's name within the backbone."""
        old = backbone.get_submodule(self.head_name)
        assert isinstance(old, nn.Linear)
        backbone.set_submodule(self.head_name, nn.Linear(old.in_features, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for `images` (N, channels, H, W), floats in [0, 1]."""
        logits: Tensor = self.backbone(self.prepare(images))
        return logits

    def groups(self) -> list[nn.Module]:
        """Return the head, then the backbone's other top-level layers with weights, last first."""
        parts = _children_with_weights(self.backbone)
        while len(parts) == 1 and list(parts[0].children()):  # a network wrapped in another
            parts = _children_with_weights(parts[0])
        head = self.backbone.get_submodule(self.head_name)
        return [head, *(part for part in reversed(parts) if part is not head)]


def _children_with_weights(network: nn.Module) -> list[nn.Module]:
    return [part for part in network.children() if list(part.parameters())]


class Fit(nn.Module):
    """Resize images, expand grey ones to three channels, and normalise.

    Args:
        size: Side length in pixels.
        mean: One number per colour channel.
        std: One number per colour channel.
    """

    def __init__(self, size: int, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.size = size
        self.mean = mean
        self.std = std
        self.normalize = Normalize(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """Return normalised images (N, 3, size, size) from `images` (N, 1 or 3, H, W)."""
        resized = F.interpolate(
            images, size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        normalized: Tensor = self.normalize(resized.expand(-1, 3, -1, -1))
        return normalized


def build(params: Params, facts: Facts) -> nn.Module:
    """Build the network with fresh weights.

    Args:
        params: A value for each of the recipe's parameters.
        facts: `classes`, `mean` and `std` of the training set, and the `spec` of a tracked
            `backbone`.

    Raises:
        ModelsError: The backbone is unknown, or does not take such images.
    """
    if is_tracked(params["weights"]):
        prepare: nn.Module = nn.Identity()  # it takes the images it was trained on
    elif params["weights"] == "imagenet":
        prepare = Fit(params["image_size"], IMAGENET_MEAN, IMAGENET_STD)
    else:
        prepare = Fit(params["image_size"], [facts["mean"]] * 3, [facts["std"]] * 3)
    network = Transfer(backbone(params, facts), len(facts["classes"]), prepare)
    _check(network, params)
    return network


def weights(network: nn.Module, params: Params, state: Mapping[str, Tensor] | None) -> None:
    """Load the backbone's weights; the head stays new.

    Args:
        network: What `build` returned.
        params: A value for each of the recipe's parameters.
        state: The state dict of the tracked model that `weights` names, if it names one.

    Raises:
        ModelsError: The weights cannot be downloaded, are damaged, or do not fit.
    """
    assert isinstance(network, Transfer)
    head = (f"{network.head_name}.weight", f"{network.head_name}.bias")
    kept = {k: v for k, v in first_weights(params, state).items() if k not in head}
    load_weights(network.backbone, kept, params["weights"])


def thaw(network: nn.Module, params: Params, epoch: int) -> None:
    """Unfreeze the head and, every `thaw` epochs, one more layer group below it.

    Frozen layers are in evaluation mode too, so that batch normalisation keeps its statistics.

    Args:
        network: What `build` returned.
        params: The parameters `thaw` and `weights`.
        epoch: The epoch about to start, from 1.
    """
    assert isinstance(network, Transfer)
    groups = network.groups()
    every = params["thaw"]
    count = 1 + ((epoch - 1) // every if every else 0)
    if params["weights"] == "none":  # there are no features worth keeping
        count = len(groups)
    trained = {id(p) for group in groups[:count] for p in group.parameters()}
    is_whole = count >= len(groups)
    for parameter in network.parameters():
        parameter.requires_grad_(is_whole or id(parameter) in trained)
    network.train(is_whole)
    for group in groups[:count]:
        group.train()


def unused(params: Params) -> Collection[str]:
    """Return the parameters that are ignored under the given (possibly partial) values."""
    weights = params.get("weights")
    if is_tracked(weights):  # it brings its own network and image size
        return ("backbone", "image_size")
    return ("thaw",) if weights == "none" else ()  # without features nothing is frozen


def _check(network: nn.Module, params: Params) -> None:
    """Raise ModelsError if the backbone does not take images of 28x28."""
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, 1, 28, 28))
    except Exception as error:  # any network's forward may raise anything
        tracked = is_tracked(params["weights"])
        size = "" if tracked else f" at image_size={params['image_size']}"
        argument = "weights" if tracked else "backbone"
        raise ModelsError(
            f"{argument}={params[argument]!r} does not take images of 28x28{size}: "
            f"{first_line(error)[:200].rstrip('.')}."
        ) from error
    network.train()


RECIPE = Recipe(
    name="transfer",
    summary="a frozen torchvision backbone or tracked model, with a new head",
    load=load_images,
    build=build,
    weights=weights,
    before_epoch=thaw,
    unused=unused,
    parameters={
        **{name: CLASSIFIER_PARAMETERS[name] for name in ("batch_size", "shuffle", "schedule")},
        "lr": Parameter(
            default=0.001,
            help="learning rate of Adam; the peak of a schedule",
            search=Range(low=1e-4, high=1e-2, log=True),
            grid=(0.003, 0.001),
        ),
        "backbone": BACKBONE,
        "weights": WEIGHTS,
        "thaw": Parameter(
            default=0,
            least=0,
            help="unfreeze one more layer group every THAW epochs; 0: train the head only",
            search=(0, 1, 2),
            grid=(0, 1),
        ),
        "image_size": Parameter(
            default=64, least=8, most=1024, help="side length in pixels for a torchvision backbone"
        ),
        **AUGMENTATION,
    },
    datasets=", ".join(DATASETS),
)
