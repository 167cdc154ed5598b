"""Arguments against the types that their functions declare: what makes no sense is refused at the call, by name."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..errors import ConfigError, one_line

F = TypeVar("F", bound=Callable[..., Any])


def typed(function: F) -> F:
    """Check the arguments of a function's calls against its annotations, before anything is done.

    A `bool` is no number, NaN is none either, and text is no list; numbers of NumPy are numbers. What annotations
    can't say, ranges above all, the function checks.

    **Raises:** `ConfigError` naming the argument.

    >>> @typed
    ... def train(epochs: int, share: float | None = None) -> None: ...
    >>> try: train(True)
    ... except ConfigError as error: print(error)
    train: epochs=True must be int
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        check(function.__qualname__.removesuffix(".__init__"), _hints(function), bound)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def check_fields(instance: Any) -> None:
    """The same for the fields of a dataclass, in its `__post_init__`."""
    kind: Any = type(instance)
    values = {entry.name: getattr(instance, entry.name) for entry in dataclasses.fields(kind)}
    check(kind.__name__, _hints(kind), values)


def check(where: str, hints: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse the first value that is not of its type."""
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            hint = f"; write [{value!r}]" if isinstance(value, str) and fits([value], hints[name]) else ""
            raise ConfigError(f"{where}: {name}={_shown(value)} must be {_named(hints[name])}{hint}")


def check_device(device: Any) -> None:
    """Refuse what PyTorch knows no device by."""
    try:
        torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"device={device!r} is no device, such as 'cpu' or 'cuda:0' ({one_line(error)})") from error


@functools.cache
def _hints(owner: Hashable) -> dict[str, Any]:
    return get_type_hints(owner)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, entries of containers included; of types that can't be checked, everything is.

    >>> fits(3, int | None), fits(True, float), fits([1, "a"], tuple[int, ...]), fits("ab", list[str])
    (True, False, False, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(type(value) is type(option) for option in inner)  # which of them, the function says
    if origin in _CONTAINERS:
        return _holds(value, origin, inner)
    if hint in (int, float):
        kind = Integral if hint is int else Real
        return not isinstance(value, bool) and isinstance(value, kind) and bool(value == value)
    if hint is None or hint is type(None):
        return value is None
    plain = hint is not Any and isinstance(hint, type) and not getattr(hint, "_is_protocol", False)
    return isinstance(value, hint) if plain else True


def _holds(value: Any, origin: Any, inner: tuple[Any, ...]) -> bool:
    if origin is Callable:
        return callable(value)
    if origin is type:
        return isinstance(value, type)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items()
        )
    if origin is Iterable:  # which may be read only once
        iterable = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
        return iterable and not isinstance(value, str) and (not isinstance(value, list | tuple) or _all(value, inner))
    if origin is tuple and (not isinstance(value, tuple | list | range)):
        return False
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | Tensor):
        return False
    if origin is tuple and len(inner) > 1 and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return isinstance(value, range) or _all(value, inner)


def _all(values: Sequence[Any], inner: tuple[Any, ...]) -> bool:
    return inner[0] is Any or all(fits(item, inner[0]) for item in values)


_CONTAINERS = (Callable, type, Mapping, Iterable, Sequence, tuple, list)


def _named(hint: Any) -> str:
    options = [option for option in get_args(hint) or () if get_origin(hint) in (Union, types.UnionType)]
    if options:
        return " or ".join(_named(option) for option in options)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is nn.Module:
        return "a torch.nn.Module (a network, not its class or name)"
    if hint is type(None):
        return "None"
    plain = isinstance(hint, type) and not get_args(hint)
    return hint.__name__ if plain else re.sub(r"(\w+\.)+(?=\w)", "", str(hint))


def _shown(value: Any) -> str:
    if isinstance(value, nn.Module | Tensor):
        return type(value).__name__
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
