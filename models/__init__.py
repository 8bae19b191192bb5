"""The networks that the studies train, and the data they are trained on."""

import importlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from models import char_lstm, fashion_cnn, fashion_mlp, sentiment_lstm, style_transfer, transfer
from models.data import DATASETS, ImageData, Images, load
from models.errors import ModelsError, first_line
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
    """Return a recipe by name.

    Args:
        name: A key of `RECIPES`, or `package.module:object`, which is imported.

    Raises:
        ModelsError: The name is unknown, the import fails, or the object is not a Recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ModelsError(
            f"model={name!r} is unknown; allowed: {', '.join(RECIPES)}, or package.module:object."
        )
    try:
        recipe = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the user's module may raise anything
        raise ModelsError(f"model={name!r} cannot be imported: {first_line(error)}.") from error
    if not isinstance(recipe, Recipe):
        raise ModelsError(f"model={name!r} is a {type(recipe).__name__}, not a Recipe.")
    return recipe


def spec(name: str, params: Params, facts: Facts) -> dict[str, Any]:
    """Return the JSON-serialisable description that `rebuild` builds a network from.

    Args:
        name: The recipe's name, as `find` takes it.
        params: A value for each of the recipe's parameters.
        facts: The facts of the data that the network was built for.
    """
    return {"model": name, "params": dict(params), "facts": dict(facts)}


def parse_spec(text: str, allowed: Collection[str], source: str) -> dict[str, Any]:
    """Parse the JSON of a `spec` that came with a logged model.

    Parameters that were added since the model was logged get their defaults.

    Args:
        text: The JSON.
        allowed: The recipes it may name. No other is looked up: finding a recipe imports it.
        source: The argument that named the model, for messages: `model='runs:/…'`.

    Raises:
        ModelsError: The JSON is damaged, or names a recipe that is not allowed.
    """
    try:
        described = json.loads(text)
        name = described["model"]
        params, facts = dict(described["params"]), dict(described["facts"])
    except (ValueError, TypeError, KeyError) as error:
        raise ModelsError(f"{source} is a model with a damaged recipe.json.") from error
    if name not in allowed:
        raise ModelsError(
            f"{source} is a model of {name!r}; allowed: {', '.join(sorted(allowed))}."
        )
    if "backbone" in facts:
        facts["backbone"] = parse_spec(json.dumps(facts["backbone"]), {*RECIPES, *allowed}, source)
    return spec(name, {**find(name).defaults(), **params}, facts)


def rebuild(described: Mapping[str, Any]) -> nn.Module:
    """Build the network that `spec` describes, with fresh weights.

    Args:
        described: What `spec` or `parse_spec` returned.

    Raises:
        ModelsError: The recipe is unknown, or its parameters do not fit together.
    """
    return find(described["model"]).build(described["params"], described["facts"])
