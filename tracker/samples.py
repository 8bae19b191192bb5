"""What a loader feeds to a network, looked at without touching either."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from tracker.environment import preserve_rng

_DIGEST_SAMPLES = 64  # enough to tell data sets apart that must be decoded item by item


def sample_batch(loader: Any, size: int) -> Any:
    """The first `size` samples, batched as `loader` batches them; None for a stream.

    Reads the data set, not the loader: no order is advanced, no worker started, and every random
    generator is left as it was. A stream (IterableDataset, a generator) would lose what is read.
    """
    if isinstance(loader, (list, tuple)):
        return loader[0] if loader else None
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not _is_finite(dataset):
        return None
    with preserve_rng():
        if loader.batch_size is None and loader.batch_sampler is None:  # samples are batches
            return loader.collate_fn(dataset[0]) if len(dataset) else None
        samples = [dataset[index] for index in range(min(size, len(dataset)))]
        return loader.collate_fn(samples) if samples else None


def _is_finite(dataset: Any) -> bool:
    """Whether its samples can be asked for by number, and how many there are."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


def inputs_of(batch: Any, size: int) -> Tensor | None:
    """The input tensor of a batch, its first `size` samples; None where it has none."""
    while isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    return batch[:size] if isinstance(batch, Tensor) and batch.dim() > 0 else None


def dataset_name(dataset: Any) -> str:
    """The data set's own `name`, else its class; that of the whole for a part of one."""
    if isinstance(dataset, Subset):
        return dataset_name(dataset.dataset)
    name = getattr(dataset, "name", None)
    return name if isinstance(name, str) else type(dataset).__name__


class DatasetInput(NamedTuple):
    """What MLflow records of a data set: the fields of mlflow.entities.Dataset but the name."""

    digest: str
    """36 hexadecimal digits at most."""
    profile: dict[str, Any]


def describe_dataset(dataset: Any) -> DatasetInput:
    """A digest of what `dataset` holds, and its length.

    Tensors are read whole. A data set that makes its samples one by one is known by its length and
    64 of them, made with the generators at a fixed state and left as they were.
    """
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(type(dataset).__name__.encode())
    _feed(hasher, _content(dataset))
    profile: dict[str, Any] = {"class": type(dataset).__name__}
    if hasattr(dataset, "__len__"):
        profile["samples"] = len(dataset)
    return DatasetInput(hasher.hexdigest(), profile)


def _content(dataset: Any) -> Any:
    """The parts of a data set that make it what it is."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    if isinstance(dataset, Subset):
        return _content(dataset.dataset), list(dataset.indices)
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if isinstance(data, (Tensor, np.ndarray)) and targets is not None:  # torchvision's
        return data, targets
    if not _is_finite(dataset):
        return None
    length = len(dataset)
    step = -(-length // _DIGEST_SAMPLES) or 1
    with preserve_rng():
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed CUDA's too
        chosen = itertools.islice(range(0, length, step), _DIGEST_SAMPLES)
        return length, [dataset[index] for index in chosen]


def _feed(hasher: Any, value: Any) -> None:
    """Add `value` to the digest, by content and type."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        plain = dense.cpu().resolve_conj().resolve_neg().contiguous()
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype == object:
        _feed(hasher, [value.shape, value.tolist()])
    elif isinstance(value, (np.ndarray, np.generic)):
        hasher.update(f"array {value.dtype} {value.shape};".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Image.Image):
        hasher.update(f"image {value.mode} {value.size} {value.getpalette()};".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, Mapping):
        _feed(hasher, list(value.items()))
    elif isinstance(value, (list, tuple)):
        hasher.update(f"{len(value)} items;".encode())
        for item in value:
            _feed(hasher, item)
    elif isinstance(value, (str, bytes, bool, int, float, complex, type(None))):
        hasher.update(f"{type(value).__name__} {value!r};".encode())
    else:  # its repr may hold an address
        hasher.update(f"{type(value).__qualname__};".encode())
