"""Argument types that say in one sentence what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from models import RECIPES, ModelsError, find
from models.recipe import Parameter, Range, Recipe, Value

RAW = argparse.RawDescriptionHelpFormatter
DEFAULT_MODEL = "fashion-cnn"
_PREFIX = "parameter."  # what they are in the parsed arguments


def positive_int(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from 1"
        )
    return value


def natural(text: str) -> int:
    """A whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from 0"
        )
    return int(text)


def add_model(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Recipe:
    """Add the options of every training; returns the recipe that `arguments` name.

    Exits with a sentence for a model that is not known.
    """
    parser.add_argument("--model", default=DEFAULT_MODEL, help=_known())
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", nargs="?", default=DEFAULT_MODEL)
    try:
        recipe = find(finder.parse_known_args(arguments)[0].model or "")
    except ModelsError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    parser.add_argument("--dataset", default=recipe.dataset, help=recipe.datasets)
    parser.add_argument("--data-dir", default="data", help="where data sets lie or go")
    parser.add_argument(
        "--epochs", type=positive_int, default=recipe.epochs, help=f"by default {recipe.epochs}"
    )
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tracking-uri", help="by default the one that MLflow itself would use")
    parser.add_argument("--experiment", help="by default MLFLOW_EXPERIMENT_NAME, else Default")
    parser.add_argument("--offline", action="store_true", default=None, help="for `tracker sync`")
    return recipe


def add_logged_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument `model`, which becomes a model's URI."""
    parser.add_argument(
        "model",
        type=lambda text: text if ":/" in text else f"runs:/{text}/model",
        metavar="RUN_ID",
        help="a run, or a model: runs:/RUN_ID/model, models:/NAME@ALIAS, models:/NAME/1",
    )


def add_parameters(
    parser: argparse.ArgumentParser,
    recipe: Recipe,
    kind: Callable[[Parameter], Callable[[str], Any]],
    usual: Callable[[Parameter], str],
    how: str = "",
) -> None:
    """Add an option for each of the recipe's hyperparameters, read as `kind` says.

    `usual` says what it is by default, and `how` what may be written.
    """
    group = parser.add_argument_group(recipe.name, f"{recipe.summary}{how}")
    for name, parameter in recipe.parameters.items():
        text = f"{parameter.help}; by default {usual(parameter)}"
        try:
            group.add_argument(
                option(name),
                dest=_PREFIX + name,
                type=kind(parameter),
                help=text.replace("%", "%%"),
                metavar=name.upper(),
            )
        except argparse.ArgumentError:
            parser.exit(
                2,
                f"{parser.prog}: recipe {recipe.name!r} has a parameter {name!r}, which is an "
                "option of the command; it needs another name.\n",
            )


def given_parameters(given: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """The hyperparameters that were given."""
    every = {name: getattr(given, _PREFIX + name) for name in recipe.parameters}
    return {name: value for name, value in every.items() if value is not None}


def refuse_unused(
    parser: argparse.ArgumentParser, asked: Iterable[str], unused: Collection[str]
) -> None:
    """Exit with a sentence where a hyperparameter was asked for that has no effect."""
    for name in asked:
        if name in unused:
            parser.error(f"argument {option(name)}: it has no effect beside the other arguments")


def usual_value(parameter: Parameter) -> str:
    """What a hyperparameter of a training is by default."""
    return str(parameter.default)


def usual_domain(parameter: Parameter) -> str:
    """What a study searches of a hyperparameter by default, spelt as `domain` reads it."""
    drawn, points = _spelt(parameter.search), _spelt(parameter.grid)
    if drawn is None and points is None:
        return usual_value(parameter)
    fixed = usual_value(parameter)
    return f"{drawn or fixed}, in a grid {points or fixed}" if drawn != points else drawn or fixed


def _spelt(searched: Range | tuple[Value, ...] | None) -> str | None:
    if isinstance(searched, Range):
        return f"{searched.low:g}:{searched.high:g}{':log' if searched.log else ''}"
    return None if searched is None else ",".join(map(str, searched))


def value(parameter: Parameter) -> Callable[[str], Value]:
    """Reads one value of a hyperparameter."""

    def read(text: str) -> Value:
        try:
            return parameter.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def domain(parameter: Parameter) -> Callable[[str], list[Value] | BaseDistribution]:
    """Reads values, `A,B,C`, or the range between two numbers, `LOW:HIGH`, `:log` by ratio.

    Texts may hold commas: those that are no choice of a few are split at `|`.
    """
    one = value(parameter)

    def read(text: str) -> list[Value] | BaseDistribution:
        if isinstance(parameter.default, str) and not parameter.allowed:
            return [one(part) for part in text.split("|")]
        if ":" not in text or isinstance(parameter.default, (bool, str)):
            return [one(part) for part in text.split(",")]
        low, high, *rest = text.split(":")
        if rest not in ([], ["log"]):
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be LOW:HIGH[:log]")
        ends = one(low), one(high)
        assert not isinstance(ends[0], str)
        assert not isinstance(ends[1], str)
        if ends[0] > ends[1]:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; LOW must not be above HIGH")
        if rest and ends[0] == 0:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; LOW must be above 0 for log"
            )
        return distribution(Range(low=ends[0], high=ends[1], log=bool(rest)))

    return read


def default_space(recipe: Recipe, *, grid: bool) -> dict[str, list[Value] | BaseDistribution]:
    """What a study over the recipe searches where nothing else is asked for."""
    space: dict[str, list[Value] | BaseDistribution] = {}
    for name, parameter in recipe.parameters.items():
        usual = parameter.grid if grid else parameter.search
        if isinstance(usual, Range):
            space[name] = distribution(usual)
        elif usual is not None:
            space[name] = list(usual)
    return space


def distribution(given: Range) -> BaseDistribution:
    """Optuna's word for a range."""
    if isinstance(given.low, int) and isinstance(given.high, int):
        return IntDistribution(given.low, given.high, log=given.log)
    return FloatDistribution(given.low, given.high, log=given.log)


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--batch_size`, as `mlflow run -P batch_size=1` has it, as options."""
    return [
        option(word[2:].partition("=")[0]) + word[len(word.partition("=")[0]) :]
        if word.startswith("--")
        else word
        for word in arguments
    ]


def option(name: str) -> str:
    """The option of a hyperparameter."""
    return "--" + name.replace("_", "-")


def _known() -> str:
    known = "; ".join(f"{recipe.name}: {recipe.summary}" for recipe in RECIPES.values())
    return f"{known}; or package.module:object, a Recipe of your own".replace("%", "%%")


def seed(text: str) -> int:
    """A seed that torch takes: a whole number from 0 to 2**63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from 0 to 2**63 - 1"
        )
    return int(text)


def boolean(text: str) -> bool:
    """`true` or `false`, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be true or false")
    return text.lower() == "true"
