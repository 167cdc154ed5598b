"""Options for trained weights, and the images that suit them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from ..errors import ConfigError, ModelError
from .display import say
from .options import DataOptions, ModelOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from ..bench.trials.start import Start
    from ..data import ImageData
    from ..surgery.weights import Weights


Images = TypeVar("Images", bound=DataOptions)


WEIGHTS_HELP = "safetensors, a state dict, a trainer's checkpoint, or a network that Filterfold saved."


_weights = partial(Option, "--weights", "-w")


_pretrained = partial(Option, "--pretrained")


@dataclass(frozen=True)
class BareNetwork:
    """A network with its weights.

    - `fingerprint`: of the weights.
    - `example`: a blank image, shape (1, channels, height, width).
    """

    model: nn.Module
    fingerprint: str
    example: Tensor


@dataclass(frozen=True)
class TrainedNetwork(BareNetwork):
    """A network with its weights, and the images that suit them.

    - `images`: the options with which `data` were loaded.
    """

    data: ImageData
    images: DataOptions


@dataclass(frozen=True)
class WeightOptions:
    """Which trained weights."""

    weights: Annotated[Path | None, _weights(help=f"Weights: {WEIGHTS_HELP}")] = None
    pretrained: Annotated[bool, _pretrained(help="The weights that timm or torchvision has for its network.")] = False

    def start(self) -> Start:
        """What the network begins with."""
        from ..bench.trials.start import Start

        return Start(None if self.weights is None else str(self.weights), self.pretrained)

    @property
    def name(self) -> str:
        """The weights, for titles."""
        return "pretrained weights" if self.pretrained else str(self.weights)

    def network(self, chosen: ModelOptions, images: DataOptions, device: str) -> TrainedNetwork:
        """Build the network with these weights, load images that suit them, and say what was made of the weights.

        **Raises:** `ConfigError` without weights, `CheckpointError` naming what does not fit.
        """
        from ..bench.trials.start import shown

        start, weights = self.read(chosen.model, images.channels or 3)
        fitting = suited(images, chosen.model, start, weights)
        data = fitting.load()
        model = _filled(chosen.build(data), weights, len(data.classes))
        if fitting != images and not weights.header:
            say(f"{shown(data)}, as {chosen.model} expects")
        return TrainedNetwork(model.to(device), weights.fingerprint, data.example.to(device), data, fitting)

    def bare(self, chosen: ModelOptions, shape: tuple[int, int, int], classes: int, device: str) -> BareNetwork:
        """The network with these weights for images of this shape: channels, height, width; none is loaded."""
        import torch

        from ..zoo import build

        weights = self.read(chosen.model, shape[0])[1]
        fresh = build(chosen.model, classes=classes, channels=shape[0], width=chosen.width, image_size=shape[1])
        model = _filled(fresh, weights, classes).to(device)
        return BareNetwork(model, weights.fingerprint, torch.zeros(1, *shape, device=device))

    def read(self, model: str, channels: int) -> tuple[Start, Weights]:
        """The weights of the file or the hub.

        **Raises:** `ConfigError` if none are given.
        """
        start = self.start()
        if not start.given:
            raise ConfigError("say which weights: --weights FILE; or --pretrained, for a timm: or torchvision: model")
        return start, start.read(model, channels)


def _filled(model: nn.Module, weights: Weights, classes: int) -> nn.Module:
    """The network with the weights in it; says what was made of them."""
    if loaded := str(weights.into(model, classes=classes)):
        say(f"{weights.source}: {loaded}")
    return model


@dataclass(frozen=True)
class StartOptions(WeightOptions):
    """Which weights training begins with."""

    weights: Annotated[Path | None, _weights(help=f"Begin with weights: {WEIGHTS_HELP}")] = None
    pretrained: Annotated[
        bool, _pretrained(help="Begin with the weights that timm or torchvision has for its network.")
    ] = False
    new_head: Annotated[
        bool,
        Option("--new-head", help="Draw a classifier anew that has other outputs than classes."),
    ] = False

    def settle(self, model: str, images: Images) -> tuple[Start, Images]:
        """What all networks begin with, known by its content; and the images that suit it.

        **Raises:** `CheckpointError`, `ModelError` if the weights can't be had.
        """
        start = replace(self.start(), new_head=self.new_head)
        if not start.given:
            return start, suited(images, model, start)
        weights = start.read(model, images.channels or 3)
        return replace(start, tune=True, fingerprint=weights.fingerprint), suited(images, model, start, weights)


def suited(images: Images, model: str, start: Start, weights: Weights | None = None) -> Images:
    """The options with the normalization and the size that the weights were trained with, unless others are asked for.

    A file of Filterfold notes them. For other weights of a `timm:` or `torchvision:` model they are those of its
    pretrained ones, of whose size images are made for these only.
    """
    from ..bench.trials.start import SHAPE, noted_input
    from ..zoo import expected, is_of_a_hub

    noted = noted_input(weights) if weights is not None else {}
    if images.normalization == "model" or (weights is not None and not weights.header and is_of_a_hub(model)):
        try:
            own = expected(model)
            noted = {"mean": own.mean, "std": own.std}
            noted |= {"image_size": own.image_size, "channels": 3} if start.pretrained else {}
        except ModelError:  # a network of a hub without weights there
            if images.normalization == "model":
                raise
    shape: dict[str, Any] = {name: getattr(images, name) or noted.get(name) for name in SHAPE}
    images = replace(images, **shape)
    if not noted or images.mean or images.std or images.normalization not in (None, "model"):
        return images
    mean, std = (",".join(map(repr, noted[name])) for name in ("mean", "std"))
    return replace(images, normalization=None, mean=mean, std=std)


def with_weights(factory: Callable[[], nn.Module], weights: Path, device: str) -> nn.Module:
    """A network with the weights of a file: one of Filterfold's, whose sizes it takes on, or a plain state dict.

    **Raises:** `CheckpointError` naming what does not fit.
    """
    from ..surgery.weights import Weights

    found, model = Weights.read(weights), factory()
    found.into(model)
    return model.to(device)
