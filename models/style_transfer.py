"""Style transfer: a picture with the content of one and the style of another.

Source: Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", 2016.
What is trained is the picture itself, against the features of a network that is not.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader, Dataset

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
from models.errors import ModelsError
from models.pictures import read_picture
from models.prepare import Normalize
from models.recipe import Data, Facts, Parameter, Params, Picture, Range, Recipe, Source, Step, Text
from models.transfer import Fit, Transfer

_VGG19_STYLE = ("features.0", "features.5", "features.10", "features.19", "features.28")
_VGG19_CONTENT = "features.21"
"""conv1_1, conv2_1, conv3_1, conv4_1, conv5_1, and conv4_2: those of the paper."""


class Pair(Dataset[dict[str, Tensor]]):
    """A content and a style picture, of one size; the only item."""

    name = "pictures"

    def __init__(self, content: Tensor, style: Tensor) -> None:
        """Take two pictures (3, H, W), floats in [0, 1]."""
        self.content = content
        self.style = style

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index:
            raise IndexError(index)
        return {"content": self.content, "style": self.style}


class StyledPicture(nn.Module):
    """The picture that is trained, and the network that judges it."""

    judge: nn.Module
    whole: nn.Module
    """The network that the judge is a part of, as it was saved."""

    def __init__(self, height: int, width: int, judge: nn.Module, mean: Any, std: Any) -> None:
        """Begin with a grey picture. `judge` takes pictures normalised by `mean` and `std`."""
        super().__init__()
        self.picture = nn.Parameter(torch.full((3, height, width), 0.5))
        self.normalize = Normalize(mean, std)
        # No part of this module: it is not trained, and checkpoints need not hold it.
        object.__setattr__(self, "judge", judge.requires_grad_(False).eval())
        for module in judge.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the features are read before it
        first = next(m for m in judge.modules() if isinstance(m, nn.Conv2d))
        self.is_grey = first.in_channels == 1

    def forward(self) -> Tensor:
        """The picture (3, H, W), in [0, 1]."""
        return self.picture.detach().clamp(0, 1)

    def features(self, picture: Tensor, layers: list[str]) -> dict[str, Tensor]:
        """What the layers make of a picture (3, H, W): (1, channels, H', W') each.

        A network for grey pictures sees each colour as a picture: (3, channels, H', W').
        """
        found: dict[str, Tensor] = {}
        hooks = []
        for name in layers:

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                found[name] = output
                if len(found) == len(layers):
                    raise _EnoughError  # what follows may want pictures of another size

            hooks.append(self.judge.get_submodule(name).register_forward_hook(keep))
        batch = picture[:, None] if self.is_grey else self.normalize(picture)[None]
        try:
            self.judge(batch)
        except _EnoughError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found


class _EnoughError(Exception):
    """All features are there."""


def gram(features: Tensor) -> Tensor:
    """The Gram matrices (N, C, C) of features (N, C, H, W), divided by C·H·W."""
    flat = features.flatten(start_dim=2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


class StyleLoop:
    """Trains the picture, `steps` steps an epoch."""

    def __init__(self, network: nn.Module, data: Data[Pair], params: Params) -> None:
        """Begin at the content. Raises ModelsError for a layer that the network does not have."""
        assert isinstance(network, StyledPicture)
        self._network = network
        self._params = params
        self._content_layer, self._style_layers = chosen_layers(network.judge, params)
        self._layers = list(dict.fromkeys([*self._style_layers, self._content_layer]))
        place = network.picture.device
        self._pair = data.train
        network.judge.to(place)
        content, style = self._pair.content.to(place), self._pair.style.to(place)
        with torch.no_grad():
            network.picture.copy_(content)
            try:
                self._content = network.features(content, self._layers)[self._content_layer]
                found = network.features(style, self._layers)
            except Exception as error:  # any network's forward may raise anything
                why = next(iter(str(error).splitlines()), type(error).__name__)
                raise ModelsError(
                    f"size={params['size']} is not allowed: the network does not take pictures of "
                    f"{content.shape[1]}x{content.shape[2]} ({why})."
                ) from error
            self._grams = {name: gram(found[name]) for name in self._style_layers}
            self._first_style = max(self._losses()[1].item(), 1e-30)
            self._size = max(self._content.square().mean().item(), 1e-30)
        self.optimizer: Optimizer = Adam([network.picture], lr=params["lr"])
        self.loader: DataLoader[Any] = DataLoader(self._pair)

    def train(self, epoch: int) -> Iterator[Step]:
        """Change the picture, step by step."""
        for _ in range(self._params["steps"]):
            content, style = self._losses()
            # By their own sizes: the same weights then serve every network.
            loss = self._params["content_weight"] * content / self._size
            loss = loss + self._params["style_weight"] * style / self._first_style
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                self._network.picture.clamp_(0, 1)
            yield Step(loss, 1)

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Both losses of the picture as it is, and how far the style's has fallen."""
        content, style = (loss.item() for loss in self._losses())
        return {
            "style_loss": style,
            "content_loss": content,
            "style_fall": self._first_style / max(style, 1e-30),
        }

    def test(self) -> Mapping[str, float]:
        """Nothing: there is no other part."""
        return {}

    def show(self, epoch: int) -> Iterable[Picture | Text]:
        """The picture; first also what it is made of."""
        if epoch == 1:
            yield Picture("content", self._pair.content)
            yield Picture("style", self._pair.style)
        yield Picture("picture", self._network())

    def _losses(self) -> tuple[Tensor, Tensor]:
        """Content loss, and the style loss as the mean over its layers.

        Each is a mean of squares, of features and of Gram matrices: the paper's up to constants.
        """
        found = self._network.features(self._network.picture, self._layers)
        content = F.mse_loss(found[self._content_layer], self._content)
        styles = [F.mse_loss(gram(found[name]), self._grams[name]) for name in self._style_layers]
        return content, torch.stack(styles).mean()


