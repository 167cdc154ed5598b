"""From the name of a data set to splits that are ready to train on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..utils.arguments import typed
from . import decode, streaming
from .augment import POLICIES
from .decode import decode_all, open_image, unreadable
from .sources import Columns, Opened, Place, locate, open_place
from .splits import ImageData, Normalization, Split, hold_out, limit
from .streaming import StreamedSplit, sampled_statistics

logger = logging.getLogger(__name__)


IMAGENET: Normalization = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What most published weights were trained with (PyTorch's ImageNet recipe)."""


VALIDATION = 0.1


TEST = 0.2
"""Shares held out of the training images where the data set has no such split."""


Held = Split | StreamedSplit


S = TypeVar("S", Split, StreamedSplit)


MEMORY_LIMIT = 2 << 30


STREAMED_SIZE = 224


@typed
def load(
    source: str,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
    revision: str | None = None,
    validation: float | None = None,
    train_limit: int | None = None,
    normalization: str | Sequence[Sequence[float]] = "dataset",
    augment: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
    workers: int | None = None,
    cache_dir: Path | str | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set for image classification and split it.

    Small sets are decoded once, kept as uint8 tensors, and cached on disk; sets that would take more
    than `memory_limit` bytes are streamed by worker processes.

    **Arguments:**

    - `source`: `digits` (scikit-learn's 8×8 digits), `cifar10`, `cifar100`, a Parquet file, a folder
      of Parquet files or of images, or a hub id. A name is looked for at `$FILTERFOLD_DATA/NAME`, at
      `./data/NAME`, in the cache, and on the hub.
    - `image_size`: height and width to scale to. None: as the images are, or 224 if streamed.
    - `channels`: 1 or 3. None: as the images are.
    - `image_column`, `label_column`, `train_split`, `validation_split`, `test_split`: names, where the
      usual ones do not fit.
    - `revision`: of a data set on the hub.
    - `validation`: how much of the training split to hold out: a share, a count, or 0. None: the data
      set's own validation split if it has one beside its test split, else a tenth.
    - `train_limit`: train on at most so many images, balanced over the classes, taken after holding
      out; smaller limits are subsets of larger ones.
    - `normalization`: `dataset` (mean and standard deviation of the training split, before holding
      out), `imagenet`, or (means, deviations) of values scaled to 0 … 1.
    - `augment`: policy for training, see `batches`. None: `crop-flip` for colour, `crop` for grey
      images (a mirrored digit is another sign), `resized-crop-flip` if streamed.
    - `memory_limit`: bytes above which the set is streamed.
    - `workers`: processes that decode a streamed set; None: one for each processor but one, at most 16.
    - `cache_dir`: where decoded sets are kept; None: `$FILTERFOLD_CACHE` or `~/.cache/filterfold`.
    - `seed`: which images are held out and left out. Trials with other training seeds see the same split.

    A set without a test split gives up a fifth of its images for one, always the same ones.

    **Returns:** the data set.

    **Raises:** `DataError`, in one line: what is missing or unreadable, where it was looked for, and
    what to do.

    ```python
    >>> print(load("digits"))
    digits: 1294 train, 144 validation, 359 test images of 1x8x8, 10 classes

    ```
    """
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels={channels}: images can be had with 1 or 3 channels")
    if image_size is not None and image_size < 1:
        raise ConfigError(f"image_size={image_size} makes no image; give at least 1")
    for name, number, least in (("memory_limit", memory_limit, 0), ("workers", workers or 0, 0)):
        if number < least:
            raise ConfigError(f"{name}={number}: at least {least}")
    if augment is not None and augment not in (every := sorted({*POLICIES, *streaming.POLICIES})):
        raise ConfigError(f"augment={augment!r} is not one of {', '.join(every)}")
    names = Columns(image_column, label_column, train_split, validation_split, test_split)
    if source == "digits":
        name, classes = source, tuple(map(str, range(10)))
        parts: Mapping[str, Held] = _digits()
        if image_size not in (None, 8) or channels not in (None, 1):
            raise DataError("digits: the images are 1x8x8; leave image_size and channels out")
    else:
        place = locate(source)
        name = place.name
        classes, parts = _pools(place, names, revision, channels, image_size, memory_limit, workers, cache_dir)
    parts = _divided(_normalised(parts, normalization), len(classes), validation, train_limit, seed)
    return _assemble(name, classes, parts, augment)


def _assemble(name: str, classes: tuple[str, ...], parts: Mapping[str, Held], augment: str | None) -> ImageData:
    train = parts["train"]
    usual = "resized-crop-flip" if isinstance(train, StreamedSplit) else "crop" if train.channels == 1 else "crop-flip"
    return ImageData(name, classes, train.channels, train.image_size, **parts, augment=augment or usual)


def _pools(
    place: Place,
    names: Columns,
    revision: str | None,
    channels: int | None,
    size: int | None,
    memory_limit: int,
    workers: int | None,
    cache_dir: Path | str | None,
) -> tuple[tuple[str, ...], Mapping[str, Held]]:
    """Classes and splits as the data set has them: from the cache, decoded, or to be streamed."""
    options = {**asdict(names), "revision": revision, "channels": channels, "size": size}
    file = decode.file_for(place, options, cache_dir)
    cached = decode.read(file)
    if cached is not None and sum(split.images.numel() for split in cached[1].values()) <= memory_limit:
        return cached
    opened = open_place(place, names, revision)
    _check_classes(place.name, opened)
    depth, side = _shape(place.name, opened, channels, size)
    count = sum(len(table.labels) for table in opened.splits.values())
    if count * depth * (side or STREAMED_SIZE) ** 2 > memory_limit:
        return opened.classes, _streamed(place.name, opened, depth, size or STREAMED_SIZE, workers)
    if side is None:
        raise DataError(f"{place.name}: the images are not squares of one size; say which size with image_size")
    decoded = _decoded(place.name, opened, depth, side)
    decode.write(file, opened.classes, decoded)
    return opened.classes, decoded


def _check_classes(name: str, opened: Opened) -> None:
    counts = torch.bincount(opened.splits["train"].labels, minlength=len(opened.classes))
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            f"{name}: class {opened.classes[empty[0]]!r} has no training image "
            f"({len(empty)} of {len(opened.classes)} classes have none)"
        )


def _shape(name: str, opened: Opened, channels: int | None, size: int | None) -> tuple[int, int | None]:
    """Channels and side of the first images; the side is None where they are not squares of one size."""
    table = opened.splits["train"]
    modes, sides = set(), set()
    for row, entry in enumerate(table.rows[:16][table.image_column]):
        try:
            image = open_image(entry, opened.roots)
        except Exception as error:  # Pillow's plugins raise anything
            raise unreadable(name, "train", row, entry, error) from error
        modes.add(image.mode)
        sides.add(image.size)
    width, height = next(iter(sides))
    side = size or (width if len(sides) == 1 and width == height else None)
    return channels or (1 if modes <= {"L", "1", "LA"} else 3), side


def _decoded(name: str, opened: Opened, channels: int, size: int) -> dict[str, Split]:
    splits = {}
    for role, table in opened.splits.items():

        def entries(start: int, stop: int, table: Any = table) -> Any:
            return table.rows[start:stop][table.image_column]

        images = decode_all(name, role, entries, len(table.labels), channels=channels, size=size, roots=opened.roots)
        splits[role] = Split(images, table.labels, _neutral(channels))
    return _measured(_with_test(name, splits, len(opened.classes)))


def _with_test(name: str, splits: dict[str, S], classes: int) -> dict[str, S]:
    """Hold a test split out where there is none, before the training statistics are taken."""
    if "test" in splits:
        return splits
    logger.info("%s has no test split: a fifth of its training images is held out, always the same", name)
    train = splits["train"]
    kept, held = hold_out(train.labels, TEST, classes, seed=0)
    return {**splits, "train": train.take(kept), "test": train.take(held)}


def _neutral(channels: int) -> Normalization:
    return (0.0,) * channels, (1.0,) * channels


def _measured(splits: dict[str, Split]) -> dict[str, Split]:
    """The splits with the statistics of the training split as their normalization."""
    statistics = _statistics(splits["train"].images)
    return {role: replace(split, normalization=statistics) for role, split in splits.items()}


def _statistics(images: Tensor) -> Normalization:
    """Exact mean and standard deviation of each channel, from histograms."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.zeros(256, dtype=torch.int64)
        for start in range(0, len(images), 4096):
            counts += torch.bincount(images[start : start + 4096, channel].reshape(-1).int(), minlength=256)
        shares = counts.double() / images[:, channel].numel()
        mean = float((shares * values).sum())
        means.append(mean)
        deviations.append(max(float((shares * (values - mean) ** 2).sum()) ** 0.5, 1e-6))
    return tuple(means), tuple(deviations)


def _streamed(name: str, opened: Opened, channels: int, size: int, workers: int | None) -> dict[str, StreamedSplit]:
    splits = {}
    for role, table in opened.splits.items():
        places, neutral = torch.arange(len(table.labels)), _neutral(channels)
        where = table.rows, table.image_column, places, table.labels
        splits[role] = StreamedSplit(name, role, *where, channels, size, neutral, workers, opened.roots)
    return _with_test(name, splits, len(opened.classes))


def _normalised(parts: Mapping[str, Held], asked: str | Sequence[Sequence[float]]) -> dict[str, Held]:
    """The splits with the normalization that was asked for; "dataset" is measured on the training split."""
    train = parts["train"]
    channels = train.channels
    chosen: Normalization
    if isinstance(asked, str):
        if asked not in ("dataset", "imagenet"):
            raise ConfigError(f"normalization={asked!r} is not dataset, imagenet, or (means, deviations)")
        if asked == "imagenet":
            chosen = IMAGENET
        else:
            chosen = train.normalization if isinstance(train, Split) else sampled_statistics(train)
    else:
        if len(asked) != 2 or any(not value > 0 for value in asked[1]):
            raise ConfigError("a normalization is (means, deviations), one of each a channel, deviations above 0")
        chosen = tuple(map(float, asked[0])), tuple(map(float, asked[1]))
    if any(len(values) != channels for values in chosen):
        raise ConfigError(f"the normalization has {len(chosen[0])} channels, the images have {channels}")
    return {role: replace(part, normalization=chosen) for role, part in parts.items()}


def _divided(
    parts: Mapping[str, Held], classes: int, validation: float | None, train_limit: int | None, seed: int
) -> dict[str, Held]:
    """Hold the validation split out of the training split, then take what the limit allows."""
    train = parts["train"]
    if validation is None and "validation" in parts:
        held_out = parts["validation"]
    else:
        kept, held = hold_out(train.labels, VALIDATION if validation is None else validation, classes, seed)
        train, held_out = train.take(kept), train.take(held)
    if train_limit is not None:
        train = train.take(limit(train.labels, train_limit, classes, seed))
    return {"train": train, "validation": held_out, "test": parts["test"]}


def _digits() -> dict[str, Split]:
    """Scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998): 8×8, values 0 … 16 scaled to 0 … 255."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.as_tensor(found.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.as_tensor(found.target, dtype=torch.int64)
    return _measured(_with_test("digits", {"train": Split(images, labels, _neutral(1))}, 10))
