"""One recipe, trained and tracked: the common part of `studies.train` and `studies.search`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

import models
from models.backbones import is_tracked
from models.recipe import Data, Loop, Params, Picture, Recipe, Source
from tracker import (
    ArgumentError,
    Epoch,
    Predictor,
    Run,
    RunManager,
    Trained,
    evaluate,
    fit,
    load_trained,
    run_epochs,
)
from tracker.training.device import evaluation_mode
from tracker.validation import checked_name

SPEC = "recipe.json"
"""A file logged with each model, from which `models.rebuild` builds its network."""
_CANDIDATES, _CHECKED = 64, 8  # validation texts considered for, and used in, a predictor's check


@dataclass(frozen=True)
class Task:
    """A recipe with its data and hyperparameters, ready to train."""

    name: str
    """The recipe's name, as given to `--model`."""
    recipe: Recipe
    params: Params
    data: Data[Any]
    backbone: Trained | None = None
    """The tracked model whose weights training starts from."""

    @classmethod
    def of(cls, model: str, params: Params, source: Source, tracking_uri: str | None) -> Task:
        """Find the recipe, and load its data and initial weights.

        Args:
            model: The recipe's name.
            params: A value for each of its parameters.
            source: The data to load.
            tracking_uri: Where a tracked model in `params` is stored; by default MLflow's own.

        Raises:
            ModelsError: The recipe or its data is absent or unsuitable.
            StoreError: The tracked model that `params["weights"]` names does not exist.
        """
        recipe = models.find(model)
        weights = params.get("weights")
        trained = None
        if is_tracked(weights):
            trained = load_trained(str(weights), tracking_uri)
            if SPEC not in trained.files:
                raise models.ModelsError(
                    f"weights={weights!r} was not logged by studies.train: it has no {SPEC}."
                )
        data = recipe.load(source, params)
        if recipe.loop is None and recipe.scores is not None and "classes" not in data.facts:
            raise models.ModelsError(
                f"recipe {recipe.name!r} is a classifier whose data lacks facts['classes']; "
                "add them, or pass scores=None."
            )
        return cls(model, recipe, params, data, trained)

    def check(self) -> None:
        """Raise ModelsError if the network does not fit its hyperparameters or its data."""
        network = self.network()
        if self.recipe.loop is not None:
            self.recipe.loop(network, self.data, self.params)

    @property
    def spec(self) -> dict[str, Any]:
        """The description from which `models.rebuild` builds this network."""
        facts = dict(self.data.facts)
        if self.backbone is not None:
            facts["backbone"] = models.parse_spec(
                self.backbone.files[SPEC],
                {*models.RECIPES, self.name},
                f"weights={self.params['weights']!r}",
            )
        return models.spec(self.name, self.params, facts)

    def network(self) -> nn.Module:
        """Build a network with its initial weights, drawn from torch's global generator."""
        network = models.rebuild(self.spec)
        if self.recipe.weights is not None:
            state = None if self.backbone is None else self.backbone.program.state_dict
            self.recipe.weights(network, self.params, state)
        return network


