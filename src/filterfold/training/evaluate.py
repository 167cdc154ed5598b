"""Accuracy of a network on a split."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data import batches
from ..data.splits import AnySplit, whole
from ..errors import ConfigError, DataError, ModelError, pass_on_exhaustion
from ..utils import distributed
from ..utils.model_state import preserved
from ..utils.progress import track
from .recipe import AUTOCAST


@dataclass(frozen=True, slots=True)
class Metrics:
    """The result of an evaluation.

    **Arguments:**

    - `top1`, `top5`: percent of the images whose class is the likeliest, and among the five likeliest (among all,
      where there are fewer classes).
    - `loss`: mean cross-entropy in nats.
    - `images`: how many there were.
    - `seconds`: wall time, data included. For honest speed use the latency module.
    """

    top1: float
    top5: float
    loss: float
    images: int
    seconds: float


def evaluate(
    model: nn.Module,
    split: AnySplit,
    *,
    batch_size: int = 500,
    device: torch.device | str | None = None,
    precision: str = "32-true",
    channels_last: bool = False,
    classes: int | None = None,
    description: str = "evaluating",
    together: bool = False,
) -> Metrics:
    """Measure a network on a split, in eval mode and without gradients.

    **Arguments:**

    - `model`: maps images (b, channels, height, width) to logits (b, classes). It is left in the mode it was in.
    - `split`: of `data.ImageData`.
    - `batch_size`: images at a time; it changes speed and memory only.
    - `device`: where to compute; None: where the network is. It is not moved: give the device it is on.
    - `precision`: `32-true`, `bf16-mixed` or `16-mixed`.
    - `channels_last`: memory format of the images.
    - `classes`: number of outputs that the network must have; None: at least as many as the labels need.
    - `description`: of the progress bar.
    - `together`: for processes that train together, all of which must call it: each takes its part of every batch,
      and all get the figures of the whole split. Otherwise the process that calls evaluates all images.

    **Returns:** top-1 and top-5 in percent, loss, number of images, seconds.

    **Raises:** `ModelError` if the network can't take the images or gives no logits, `DataError` if the number of
    classes does not fit or the split is empty.

    ```python
    >>> from filterfold import data, zoo
    >>> metrics = evaluate(zoo.build("vgg_small", channels=1, image_size=8), data.load("digits").test)
    >>> metrics.images
    359

    ```
    """
    if precision not in AUTOCAST:
        raise ConfigError(f"precision={precision!r} is not one of {', '.join(AUTOCAST)}")
    first = next(model.parameters(), None)
    where = torch.device(device) if device is not None else first.device if first is not None else torch.device("cpu")
    held = split.to(where)
    count = len(held)
    sums = torch.zeros(3, dtype=torch.float64, device=where)
    dtype = AUTOCAST[precision]
    autocast = torch.autocast(where.type, dtype=dtype) if dtype is not None else contextlib.nullcontext()
    started = time.perf_counter()
    with preserved(model), torch.inference_mode(), autocast:
        part = distributed.own_part if together else whole
        feed = batches(held, batch_size, device=where, channels_last=channels_last, part=part)
        for number, (images, labels) in enumerate(track(feed, description, -(-count // batch_size))):
            if not len(labels):  # the last batch may be smaller than there are processes
                continue
            if number == 0:
                check_fit(model, images[:1], classes, int(held.labels.max()) + 1)
            sums += _counts(model(images).float(), labels)
        if together:
            distributed.summed(sums)
    loss, top1, top5 = (sums / count).tolist()
    return Metrics(100 * top1, 100 * top5, loss, count, time.perf_counter() - started)


def predicted(model: nn.Module, split: AnySplit, *, batch_size: int = 500) -> Tensor:
    """The likeliest class of each image of a split, on the network's device, in eval mode.

    **Arguments:** as for `evaluate`.

    **Returns:** class indices, shape `(n,)`.

    ```python
    >>> from filterfold import data, zoo
    >>> predicted(zoo.build("vgg_small", channels=1, image_size=8), data.load("digits").test).shape
    torch.Size([359])

    ```
    """
    where = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    held, found = split.to(where), []
    with preserved(model), torch.inference_mode():
        feed = batches(held, batch_size, device=where)
        for number, (images, _) in enumerate(track(feed, "evaluating", -(-len(held) // batch_size))):
            if number == 0:
                check_fit(model, images[:1], None, int(held.labels.max()) + 1)
            found.append(model(images).argmax(1))
    return torch.cat(found)


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over the batch of the loss, of top-1 hits and of top-5 hits."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    return torch.stack((loss.double(), hits[:, 0].sum().double(), hits.sum().double()))


def check_fit(model: nn.Module, images: Tensor, classes: int | None, needed: int = 1) -> None:
    """Refuse, in one line, a network that can't take these images or has the wrong number of outputs.

    **Arguments:** `images`: at least one; `classes`: the exact number of outputs, or None; `needed`: the least.
    """
    with preserved(model), torch.no_grad():
        try:
            logits = model(images)
        except (RuntimeError, ValueError, TypeError, AssertionError, SystemExit) as error:
            pass_on_exhaustion(error)
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
            shape = "x".join(map(str, images.shape[1:]))
            raise ModelError(f"{type(model).__name__} can't take images of {shape}: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        what = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{type(model).__name__} returns {what}; a tensor of logits (batch, classes) is needed")
    outputs = logits.shape[1]
    if (classes is not None and outputs != classes) or outputs < needed:
        raise DataError(
            f"the network has {outputs} outputs, the data {classes or needed} classes; build it for as many classes"
        )