def chosen_layers(judge: nn.Module, params: Params) -> tuple[str, list[str]]:
    """The content layer and the style layers: those asked for, the paper's, or all convolutions.

    Raises ModelsError for a layer that the network does not have.
    """
    convolutions = [name for name, m in judge.named_modules() if isinstance(m, nn.Conv2d)]
    is_paper = not is_own(params) and params["backbone"] == "vgg19"
    content, styles = convolutions[-1], convolutions
    if is_paper:
        content, styles = _VGG19_CONTENT, list(_VGG19_STYLE)
    if params["content_layer"] != "auto":
        content = params["content_layer"]
    if params["style_layers"] != "auto":
        styles = params["style_layers"].split(",")
    for name in (content, *styles):
        if name not in convolutions:
            raise ModelsError(
                f"layer {name!r} is no convolution of the network; allowed: "
                f"{', '.join(convolutions)}."
            )
    return content, styles


def load(source: Source, params: Params) -> Data[Pair]:
    """The content and the style picture, `CONTENT,STYLE`, at the size of the first."""
    if source.dataset == "auto":
        folder = Path(source.data_dir, "images")
        files = [str(folder / name) for name in ("octopus.jpg", "delaunay.jpg")]
    else:
        files = source.dataset.split(",")
    if len(files) != 2 or not all(os.path.isfile(file) for file in files):
        raise ModelsError(
            f"dataset={source.dataset!r} is not two picture files; allowed: CONTENT.jpg,STYLE.jpg."
        )
    content = read_picture(files[0], params["size"])
    height, width = content.shape[1:]
    style = read_picture(files[1], (height, width))
    return Data(
        name=",".join(Path(file).stem for file in files),
        train=Pair(content, style),
        source=", ".join(files),
        facts={"height": height, "width": width},
    )


def build(params: Params, facts: Facts) -> nn.Module:
    """A grey picture, and the network that judges it. Raises ModelsError."""
    whole = judge = backbone(params, facts)
    mean, std = ([0.0] * 3, [1.0] * 3) if is_own(params) else (IMAGENET_MEAN, IMAGENET_STD)
    while isinstance(judge, Transfer):  # without what makes pictures small and grey for it
        if isinstance(judge.prepare, Fit):
            mean, std = judge.prepare.mean, judge.prepare.std
        judge = judge.backbone
    if not any(isinstance(module, nn.Conv2d) for module in judge.modules()):
        raise ModelsError(
            f"weights={params['weights']!r} is a network without a convolution; allowed: one with."
        )
    network = StyledPicture(facts["height"], facts["width"], judge, mean, std)
    object.__setattr__(network, "whole", whole)
    return network


def unused(params: Params) -> Collection[str]:
    """A tracked model brings its own network."""
    return ("backbone",) if is_own(params) else ()


def weights(network: nn.Module, params: Params, state: Mapping[str, Tensor] | None) -> None:
    """Give the judge its weights."""
    assert isinstance(network, StyledPicture)
    load_weights(network.whole, first_weights(params, state), params["weights"])


RECIPE = Recipe(
    name="style-transfer",
    summary="the content of one picture in the style of another (Gatys et al., 2016)",
    load=load,
    build=build,
    weights=weights,
    unused=unused,
    loop=StyleLoop,
    is_model=False,
    scores=None,
    epochs=10,
    metrics={
        "style_loss": "minimize",
        "content_loss": "minimize",
        "loss": "minimize",
        "style_fall": "maximize",
    },
    parameters={
        "lr": Parameter(
            default=0.02,
            help="Adam's learning rate, of pixels in [0, 1]",
            search=Range(low=3e-3, high=1e-1, log=True),
            grid=(0.02, 0.05),
        ),
        "steps": Parameter(default=30, help="steps in an epoch"),
        "size": Parameter(default=256, least=16, most=2048, help="pixels of the longer side"),
        "content_weight": Parameter(
            default=1.0, least=0, help="of the content loss, as a share of the features' squares"
        ),
        "style_weight": Parameter(
            default=100.0,
            help="of the style loss, as a share of what it is at the start",
        ),
        "backbone": replace(BACKBONE, default="vgg19"),
        "weights": WEIGHTS,
        "content_layer": Parameter(default="auto", help="a convolution; auto: conv4_2 of VGG-19"),
        "style_layers": Parameter(
            default="auto", help="convolutions, A,B,C; auto: the paper's of VGG-19, else all"
        ),
    },
    datasets="two picture files, CONTENT,STYLE; auto: DATA_DIR/images/octopus.jpg and delaunay.jpg",
)
