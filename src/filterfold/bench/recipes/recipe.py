"""Pruning recipes: shares per layer, as TOML; and the rows of Li et al. 2017."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import tomli_w

from ...errors import ConfigError


@dataclass(frozen=True, slots=True)
class Rule:
    """A share of the filters to remove from some layers.

    **Arguments:**

    - `layers`, `skip`: names or glob patterns of layers, and of those among them that stay whole.
    - `ratio`: share of the filters removed; int(C·(1 - ratio)) of C stay.
    """

    layers: tuple[str, ...]
    ratio: float
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse ratios out of range and rules about nothing."""
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio:g}: the share of filters to remove must lie between 0 and 1")
        if not self.layers:
            raise ConfigError("a [[prune]] entry names no layers")


@dataclass(frozen=True, slots=True)
class Figures:
    """What a publication prints about one network.

    - `error`: percent.
    - `macs`, `weights`: as printed, such as "9.09e7".
    - `macs_removed`, `weights_removed`: percent of the dense network's.
    """

    error: float | None = None
    macs: str | None = None
    weights: str | None = None
    macs_removed: float | None = None
    weights_removed: float | None = None


@dataclass(frozen=True, slots=True)
class Paper:
    """What a publication says about the networks of a recipe.

    - `dense`, `pruned`, `scratch`: the figures of each.
    - `uncounted`: patterns of layers that its counts leave out.
    """

    dense: Figures = Figures()
    pruned: Figures = Figures()
    scratch: Figures = Figures()
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CountedTrial:
    """A finished trial of a recipe: its record, and its network's counts as the paper counts."""

    record: Mapping[str, Any]
    macs: int
    weights: int


@dataclass(frozen=True, slots=True)
class PruningRecipe:
    """A network's way from fresh weights to a small one.

    **Arguments:**

    - `name`, `title`: for the command line, and for tables.
    - `model`: for `zoo.build`, with `classes` and `image_size`; `data`: for `data.load`.
    - `prune`: what is removed.
    - `criterion`: which filters go; `follow`: see `filterfold.pruning.criteria.score`.
    - `base`: fields of `training.Recipe` for the dense network.
    - `retrain`: name → fields of `training.Recipe` for training after the cut; the first is the default.
    - `scratch`: fields of `training.Recipe` in which the small network's training from fresh weights differs from the
      base's; None: no such twin.
    - `paper`: the publication's figures.
    """

    name: str
    model: str
    data: str
    prune: tuple[Rule, ...]
    title: str = ""
    image_size: int = 32
    classes: int = 10
    criterion: str = "l1"
    follow: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scratch: Mapping[str, Any] | None = None
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        """Refuse a recipe that removes nothing."""
        if not self.prune:
            raise ConfigError(f"recipe {self.name!r} has no [[prune]] entry, so it removes nothing")

    @property
    def keep(self) -> dict[str, float]:
        """Pattern → share of the units that stays, as `filterfold.select(keep=...)` takes it: the last match counts.

        >>> PruningRecipe("r", "m", "d", (Rule(("a.*",), 0.3, ("a.1",)),)).keep
        {'a.*': 0.7, 'a.1': 1.0}
        """
        shares: dict[str, float] = {}
        for rule in self.prune:
            shares |= dict.fromkeys(rule.layers, round(1 - rule.ratio, 9)) | dict.fromkeys(rule.skip, 1.0)
        return shares

    def schedule(self, name: str | None = None) -> tuple[str, dict[str, Any]]:
        """The retraining of that name, or the first: its name and fields.

        **Raises:** `ConfigError` if there is none of that name.
        """
        chosen = name or next(iter(self.retrain), "")
        if chosen not in self.retrain:
            known = ", ".join(self.retrain) or "none"
            raise ConfigError(f"recipe {self.name!r} has no retraining {chosen!r}; there is {known}")
        return chosen, dict(self.retrain[chosen])


COLLECTIONS = ("li2017",)


T = TypeVar("T")


@cache
def _packaged() -> dict[str, Traversable]:
    found = {}
    for collection in COLLECTIONS:
        for entry in (files(__package__) / collection).iterdir():
            if entry.name.endswith(".toml"):
                found[entry.name.removesuffix(".toml")] = entry
    return found


