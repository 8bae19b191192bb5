"""Recipes: a network with its data, loss, metrics and hyperparameters.

To add a recipe, write a module with an object `RECIPE` and list it in `models/__init__.py`.
A recipe outside this package is named `package.module:object`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Dataset

from models.errors import ModelsError

Value: TypeAlias = float | int | bool | str
Params: TypeAlias = Mapping[str, Any]
"""A value for each of a recipe's parameters."""
Facts: TypeAlias = Mapping[str, Any]
"""What the network's shape depends on besides its parameters, as JSON: for example the classes."""
Part = TypeVar("Part", bound=Dataset[Any], covariant=True)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Integers or floats from `low` to `high`, both included; uniform in the logarithm if `log`."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A hyperparameter, of its default's type.

    Raises:
        ModelsError: The default is not an allowed value.
    """

    default: Value
    help: str
    least: float | None = None
    """The smallest number allowed; by default 1 for integers, and anything above 0 for floats."""
    most: float = math.inf
    allowed: tuple[str, ...] = ()
    """The strings allowed; empty: any."""
    search: Range | tuple[Value, ...] | None = None
    """What a study samples by default; None: it keeps the default."""
    grid: tuple[Value, ...] | None = None
    """The values of a study's default grid; None: it keeps the default."""

    def __post_init__(self) -> None:
        if self._value(str(self.default)) is None:
            raise ModelsError(f"default={self.default!r} is not allowed; it must be {self.domain}.")

    def parse(self, text: str) -> Value:
        """Return the value that `text` spells.

        Raises:
            ValueError: It is not an allowed value; the message says what is, in one sentence.
        """
        value = self._value(text)
        if value is None:
            raise ValueError(f"{text!r} is not allowed; it must be {self.domain}")
        return value

    @property
    def domain(self) -> str:
        """The allowed values, in words."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return f"one of {', '.join(self.allowed)}" if self.allowed else "a string"
        most = f" to {self.most:g}" if math.isfinite(self.most) else ""
        if isinstance(self.default, int):
            return f"a whole number from {self._least:g}{most}"
        return (
            f"a number above 0{most}"
            if self.least is None
            else f"a number from {self.least:g}{most}"
        )

    @property
    def _least(self) -> float:
        return self.least if self.least is not None else 1 if isinstance(self.default, int) else 0

    def _value(self, text: str) -> Value | None:
        if isinstance(self.default, bool):
            return {"true": True, "false": False}.get(text.lower())
        if isinstance(self.default, str):
            return text if text in self.allowed or not self.allowed else None
        try:
            number = type(self.default)(text)
        except ValueError:
            return None
        too_low = number < self._least or (number == 0 and self.least is None)
        # `not too_low` alone would let NaN pass: it compares as false with everything.
        return number if not too_low and number <= self.most and math.isfinite(number) else None


class Source(NamedTuple):
    """The data a recipe is asked to load."""

    dataset: str
    data_dir: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Data(Generic[Part]):
    """A data set in parts that share no sample."""

    name: str
    train: Part
    validation: Part | None = None
    """A share of the training data, never of the test part."""
    test: Part | None = None
    source: str
    """Where the data came from: a file, a folder, or the library that bundles it."""
    facts: Facts = field(default_factory=dict)


class Step(NamedTuple):
    """One training step."""

    loss: Tensor
    """Mean over the step's samples, a scalar on the network's device."""
    samples: int


class Picture(NamedTuple):
    """An image to log: `image` is (channels, H, W), floats in [0, 1]."""

    name: str
    image: Tensor


class Text(NamedTuple):
    """A text to log as the file `path`."""

    path: str
    content: str


class Loop(Protocol):
    """A training loop for what is not batches of (inputs, targets) through a network.

    `validate`, `test` and `show` are called with the network in evaluation mode.
    """

    optimizer: Optimizer
    loader: DataLoader[Any]

    def train(self, epoch: int) -> Iterator[Step]:
        """Train for one epoch, numbered from 1, and yield after each step."""

    def validate(self) -> Mapping[str, float]:
        """Return the metrics after an epoch, by their names in `Recipe.metrics`."""

    def test(self) -> Mapping[str, float]:
        """Return metrics of the test part, such as `test_loss`; empty without a test part."""

    def show(self, epoch: int) -> Iterable[Picture | Text]:
        """Return images and texts to log after an epoch."""


def _identity(outputs: Tensor) -> Tensor:
    return outputs


def _nothing_unused(params: Params) -> Collection[str]:
    return ()


def _adam(network: nn.Module, params: Params) -> Optimizer:
    return Adam(network.parameters(), lr=params["lr"])


_CLASSIFIER: Mapping[str, Literal["maximize", "minimize"]] = {
    "val_accuracy": "maximize",
    "val_loss": "minimize",
    "accuracy": "maximize",
    "loss": "minimize",
    "epoch_duration": "minimize",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A network that can be trained, searched and exported by name.

    Raises:
        ModelsError: `parameters` lacks one that training needs.
    """

    name: str
    summary: str
    """One line."""
    load: Callable[[Source, Params], Data[Any]]
    """Load the data. Raises ModelsError if it is absent or unsuitable."""
    build: Callable[[Params, Facts], nn.Module]
    """Build a network, its weights drawn from torch's global generator."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    epochs: int = 3
    dataset: str = "auto"
    datasets: str
    """The values that `--dataset` takes, in words."""
    metrics: Mapping[str, Literal["maximize", "minimize"]] = field(
        default_factory=lambda: _CLASSIFIER
    )
    """The metrics and their directions; the first one is a study's default objective."""
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    """Mean loss of (outputs, targets)."""
    scores: Callable[[Tensor], Tensor] | None = _identity
    """Turn a classifier's outputs into scores (N, classes); None: not a classifier."""
    optimizer: Callable[[nn.Module, Params], Optimizer] = _adam
    """Make the optimizer, unless `loop` does."""
    loop: Callable[[nn.Module, Data[Any], Params], Loop] | None = None
    """Make the training loop; None: batches of (inputs, targets)."""
    example: Callable[[Data[Any]], Any] | None = None
    """Make an example of the inputs of the logged model; None: the network's first call."""
    weights: Callable[[nn.Module, Params, Mapping[str, Tensor] | None], None] | None = None
    """Load the weights that the parameter `weights` names into a new network. The last argument is
    the state dict of a tracked model, None if `weights` names something else."""
    is_model: bool = True
    """Whether training yields a model to log; False for a network whose result is an image."""
    predictor: Path | None = None
    """A file for `tracker.Predictor` that predicts from raw texts: a table of `label` (the class's
    name) and its `probability`. The data's parts must have `texts`."""
    unused: Callable[[Params], Collection[str]] = _nothing_unused
    """Parameters that are ignored under the given (possibly partial) values."""
    before_epoch: Callable[[nn.Module, Params, int], None] | None = None
    """Change the network before an epoch, for example unfreeze layers."""

    def __post_init__(self) -> None:
        needed = {"batch_size"} if self.loop is None else set()
        if self.loop is None and self.optimizer is _adam:
            needed |= {"lr"}
        if missing := sorted(needed - set(self.parameters)):
            raise ModelsError(
                f"recipe {self.name!r} lacks the parameter {missing[0]!r}, which training needs."
            )

    def defaults(self) -> dict[str, Value]:
        """Return each parameter's default."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


CLASSIFIER_PARAMETERS: Mapping[str, Parameter] = {
    "lr": Parameter(
        default=0.01,
        help="learning rate of Adam; the peak of a schedule",
        search=Range(low=1e-4, high=1e-1, log=True),
        grid=(0.01, 0.001),
    ),
    "batch_size": Parameter(
        default=100,
        most=1_000_000,
        help="images per batch",
        search=(50, 100, 200, 500, 1000),
        grid=(100, 1000),
    ),
    "shuffle": Parameter(
        default=True,
        help="shuffle the training set each epoch",
        search=(True, False),
        grid=(True, False),
    ),
    "schedule": Parameter(
        default="constant",
        allowed=("constant", "one-cycle"),
        help="learning rate schedule: constant, or one-cycle over all steps "
        "(Smith and Topin, 2018)",
    ),
}
"""The tutorial's hyperparameters with its grid, and a learning rate schedule."""

DROPOUT = Parameter(
    default=0.0, least=0, most=0.9, help="share of hidden units dropped in each training step"
)


def scheduler(
    optimizer: Optimizer, params: Params, loader: DataLoader[Any], epochs: int
) -> LRScheduler | None:
    """Make the learning rate scheduler that the parameter `schedule` asks for.

    Args:
        optimizer: The optimizer; its learning rates are the peaks of the schedule.
        params: The recipe's parameters.
        loader: The training set.
        epochs: Epochs of the whole training.

    Returns:
        A scheduler to step after each batch, or None for a constant learning rate.

    Raises:
        ModelsError: The training is too short for the schedule, or of unknown length.
    """
    if params.get("schedule") != "one-cycle":
        return None
    try:
        steps = epochs * len(loader)
    except TypeError as error:
        raise ModelsError(
            "schedule='one-cycle' needs a data set with a length; allowed here: constant."
        ) from error
    if steps < 2:
        raise ModelsError(
            f"schedule='one-cycle' needs at least 2 training steps, not {steps}; allowed: "
            "constant, more epochs, or a smaller batch_size."
        )
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        # Only for optimizers that have a momentum: plain SGD would be given one.
        cycle_momentum="betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum")),
    )
