"""Finding and reading recipe files."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .recipe import Figures, PruningRecipe, Rule

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