def names() -> tuple[str, ...]:
    """The recipes that come with the package.

    >>> "resnet56-b" in names()
    True
    """
    order = ("vgg16", "resnet56", "resnet110", "resnet34")
    return tuple(sorted(_packaged(), key=lambda name: (order.index(name.rpartition("-")[0]), name)))


def load(name: str | Path) -> PruningRecipe:
    """A recipe of the package by name, or a file by path.

    **Raises:** `ConfigError` for an unknown name or a file that is no recipe.

    >>> load("resnet56-b").prune[0].ratio
    0.6
    """
    if str(name).endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{path}: no such recipe file")
        return read(path.read_text(encoding="utf-8"), str(path))
    known = _packaged()
    if str(name) not in known:
        close = " or ".join(difflib.get_close_matches(str(name), known, n=2))
        hint = f"did you mean {close}? There are" if close else "there are"
        raise ConfigError(f"no recipe {str(name)!r}; {hint} {', '.join(names())}, and FILE.toml")
    return read(known[str(name)].read_text(encoding="utf-8"), str(name))


def read(text: str, where: str) -> PruningRecipe:
    """A recipe from TOML.

    **Arguments:** `where`: what to call the text in messages.

    **Raises:** `ConfigError` naming what is malformed.
    """
    try:
        return _built(PruningRecipe, tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not a recipe: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _built(kind: Callable[..., T], table: Mapping[str, Any]) -> T:
    """A dataclass from a table of a TOML file; entries that lack, are unknown or of the wrong type are refused."""
    hints = get_type_hints(kind)
    for entry in fields(cast(Any, kind)):
        if entry.name not in table and entry.default is entry.default_factory is MISSING:
            raise ConfigError(f"lacks {entry.name!r}")
    for name in table:
        if name not in hints:
            raise ConfigError(f"has an entry {name!r} of no meaning")
    return kind(**{name: _value(name, value, hints[name]) for name, value in table.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    """A value of a file as a field of this type takes it."""
    if hint is Any:
        return value
    hint = get_args(hint)[0] if isinstance(hint, UnionType) else hint  # what may be None
    kind = get_origin(hint) or hint
    accepted, called = _TYPES.get(kind, (dict, "a table"))
    if not isinstance(value, accepted):
        raise ConfigError(f"{name} must be {called}")
    if kind is tuple:
        return tuple(_value(name, item, get_args(hint)[0]) for item in value)
    if kind is Mapping:
        return {key: _value(f"{name}.{key}", item, get_args(hint)[1]) for key, item in value.items()}
    return _built(cast(Any, kind), value) if is_dataclass(kind) else value


_TYPES: dict[Any, tuple[Any, str]] = {
    str: (str, "a text"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    tuple: (list, "an array"),
}
"""Type of a field → what TOML gives for it, and how it is called; all others are tables."""


def to_toml(recipe: PruningRecipe, remarks: str = "") -> str:
    """The recipe as TOML; `read` gives back an equal one.

    **Arguments:** `remarks`: lines to put above it as a comment.

    >>> read(to_toml(load("vgg16-a")), "text") == load("vgg16-a")
    True
    """
    table = _given(asdict(recipe))
    if recipe.scratch is not None:
        table["scratch"] = dict(recipe.scratch)  # an empty one is not the same as none
    comment = "".join(f"# {line}".rstrip() + "\n" for line in remarks.splitlines())
    return comment + tomli_w.dumps(table)


def _given(value: Any) -> Any:
    """Without None, which TOML does not have, and without what is empty."""
    if isinstance(value, Mapping):
        given = {name: _given(item) for name, item in value.items()}
        return {name: item for name, item in given.items() if item not in (None, (), {})}
    return tuple(map(_given, value)) if isinstance(value, tuple) else value


_FAVOURED = {"vgg16": "vgg16-a", "resnet56": "resnet56-b", "resnet110": "resnet110-b"}
"""VGG-16-A, ResNet-56-B and ResNet-110-B: the variants that the paper's text puts forward."""


def keep_shares(model: str) -> dict[str, float] | None:
    """Layer pattern → share of the filters that stays, for the paper's own CIFAR networks; None for any other.

    >>> keep_shares("resnet56")["layer2.*.conv1"], keep_shares("resnet20")
    (0.7, None)
    """
    return load(_FAVOURED[model]).keep if model in _FAVOURED else None
