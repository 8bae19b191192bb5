"""Samples, name and digest of a data set, read without side effects."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from tracker.training.rng import preserve_rng

logger = logging.getLogger(__name__)

_DIGEST_SAMPLES = 64  # enough to distinguish data sets whose samples must be decoded


def sample_batch(loader: Any, size: int) -> Any:
    """Return the first samples, batched the way `loader` does it.

    Reads the data set, not the loader: this advances no order, starts no workers and leaves all
    random generators unchanged.

    Args:
        loader: A DataLoader, or a list or tuple of batches.
        size: Maximum number of samples. If each item is a batch already, one item is returned.

    Returns:
        The batch; None if there are no samples, if the data set fails, or for a stream
        (IterableDataset, generator), which would lose what is read.
    """
    if isinstance(loader, (list, tuple)):
        return loader[0] if loader else None
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not _is_finite(dataset):
        return None
    with _preserve_generators(dataset):
        try:
            if loader.batch_size is None and loader.batch_sampler is None:  # items are batches
                return loader.collate_fn(dataset[0]) if len(dataset) else None
            samples = [dataset[index] for index in range(min(size, len(dataset)))]
            return loader.collate_fn(samples) if samples else None
        except Exception as error:  # noqa: BLE001 - the user's data set may raise anything
            logger.warning("Sample pictures are not logged: the data set raised %r.", error)
            return None


def inputs_of(batch: Any, size: int) -> Tensor | None:
    """Return the first `size` samples of a batch's first tensor, (N, …); None without one."""
    while isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    return batch[:size] if isinstance(batch, Tensor) and batch.dim() > 0 else None


def dataset_name(dataset: Any) -> str:
    """Return the data set's `name`, else its class; a Subset is named after the whole."""
    if isinstance(dataset, Subset):
        return dataset_name(dataset.dataset)
    name = getattr(dataset, "name", None)
    return name if isinstance(name, str) else type(dataset).__name__


class DatasetInput(NamedTuple):
    """The fields of mlflow.entities.Dataset that describe the content."""

    digest: str
    """Up to 36 hexadecimal digits."""
    profile: dict[str, Any]
    """Class and, if known, number of samples."""


def describe_dataset(dataset: Any) -> DatasetInput:
    """Return a digest of the data set's content, and its class and length.

    Tensors are hashed completely. Of a data set that creates its samples one by one, the length
    and 64 samples are hashed, created with seeded generators that are restored afterwards. If a
    data set has an attribute `digest_of`, that is hashed instead: a text rather than its codes.
    """
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(type(dataset).__name__.encode())
    _hash(hasher, _content(dataset))
    profile: dict[str, Any] = {"class": type(dataset).__name__}
    if hasattr(dataset, "__len__"):
        profile["samples"] = len(dataset)
    return DatasetInput(hasher.hexdigest(), profile)


def _content(dataset: Any) -> Any:
    """The values that identify a data set."""
    if (source := getattr(dataset, "digest_of", None)) is not None:
        return source
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    if isinstance(dataset, Subset):
        return _content(dataset.dataset), list(dataset.indices)
    data, targets = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if isinstance(data, (Tensor, np.ndarray)) and targets is not None:  # torchvision
        return data, targets
    if not _is_finite(dataset):
        return None
    length = len(dataset)
    step = -(-length // _DIGEST_SAMPLES) or 1
    with _preserve_generators(dataset):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed CUDA too
        indices = itertools.islice(range(0, length, step), _DIGEST_SAMPLES)
        try:
            return length, [dataset[index] for index in indices]
        except Exception:  # noqa: BLE001 - the user's data set may raise anything
            return length


def _is_finite(dataset: Any) -> bool:
    """Whether samples can be read by index, and their number is known."""
    return not isinstance(dataset, IterableDataset) and hasattr(dataset, "__len__")


@contextmanager
def _preserve_generators(dataset: Any) -> Iterator[None]:
    """Restore the global generators, and those held by the data set, on exit."""
    held = list(_generators(dataset))
    states = [copy.deepcopy(_state(generator)) for generator in held]
    try:
        with preserve_rng():
            yield
    finally:
        for generator, state in zip(held, states, strict=True):
            _state(generator, state)


def _generators(owner: Any, depth: int = 4) -> Iterator[Any]:
    """Random generators in the attributes of a data set, its parts and its transforms."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    values = owner if isinstance(owner, (list, tuple)) else getattr(owner, "__dict__", {}).values()
    for value in list(values)[:_DIGEST_SAMPLES]:
        if isinstance(value, kinds):
            yield value
        elif depth and (hasattr(value, "__dict__") or isinstance(value, (list, tuple))):
            yield from _generators(value, depth - 1)


def _state(generator: Any, state: Any = None) -> Any:
    """Return the state of a generator of any of these kinds; with `state`, set it."""
    if isinstance(generator, np.random.Generator):
        if state is not None:
            generator.bit_generator.state = state
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate() if state is None else generator.setstate(state)
    return generator.get_state() if state is None else generator.set_state(state)


def _hash(hasher: Any, value: Any) -> None:
    """Add the content and the type of `value` to the digest."""
    if isinstance(value, Tensor):
        dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        plain = dense.cpu().resolve_conj().resolve_neg().contiguous()
        hasher.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        hasher.update(plain.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype == object:
        _hash(hasher, [value.shape, value.tolist()])
    elif isinstance(value, (np.ndarray, np.generic)):
        hasher.update(f"array {value.dtype} {value.shape};".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Image.Image):
        hasher.update(f"image {value.mode} {value.size} {value.getpalette()};".encode())
        hasher.update(value.tobytes())
    elif isinstance(value, Mapping):
        _hash(hasher, list(value.items()))
    elif isinstance(value, (list, tuple)):
        hasher.update(f"{len(value)} items;".encode())
        for item in value:
            _hash(hasher, item)
    elif isinstance(value, (str, bytes, bool, int, float, complex, type(None))):
        hasher.update(f"{type(value).__name__} {value!r};".encode())
    else:  # its repr may contain an address
        hasher.update(f"{type(value).__qualname__};".encode())
