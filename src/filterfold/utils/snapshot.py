"""What a model is in Python: attributes, lists, dictionaries, hooks, children. Taken down, and given back."""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

from torch import Tensor, nn

from .modules import leaves

_CONTAINERS = (dict, list, set, OrderedDict, defaultdict, deque)


_OWN = frozenset(vars(nn.Module())) - {"_buffers", "_parameters"}
"""Attributes that PyTorch keeps in every module: children and hooks. They hold no tensors of their own."""


_DEPTH, _LONGEST = 3, 4096
"""How deep to look into containers and plain objects, and the most entries of one: a module may hold a data set."""


class Snapshot:
    """All Python state of some models, to be given back as it is now.

    That is every module's attributes (its mode among them), its children, hooks, parameters and buffers as objects, and
    the content of containers and plain objects (a configuration, a cache) that its attributes hold. Classes, and the
    files that they are from, may keep caches too. Those are not given back, since others may use them meanwhile; but
    what was added to them is forgotten if it is tensors made in inference mode, which are of no use in training.

    >>> model = nn.Linear(2, 2)
    >>> before = Snapshot([model])
    >>> handle = model.register_forward_hook(print); model.extra = nn.Linear(1, 1); model.flag = True
    >>> before.give_back(); len(model._forward_hooks), list(model.children()), hasattr(model, "flag")
    (0, [], False)
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._modules = [module for model in models for module in model.modules()]
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any, bool]] = []
        self._empty: list[Any] = []  # nearly all
        self._seen: set[int] = {id(module) for module in self._modules}
        for module in self._modules:
            attributes = vars(module)
            self._attributes.append((attributes, attributes.copy()))
            for name, value in attributes.items():
                kind = type(value)
                if kind in _ATOMS or (kind is tuple and _ATOMS.issuperset(map(type, value))):
                    continue
                if name not in _OWN:
                    self._look_into(value, 0)
                elif not value:
                    self._empty.append(value)
                else:
                    self._containers.append((value, value.copy(), False))
        places = _places(self._modules)
        self._remembered = [(cached, cached.cache_info().currsize) for cached in _caches(places)]
        shared = (value for place in places for name, value in list(vars(place).items()) if not name.startswith("__"))
        self._shared = [(value, set(value)) for value in shared if type(value) is dict and len(value) <= _LONGEST]

    def _look_into(self, value: Any, depth: int) -> None:
        kind = type(value)
        if kind in _ATOMS or id(value) in self._seen or depth > _DEPTH:
            return
        if kind in _CONTAINERS:
            if len(value) > _LONGEST:
                return
            self._containers.append((value, value.copy(), True))
            items = list(value.values()) if isinstance(value, dict) else list(value)
        elif kind is tuple:
            if _ATOMS.issuperset(map(type, value)):
                return
            items = list(value)
        elif hasattr(value, "__dict__") and not isinstance(value, _LEFT_ALONE) and not callable(value):
            self._attributes.append((vars(value), vars(value).copy()))
            items = list(vars(value).values())
        else:
            return
        self._seen.add(id(value))
        for item in items:
            self._look_into(item, depth + 1)

    def added(self) -> Iterator[Tensor]:
        """The tensors that were put into containers and plain objects since."""
        for container, content, holds_tensors in self._containers:
            if holds_tensors and not isinstance(container, set) and not _same_content(container, content):
                old = {id(tensor) for tensor in leaves(content)}
                yield from (tensor for tensor in leaves(container) if id(tensor) not in old)

    def give_back(self) -> None:
        """Make everything what it was."""
        for container in self._empty:
            if container:
                container.clear()
        for container, content, _ in self._containers:
            if not _same_content(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list | deque) else container.update(content)
        for attributes, content in self._attributes:
            if attributes.keys() != content.keys():
                for name in [name for name in attributes if name not in content]:
                    del attributes[name]
            attributes.update(content)
        for shared, keys in self._shared:
            for key in [key for key in shared if key not in keys]:
                if any(tensor.is_inference() for tensor in leaves(shared[key])):
                    del shared[key]
        for cached, size in self._remembered:
            if cached.cache_info().currsize > size:
                cached.cache_clear()


_ATOMS = frozenset({type(None), bool, int, float, str, bytes, complex, Tensor, nn.Parameter, type(lambda: None), type})


_LEFT_ALONE = (Tensor, nn.Module, type)


def _same_content(first: Any, second: Any) -> bool:
    """Whether two containers hold the very same objects."""
    if len(first) != len(second):
        return False
    if isinstance(first, set):
        return bool(first == second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(map(is_, first.values(), second.values()))
    return all(map(is_, first, second))


def _places(modules: Iterable[nn.Module]) -> list[Any]:
    """The classes of the modules, and the files that these are from."""
    classes = {kind for module in modules for kind in type(module).__mro__ if not kind.__module__.startswith("torch.")}
    files = {sys.modules[kind.__module__] for kind in classes if kind.__module__ in sys.modules}
    return [*classes, *files - {sys.modules["builtins"]}]


def _caches(places: Iterable[Any]) -> list[Any]:
    """Functions with a cache in classes and files."""
    found = (value for place in places for value in list(vars(place).values()))
    return list({id(value): value for value in found if type(value) is functools._lru_cache_wrapper}.values())
