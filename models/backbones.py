"""Pretrained networks: torchvision's, or tracked models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from models.download import DownloadError, download_file
from models.errors import ModelsError
from models.recipe import Facts, Parameter, Params

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
"""Per colour channel; torchvision's weights were trained with these."""
_LIMIT_S = 1800.0  # for half a gigabyte
_AUXILIARY = ("googlenet", "inception_v3")  # they return more than the logits in training

BACKBONE = Parameter(
    default="resnet18",
    help="classification network of torchvision; ignored if --weights is a tracked model",
)
WEIGHTS = Parameter(
    default="imagenet",
    help="imagenet (downloaded), none, or a tracked model: runs:/RUN_ID/model, models:/NAME@ALIAS",
)


def is_tracked(weights: object) -> bool:
    """Return whether the parameter `weights` names a tracked model."""
    return str(weights).startswith(("runs:/", "models:/"))


def backbone(params: Params, facts: Facts) -> nn.Module:
    """Build a backbone with fresh weights.

    Args:
        params: The parameters `backbone` and `weights`.
        facts: Has the `spec` of the backbone as `backbone` if `weights` names a tracked model.

    Raises:
        ModelsError: The network or its weights are unknown.
    """
    weights = params["weights"]
    if is_tracked(weights):
        from models import rebuild  # imported late: it imports every recipe, this module's too

        return rebuild(facts["backbone"])
    name = params["backbone"]
    if weights not in ("imagenet", "none"):
        raise ModelsError(
            f"weights={weights!r} is unknown; allowed: imagenet, none, runs:/RUN_ID/model or "
            "models:/NAME@ALIAS."
        )
    import torchvision  # takes seconds

    known = torchvision.models.list_models(module=torchvision.models, exclude=_AUXILIARY)
    if name not in known:
        raise ModelsError(f"backbone={name!r} is unknown; allowed: {', '.join(known)}.")
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return network


def first_weights(params: Params, state: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """Return the weights that the backbone starts from; empty for `none`.

    Args:
        params: The parameters `backbone` and `weights`.
        state: The state dict of the tracked model that `weights` names, if it names one.

    Raises:
        ModelsError: ImageNet weights are not on disk and cannot be downloaded, or are damaged.
    """
    if is_tracked(params["weights"]):
        assert state is not None
        return state
    if params["weights"] == "none":
        return {}
    import torchvision

    name = params["backbone"]
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    file = Path(urlsplit(url).path).name
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        if not cached.is_file():  # torchvision looks there first
            # torchvision's file names end with the first digits of their SHA-256: name-HASH.pth.
            sha256 = file.rpartition("-")[2].partition(".")[0]
            download_file(url, cached, sha256=sha256, limit_s=_LIMIT_S)
    except DownloadError as error:
        raise ModelsError(
            f"weights='imagenet' of {name} cannot be downloaded ({error}); "
            "allowed offline: none, or a tracked model, runs:/RUN_ID/model."
        ) from error
    try:
        trained = torchvision.models.get_model(name, weights="DEFAULT", progress=False)
    except Exception as error:  # zipfile, pickle and torch each raise their own on a damaged file
        raise ModelsError(f"{cached} is damaged; remove it to download it again.") from error
    state_dict: dict[str, Tensor] = trained.state_dict()
    return state_dict


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], argument: Any) -> None:
    """Load weights into a network; its other weights keep their values.

    Args:
        network: Has every weight in `weights`, and may have more.
        weights: A state dict.
        argument: The value of the parameter `weights`, for messages.

    Raises:
        ModelsError: The network lacks one of the weights, or has it in another shape.
    """
    own = network.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            expected = tuple(own[name].shape) if name in own else "no such weight"
            raise ModelsError(
                f"weights={argument!r} do not fit: {name} is {tuple(tensor.shape)}, but the "
                f"backbone has {expected}."
            )
    network.load_state_dict(dict(weights), strict=False)
