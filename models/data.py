"""Image data sets: Fashion-MNIST, MNIST, and scikit-learn's digits, which need no download."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from models import idx
from models.download import Archives, DownloadError, download
from models.errors import ModelsError
from models.recipe import Data, Parameter, Params, Source

DATASETS = ("fashion-mnist", "mnist", "digits", "auto")

_LOGGER = logging.getLogger(__name__)
_CLASSES = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST"}  # of torchvision
_LIMIT_S = 300.0  # for a data set asked for by name
_AUTO_LIMIT_S = 30.0  # for `auto`, which can fall back to the digits


class Images(TensorDataset):
    """One part of a data set, in memory; an item is the pair (image, label).

    Args:
        name: The data set's name.
        classes: The name of each class.
        images: float32 (N, 1, 28, 28) in [0, 1].
        labels: int64 (N,).
        transform: Applied to images (N, 1, 28, 28) when they are drawn; keeps their shape.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        images: Tensor,
        labels: Tensor,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(images, labels)
        self.name = name
        self.classes = classes
        self.images = images
        self.labels = labels
        self.transform = transform

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        """Return (image, label), or a batch of both for an index that selects several."""
        images = self.images[index]
        if self.transform is not None:
            is_single = images.ndim == 3
            images = self.transform(images[None])[0] if is_single else self.transform(images)
        return images, self.labels[index]

    def __getitems__(self, indices: Iterable[int]) -> list[tuple[Tensor, ...]]:
        """Return the pairs of a batch, transformed together; DataLoader calls this."""
        if self.transform is None:
            return [self[index] for index in indices]
        images, labels = self[[int(index) for index in indices]]  # samplers may yield tensors
        return [*zip(images, labels, strict=True)]

    def part(self, index: Tensor) -> "Images":
        """Return a copy of the images at `index`, int64 (M,)."""
        images, labels = self.images[index], self.labels[index]
        return Images(self.name, self.classes, images, labels, self.transform)


@dataclass(frozen=True, kw_only=True)
class ImageData(Data[Images]):
    """Images in three parts. Facts: `classes`, and `mean` and `std` of the training part."""

    validation: Images
    """A share of the published training part."""
    test: Images
    """The published test part."""


AUGMENTATION: Mapping[str, Parameter] = {
    "mirror": Parameter(default=False, help="mirror each training image with probability 0.5"),
    "shift": Parameter(
        default=0, least=0, most=27, help="shift training images by up to this many pixels"
    ),
}
"""The hyperparameters of `load_images`."""


def load_images(source: Source, params: Params) -> ImageData:
    """Load the data of an image recipe.

    Args:
        source: The data set, its folder, and the seed of the split.
        params: May have the parameters in `AUGMENTATION`, which apply to the training part.

    Raises:
        ModelsError: As for `load`.
    """
    data = load(source.dataset, source.data_dir, seed=source.seed)
    mirror, shift = params.get("mirror", False), params.get("shift", 0)
    if not mirror and not shift:
        return data
    part = data.train
    transform = partial(augment, mirror=mirror, shift=shift)
    return replace(data, train=Images(part.name, part.classes, part.images, part.labels, transform))


def augment(images: Tensor, *, mirror: bool, shift: int) -> Tensor:
    """Vary each image of a batch independently.

    torchvision's transforms draw once per call, so each image would need its own call; that is ten
    times slower.

    Args:
        images: (N, channels, H, W).
        mirror: Flip each image horizontally with probability 0.5.
        shift: Move each image by up to this many pixels along each axis, and fill with 0.

    Returns:
        A tensor of the same shape.
    """
    count, _, height, width = images.shape
    if mirror:
        is_flipped = torch.rand(count) < 0.5
        images = torch.where(is_flipped[:, None, None, None], images.flip(-1), images)
    if shift:
        windows = F.pad(images, [shift] * 4).unfold(2, height, 1).unfold(3, width, 1)
        y, x = torch.randint(2 * shift + 1, (2, count))
        images = windows[torch.arange(count), :, y, x]
    return images


