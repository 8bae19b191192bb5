"""What a loader feeds to a network, looked at without touching either."""

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
    with _untouched(dataset):
        try:
            if loader.batch_size is None and loader.batch_sampler is None:  # samples are batches
                return loader.collate_fn(dataset[0]) if len(dataset) else None
            samples = [dataset[index] for index in range(min(size, len(dataset)))]
            return loader.collate_fn(samples) if samples else None
        except Exception as error:  # noqa: BLE001 - a data set of the user's, with keys of its own
            logger.warning("There are no sample pictures: %r from the data set.", error)
            return None


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
    64 of them, made with the generators at a fixed state and left as they were. One whose samples
    are encoded, by a vocabulary say, tells what they were made of in its attribute `digest_of`.
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
    if (told := getattr(dataset, "digest_of", None)) is not None:
        return told
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
    with _untouched(dataset):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed CUDA's too
        chosen = itertools.islice(range(0, length, step), _DIGEST_SAMPLES)
        try:
            return length, [dataset[index] for index in chosen]
        except Exception:  # noqa: BLE001 - a data set of the user's, with keys of its own
            return length


@contextmanager
def _untouched(dataset: Any) -> Iterator[None]:
    """Leave the global generators, and those that a data set holds, as they were found."""
    held = list(_generators(dataset))
    states = [copy.deepcopy(_state(generator)) for generator in held]
    try:
        with preserve_rng():
            yield
    finally:
        for generator, state in zip(held, states, strict=True):
            _state(generator, state)


def _generators(owner: Any, depth: int = 4) -> Iterator[Any]:
    """The random generators in the attributes of a data set, its parts and its transforms."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    values = owner if isinstance(owner, (list, tuple)) else getattr(owner, "__dict__", {}).values()
    for value in list(values)[:_DIGEST_SAMPLES]:
        if isinstance(value, kinds):
            yield value
        elif depth and (hasattr(value, "__dict__") or isinstance(value, (list, tuple))):
            yield from _generators(value, depth - 1)


def _state(generator: Any, state: Any = None) -> Any:
    """The state of a generator of any of the four kinds; sets it where one is given."""
    if isinstance(generator, np.random.Generator):
        if state is not None:
            generator.bit_generator.state = state
        return generator.bit_generator.state
    if isinstance(generator, random.Random):
        return generator.getstate() if state is None else generator.setstate(state)
    return generator.get_state() if state is None else generator.set_state(state)


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
