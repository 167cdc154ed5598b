"""Splits that are too large for memory: decoded by worker processes, batch by batch."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ConfigError, DataError
from .augment import seeded
from .decode import convert, encoded, fit, open_image, to_array, unreadable
from .splits import Normalization, Part, whole

POLICIES = ("none", "resized-crop-flip", "torchvision")
"""`resized-crop-flip` needs Pillow only; `torchvision` is the same with torchvision's v2 transforms, which crop to
whole pixels and antialias: for comparisons with figures that were made with them."""


AREA = (0.08, 1.0)


RATIO = (3 / 4, 4 / 3)
"""Share of the area and aspect ratio of random crops (Szegedy et al. 2015, section 6)."""


PROBES = 256
"""Images that a fingerprint is made of: all of them may be hundreds of gigabytes."""


EVALUATION_MARGIN = 8 / 7
"""The shorter side before the centre crop: 256 for 224 pixels (Krizhevsky et al. 2012)."""


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """A split whose images stay encoded in their files until a batch needs them.

    **Arguments:**

    - `name`, `role`: data set and split, for messages.
    - `rows`: the `datasets.Dataset` with undecoded images in `image_column`.
    - `places`: the rows that belong to the split, shape (n,).
    - `labels`: their class indices, shape (n,).
    - `channels`, `image_size`: what images are converted to.
    - `normalization`: mean and standard deviation of each channel.
    - `workers`: processes that decode; None: one for each processor but one, at most 16.
    - `roots`: the folders that the rows' paths may lead into.
    """

    name: str
    role: str
    rows: Any
    image_column: str
    places: Tensor
    labels: Tensor
    channels: int
    image_size: int
    normalization: Normalization
    workers: int | None = None
    roots: tuple[Path, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """Of labels, in their order, and of `PROBES` encoded images, evenly spread: 16 hexadecimal digits."""
        digest = hashlib.sha256(self.labels.cpu().contiguous().numpy().data)
        for index in torch.linspace(0, len(self) - 1, min(PROBES, len(self))).long().tolist():
            digest.update(encoded(self.rows[int(self.places[index])][self.image_column], self.roots))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> StreamedSplit:
        """The split with its labels on a device."""
        return replace(self, labels=self.labels.to(device))

    def take(self, indices: Tensor) -> StreamedSplit:
        """The images at these places, in this order."""
        return replace(self, places=self.places[indices], labels=self.labels[indices])

    def pixels(self, chunks: list[Tensor], augment: str, seed: int, epoch: int, part: Part = whole) -> Iterator[Tensor]:
        """For every chunk of indices the wanted part of its images, uint8, decoded and augmented by the workers."""
        if augment not in POLICIES:
            raise ConfigError(f"augment={augment!r} is not one of {', '.join(POLICIES)} (for streamed data)")
        workers = min(16, (os.cpu_count() or 1) - 1) if self.workers is None else self.workers
        loader: DataLoader[Tensor] = DataLoader(
            _Decoder(self, augment, seed, epoch),
            batch_sampler=[chunk[part(len(chunk))].tolist() for chunk in chunks],
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the loader would draw from the global random state
        )
        yield from loader


class _Decoder(Dataset[Tensor]):
    def __init__(self, split: StreamedSplit, augment: str, seed: int, epoch: int) -> None:
        self.split, self.augment, self.seed, self.epoch = split, augment, seed, epoch
        self.transform = _torchvision(split.image_size) if augment == "torchvision" else None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Tensor:
        split = self.split
        row = int(split.places[index])
        entry = split.rows[row][split.image_column]
        try:
            image = convert(open_image(entry, split.roots), split.channels)
            if self.transform is not None:
                with torch.random.fork_rng(devices=[]):  # these transforms draw from the global random state
                    torch.manual_seed(seeded(self.seed, self.epoch, index, 4).initial_seed())
                    image = self.transform(image)
            elif self.augment != "none":
                image = _resized_crop_flip(image, split.image_size, seeded(self.seed, self.epoch, index, 4))
            else:
                image = _centre(image, split.image_size)
        except Exception as error:  # Pillow's plugins raise anything
            raise unreadable(split.name, split.role, row, entry, error) from error
        return torch.from_numpy(to_array(image).copy())


def _torchvision(size: int) -> Any:
    """The transforms of torchvision's ImageNet recipe: random resized crop (antialiased), mirrored by chance."""
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:  # a torchvision that doesn't fit torch raises RuntimeError
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"augment='torchvision': torchvision can't be imported ({reason})") from error
    return v2.Compose([v2.RandomResizedCrop(size, scale=AREA, ratio=RATIO), v2.RandomHorizontalFlip()])


def _resized_crop_flip(image: Any, size: int, generator: torch.Generator) -> Any:
    """A random part of the image, scaled to the size, mirrored by chance."""
    from PIL import Image

    width, height = image.size
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(10):
        area, ratio, left, top = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (AREA[0] + area * (AREA[1] - AREA[0]))
        ratio = math.exp(math.log(RATIO[0]) + ratio * math.log(RATIO[1] / RATIO[0]))
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            left, top = left * (width - across), top * (height - down)
            box = (left, top, left + across, top + down)
            break
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if torch.rand((), generator=generator).item() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def _centre(image: Any, size: int) -> Any:
    """The middle of the image, an eighth of each side left out, scaled to the size."""
    width, height = image.size
    side = min(width, height) / EVALUATION_MARGIN
    left, top = (width - side) / 2, (height - side) / 2
    return fit(image.crop((round(left), round(top), round(left + side), round(top + side))), size)


def sampled_statistics(split: StreamedSplit, count: int = 1024) -> Normalization:
    """Mean and standard deviation of each channel over a fixed sample of the split's images."""
    if not len(split):
        raise DataError(f"{split.name}: split {split.role!r} has no images")
    chosen = torch.randperm(len(split), generator=seeded(0, 5))[:count].sort().values
    chunks = [chosen[start : start + 64] for start in range(0, len(chosen), 64)]
    moments = torch.zeros(2, split.channels, dtype=torch.float64)
    for images in split.pixels(chunks, "none", 0, 0):
        values = images.double() / 255
        moments += torch.stack((values.sum((0, 2, 3)), values.square().sum((0, 2, 3))))
    mean, square = moments / (len(chosen) * split.image_size**2)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(max(value, 1e-6) for value in deviation.tolist())
