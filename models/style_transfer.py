"""Style transfer: an image with the content of one image and the style of another.

Source: Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional Neural Networks", 2016.
The pixels are optimised to match features of a fixed network.
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
    is_tracked,
    load_weights,
)
from models.errors import ModelsError, first_line
from models.image_file import read_image
from models.prepare import Normalize
from models.recipe import Data, Facts, Parameter, Params, Picture, Range, Recipe, Source, Step, Text
from models.transfer import Fit, Transfer

_VGG19_STYLE = ("features.0", "features.5", "features.10", "features.19", "features.28")
_VGG19_CONTENT = "features.21"
"""The paper's layers: conv1_1, conv2_1, conv3_1, conv4_1 and conv5_1; conv4_2."""


class Pair(Dataset[dict[str, Tensor]]):
    """A content and a style image of the same size, as a data set with one item.

    Args:
        content: (3, H, W), floats in [0, 1].
        style: (3, H, W), floats in [0, 1].
    """

    name = "pictures"

    def __init__(self, content: Tensor, style: Tensor) -> None:
        self.content = content
        self.style = style

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index:
            raise IndexError(index)
        return {"content": self.content, "style": self.style}


class StyledPicture(nn.Module):
    """The image being optimised, initially grey, and the network that provides features.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        judge: The feature network.
        whole: The network that contains `judge`, as its weights were saved.
        mean: Per channel; the judge takes images normalised by it.
        std: Per channel; the judge takes images normalised by it.
    """

    judge: nn.Module
    whole: nn.Module

    def __init__(
        self,
        height: int,
        width: int,
        *,
        judge: nn.Module,
        whole: nn.Module,
        mean: list[float],
        std: list[float],
    ) -> None:
        super().__init__()
        self.picture = nn.Parameter(torch.full((3, height, width), 0.5))
        self.normalize = Normalize(mean, std)
        # Not submodules: they are not trained, and stay out of checkpoints.
        object.__setattr__(self, "judge", judge.requires_grad_(False).eval())
        object.__setattr__(self, "whole", whole)
        for module in judge.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # it would overwrite the features
        first = next(m for m in judge.modules() if isinstance(m, nn.Conv2d))
        self.is_grey = first.in_channels == 1

    def forward(self) -> Tensor:
        """Return the image (3, H, W), in [0, 1]."""
        return self.picture.detach().clamp(0, 1)

    def features(self, picture: Tensor, layers: list[str]) -> dict[str, Tensor]:
        """Compute the outputs of some of the judge's layers.

        Args:
            picture: (3, H, W), floats in [0, 1].
            layers: Names of submodules.

        Returns:
            By layer, (1, channels, H', W'); (3, channels, H', W') for a judge of grey images, which
            sees each colour channel as an image.
        """
        outputs: dict[str, Tensor] = {}
        hooks = []
        for name in layers:

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                outputs[name] = output
                if len(outputs) == len(layers):
                    raise _CompleteError  # later layers may need another image size

            hooks.append(self.judge.get_submodule(name).register_forward_hook(keep))
        batch = picture[:, None] if self.is_grey else self.normalize(picture)[None]
        try:
            self.judge(batch)
        except _CompleteError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return outputs


class _CompleteError(Exception):
    """Ends a forward pass once all features are computed."""