def load(
    name: str,
    data_dir: str | os.PathLike[str],
    *,
    seed: int = 0,
    validation: float = 0.1,
    archives: Archives | None = None,
) -> ImageData:
    """Load a data set, with a share of its training part set aside for validation.

    Args:
        name: One of `DATASETS`; `auto` is Fashion-MNIST if it is on disk or downloads within
            seconds, else `digits`.
        data_dir: `fashion-mnist` and `mnist` are read from its folders FashionMNIST/raw and
            MNIST/raw, and downloaded to them if absent.
        seed: Decides which images are set aside; no global generator is used.
        validation: The share set aside, equal in each class.
        archives: Where to download from; by default torchvision's mirrors.

    Raises:
        ModelsError: An argument is not allowed, the data set cannot be downloaded, or its files are
            damaged (under `auto` too).
    """
    if name not in DATASETS:
        raise ModelsError(f"dataset={name!r} is unknown; allowed: {', '.join(DATASETS)}.")
    if not 0 <= seed < 2**63:
        raise ModelsError(f"seed={seed} is out of range; allowed: 0 to 2**63 - 1.")
    if not 0 < validation < 1:
        raise ModelsError(f"validation={validation} is not allowed; it must be between 0 and 1.")
    root = Path(data_dir)
    if os.path.exists(root) and not os.path.isdir(root):
        raise ModelsError(f"data_dir='{root}' is not a folder; allowed: a folder, or a new path.")

    chosen = _choose(root, archives) if name == "auto" else name
    if chosen == "digits":
        published, test, source = _digits()
    else:
        published, test, source = _published(chosen, root, archives)
    rest, aside = split(published.labels, validation, seed)
    if not len(rest) or not len(aside):
        raise ModelsError(
            f"validation={validation} of {len(published)} training images leaves one part empty; "
            f"allowed: a share that leaves at least one image in each."
        )
    train = published.part(rest)
    return ImageData(
        name=chosen,
        train=train,
        validation=published.part(aside),
        test=test,
        source=source,
        facts={
            "classes": list(train.classes),
            "mean": round(train.images.mean().item(), 4),
            "std": round(train.images.std().item(), 4),
        },
    )


def _choose(root: Path, archives: Archives | None) -> str:
    try:
        folder = _provide("fashion-mnist", root, archives, limit_s=_AUTO_LIMIT_S)
    except DownloadError as error:
        _LOGGER.warning(
            "dataset='auto' is digits, because Fashion-MNIST is not in %s and cannot be "
            "downloaded (%s).",
            root,
            error,
        )
        return "digits"
    _LOGGER.warning("dataset='auto' is fashion-mnist, because it is in %s.", folder)
    return "fashion-mnist"


def _published(name: str, root: Path, archives: Archives | None) -> tuple[Images, Images, str]:
    """Training part, test part and source of a data set that is read from files."""
    try:
        folder = _provide(name, root, archives, limit_s=_LIMIT_S)
    except DownloadError as error:
        raise ModelsError(
            f"dataset={name!r} is not in data_dir='{root}' and cannot be downloaded ({error}); "
            f"use dataset='digits', or put {', '.join(idx.FILES)} into {_folder(name, root)}."
        ) from error
    classes = tuple(_torchvision_class(name).classes)
    train, test = (
        Images(name, classes, pixels[:, None].float() / 255, labels)
        for pixels, labels in (idx.read_part(folder, part) for part in ("train", "t10k"))
    )
    return train, test, str(folder)


def _provide(name: str, root: Path, archives: Archives | None, *, limit_s: float) -> Path:
    """The folder of the files of `name`, which are downloaded if all are absent."""
    folder = _folder(name, root)
    missing = [file for file in idx.FILES if not os.path.isfile(folder / file)]
    if missing == list(idx.FILES):
        published = _torchvision_class(name)
        download(
            archives or Archives(mirrors=(*published.mirrors,), files=(*published.resources,)),
            folder,
            limit_s=limit_s,
        )
    elif missing:
        # Not downloaded: the files that exist need not be those of the published set.
        raise ModelsError(
            f"{folder} lacks {', '.join(missing)}; add it, or remove the other files."
        )
    return folder


def _folder(name: str, root: Path) -> Path:
    return Path(root, _CLASSES[name], "raw")


def _torchvision_class(name: str) -> Any:
    from torchvision import datasets  # takes seconds

    return getattr(datasets, _CLASSES[name])


def _digits() -> tuple[Images, Images, str]:
    """Training part (80 %), test part and source of scikit-learn's digits, resized to 28x28."""
    # Imported late: a saved network that imports `models` must load without scikit-learn.
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.from_numpy(bundled.images).float()[:, None] / 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(bundled.target).long()
    every = Images("digits", tuple(str(digit) for digit in range(10)), images, labels)
    train, test = split(labels, 0.2, seed=0)  # the test part is the same under every seed
    return every.part(train), every.part(test), "sklearn.datasets.load_digits, resized to 28x28"


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split a data set so that each class contributes the same share.

    Args:
        labels: Class numbers, int64 (N,).
        share: The share of the second part.
        seed: Decides which samples are in it.

    Returns:
        The indices of the first and of the second part, both ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    count = round(share * len(labels))
    # Evenly spaced picks from a list sorted by class: exactly `count`, in proportion.
    picks = (2 * torch.arange(count) + 1) * len(labels) // max(1, 2 * count)
    aside = torch.zeros(len(labels), dtype=torch.bool)
    aside[by_class[picks]] = True
    return (~aside).nonzero().flatten(), aside.nonzero().flatten()
