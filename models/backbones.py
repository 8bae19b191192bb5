"""Networks that were trained before: torchvision's, or one of our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision
from torch import Tensor, nn

from models.download import DownloadError, download_file
from models.errors import ModelsError
from models.recipe import Facts, Parameter, Params

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
"""Of each colour; what torchvision's weights were trained with."""
_PATIENCE_S = 1800.0  # for half a gigabyte
_WITH_HELPERS = ("googlenet", "inception_v3")  # in training they return more than the logits

BACKBONE = Parameter(
    default="resnet18", help="a classification network of torchvision, where weights names none"
)
WEIGHTS = Parameter(
    default="imagenet",
    help="imagenet (downloaded), none, or a tracked model: runs:/RUN_ID/model, models:/NAME@ALIAS",
)


def is_own(params: Params) -> bool:
    """Whether the backbone is one of our own tracked models."""
    return str(params.get("weights")).startswith(("runs:/", "models:/"))


def backbone(params: Params, facts: Facts) -> nn.Module:
    """The backbone that `params` name, with fresh weights. Raises ModelsError."""
    if is_own(params):
        from models import rebuild  # which imports every recipe, this one's too

        return rebuild(facts["backbone"])
    name, weights = params["backbone"], params["weights"]
    if weights not in ("imagenet", "none"):
        raise ModelsError(
            f"weights={weights!r} is not known; allowed: imagenet, none, runs:/RUN_ID/model or "
            "models:/NAME@ALIAS."
        )
    known = torchvision.models.list_models(module=torchvision.models, exclude=_WITH_HELPERS)
    if name not in known:
        raise ModelsError(f"backbone={name!r} is not known; allowed: {', '.join(known)}.")
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return network


def first_weights(params: Params, state: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The weights that the backbone begins with; none for `none`.

    Raises ModelsError where ImageNet's are not on this machine and cannot be downloaded.
    """
    if is_own(params):
        assert state is not None
        return state
    if params["weights"] == "none":
        return {}
    name = params["backbone"]
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    file = Path(urlsplit(url).path).name
    cached = Path(torch.hub.get_dir(), "checkpoints", file)
    try:
        if not cached.is_file():  # where torchvision then finds it
            # torchvision's names end with the beginning of the file's SHA-256: name-HASH.pth.
            sha256 = file.rpartition("-")[2].partition(".")[0]
            download_file(url, cached, sha256=sha256, limit_s=_PATIENCE_S)
    except DownloadError as error:
        raise ModelsError(
            f"weights='imagenet' of {name} cannot be downloaded ({error}); "
            "allowed without a network: none, or a tracked model, runs:/RUN_ID/model."
        ) from error
    try:
        trained = torchvision.models.get_model(name, weights="DEFAULT", progress=False)
    except Exception as error:  # what zip files, pickles and torch raise on a damaged file
        raise ModelsError(f"{cached} is damaged; remove it, and it is downloaded again.") from error
    state_dict: dict[str, Tensor] = trained.state_dict()
    return state_dict


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], named: Any) -> None:
    """Put `weights` into `network`; what it has beside them stays as it is.

    Raises ModelsError where one of them has another shape, or no place.
    """
    here = network.state_dict()
    for name, tensor in weights.items():
        if name not in here or here[name].shape != tensor.shape:
            has = tuple(here[name].shape) if name in here else "no such weight"
            raise ModelsError(
                f"weights={named!r} do not fit: {name} is {tuple(tensor.shape)}, and the "
                f"backbone has {has}."
            )
    network.load_state_dict(dict(weights), strict=False)
