"""Networks of timm and torchvision: built, their pretrained weights, and the images that those expect."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError, pass_on_exhaustion

HUBS = ("timm", "torchvision")


@dataclass(frozen=True, slots=True)
class Expected:
    """The images that a network's pretrained weights were trained on.

    - `mean`, `std`: of each channel, of values scaled to 0 … 1.
    - `image_size`: height and width in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int


def is_of_a_hub(name: str) -> bool:
    """Whether a network's name is one of timm or torchvision.

    >>> is_of_a_hub("timm:resnet18"), is_of_a_hub("resnet56")
    (True, False)
    """
    return name.partition(":")[0] in HUBS and ":" in name


def expected(name: str) -> Expected:
    """What `timm:NAME` or `torchvision:NAME` was trained on; nothing is fetched.

    **Raises:** `ModelError` for a name of neither, or without pretrained weights.

    >>> expected("resnet56")
    Traceback (most recent call last):
    filterfold.errors.ModelError: resnet56 says nothing of the images that it expects; give --mean and --std
    """
    if not is_of_a_hub(name):
        raise ModelError(f"{name} says nothing of the images that it expects; give --mean and --std")
    prefix, _, rest = name.partition(":")
    if prefix == "timm":
        config = _timm_config(rest)
        return Expected(tuple(config.mean), tuple(config.std), config.input_size[-1])
    transforms = _torchvision_weights(rest).transforms()
    return Expected(tuple(transforms.mean), tuple(transforms.std), transforms.crop_size[0])


def pretrained(name: str, channels: int = 3) -> dict[str, Tensor]:
    """The pretrained weights of `timm:NAME` or `torchvision:NAME`, from the library's own hub or its cache.

    **Arguments:** `channels`: of the input; timm adapts the first convolution to other numbers than 3.

    **Returns:** the state dict of the network with as many classes as it was trained on.

    **Raises:** `ModelError`, in one line, for a name of neither, without weights, or if the hub can't be reached.
    """
    prefix, _, rest = name.partition(":")
    if not is_of_a_hub(name):
        raise ModelError(
            f"{name}: only timm: and torchvision: models have pretrained weights; give a file with --weights"
        )
    if prefix == "timm":
        config = _timm_config(rest)
        if not config.has_weights:
            raise ModelError(f"{name} has no pretrained weights; give a file with --weights")
        make = _timm(rest).create_model
        options = {"pretrained": True, "in_chans": channels, "num_classes": config.num_classes}
    else:
        if rest in ("googlenet", "inception_v3"):
            raise ModelError(f"{name} has outputs beside its logits while it trains; take it from a file, without them")
        make, options = _library("torchvision.models", name).get_model, {"weights": _torchvision_weights(rest)}
    try:
        with quiet():
            model: nn.Module = make(rest, **options)
    except Exception as error:  # what hubs raise without a network has no common kind
        reason = first_line(error) or type(error).__name__
        raise ModelError(
            f"{name}: its pretrained weights can't be had ({reason}); is there a network? A file needs none: --weights"
        ) from error
    return dict(model.state_dict())


def from_timm(name: str, classes: int, channels: int) -> nn.Module:
    """A network of timm with fresh weights."""
    timm = _timm(name)
    with one_line(f"timm:{name}"):
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels)
    return model


def from_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    """A network of torchvision with fresh weights."""
    models = _torchvision(name)
    if channels != 3:
        raise ModelError(f"torchvision:{name} takes 3 input channels, not {channels}; timm models take any number")
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    with one_line(f"torchvision:{name}"):
        model: nn.Module = models.get_model(name, weights=None, num_classes=classes, **options)
    return model


def near(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the known names that are most like this one."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


@contextmanager
def one_line(name: str) -> Iterator[None]:
    """Turn what a library or a user's factory raises into one line that names it, with the cause attached."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        pass_on_exhaustion(error)
        raise ModelError(f"{name}: {type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return (str(error).splitlines() or [""])[0]


def _library(name: str, wanted: str) -> Any:
    """An installed library.

    **Raises:** `ModelError` that says what is missing, or that torchvision (which timm imports) is of another PyTorch.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModelError(f"{wanted}: {error.name} is not installed; pip install 'filterfold[zoo]'") from error
    except (ImportError, RuntimeError) as error:
        about = f"torchvision {_version('torchvision')} is of another PyTorch than {_version('torch')}"
        raise ModelError(
            f"{wanted}: {name} is installed, but can't be imported ({first_line(error)}): {about}; install the "
            "torchvision of this PyTorch, from the same index"
        ) from error


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of no version"


def _timm(name: str) -> Any:
    timm = _library("timm", f"timm:{name}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ModelError(f"timm has no model {name!r}{near(architecture, timm.list_models())}")
    if tag and name not in (tagged := timm.list_models(f"{architecture}.*", pretrained=True)):
        raise ModelError(f"timm has no weights {name!r}{near(name, tagged) or f'; leave .{tag} out'}")
    return timm


def _timm_config(name: str) -> Any:
    timm = _timm(name)
    with one_line(f"timm:{name}"):
        config = timm.get_pretrained_cfg(name)
    if config is None:
        raise ModelError(f"timm:{name} has no pretrained weights, and says nothing of the images that it expects")
    return config


def _torchvision(name: str) -> Any:
    models = _library("torchvision.models", f"torchvision:{name}")
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"torchvision has no classification model {name!r}{near(name, known)}")
    return models


def _torchvision_weights(name: str) -> Any:
    """The best weights of a network, as torchvision lists them: nothing is fetched."""
    listed = _torchvision(name).get_model_weights(name)
    if not len(listed):
        raise ModelError(f"torchvision:{name} has no pretrained weights")
    return listed.DEFAULT


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the hubs' own retries and announcements off the terminal: the caller says in one line what came of it."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
