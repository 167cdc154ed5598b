"""Writing a recipe as TOML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .recipe import Figures, PruningRecipe


def to_toml(recipe: PruningRecipe, remarks: str = "") -> str:
    """The recipe as TOML; `read` gives back an equal one.

    **Arguments:** `remarks`: lines to put above it as a comment.

    >>> from .files import load, read
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
