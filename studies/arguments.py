"""Options that the commands share, and argument types whose errors say what is allowed."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

from models import RECIPES, ModelsError, find
from models.recipe import Parameter, Range, Recipe, Value

RAW = argparse.RawDescriptionHelpFormatter
DEFAULT_MODEL = "fashion-cnn"
_PREFIX = "parameter."  # of hyperparameters in the parsed arguments


def positive_int(text: str) -> int:
    """Parse a whole number from 1."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Parse a whole number from 0."""
    return _whole(text, 0)


def seed(text: str) -> int:
    """Parse a seed that torch accepts."""
    return _whole(text, 0, 2**63 - 1)


def _whole(text: str, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        end = "" if most is None else f" to {most}"
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be a whole number from {least}{end}"
        )
    return value


def boolean(text: str) -> bool:
    """Parse `true` or `false`, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be true or false")
    return text.lower() == "true"


def add_tracking_uri(parser: argparse.ArgumentParser) -> None:
    """Add `--tracking-uri`."""
    parser.add_argument(
        "--tracking-uri", metavar="URI", help="where MLflow stores runs; default: MLflow's own"
    )


def add_seed(parser: argparse.ArgumentParser, help: str) -> None:
    """Add `--seed`."""
    parser.add_argument("--seed", type=seed, default=0, help=f"{help}; default: 0")


def add_model(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Recipe:
    """Add the options of every training; exit with a message if the model is unknown.

    Args:
        parser: The command's parser.
        arguments: The command line, which `--model` is read from.

    Returns:
        The recipe that `--model` names.
    """
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME", help=_models_help())
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", nargs="?", default=DEFAULT_MODEL)
    try:
        recipe = find(finder.parse_known_args(arguments)[0].model or "")
    except ModelsError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    parser.add_argument(
        "--dataset",
        default=recipe.dataset,
        help=_escaped(f"{recipe.datasets}; default: {recipe.dataset}"),
    )
    parser.add_argument(
        "--data-dir",
        default="data",
        metavar="FOLDER",
        help="where data sets are read from and downloaded to; default: data",
    )
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=recipe.epochs,
        metavar="N",
        help=f"epochs to train; default: {recipe.epochs}",
    )
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, mps, xpu or auto, which takes a GPU if there is one; default: auto",
    )
    add_seed(parser, "seed of the weights, the order of samples and the validation split")
    add_tracking_uri(parser)
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="MLflow experiment; default: MLFLOW_EXPERIMENT_NAME, or Default if that is unset",
    )
    parser.add_argument(
        "--offline",
        action="store_true",
        default=None,
        help='keep the run on disk until "tracker sync" uploads it',
    )
    return recipe


def add_logged_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument `model`, which is parsed into a model URI."""
    parser.add_argument(
        "model",
        type=lambda text: text if ":/" in text else f"runs:/{text}/model",
        metavar="RUN_ID",
        help="a run, or a model: runs:/RUN_ID/model, models:/NAME@ALIAS, models:/NAME/1",
    )


def add_parameters(
    parser: argparse.ArgumentParser,
    recipe: Recipe,
    parse: Callable[[Parameter], Callable[[str], Any]],
    describe_default: Callable[[Parameter], str],
    syntax: str = "",
) -> None:
    """Add an option for each of a recipe's hyperparameters.

    Args:
        parser: The command's parser; it exits with a message if an option's name is taken.
        recipe: The recipe.
        parse: Returns the argument type for a hyperparameter.
        describe_default: Says what a hyperparameter is by default.
        syntax: Appended to the group's description: how values are written.
    """
    group = parser.add_argument_group(recipe.name, _escaped(f"{recipe.summary}{syntax}"))
    for name, parameter in recipe.parameters.items():
        try:
            group.add_argument(
                option(name),
                dest=_PREFIX + name,
                type=parse(parameter),
                help=_escaped(f"{parameter.help}; default: {describe_default(parameter)}"),
                metavar="true|false" if isinstance(parameter.default, bool) else name.upper(),
            )
        except argparse.ArgumentError:
            parser.exit(
                2,
                f"{parser.prog}: recipe {recipe.name!r} has a parameter {name!r}, which is an "
                "option of the command; rename the parameter.\n",
            )


def given_parameters(given: argparse.Namespace, recipe: Recipe) -> dict[str, Any]:
    """Return the hyperparameters that the command line sets."""
    values = {name: getattr(given, _PREFIX + name) for name in recipe.parameters}
    return {name: value for name, value in values.items() if value is not None}


def refuse_unused(
    parser: argparse.ArgumentParser, given: Iterable[str], unused: Collection[str]
) -> None:
    """Exit with a message if the command line sets a hyperparameter that is ignored.

    Args:
        parser: The command's parser, which prints the message.
        given: The hyperparameters that the command line sets.
        unused: The hyperparameters that are ignored.
    """
    for name in given:
        if name in unused:
            parser.error(
                f"argument {option(name)}: it has no effect together with the other options"
            )


def default_value(parameter: Parameter) -> str:
    """Describe the default of a hyperparameter in a training."""
    return _shown(parameter.default) or "empty"


def default_domain(parameter: Parameter) -> str:
    """Describe what a study searches by default, in the syntax that `domain` parses."""
    fixed = default_value(parameter)
    sampled, points = _spelt(parameter.search) or fixed, _spelt(parameter.grid) or fixed
    return sampled if sampled == points else f"{sampled}, in a grid {points}"


def _spelt(values: Range | tuple[Value, ...] | None) -> str | None:
    if isinstance(values, Range):
        return f"{values.low:g}:{values.high:g}{':log' if values.log else ''}"
    return None if values is None else ",".join(map(_shown, values))


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def value(parameter: Parameter) -> Callable[[str], Value]:
    """Return an argument type for one value of a hyperparameter."""

    def read(text: str) -> Value:
        try:
            return parameter.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def domain(parameter: Parameter) -> Callable[[str], list[Value] | BaseDistribution]:
    """Return an argument type for values `A,B,C`, or a range `LOW:HIGH` or `LOW:HIGH:log`.

    Free text may contain commas, so it is split at `|` instead.
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
    """Return the search space of a study whose command line sets no hyperparameter.

    Args:
        recipe: The recipe.
        grid: Whether the study's sampler is a grid.
    """
    space: dict[str, list[Value] | BaseDistribution] = {}
    for name, parameter in recipe.parameters.items():
        values = parameter.grid if grid else parameter.search
        if isinstance(values, Range):
            space[name] = distribution(values)
        elif values is not None:
            space[name] = list(values)
    return space


def distribution(values: Range) -> BaseDistribution:
    """Return Optuna's distribution for a range."""
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def hyphenated(arguments: Sequence[str]) -> list[str]:
    """Spell options with hyphens: `mlflow run -P batch_size=1` passes `--batch_size`."""
    words = []
    for word in arguments:
        name, equals, text = word.partition("=")
        words.append(f"{name.replace('_', '-')}{equals}{text}" if word[:2] == "--" else word)
    return words


def option(name: str) -> str:
    """Return the option that sets a hyperparameter."""
    return "--" + name.replace("_", "-")


def _models_help() -> str:
    known = "; ".join(f"{recipe.name}: {recipe.summary}" for recipe in RECIPES.values())
    return _escaped(f"{known}; or your own Recipe, package.module:object; default: {DEFAULT_MODEL}")


def _escaped(text: str) -> str:
    """Argparse formats help texts with %."""
    return text.replace("%", "%%")
