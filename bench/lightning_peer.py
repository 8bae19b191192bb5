"""Lightning with its MLFlowLogger, configured for speed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import MLFlowLogger
from torch import Tensor

from bench.measuring import Turn
from bench.peers import BATCH, RUN
from models import FashionCNN


class Lightning:
    """Lightning's loop, which logs the loss every `every` steps and per epoch."""

    def __init__(self, folder: Path, every: int) -> None:
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        self._every = every
        self._logger = MLFlowLogger(tracking_uri=f"sqlite:///{folder / 'lightning.db'}")
        self._module = _Module()

    def turn(self, lead: Sequence[Any], batches: Sequence[Any]) -> Turn:
        """Measure an epoch without the start and end of `fit`; see `bench.overhead.Lane.turn`."""
        clock = _Clock(len(lead))
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=self._logger,
            log_every_n_steps=self._every,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[clock],
        )
        trainer.fit(self._module, _Loader([*lead, *batches]))
        return Turn(clock.seconds, clock.cpu, clock.epoch)


class _Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = FashionCNN()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=RUN.lr)


class _Loader:
    """Wraps the batches: Lightning takes a list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


class _Clock(pl.Callback):
    """Measures from the first step after the lead to the end of the epoch."""

    def __init__(self, lead: int) -> None:
        self._lead = lead
        self.seconds = self.cpu = self.epoch = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self._lead:
            self._started = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self._epoch_ends = time.perf_counter()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        ended = time.perf_counter()
        self.seconds, self.epoch = ended - self._started[0], ended - self._epoch_ends
        self.cpu = time.process_time() - self._started[1]
