"""Where the weights come from that the networks of a comparison begin with, if they are not drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...data import ImageData
from ...errors import CheckpointError, ConfigError, RecordError
from ...surgery.weights import Weights
from ...zoo import pretrained


@dataclass(frozen=True, slots=True)
class Start:
    """What networks begin with: fresh weights, those of a file, or a hub's.

    **Arguments:**

    - `weights`: file, see `surgery.weights.Weights`.
    - `pretrained`: the hub's weights of a `timm:` or `torchvision:` model.
    - `new_head`: a classifier of another size than the data need is drawn anew.
    - `tune`: all methods train from these weights; else they are those of the dense network, which is trained already.
    - `fingerprint`: of the weights, so that others are not taken for them.

    >>> Start(pretrained=True, tune=True).entries
    {'pretrained': True, 'tune': True}
    """

    weights: str | None = None
    pretrained: bool = False
    new_head: bool = False
    tune: bool = False
    fingerprint: str = ""

    def __post_init__(self) -> None:
        """Refuse two kinds of weights, and a new classifier for none."""
        if self.weights is not None and self.pretrained:
            raise ConfigError("--weights and --pretrained exclude each other: give one")
        if self.new_head and not self.given:
            raise ConfigError("--new-head: fresh weights have a classifier of the right size; give --weights")

    @property
    def given(self) -> bool:
        """Whether there are weights, and networks don't begin with fresh ones."""
        return self.weights is not None or self.pretrained

    @property
    def entries(self) -> dict[str, Any]:
        """What a setting notes beside the file: only what is set, so that later fields change no trial's name."""
        return {name: value for name, value in asdict(self).items() if value and name != "weights"}

    def read(self, model: str, channels: int) -> Weights:
        """The weights.

        **Arguments:** `model`: for `zoo.pretrained`; `channels`: of the images.

        **Raises:** `CheckpointError`, `ModelError` if they can't be had, `RecordError` if they are not those of the
        fingerprint.
        """
        if self.weights is None:
            found = Weights(f"{model}, pretrained", pretrained(model, channels))
        else:
            found = Weights.read(self.weights)
        if self.fingerprint and found.fingerprint != self.fingerprint:
            raise RecordError(
                f"{found.source}: not the weights that this was begun with: "
                f"fingerprint {found.fingerprint}, {self.fingerprint} then"
            )
        return found


def shown(data: ImageData) -> str:
    """In words what images a network is given.

    >>> from filterfold.data import load
    >>> shown(load("digits"))
    'images: 1x8x8, mean 0.305, deviation 0.376'
    """
    mean, deviation = (" ".join(f"{value:.3g}" for value in values) for values in data.train.normalization)
    return f"images: {data.channels}x{data.image_size}x{data.image_size}, mean {mean}, deviation {deviation}"


SHAPE = ("image_size", "channels")


def input_of(data: ImageData, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a saved network notes of its images, so that it is given the same ones later.

    **Arguments:** `asked`: arguments of `data.load`; size and channels that were not asked for are the data set's own.
    """
    mean, std = map(list, data.train.normalization)
    return {"mean": mean, "std": std, **{name: asked[name] for name in SHAPE if name in asked}}


def network_of(model: str, width: float, data: ImageData) -> dict[str, Any]:
    """What a saved network notes of its code and its classes, so that it can be built from its file alone.

    >>> from filterfold.data import load
    >>> network_of("vgg16", 0.5, load("digits"))["arguments"]
    {'classes': 10, 'channels': 1, 'width': 0.5, 'image_size': 8}
    """
    noted = code_of(model, width, (data.channels, data.image_size), len(data.classes))
    return {**noted, "classes": list(data.classes)}


def code_of(model: str, width: float, shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    """What is noted of a network's code alone; `shape`: channels, height, of its images."""
    sizes = {"classes": classes, "channels": shape[0], "width": width, "image_size": shape[1]}
    return {"factory": model, "arguments": sizes}


def noted_network(weights: Weights) -> dict[str, Any]:
    """What `network_of` noted in a file; empty if nothing is noted there.

    **Raises:** `CheckpointError` if it makes no sense.
    """
    try:
        metadata = json.loads(weights.header.get("metadata", "{}"))
        if "factory" not in metadata:
            return {}
        factory, noted, classes = metadata["factory"], metadata["arguments"], metadata.get("classes", [])
        kinds = {"classes": int, "channels": int, "width": float, "image_size": int}
        if not isinstance(factory, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError("names are texts")
        sizes = {name: kind(noted[name]) for name, kind in kinds.items() if name in noted}
        return {"factory": factory, "arguments": sizes, "classes": list(classes)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{weights.source}: damaged header: what it notes of its network ({error})") from error


def noted_input(weights: Weights) -> dict[str, Any]:
    """What `input_of` noted in a file; empty if nothing is noted there.

    **Raises:** `CheckpointError` if it makes no sense.
    """
    try:
        noted = json.loads(weights.header.get("metadata", "{}")).get("input")
        if noted is None:
            return {}
        found = {name: [float(value) for value in noted[name]] for name in ("mean", "std")}
        if not all(map(math.isfinite, found["mean"] + found["std"])) or min(found["std"]) <= 0:
            raise ValueError("no mean and deviation")
        return {**found, **{name: int(noted[name]) for name in SHAPE if name in noted}}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{weights.source}: damaged header: what it notes of its images ({error})") from error
