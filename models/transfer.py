"""Transfer learning: features that were learnt on other pictures, and a new head."""

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
    is_own,
    load_weights,
)
from models.data import AUGMENTATION, DATASETS, load_images
from models.errors import ModelsError
from models.prepare import Normalize
from models.recipe import CLASSIFIER_PARAMETERS, Facts, Parameter, Params, Range, Recipe


class Transfer(nn.Module):
    """A backbone whose last linear layer, the head, is new, behind what makes pictures fit it."""

    def __init__(self, backbone: nn.Module, classes: int, prepare: nn.Module) -> None:
        """Replace the last linear layer of `backbone`. Raises ModelsError where there is none."""
        super().__init__()
        self.prepare = prepare
        self.backbone = backbone
        layers = [name for name, m in backbone.named_modules() if isinstance(m, nn.Linear)]
        if not layers:
            raise ModelsError(
                f"backbone={type(backbone).__name__!r} has no linear layer to replace by a head."
            )
        self.head_name = layers[-1]
        """The head's name within the backbone."""
        old = backbone.get_submodule(self.head_name)
        assert isinstance(old, nn.Linear)
        backbone.set_submodule(self.head_name, nn.Linear(old.in_features, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of `images` (N, channels, H, W), floats in [0, 1]."""
        logits: Tensor = self.backbone(self.prepare(images))
        return logits

    def groups(self) -> list[list[nn.Module]]:
        """The backbone's layers with weights, as its own top-level parts, from the head down."""
        parts = _with_weights(self.backbone)
        while len(parts) == 1 and list(parts[0].children()):  # a network within another
            parts = _with_weights(parts[0])
        head = self.backbone.get_submodule(self.head_name)
        below = [part for part in parts if part is not head]
        return [[head], *([part] for part in reversed(below))]


def _with_weights(network: nn.Module) -> list[nn.Module]:
    return [part for part in network.children() if list(part.parameters())]


class Fit(nn.Module):
    """Grey pictures made those that a network for colour pictures of some size takes."""

    def __init__(self, size: int, mean: list[float], std: list[float]) -> None:
        """Take the length of a side in pixels, and statistics for three colours."""
        super().__init__()
        self.size, self.mean, self.std = size, mean, std
        self.normalize = Normalize(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, size, size), normalised, of `images` (N, 1 or 3, H, W)."""
        sized = F.interpolate(
            images, size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        normal: Tensor = self.normalize(sized.expand(-1, 3, -1, -1))
        return normal


def build(params: Params, facts: Facts) -> nn.Module:
    """The network with fresh weights. Raises ModelsError where backbone and pictures do not fit."""
    if is_own(params):
        prepare: nn.Module = nn.Identity()  # it takes the same pictures as before
    elif params["weights"] == "imagenet":
        prepare = Fit(params["image_size"], IMAGENET_MEAN, IMAGENET_STD)
    else:
        prepare = Fit(params["image_size"], [facts["mean"]] * 3, [facts["std"]] * 3)
    network = Transfer(backbone(params, facts), len(facts["classes"]), prepare)
    _check(network, params)
    return network


def weights(network: nn.Module, params: Params, state: Mapping[str, Tensor] | None) -> None:
    """Give the backbone the weights that it begins with; the head stays new."""
    assert isinstance(network, Transfer)
    head = (f"{network.head_name}.weight", f"{network.head_name}.bias")
    found = {k: v for k, v in first_weights(params, state).items() if k not in head}
    load_weights(network.backbone, found, params["weights"])


def thaw(network: nn.Module, params: Params, epoch: int) -> None:
    """Train the head and, every `thaw` epochs, one more group of layers below it.

    What is frozen is in evaluation mode too: batch normalisation keeps its statistics.
    """
    assert isinstance(network, Transfer)
    groups = network.groups()
    every = params["thaw"]
    warm = 1 + ((epoch - 1) // every if every else 0)
    if params["weights"] == "none":  # nothing was learnt that could be kept
        warm = len(groups)
    trained = {id(p) for group in groups[:warm] for part in group for p in part.parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(warm >= len(groups) or id(parameter) in trained)
    network.train(warm >= len(groups))
    for group in groups[:warm]:
        for part in group:
            part.train()


def unused(params: Params) -> Collection[str]:
    """A tracked model brings its own network and size; what learnt nothing is not kept frozen."""
    if is_own(params):
        return ("backbone", "image_size")
    return ("thaw",) if params.get("weights") == "none" else ()


def _check(network: nn.Module, params: Params) -> None:
    """Raise ModelsError for a backbone that does not take such pictures."""
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, 1, 28, 28))
    except Exception as error:  # any network's forward may raise anything
        why = next(iter(str(error).splitlines()), type(error).__name__)
        size = "" if is_own(params) else f" at image_size={params['image_size']}"
        whose = "weights" if is_own(params) else "backbone"
        raise ModelsError(
            f"{whose}={params[whose]!r} does not take pictures of 28x28{size}: "
            f"{why[:200].rstrip('.')}."
        ) from error
    network.train()


RECIPE = Recipe(
    name="transfer",
    summary="a backbone of torchvision, or a tracked model, frozen, with a new head",
    load=load_images,
    build=build,
    weights=weights,
    before_epoch=thaw,
    unused=unused,
    parameters={
        **{name: CLASSIFIER_PARAMETERS[name] for name in ("batch_size", "shuffle", "schedule")},
        "lr": Parameter(
            default=0.001,
            help="Adam's learning rate, of a schedule the highest",
            search=Range(low=1e-4, high=1e-2, log=True),
            grid=(0.003, 0.001),
        ),
        "backbone": BACKBONE,
        "weights": WEIGHTS,
        "thaw": Parameter(
            default=0,
            least=0,
            help="epochs until one more group of layers is trained; 0: the head alone is",
            search=(0, 1, 2),
            grid=(0, 1),
        ),
        "image_size": Parameter(
            default=64, least=8, most=1024, help="pixels of a side, for a torchvision backbone"
        ),
        **AUGMENTATION,
    },
    datasets=", ".join(DATASETS),
)
