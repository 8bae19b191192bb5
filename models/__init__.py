"""The networks that the studies train, and the data that they train on."""

import importlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from models import char_lstm, fashion_cnn, fashion_mlp, sentiment_lstm, style_transfer, transfer
from models.data import DATASETS, ImageData, Images, load
from models.errors import ModelsError
from models.fashion_cnn import FashionCNN
from models.fashion_mlp import FashionMLP
from models.recipe import Data, Facts, Params, Recipe

__all__ = [
    "DATASETS",
    "RECIPES",
    "Data",
    "FashionCNN",
    "FashionMLP",
    "ImageData",
    "Images",
    "ModelsError",
    "Recipe",
    "find",
    "load",
    "parse_spec",
    "rebuild",
    "spec",
]

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        fashion_cnn.RECIPE,
        fashion_mlp.RECIPE,
        char_lstm.RECIPE,
        transfer.RECIPE,
        style_transfer.RECIPE,
        sentiment_lstm.RECIPE,
    )
}


def find(name: str) -> Recipe:
    """The recipe of that name: one of `RECIPES`, or `package.module:object`, which is imported.

    Raises ModelsError where there is none.
    """
    if name in RECIPES:
        return RECIPES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ModelsError(
            f"model={name!r} is not known; allowed: {', '.join(RECIPES)}, or package.module:object."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may raise anything
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelsError(f"model={name!r} cannot be imported: {why}.") from error
    if not isinstance(found, Recipe):
        raise ModelsError(f"model={name!r} is no Recipe; it is a {type(found).__name__}.")
    return found


def spec(name: str, params: Params, facts: Facts) -> dict[str, Any]:
    """What `rebuild` needs, as JSON."""
    return {"model": name, "params": dict(params), "facts": dict(facts)}


def parse_spec(text: str, allowed: Collection[str], whose: str) -> dict[str, Any]:
    """What `spec` made, from its JSON, which came with the model `whose`.

    Parameters that are newer than it get their defaults. It may name no recipe but those that are
    `allowed`: it would be imported. Raises ModelsError for a text that is none, or names another.
    """
    try:
        found = json.loads(text)
        name, params, facts = found["model"], dict(found["params"]), dict(found["facts"])
    except (ValueError, TypeError, KeyError) as error:
        raise ModelsError(f"{whose} is a model whose recipe.json is damaged.") from error
    if name not in allowed:
        raise ModelsError(f"{whose} is a model of {name!r}; allowed: {', '.join(sorted(allowed))}.")
    if "backbone" in facts:
        facts["backbone"] = parse_spec(json.dumps(facts["backbone"]), {*RECIPES, *allowed}, whose)
    return spec(name, {**find(name).defaults(), **params}, facts)


def rebuild(described: Mapping[str, Any]) -> nn.Module:
    """The network that `spec` describes, with fresh weights. Raises ModelsError."""
    return find(described["model"]).build(described["params"], described["facts"])