def begin(
    manager: RunManager,
    task: Task,
    *,
    epochs: int,
    device: torch.device,
    params: Mapping[str, Any],
    final: bool,
) -> tuple[Run, Iterator[Epoch]]:
    """Begin a run and prepare its epochs.

    Each epoch is logged and checkpointed, and the run ends after the last one. A manager with a
    checkpoint continues from there.

    Args:
        manager: Begins the run.
        task: What to train.
        epochs: Epochs in all, those before the checkpoint included.
        device: Where to train.
        params: Logged in addition to the recipe's.
        final: After the last epoch, evaluate the test part and log a classifier's mistakes.

    Returns:
        The run, and an iterator that trains one epoch at a time.

    Raises:
        ModelsError: The network does not fit its hyperparameters or its data.
        ArgumentError: The checkpoint's learning rate schedule is for other epochs.
    """
    recipe, data = task.recipe, task.data
    for name in recipe.metrics:
        checked_name(name, "metric")  # now, not after an epoch
    network = task.network().to(device)
    loop = None if recipe.loop is None else recipe.loop(network, data, task.params)
    size = task.params.get("batch_size", 1)
    if loop is not None:
        optimizer, loader, scheduler = loop.optimizer, loop.loader, None
    else:
        optimizer = recipe.optimizer(network, task.params)
        loader = DataLoader(data.train, size, shuffle=task.params.get("shuffle", True))
        scheduler = models.recipe.scheduler(optimizer, task.params, loader, epochs)
    logged = {
        "model": task.name,
        "dataset": data.name,
        "epochs": epochs,
        "device": device,
        "optimizer": type(optimizer).__name__,
        **{n: v for n, v in task.params.items() if n not in recipe.unused(task.params)},
    }
    if scheduler is not None:
        _check_same_epochs(manager, epochs)
    example = None if recipe.example is None else recipe.example(data)
    run = manager.begin_run(logged | dict(params), network, loader, example=example)
    for context, part in (("validation", data.validation), ("test", data.test)):
        if part is not None and (final or context != "test"):
            run.log_dataset(part, context)
    if manager.checkpoint is not None:
        manager.checkpoint.restore(
            network=network, optimizer=optimizer, scheduler=scheduler, loader=loader
        )

    def train() -> Iterator[Epoch]:
        numbers = {"epochs": epochs, "done": manager.epoch_count}
        if loop is not None:

            def validate() -> Mapping[str, float]:
                with evaluation_mode(network):
                    return loop.validate()

            passes = run_epochs(
                lambda number: manager.progress(loop.train(number), len(loader)),
                validate=validate,
                loader=loader,
                **numbers,
            )
        else:
            passes = fit(
                network,
                manager.progress(loader),
                optimizer,
                recipe.loss,
                device=device,
                val_loader=None if data.validation is None else DataLoader(data.validation, size),
                accuracy=recipe.scores is not None,
                scores=recipe.scores,
                scheduler=scheduler,
                **numbers,
            )
        for number in range(manager.epoch_count + 1, epochs + 1):
            if recipe.before_epoch is not None:
                recipe.before_epoch(network, task.params, number)
            epoch = next(passes)
            manager.log_epoch(epoch)
            if loop is not None:
                with evaluation_mode(network):
                    _show(run, loop, number)
            manager.save_checkpoint(optimizer=optimizer, scheduler=scheduler)
            yield epoch
        if final:
            with evaluation_mode(network):
                tested = _test(network, task, device) if loop is None else loop.test()
            if tested:
                run.log_metrics(tested, epochs)
            _log_mistakes(run, network, task)
        manager.end_run(
            model_files={SPEC: json.dumps(task.spec, indent=1)},
            predictor=_predictor(network, task, device),
        )

    return run, train()


def _check_same_epochs(manager: RunManager, epochs: int) -> None:
    """Raise ArgumentError if a run with a schedule is resumed for another number of epochs."""
    before = manager.resumed_params.get("epochs", str(epochs))
    if before != str(epochs):
        raise ArgumentError(
            f"epochs={epochs} differs from the run to resume, whose learning rate schedule ends "
            f"after {before}."
        )


def _predictor(network: nn.Module, task: Task, device: torch.device) -> Predictor | None:
    """The recipe's predictor, with validation texts and the network's answers to check it."""
    recipe, part = task.recipe, task.data.validation
    if recipe.predictor is None or recipe.scores is None or part is None:
        return None
    inputs = torch.stack([part[index][0] for index in range(min(_CANDIDATES, len(part)))])
    with evaluation_mode(network), torch.no_grad():
        probability, label = recipe.scores(network(inputs.to(device))).softmax(dim=1).max(dim=1)
    # The most confident answers: rounding cannot change their labels.
    chosen = probability.argsort(descending=True)[:_CHECKED].tolist()
    classes = task.data.facts["classes"]
    expected = pd.DataFrame(
        {
            "label": [classes[label[index].item()] for index in chosen],
            "probability": probability[chosen].double().cpu().numpy(),
        }
    )
    return Predictor(recipe.predictor, [part.texts[index] for index in chosen], expected)


def _show(run: Run, loop: Loop, epoch: int) -> None:
    for item in loop.show(epoch):
        if isinstance(item, Picture):
            run.log_image(item.image, item.name, step=epoch)
        else:
            run.log_text(item.content, item.path)


def _test(network: nn.Module, task: Task, device: torch.device) -> Mapping[str, float]:
    """The metrics of the test part, if there is one."""
    if task.data.test is None:
        return {}
    metrics = evaluate(
        network,
        DataLoader(task.data.test, task.params["batch_size"]),
        task.recipe.loss,
        device=device,
        accuracy=task.recipe.scores is not None,
        scores=task.recipe.scores,
    )
    return {f"test_{name}": value for name, value in metrics.items()}


def _log_mistakes(run: Run, network: nn.Module, task: Task) -> None:
    """Log a classifier's misclassifications of the validation part."""
    recipe, part = task.recipe, task.data.validation
    if recipe.loop is None and recipe.scores is not None and part is not None:
        run.log_mistakes(
            network,
            DataLoader(part, task.params["batch_size"]),
            classes=task.data.facts["classes"],
            scores=recipe.scores,
            shown=getattr(part, "texts", None),
        )