def gram(features: Tensor) -> Tensor:
    """Return the Gram matrices (N, C, C) of features (N, C, H, W), divided by C·H·W."""
    flat = features.flatten(start_dim=2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


class StyleLoop:
    """Optimises the image, starting from the content, for `steps` steps per epoch.

    Args:
        network: What `build` returned, its image on the device to train on.
        data: The content and the style.
        params: A value for each of the recipe's parameters.

    Raises:
        ModelsError: The network lacks a layer, or does not take images of this size.
    """

    def __init__(self, network: nn.Module, data: Data[Pair], params: Params) -> None:
        assert isinstance(network, StyledPicture)
        self._network = network
        self._params = params
        self._content_layer, self._style_layers = chosen_layers(network.judge, params)
        self._layers = list(dict.fromkeys([*self._style_layers, self._content_layer]))
        device = network.picture.device
        self._pair = data.train
        network.judge.to(device)
        content, style = self._pair.content.to(device), self._pair.style.to(device)
        with torch.no_grad():
            network.picture.copy_(content)
            try:
                self._content = network.features(content, self._layers)[self._content_layer]
                features = network.features(style, self._layers)
            except Exception as error:  # any network's forward may raise anything
                raise ModelsError(
                    f"size={params['size']} is not allowed: the network does not take images of "
                    f"{content.shape[1]}x{content.shape[2]} ({first_line(error)})."
                ) from error
            self._grams = {name: gram(features[name]) for name in self._style_layers}
            self._initial_style = max(self._losses()[1].item(), 1e-30)
            self._content_scale = max(self._content.square().mean().item(), 1e-30)
        self.optimizer: Optimizer = Adam([network.picture], lr=params["lr"])
        self.loader: DataLoader[Any] = DataLoader(self._pair)

    def train(self, epoch: int) -> Iterator[Step]:
        """Optimise the image for one epoch."""
        for _ in range(self._params["steps"]):
            content, style = self._losses()
            # Normalised, so that the same loss weights suit every network.
            loss = self._params["content_weight"] * content / self._content_scale
            loss = loss + self._params["style_weight"] * style / self._initial_style
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            with torch.no_grad():
                self._network.picture.clamp_(0, 1)
            yield Step(loss, 1)

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Return both losses, and `style_fall`: the initial style loss over the current one."""
        content, style = (loss.item() for loss in self._losses())
        return {
            "style_loss": style,
            "content_loss": content,
            "style_fall": self._initial_style / max(style, 1e-30),
        }

    def test(self) -> Mapping[str, float]:
        """Return nothing: the data has no test part."""
        return {}

    def show(self, epoch: int) -> Iterable[Picture | Text]:
        """Yield the image, after the first epoch also the content and the style."""
        if epoch == 1:
            yield Picture("content", self._pair.content)
            yield Picture("style", self._pair.style)
        yield Picture("picture", self._network())

    def _losses(self) -> tuple[Tensor, Tensor]:
        """Content loss, and the style loss averaged over its layers.

        Mean squared errors of features and of Gram matrices: the paper's losses up to constants.
        """
        features = self._network.features(self._network.picture, self._layers)
        content = F.mse_loss(features[self._content_layer], self._content)
        styles = [
            F.mse_loss(gram(features[name]), self._grams[name]) for name in self._style_layers
        ]
        return content, torch.stack(styles).mean()


def chosen_layers(judge: nn.Module, params: Params) -> tuple[str, list[str]]:
    """Choose the content layer and the style layers.

    Args:
        judge: The feature network.
        params: `content_layer` and `style_layers`; `auto` is the paper's choice for VGG-19, else
            the last convolution and all convolutions.

    Raises:
        ModelsError: A layer is not a convolution of the network.
    """
    convolutions = [name for name, m in judge.named_modules() if isinstance(m, nn.Conv2d)]
    content, styles = convolutions[-1], convolutions
    if not is_tracked(params["weights"]) and params["backbone"] == "vgg19":
        content, styles = _VGG19_CONTENT, list(_VGG19_STYLE)
    if params["content_layer"] != "auto":
        content = params["content_layer"]
    if params["style_layers"] != "auto":
        styles = params["style_layers"].split(",")
    for name in (content, *styles):
        if name not in convolutions:
            raise ModelsError(
                f"layer {name!r} is not a convolution of the network; allowed: "
                f"{', '.join(convolutions)}."
            )
    return content, styles


def load(source: Source, params: Params) -> Data[Pair]:
    """Load the content and the style image, the style at the size of the content.

    Args:
        source: The paths `CONTENT,STYLE`; `auto` is two images in `data_dir`/images.
        params: `size`, the length of the content's longer side in pixels.

    Raises:
        ModelsError: A file is absent or not a usable image.
    """
    if source.dataset == "auto":
        folder = Path(source.data_dir, "images")
        files = [str(folder / name) for name in ("octopus.jpg", "delaunay.jpg")]
    else:
        files = source.dataset.split(",")
    if len(files) != 2 or not all(os.path.isfile(file) for file in files):
        raise ModelsError(
            f"dataset={source.dataset!r} is not two image files; allowed: CONTENT.jpg,STYLE.jpg."
        )
    content = read_image(files[0], params["size"])
    height, width = content.shape[1:]
    style = read_image(files[1], (height, width))
    return Data(
        name=",".join(Path(file).stem for file in files),
        train=Pair(content, style),
        source=", ".join(files),
        facts={"height": height, "width": width},
    )


def build(params: Params, facts: Facts) -> nn.Module:
    """Build a grey image with its feature network.

    Args:
        params: A value for each of the recipe's parameters.
        facts: `height` and `width` of the image, and the `spec` of a tracked `backbone`.

    Raises:
        ModelsError: The backbone is unknown, or has no convolution.
    """
    whole = judge = backbone(params, facts)
    mean, std = [0.0] * 3, [1.0] * 3
    if not is_tracked(params["weights"]):
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    while isinstance(judge, Transfer):  # skip its resizing: the image is judged at full size
        if isinstance(judge.prepare, Fit):
            mean, std = judge.prepare.mean, judge.prepare.std
        judge = judge.backbone
    if not any(isinstance(module, nn.Conv2d) for module in judge.modules()):
        raise ModelsError(
            f"weights={params['weights']!r} is a network without convolutions, which style "
            "transfer needs."
        )
    return StyledPicture(
        facts["height"], facts["width"], judge=judge, whole=whole, mean=mean, std=std
    )


def unused(params: Params) -> Collection[str]:
    """Return the parameters that are ignored under the given (possibly partial) values."""
    return ("backbone",) if is_tracked(params.get("weights")) else ()


def weights(network: nn.Module, params: Params, state: Mapping[str, Tensor] | None) -> None:
    """Load the feature network's weights.

    Args:
        network: What `build` returned.
        params: A value for each of the recipe's parameters.
        state: The state dict of the tracked model that `weights` names, if it names one.

    Raises:
        ModelsError: The weights cannot be downloaded, are damaged, or do not fit.
    """
    assert isinstance(network, StyledPicture)
    load_weights(network.whole, first_weights(params, state), params["weights"])


RECIPE = Recipe(
    name="style-transfer",
    summary="the content of one image in the style of another (Gatys et al., 2016)",
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
            help="learning rate of Adam, for pixels in [0, 1]",
            search=Range(low=3e-3, high=1e-1, log=True),
            grid=(0.02, 0.05),
        ),
        "steps": Parameter(default=30, help="steps per epoch"),
        "size": Parameter(default=256, least=16, most=2048, help="longer side in pixels"),
        "content_weight": Parameter(
            default=1.0,
            least=0,
            help="weight of the content loss relative to the mean squared features",
        ),
        "style_weight": Parameter(
            default=100.0, help="weight of the style loss relative to its initial value"
        ),
        "backbone": replace(BACKBONE, default="vgg19"),
        "weights": WEIGHTS,
        "content_layer": Parameter(
            default="auto", help="a convolution; auto: conv4_2 of VGG-19, else the last"
        ),
        "style_layers": Parameter(
            default="auto", help="convolutions A,B,C; auto: the paper's for VGG-19, else all"
        ),
    },
    datasets="two image files CONTENT,STYLE, or auto: DATA_DIR/images/octopus.jpg and delaunay.jpg",
)
