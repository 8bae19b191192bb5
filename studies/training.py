"""What `studies.train` and the studies have in common: one recipe, trained and tracked."""

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

SPEC = "recipe.json"
"""What travels with a model: all that `models.rebuild` needs."""
_CANDIDATES, _CHECKED = 64, 8  # texts that a predictor is checked on


@dataclass(frozen=True)
class Task:
    """A recipe with its data and hyperparameters, ready to be trained."""

    name: str
    recipe: Recipe
    params: Params
    data: Data[Any]
    backbone: Trained | None = None

    @classmethod
    def of(cls, model: str, params: Params, source: Source, tracking_uri: str | None) -> Task:
        """Find the recipe, its data and the weights that it begins with.

        Raises ModelsError or StoreError where one of them is not to be had.
        """
        recipe = models.find(model)
        weights = params.get("weights")
        trained = None
        if isinstance(weights, str) and weights.startswith(("runs:/", "models:/")):
            trained = load_trained(weights, tracking_uri)
            if SPEC not in trained.files:
                raise models.ModelsError(
                    f"weights={weights!r} is not a model of studies.train: it has no {SPEC}."
                )
        data = recipe.load(source, params)
        if recipe.loop is None and recipe.scores is not None and "classes" not in data.facts:
            raise models.ModelsError(
                f"recipe {recipe.name!r} is a classifier whose data has no facts['classes']; "
                "with scores=None it is none."
            )
        return cls(model, recipe, params, data, trained)

    def check(self) -> None:
        """Raise ModelsError where the network does not fit its hyperparameters or its data."""
        network = self.network()
        if self.recipe.loop is not None:
            self.recipe.loop(network, self.data, self.params)

    @property
    def spec(self) -> dict[str, Any]:
        """What `models.rebuild` needs to make this network."""
        facts = dict(self.data.facts)
        if self.backbone is not None:
            facts["backbone"] = models.parse_spec(
                self.backbone.files[SPEC],
                {*models.RECIPES, self.name},
                f"weights={self.params['weights']!r}",
            )
        return models.spec(self.name, self.params, facts)

    def network(self) -> nn.Module:
        """A fresh network; what of it is random is drawn from torch's generator."""
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
    """Begin to train in a run of `manager`: the run, and its epochs.

    Each epoch is logged and checkpointed, and after the last one the run ends. A run that was cut
    off goes on where `manager.checkpoint` is. `params` are logged besides those of the recipe.
    With `final` the network is tested after the last epoch, and a classifier's mistakes logged.
    """
    recipe, data = task.recipe, task.data
    network = task.network().to(device)
    loop = None if recipe.loop is None else recipe.loop(network, data, task.params)
    size = task.params.get("batch_size", 1)
    if loop is not None:
        optimizer, loader, scheduler = loop.optimizer, loop.loader, None
    else:
        optimizer = recipe.optimizer(network, task.params)
        loader = DataLoader(data.train, size, shuffle=task.params.get("shuffle", True))
        scheduler = models.recipe.scheduler(optimizer, task.params, loader, epochs)
    told = {
        "model": task.name,
        "dataset": data.name,
        "epochs": epochs,
        "device": device,
        "optimizer": type(optimizer).__name__,
        **{n: v for n, v in task.params.items() if n not in recipe.unused(task.params)},
    }
    if scheduler is not None:
        _check_same_epochs(manager, epochs)
    run = manager.begin_run(told | dict(params), network, loader)
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
            passes = run_epochs(
                lambda number: manager.progress(loop.train(number), len(loader)),
                validate=loop.validate,
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
                _show(run, loop, number)
            manager.save_checkpoint(optimizer=optimizer, scheduler=scheduler)
            yield epoch
        if final:
            if tested := _test(network, task, device) if loop is None else loop.test():
                run.log_metrics(tested, epochs)
            _log_mistakes(run, network, task)
        manager.end_run(
            model_files={SPEC: json.dumps(task.spec, indent=1)},
            predictor=_predictor(network, task, device),
        )

    return run, train()


def _check_same_epochs(manager: RunManager, epochs: int) -> None:
    """Raise ArgumentError where a run with a schedule goes on to another end."""
    had = manager.resumed_params.get("epochs", str(epochs))
    if had != str(epochs):
        raise ArgumentError(
            f"epochs={epochs} is not what the run began with, {had!r}; its schedule ends there."
        )


def _predictor(network: nn.Module, task: Task, device: torch.device) -> Predictor | None:
    """The recipe's predictor, with what the network says of texts of the validation part."""
    recipe, part = task.recipe, task.data.validation
    if recipe.predictor is None or recipe.scores is None or part is None:
        return None
    inputs = torch.stack([part[index][0] for index in range(min(_CANDIDATES, len(part)))])
    with evaluation_mode(network), torch.no_grad():
        sure, number = recipe.scores(network(inputs.to(device))).softmax(dim=1).max(dim=1)
    # The surest of them: no rounding turns their labels.
    chosen = sure.argsort(descending=True)[:_CHECKED].tolist()
    classes = task.data.facts["classes"]
    expected = pd.DataFrame(
        {
            "label": [classes[number[index].item()] for index in chosen],
            "probability": sure[chosen].double().cpu().numpy(),
        }
    )
    return Predictor(recipe.predictor, [part.texts[index] for index in chosen], expected)


def _show(run: Run, loop: Loop, epoch: int) -> None:
    for thing in loop.show(epoch):
        if isinstance(thing, Picture):
            run.log_image(thing.name, thing.image, step=epoch)
        else:
            run.log_text(thing.content, thing.path)


def _test(network: nn.Module, task: Task, device: torch.device) -> Mapping[str, float]:
    """The metrics on the test part."""
    if task.data.test is None:
        return {}
    found = evaluate(
        network,
        DataLoader(task.data.test, task.params["batch_size"]),
        task.recipe.loss,
        device=device,
        accuracy=task.recipe.scores is not None,
        scores=task.recipe.scores,
    )
    return {f"test_{name}": value for name, value in found.items()}


def _log_mistakes(run: Run, network: nn.Module, task: Task) -> None:
    """Log what a classifier takes for something else, of the validation part."""
    recipe, part = task.recipe, task.data.validation
    if recipe.loop is None and recipe.scores is not None and part is not None:
        run.log_mistakes(
            network,
            DataLoader(part, task.params["batch_size"]),
            classes=task.data.facts["classes"],
            scores=recipe.scores,
            shown=getattr(part, "texts", None),
        )
