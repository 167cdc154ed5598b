"""The networks by name, from the zoo, timm, torchvision or a file, and their widths."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

from torch import nn

from ..errors import ModelError
from .hub import HUBS, from_timm, from_torchvision, near, one_line


def scale(channels: int, width: float) -> int:
    """A layer's channels times the width multiplier, at least 1.

    >>> scale(64, 0.25), scale(3, 0.1)
    (16, 1)
    """
    return max(1, round(channels * width))


def check(name: str, *, classes: int, channels: int, width: float) -> None:
    """Refuse counts below one and a width multiplier that is not positive."""
    for what, value in (("classes", classes), ("channels", channels)):
        if value < 1:
            raise ModelError(f"{name}: {what}={value} makes no network; give at least 1")
    if not width > 0:
        raise ModelError(f"{name}: width={width} makes no network; give a multiplier above 0, such as 0.25")


def check_widths(name: str, widths: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Explicit widths as a tuple; `ModelError` unless there are `count`, all at least 1."""
    if len(widths) != count:
        raise ModelError(f"{name}: {len(widths)} widths given for {count} {what}; give one for each")
    for index, value in enumerate(widths):
        if int(value) != value or value < 1:
            raise ModelError(f"{name}: width {value!r} at place {index} of the {what} is no count of at least 1")
    return tuple(int(value) for value in widths)


def initialise(model: nn.Module) -> None:
    """Draw convolution and linear weights as He et al. 2015 (arXiv 1502.01852, equation 10) do.

    Weights are normal with variance 2 / fan-in, biases zero; batch normalisation starts as PyTorch
    has it, with scale 1 and shift 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Factory(Protocol):
    """What the registry holds: keyword arguments only, returns the network."""

    def __call__(self, *, classes: int, channels: int, width: float, image_size: int) -> nn.Module:
        """Build the network."""


F = TypeVar("F", bound=Factory)


_LOG = logging.getLogger("filterfold.zoo")


_FACTORIES: dict[str, Factory] = {}


FILE_MODULE = "filterfold_factory_"
"""How the names begin that modules from a user's files have in `sys.modules`."""


_KEYWORDS = {
    "classes": ("classes", "num_classes", "n_classes"),
    "channels": ("channels", "in_channels", "in_chans", "input_channels"),
    "width": ("width",),
    "image_size": ("image_size", "img_size"),
}
"""The names under which a user's factory may ask for each of `build`'s arguments."""


def register(name: str) -> Callable[[F], F]:
    """Put a factory into the zoo under a name: a decorator.

    ```python
    >>> @register("one_layer")
    ... def one_layer(*, classes, channels, width, image_size):
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, classes))
    >>> build("one_layer", classes=2, channels=1, image_size=4)[1]
    Linear(in_features=16, out_features=2, bias=True)
    >>> del _FACTORIES["one_layer"]

    ```
    """

    def put(factory: F) -> F:
        if name in _FACTORIES:
            raise ModelError(f"the zoo already has a model {name!r}; choose another name")
        _FACTORIES[name] = factory
        return factory

    return put


def names() -> tuple[str, ...]:
    """The names in the registry, sorted."""
    return tuple(sorted(_FACTORIES))


def is_listed(name: str) -> bool:
    """Whether a name is one of the registry, timm or torchvision: `build` imports nothing for it that it names itself.

    >>> [is_listed(name) for name in ("vgg16", "timm:resnet18", "model.py:factory", "timm:model.py:factory")]
    [True, True, False, False]
    """
    prefix, colon, _ = name.rpartition(":")
    return prefix in HUBS if colon else name in _FACTORIES


def build(name: str, *, classes: int = 10, channels: int = 3, width: float = 1.0, image_size: int = 32) -> nn.Module:
    """Build a network by name, with freshly drawn weights.

    **Arguments:**

    - `name`: a name of the registry (`vgg16`, `vgg_small`, `resnet20|32|44|56|110`), `timm:NAME`,
      `torchvision:NAME`, or a user's own callable as `package.module:factory` or `path/file.py:factory`: that code is
      executed. A user's factory is called with those of the arguments below that its signature names
      (`num_classes`, `n_classes`, `in_channels`, `in_chans`, `input_channels`, `img_size` are understood too); the log
      says with which.
    - `classes`: number of outputs.
    - `channels`: number of input channels.
    - `width`: multiplier on every layer's width; only where the network has such a thing.
    - `image_size`: height and width of the input in pixels, for networks whose shape depends on it.

    **Returns:** the network, in training mode, on the CPU.

    **Raises:** `ModelError` for an unknown name (with the nearest ones), a library that is not
    installed, an argument that the network can't follow, or a factory that fails.

    ```python
    >>> model = build("resnet20", width=0.5, classes=100)
    >>> model.linear
    Linear(in_features=32, out_features=100, bias=True)

    ```
    """
    check(name, classes=classes, channels=channels, width=width)
    prefix, colon, rest = name.rpartition(":")
    if not colon:
        if name not in _FACTORIES:
            others = f"; known are {', '.join(names())}, timm:NAME, torchvision:NAME and file.py:factory (executed)"
            raise ModelError(f"no model {name!r}{near(name, names()) or others}")
        return _FACTORIES[name](classes=classes, channels=channels, width=width, image_size=image_size)
    if prefix in HUBS:
        if width != 1.0:
            raise ModelError(f"{name}: models of {prefix} have no width multiplier; leave width at 1")
        return (from_timm if prefix == "timm" else from_torchvision)(rest, classes, channels)
    offered = {"classes": classes, "channels": channels, "width": width, "image_size": image_size}
    return _call(name, _find(name, prefix, rest), offered)


def _find(name: str, module_name: str, attribute: str) -> Callable[..., Any]:
    with one_line(name):
        module = load_file(Path(module_name)) if module_name.endswith(".py") else _import(module_name)
    found = getattr(module, attribute, None)
    if found is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"{name}: {module_name} has nothing called {attribute!r}{near(attribute, public)}")
    if not callable(found):
        raise ModelError(f"{name}: {attribute} is a {type(found).__name__}, not a callable that returns the network")
    return found  # type: ignore[no-any-return]  # callable() does not narrow Any


def _call(name: str, factory: Callable[..., Any], offered: dict[str, Any]) -> nn.Module:
    try:
        parameters = set(inspect.signature(factory).parameters)
    except ValueError:  # some C callables have no signature
        parameters = set()
    accepted = {}
    for argument, value in offered.items():
        keyword = next((key for key in _KEYWORDS[argument] if key in parameters), None)
        if keyword is not None:
            accepted[keyword] = value
        elif argument == "width" and value != 1.0:
            raise ModelError(f"{name}: the factory has no argument 'width', so width={value} can't be followed")
    given = ", ".join(f"{key}={value}" for key, value in accepted.items())
    _LOG.info("%s was given %s", name, given or f"nothing: it names none of {', '.join(_KEYWORDS)}")
    with one_line(name):
        model = factory(**accepted)
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name}: the factory returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _import(name: str) -> ModuleType:
    with _on_path(Path.cwd()):
        return importlib.import_module(name)


def load_file(path: Path) -> ModuleType:
    """Run a Python file as a module; its folder is importable meanwhile, as for a script."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    resolved = path.resolve()
    name = FILE_MODULE + hashlib.sha256(str(resolved).encode()).hexdigest()[:16]  # the same in every process
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and the like look their module up
    try:
        with _on_path(resolved.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
