"""The networks that the studies train, and the data that they train on."""

from collections.abc import Callable

from torch import nn

from models.data import DATASETS, Data, Images, load
from models.errors import ModelsError
from models.fashion_cnn import FashionCNN

__all__ = ["DATASETS", "MODELS", "Data", "FashionCNN", "Images", "ModelsError", "build", "load"]

MODELS: dict[str, Callable[[], nn.Module]] = {"fashion-cnn": FashionCNN}


def build(name: str) -> nn.Module:
    """A fresh network, its weights drawn from torch's global generator.

    Raises ModelsError for a name that is not in `MODELS`.
    """
    if name not in MODELS:
        raise ModelsError(f"model={name!r} is not known; allowed: {', '.join(MODELS)}.")
    return MODELS[name]()
