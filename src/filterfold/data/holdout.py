"""Holding images out and taking fewer of them, class by class and by a fixed seed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError
from .augment import seeded


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
