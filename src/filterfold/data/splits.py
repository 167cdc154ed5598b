"""Splits in memory: normalisation, batches, and what is held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import DataError
from ..utils.arguments import check_device, typed
from .augment import crop_and_flip, draw, seeded

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixel values scaled to 0 … 1."""


Part = Callable[[int], slice]
"""Number of images in a batch → the slice of them that is wanted, with both ends."""


BLOCKS = {"cuda": 2048}
"""Images that are augmented together, by device: on a GPU many small kernels cost more than the memory (6 MB of
CIFAR-10); on a CPU one batch at a time stays in the cache."""


def whole(length: int) -> slice:
    """All images of a batch.

    >>> whole(3)
    slice(0, 3, None)
    """
    return slice(0, length)


@runtime_checkable
class AnySplit(Protocol):
    """What training and evaluation need of a split, in memory or streamed."""

    @property
    def labels(self) -> Tensor:
        """Class indices, int64, shape (n,)."""

    @property
    def normalization(self) -> Normalization:
        """Mean and standard deviation of each channel."""

    @property
    def fingerprint(self) -> str:
        """Of images and labels, in their order: 16 hexadecimal digits."""

    def __len__(self) -> int:
        """Number of images."""

    def to(self, device: torch.device | str) -> AnySplit:
        """The split with what it holds in memory on a device."""

    def take(self, indices: Tensor) -> AnySplit:
        """The images at these places, in this order."""

    def pixels(self, chunks: list[Tensor], augment: str, seed: int, epoch: int, part: Part = whole) -> Iterator[Tensor]:
        """For every chunk of indices the wanted part of its images: uint8, shape (n, channels, height, width)."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and labels in memory.

    **Arguments:**

    - `images`: uint8, shape (n, channels, height, width).
    - `labels`: int64 class indices, shape (n,).
    - `normalization`: mean and standard deviation of each channel, of values scaled to 0 … 1;
      `batches` subtracts and divides by them.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization

    def __post_init__(self) -> None:
        """Refuse tensors of wrong types or shapes."""
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                f"images must be uint8 of shape (n, channels, height, width), not {self.images.dtype} "
                f"of shape {tuple(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},), not {self.labels.dtype} "
                f"of shape {tuple(self.labels.shape)}"
            )
        if any(len(values) != self.images.shape[1] for values in self.normalization):
            raise DataError(
                f"the normalization has {len(self.normalization[0])} means and {len(self.normalization[1])} "
                f"deviations for images of {self.images.shape[1]} channels; give one for each channel"
            )

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height of an image in pixels."""
        return self.images.shape[2]

    @cached_property
    def fingerprint(self) -> str:
        """Of pixels and labels, in their order: 16 hexadecimal digits.

        >>> black = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> splits = [Split(images, torch.tensor([0, 1]), ((0.0,), (1.0,))) for images in (black, black + 1)]
        >>> splits[0].fingerprint == splits[1].fingerprint
        False
        """
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.labels, self.images):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The split with both tensors on a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, indices: Tensor) -> Split:
        """The images at these places, in this order."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def pixels(self, chunks: list[Tensor], augment: str, seed: int, epoch: int, part: Part = whole) -> Iterator[Tensor]:
        """For every chunk of indices the wanted part of its images, augmented, uint8, on the split's device."""
        device = self.images.device
        order, sizes = torch.cat(chunks), [len(chunk) for chunk in chunks]
        draws = draw(augment, len(order), min(self.images.shape[2:]), seeded(seed, epoch, 2), device)
        places = [own[part(len(own))] for own in torch.split(torch.arange(len(order)), sizes)]
        if part is not whole:
            chosen = torch.cat(places)
            order, draws = order[chosen], None if draws is None else draws.take(chosen.to(device))
        order, sizes = order.to(device), [len(own) for own in places]
        together = max(1, BLOCKS.get(device.type, 1) // max(1, sizes[0]))
        start = 0
        for first in range(0, len(sizes), together):
            block = sizes[first : first + together]
            stop = start + sum(block)
            images = self.images[order[start:stop]]
            yield from torch.split(images if draws is None else crop_and_flip(images, draws.part(start, stop)), block)
            start = stop


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set for image classification, split and ready to train on.

    **Arguments:**

    - `name`: what it was loaded as.
    - `classes`: names of the classes; a label is an index into them.
    - `channels`: 1 or 3.
    - `image_size`: height and width in pixels.
    - `train`, `validation`, `test`: the splits. Use `validation` for every choice, `test` only for
      the final figure. `validation` may be empty.
    - `augment`: the policy that suits the training split (see `batches`).
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    train: AnySplit
    validation: AnySplit
    test: AnySplit
    augment: str

    @cached_property
    def fingerprint(self) -> str:
        """Of images and labels of all splits: 16 hexadecimal digits."""
        parts = (self.train, self.validation, self.test)
        return hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()[:16]

    @property
    def example(self) -> Tensor:
        """One image of zeros, shape (1, channels, size, size), float32: for tracing and counting."""
        return torch.zeros(1, self.channels, self.image_size, self.image_size)

    def __str__(self) -> str:
        """One line: name, sizes of the splits, shape of an image."""
        sizes = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test"
        shape = f"{self.channels}x{self.image_size}x{self.image_size}"
        return f"{self.name}: {sizes} images of {shape}, {len(self.classes)} classes"


@typed
def batches(
    split: AnySplit,
    batch_size: int,
    *,
    shuffle: bool = False,
    augment: str = "none",
    seed: int = 0,
    epoch: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    drop_last: bool = False,
    part: Part = whole,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run over a split once, in normalised batches on a device.

    Order and augmentation depend on `(seed, epoch)` alone, not on the batch size, the device or the
    global random state, so a run that is resumed at an epoch sees what it would have seen.

    **Arguments:**

    - `split`: a split of `ImageData`.
    - `batch_size`: images a batch.
    - `shuffle`: whether the order is drawn anew.
    - `augment`: for splits in memory `none`, `crop` (black padding of an eighth of the size, random
      place) or `crop-flip` (and mirrored by chance, He et al. 2016, section 4.2); for streamed ones
      `none` (resize, centre crop), `resized-crop-flip` (Szegedy et al. 2015), or `torchvision` (the same
      by torchvision's v2 transforms).
    - `seed`, `epoch`: see above.
    - `device`, `dtype`, `channels_last`: what the images come as. A split in memory is best moved to
      the device once, with `split.to(device)`.
    - `drop_last`: leave an incomplete last batch out.
    - `part`: from the number of images in a batch to the slice of them that is wanted, such as `distributed.own_part`:
      processes that train together then see, batch for batch, what one process would see.

    **Returns:** an iterator over (images (b, channels, height, width), labels (b,)).

    **Raises:** `DataError` for an empty split or an unreadable image, `ConfigError` for an unknown policy.

    ```python
    >>> from filterfold.data import load
    >>> images, labels = next(batches(load("digits").train, 32, shuffle=True))
    >>> images.shape, labels.shape
    (torch.Size([32, 1, 8, 8]), torch.Size([32]))

    ```
    """
    if not hasattr(split, "pixels"):
        raise DataError(f"{type(split).__name__} is no split; give one of load(...), such as data.train")
    check_device(device)
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} makes no batch; give at least 1")
    if not len(split):
        raise DataError("the split has no images; load the data with a validation share above 0, or use another split")
    count = len(split)
    order = torch.randperm(count, generator=seeded(seed, epoch, 1)) if shuffle else torch.arange(count)
    chunks = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    if drop_last and len(chunks[-1]) < batch_size:
        chunks.pop()

    def normalised() -> Iterator[tuple[Tensor, Tensor]]:
        mean, deviation = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in split.normalization
        )
        factor = (1 / (255 * deviation)).to(device, torch.float32)
        shift = (-mean / deviation).to(device, torch.float32)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        wanted = [chunk[part(len(chunk))] for chunk in chunks]
        # All labels at once: one copy to the device for an epoch, not one for each batch.
        labels = split.labels[torch.cat(wanted).to(split.labels.device)].to(device)
        answered = torch.split(labels, [len(chunk) for chunk in wanted])
        for answers, pixels in zip(answered, split.pixels(chunks, augment, seed, epoch, part), strict=True):
            images = pixels.to(device, torch.float32, non_blocking=True).mul_(factor).add_(shift)
            yield images.to(dtype=dtype, memory_format=layout), answers

    return normalised()


def hold_out(labels: Tensor, amount: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split places in two so that both parts have the same mix of classes.

    **Arguments:**

    - `labels`: int64, shape (n,).
    - `amount`: how many to hold out: a count if an int, a share of n if a float below 1.
    - `classes`: number of classes.
    - `seed`: which images are held out; nothing else changes it.

    **Returns:** sorted indices of the kept and of the held-out images. The count is exact; each class
    gives its proportional part to within one image (largest remainders).

    **Raises:** `DataError` if the amount is negative or would leave some class with no image.

    ```python
    >>> kept, held = hold_out(torch.tensor([0, 0, 0, 0, 1, 1]), 3, classes=2, seed=0)
    >>> torch.tensor([0, 0, 0, 0, 1, 1])[held].tolist()
    [0, 0, 1]

    ```
    """
    total = len(labels)
    count = int(amount) if isinstance(amount, int) else round(total * amount)
    if count < 0 or (isinstance(amount, float) and not 0 <= amount < 1):
        raise DataError(f"can't hold out {amount}; give a count of images, or a share from 0 up to below 1")
    sizes = torch.bincount(labels, minlength=classes)
    if count > total - int((sizes > 0).sum()):
        raise DataError(f"can't hold out {count} of {total} images: every class must keep one; hold out fewer")
    parts = [int(size) * count // total for size in sizes]
    remainders = [int(size) * count % total for size in sizes]
    for index in sorted(range(classes), key=lambda c: (-remainders[c], c))[: count - sum(parts)]:
        parts[index] += 1
    order = _by_class(labels, classes, seed)
    held = torch.cat([members[:part] for members, part in zip(order, parts, strict=True)])
    mask = torch.zeros(total, dtype=torch.bool)
    mask[held] = True
    emptied = [c for c in range(classes) if 0 < int(sizes[c]) <= parts[c]]
    if emptied:
        raise DataError(f"holding out {count} of {total} images leaves class {emptied[0]} without any; hold out fewer")
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def limit(labels: Tensor, count: int, classes: int, seed: int) -> Tensor:
    """Sorted indices of at most `count` images, as many of every class as can be.

    A smaller limit takes a subset of a larger one's images.

    >>> labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    >>> labels[limit(labels, 4, classes=2, seed=0)].tolist()
    [0, 0, 1, 1]
    """
    if count < classes:
        raise DataError(f"train_limit={count} is less than one image for each of the {classes} classes; give more")
    sizes = torch.bincount(labels, minlength=classes).tolist()
    parts = [0] * classes
    left = min(count, len(labels))
    while left:
        unfilled = [c for c in range(classes) if parts[c] < sizes[c]]
        share = max(1, left // len(unfilled))
        for index in unfilled:
            taken = min(share, sizes[index] - parts[index], left)
            parts[index] += taken
            left -= taken
    order = _by_class(labels, classes, seed)
    return torch.cat([members[:part] for members, part in zip(order, parts, strict=True)]).sort().values


def _by_class(labels: Tensor, classes: int, seed: int) -> list[Tensor]:
    shuffled = torch.randperm(len(labels), generator=seeded(seed, 3))
    return [shuffled[labels[shuffled] == index] for index in range(classes)]
