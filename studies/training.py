"""What `studies.train` and the studies have in common: one classifier, trained and tracked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from models import Data, build
from tracker import Epoch, Run, RunManager, fit


def begin(
    manager: RunManager,
    data: Data,
    *,
    model: str,
    lr: float,
    batch_size: int,
    shuffle: bool,
    epochs: int,
    device: torch.device,
    params: Mapping[str, Any],
) -> tuple[Run, Iterator[Epoch]]:
    """Begin to train `model` on `data` in a run of `manager`: the run, and its epochs.

    Each epoch is logged and checkpointed, and after the last one the run ends. The weights are
    drawn from torch's generator. A run that was cut off goes on where `manager.checkpoint` is.
    `params` are logged besides those that are used here.
    """
    network = build(model).to(device)
    loader = DataLoader(data.train, batch_size, shuffle=shuffle)
    val_loader = DataLoader(data.validation, batch_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    told = {
        "model": model,
        "dataset": data.name,
        "lr": lr,
        "batch_size": batch_size,
        "epochs": epochs,
        "shuffle": shuffle,
        "device": device,
        "optimizer": type(optimizer).__name__,
    }
    run = manager.begin_run(told | dict(params), network, loader)
    run.log_dataset(data.validation, "validation")
    if manager.checkpoint is not None:
        manager.checkpoint.restore(network=network, optimizer=optimizer, loader=loader)

    def train() -> Iterator[Epoch]:
        for epoch in fit(
            network,
            manager.watch(loader),
            optimizer,
            F.cross_entropy,
            epochs=epochs,
            done=manager.epoch_count,
            device=device,
            val_loader=val_loader,
            accuracy=True,
        ):
            manager.log_epoch(epoch)
            manager.save_checkpoint(optimizer=optimizer)
            yield epoch
        manager.end_run()

    return run, train()
