"""Pruning recipes: shares per layer, as TOML; and the rows of Li et al. 2017."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

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
class PruningRecipe:
    """A network's way from fresh weights to a small one.

    **Arguments:**

    - `name`, `title`: for the command line, and for tables.
    - `model`: for `zoo.build`, with `classes` and `image_size`; `data`: for `data.load`.
    - `rules`: what is removed.
    - `criterion`: which filters go; `follow`: see `filterfold.pruning.criteria.score`.
    - `base`: fields of `training.Recipe` for the dense network.
    - `retrain`: name → fields of `training.Recipe` for training after the cut; the first is the default.
    - `scratch`: fields of `training.Recipe` in which the small network's training from fresh weights differs from the
      base's; None: no such twin.
    - `dense`, `pruned`, `scratched`: the publication's figures.
    - `uncounted`: patterns of layers that the publication's counts leave out.
    """

    name: str
    model: str
    data: str
    rules: tuple[Rule, ...]
    title: str = ""
    image_size: int = 32
    classes: int = 10
    criterion: str = "l1"
    follow: str | None = None
    base: Mapping[str, Any] = field(default_factory=dict)
    retrain: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    scratch: Mapping[str, Any] | None = None
    dense: Figures = Figures()
    pruned: Figures = Figures()
    scratched: Figures = Figures()
    uncounted: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a recipe that removes nothing."""
        if not self.rules:
            raise ConfigError(f"recipe {self.name!r} has no [[prune]] entry, so it removes nothing")

    @property
    def keep(self) -> dict[str, float]:
        """Pattern → share of the units that stays, as `filterfold.select(keep=...)` takes it: the last match counts.

        >>> PruningRecipe("r", "m", "d", (Rule(("a.*",), 0.3, ("a.1",)),)).keep
        {'a.*': 0.7, 'a.1': 1.0}
        """
        shares: dict[str, float] = {}
        for rule in self.rules:
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


_REQUIRED = ("name", "model", "data", "prune")


_PLAIN = {"title": str, "image_size": int, "classes": int, "criterion": str, "follow": str}


_KNOWN = {*_REQUIRED, *_PLAIN, "base", "retrain", "scratch", "paper"}


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

    >>> load("resnet56-b").rules[0].ratio
    0.6
    """
    if str(name).endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{path}: no such recipe file")
        return read(path.read_text(encoding="utf-8"), str(path))
    known = _packaged()
    if str(name) not in known:
        close = difflib.get_close_matches(str(name), known, n=2) or list(names())
        raise ConfigError(f"no recipe {str(name)!r}; there are {', '.join(close)}, and FILE.toml")
    return read(known[str(name)].read_text(encoding="utf-8"), str(name))


def read(text: str, where: str) -> PruningRecipe:
    """A recipe from TOML.

    **Arguments:** `where`: what to call the text in messages.

    **Raises:** `ConfigError` naming what is malformed.
    """
    try:
        document = tomllib.loads(text)
        missing = [key for key in _REQUIRED if key not in document]
        unknown = sorted(document.keys() - _KNOWN)
        if missing or unknown:
            raise ConfigError(f"lacks {missing[0]!r}" if missing else f"has an entry {unknown[0]!r} of no meaning")
        for key, kind in _PLAIN.items():
            if key in document and not isinstance(document[key], kind):
                raise ConfigError(f"{key} must be a {kind.__name__}")
        return _recipe(document)
    except (tomllib.TOMLDecodeError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: not a recipe: {' '.join(str(error).split())}") from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _recipe(document: Mapping[str, Any]) -> PruningRecipe:
    rules = tuple(
        Rule(tuple(entry["layers"]), float(entry["ratio"]), tuple(entry.get("skip", ()))) for entry in document["prune"]
    )
    paper = document.get("paper", {})
    scratch = document.get("scratch")
    return PruningRecipe(
        name=document["name"],
        model=document["model"],
        data=document["data"],
        rules=rules,
        base=dict(document.get("base", {})),
        retrain={name: dict(fields) for name, fields in document.get("retrain", {}).items()},
        scratch=None if scratch is None else dict(scratch),
        dense=Figures(**paper.get("dense", {})),
        pruned=Figures(**paper.get("pruned", {})),
        scratched=Figures(**paper.get("scratch", {})),
        uncounted=tuple(paper.get("uncounted", ())),
        **{key: document[key] for key in _PLAIN if key in document},
    )


def to_toml(recipe: PruningRecipe, remarks: str = "") -> str:
    """The recipe as TOML; `read` gives back an equal one.

    **Arguments:** `remarks`: lines to put above it as a comment.

    >>> read(to_toml(load("vgg16-a")), "text") == load("vgg16-a")
    True
    """
    head = {
        "name": recipe.name,
        "title": recipe.title,
        "model": recipe.model,
        "data": recipe.data,
        "image_size": recipe.image_size,
        "classes": recipe.classes,
        "criterion": recipe.criterion,
        "follow": recipe.follow,
    }
    lines = [f"# {line}".rstrip() for line in remarks.splitlines()] + _entries(head)
    for rule in recipe.rules:
        body = {"layers": list(rule.layers), "ratio": rule.ratio, "skip": list(rule.skip) or None}
        lines += ["", "[[prune]]", *_entries(body)]
    if recipe.base:
        lines += ["", "[base]", *_entries(recipe.base)]
    for name, fields in recipe.retrain.items():
        lines += ["", f"[retrain.{name}]", *_entries(fields)]
    if recipe.scratch is not None:
        lines += ["", "[scratch]", *_entries(recipe.scratch)]
    paper = {"dense": recipe.dense, "pruned": recipe.pruned, "scratch": recipe.scratched}
    printed = [f"{name} = {_figures(figures)}" for name, figures in paper.items() if figures != Figures()]
    if recipe.uncounted:
        printed += _entries({"uncounted": list(recipe.uncounted)})
    if printed:
        lines += ["", "[paper]", *printed]
    return "\n".join(lines) + "\n"


def _entries(values: Mapping[str, Any]) -> list[str]:
    """TOML writes these plain values as JSON does."""
    return [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]


def _figures(figures: Figures) -> str:
    values = {key: value for key, value in asdict(figures).items() if value is not None}
    return f"{{ {', '.join(_entries(values))} }}"


_FAVOURED = {"vgg16": "vgg16-a", "resnet56": "resnet56-b", "resnet110": "resnet110-b"}
"""VGG-16-A, ResNet-56-B and ResNet-110-B: the variants that the paper's text puts forward."""


def keep_shares(model: str) -> dict[str, float] | None:
    """Layer pattern → share of the filters that stays, for the paper's own CIFAR networks; None for any other.

    >>> keep_shares("resnet56")["layer2.*.conv1"], keep_shares("resnet20")
    (0.7, None)
    """
    return load(_FAVOURED[model]).keep if model in _FAVOURED else None
