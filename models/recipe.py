"""What a recipe is: a network, its data, its loss and metrics, and its hyperparameters.

A new one is a file with an object `RECIPE` and a line in `models/__init__.py`; one of your own is
named as `package.module:object`.
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
"""A value for each of the recipe's parameters."""
Facts: TypeAlias = Mapping[str, Any]
"""What of the data, or of a backbone, makes the network's shape; JSON."""
Part = TypeVar("Part", bound=Dataset[Any], covariant=True)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Whole numbers, or floats, from `low` to `high`; with `log`, even by ratio."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A hyperparameter; its type is that of its default."""

    default: Value
    help: str
    least: float | None = None
    """The least number allowed; None: from 1 for whole numbers, above 0 for others."""
    most: float = math.inf
    allowed: tuple[str, ...] = ()
    """The texts allowed; none: any."""
    search: Range | tuple[Value, ...] | None = None
    """What a study draws from; None: the default."""
    grid: tuple[Value, ...] | None = None
    """The values of a study's grid; None: the default."""

    def __post_init__(self) -> None:
        """Raise ModelsError for a default that could not be given."""
        if self._value(str(self.default)) is None:
            raise ModelsError(f"default={self.default!r} is not allowed; it must be {self.domain}.")

    def parse(self, text: str) -> Value:
        """The value that `text` spells. Raises ValueError: one sentence that says what may be."""
        value = self._value(text)
        if value is None:
            raise ValueError(f"{text!r} is not allowed; it must be {self.domain}")
        return value

    @property
    def domain(self) -> str:
        """What a value must be, in words."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return f"one of {', '.join(self.allowed)}" if self.allowed else "a text"
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
        # Written so that NaN, which compares as false, is refused.
        return number if not too_low and number <= self.most and math.isfinite(number) else None


class Source(NamedTuple):
    """Where a recipe's data comes from, as it was asked for."""

    dataset: str
    data_dir: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Data(Generic[Part]):
    """A data set in its parts, which share no sample."""

    name: str
    train: Part
    validation: Part | None = None
    """A share of the training part, never of the test part."""
    test: Part | None = None
    source: str
    """Where it came from: a file, a folder, or the library that bundles it."""
    facts: Facts = field(default_factory=dict)


class Step(NamedTuple):
    """One step of training."""

    loss: Tensor
    """The mean over the step's samples, on the device."""
    samples: int


class Picture(NamedTuple):
    """A picture to log: `image` (channels, H, W), floats in [0, 1]."""

    name: str
    image: Tensor


class Text(NamedTuple):
    """A text to log as the file `path`."""

    path: str
    content: str


class Loop(Protocol):
    """A training that is not batches of (inputs, targets) through a network."""

    optimizer: Optimizer
    loader: DataLoader[Any]

    def train(self, epoch: int) -> Iterator[Step]:
        """Train for one epoch, numbered from 1, a step at a time."""

    def validate(self) -> Mapping[str, float]:
        """The metrics after an epoch, by their names in `Recipe.metrics`."""

    def test(self) -> Mapping[str, float]:
        """The metrics on the test part, `test_loss` for one; none where there is no such part."""

    def show(self, epoch: int) -> Iterable[Picture | Text]:
        """What there is to see after an epoch."""


def _as_they_are(outputs: Tensor) -> Tensor:
    return outputs


def _none(params: Params) -> Collection[str]:
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
    """A network that can be trained, searched and deployed by its name."""

    name: str
    summary: str
    """One line."""
    load: Callable[[Source, Params], Data[Any]]
    """The data. Raises ModelsError where there is none, or it is not fit."""
    build: Callable[[Params, Facts], nn.Module]
    """A fresh network; the weights are drawn from torch's global generator."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    epochs: int = 3
    dataset: str = "auto"
    datasets: str
    """What `--dataset` may be, in words."""
    metrics: Mapping[str, Literal["maximize", "minimize"]] = field(
        default_factory=lambda: _CLASSIFIER
    )
    """Which way is better; a study's objective is the first."""
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    """Mean loss of outputs and targets."""
    scores: Callable[[Tensor], Tensor] | None = _as_they_are
    """Scores (N, classes) of a classifier's outputs; None for what is no classifier."""
    optimizer: Callable[[nn.Module, Params], Optimizer] = _adam
    """The optimizer of a training without a loop of its own."""
    loop: Callable[[nn.Module, Data[Any], Params], Loop] | None = None
    """How it is trained, where that is not batches of (inputs, targets)."""
    weights: Callable[[nn.Module, Params, Mapping[str, Tensor] | None], None] | None = None
    """Give a fresh network the weights that the parameter `weights` names: those of one of our own
    models as they are given, else by itself."""
    is_model: bool = True
    """Whether what is trained is a model to log, not a picture."""
    predictor: Path | None = None
    """The file that makes predictions of raw texts, as `tracker.Predictor.file` has it: a table of
    `label`, a class's name, and its `probability`. The data's parts then have `texts`."""
    unused: Callable[[Params], Collection[str]] = _none
    """The parameters that have no effect beside the others, of which some may be missing."""
    before_epoch: Callable[[nn.Module, Params, int], None] | None = None
    """Change the network before an epoch: thaw layers, say."""

    def __post_init__(self) -> None:
        """Raise ModelsError for a recipe that could not be trained."""
        needed = {"batch_size"} if self.loop is None else set()
        if self.loop is None and self.optimizer is _adam:
            needed |= {"lr"}
        if missing := sorted(needed - set(self.parameters)):
            raise ModelsError(
                f"recipe {self.name!r} has no parameter {missing[0]!r}, which its training needs."
            )

    def defaults(self) -> dict[str, Value]:
        """The default of each parameter."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


CLASSIFIER_PARAMETERS: Mapping[str, Parameter] = {
    "lr": Parameter(
        default=0.01,
        help="Adam's learning rate, of a schedule the highest",
        search=Range(low=1e-4, high=1e-1, log=True),
        grid=(0.01, 0.001),
    ),
    "batch_size": Parameter(
        default=100,
        most=1_000_000,
        help="pictures in a batch",
        search=(50, 100, 200, 500, 1000),
        grid=(100, 1000),
    ),
    "shuffle": Parameter(
        default=True, help="true or false", search=(True, False), grid=(True, False)
    ),
    "schedule": Parameter(
        default="constant",
        allowed=("constant", "one-cycle"),
        help="of the learning rate: constant, or one-cycle, up and down again over all steps "
        "(Smith and Topin, 2018)",
    ),
}
"""The tutorial's hyperparameters, and its grid; and how the learning rate goes."""

DROPOUT = Parameter(
    default=0.0, least=0, most=0.9, help="share of hidden units that a step of training leaves out"
)


def scheduler(
    optimizer: Optimizer, params: Params, loader: DataLoader[Any], epochs: int
) -> LRScheduler | None:
    """What changes the learning rate after each batch, as the parameter `schedule` has it.

    None where nothing does. Raises ModelsError for a training that can have no such schedule.
    """
    if params.get("schedule") != "one-cycle":
        return None
    try:
        steps = epochs * len(loader)
    except TypeError as error:
        raise ModelsError(
            "schedule='one-cycle' is not allowed of a data set without a length; allowed: constant."
        ) from error
    if steps < 2:
        raise ModelsError(
            f"schedule='one-cycle' is not allowed with {steps} step of training, which would be "
            "of no length; allowed: constant, more epochs, or a smaller batch_size."
        )
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        # Of one that has momentum; SGD without would get some.
        cycle_momentum="betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum")),
    )
