"""A recipe as trials of one comparison: base training → pruning → retraining, and the small twin from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ...errors import ConfigError
from ...profiling.macs import measure
from ...surgery.checkpoint import load
from ..trials.config import Comparison
from ..trials.context import RunContext
from ..trials.records import Record
from ..trials.setting import Setting
from ..trials.start import Start
from .recipe import CountedTrial, PruningRecipe


def setting(
    recipe: PruningRecipe,
    *,
    data: str | None = None,
    data_options: Mapping[str, Any] | None = None,
    width: float = 1.0,
    epochs_scale: float = 1.0,
    retrain: str | None = None,
    start: Start | None = None,
    training: Mapping[str, Any] | None = None,
) -> Setting:
    """What a recipe says, for trials.

    **Arguments:**

    - `data`, `data_options`: another data set than the recipe's, and further arguments of `data.load`.
    - `width`: multiplier on every layer's width.
    - `epochs_scale`: all numbers of epochs times this, at least one each.
    - `retrain`: which of the recipe's retraining schedules; None: the first.
    - `start`: the weights of a dense network that is trained already.
    - `training`: fields of `training.Recipe` that hold for all training, such as the precision.

    **Raises:** `ConfigError` for a scale that is not positive, or an unknown schedule.

    >>> from filterfold.bench.recipes import load
    >>> chosen = setting(load("resnet56-b"), epochs_scale=0.05, retrain="cosine")
    >>> chosen.recipe["epochs"], chosen.retrain_epochs, dict(chosen.retrain)
    (8, 2, {'lr': 0.01, 'schedule': 'cosine'})
    """
    if not epochs_scale > 0:
        raise ConfigError(f"epochs scale {epochs_scale:g}: give a number above 0, such as 0.1")
    _, again = recipe.schedule(retrain)
    options = dict(data_options or {})
    if recipe.image_size != 32 and data != "digits":
        options.setdefault("image_size", recipe.image_size)
    retraining = {key: value for key, value in again.items() if key != "epochs"}
    return Setting(
        model=recipe.model,
        data=data or recipe.data,
        width=width,
        data_options=options,
        recipe={**_scaled(recipe.base, epochs_scale), **(training or {})},
        retrain_epochs=_scaled(again, epochs_scale).get("epochs", 0),
        retrain_lr=retraining.get("lr", 0.001),
        retrain=retraining,
        shares=recipe.keep,
        follow=recipe.follow,
        scratch=_scaled(recipe.scratch or {}, epochs_scale),
        weights=start.weights if start else None,
        start=start.entries if start else {},
    )


def comparison(
    recipe: PruningRecipe, chosen: Setting, *, seeds: Sequence[int] = (0,), scratch: bool = True
) -> Comparison:
    """The trials of a recipe: dense, pruned, and the twin from scratch if the recipe has one and `scratch` is set."""
    twin = ["scratch"] if scratch and recipe.scratch is not None else []
    return Comparison.of(chosen, ["dense", recipe.criterion, *twin], seeds=seeds)


def counted(recipe: PruningRecipe, records: Iterable[Record], context: RunContext) -> list[CountedTrial]:
    """The finished trials with their counts as the paper counts: `uncounted` layers left out."""
    found = []
    for record in records:
        if record["status"] == "finished":
            model = load(context.model_file(record["id"]), context.fresh, device=context.device)
            found.append(CountedTrial(record, *counts(model, context.example, recipe.paper.uncounted)))
    return found


def counts(model: nn.Module, example: Any, uncounted: Sequence[str] = ()) -> tuple[int, int]:
    """Multiply-accumulates, and convolution and linear weights, of all layers but those that match a pattern."""
    layers = [
        layer
        for layer in measure(model, example).layers
        if not any(fnmatchcase(layer.name, pattern) for pattern in uncounted)
    ]
    return sum(layer.macs for layer in layers), sum(layer.weights for layer in layers)


def _scaled(fields: Mapping[str, Any], scale: float) -> dict[str, Any]:
    scaled = dict(fields)
    if "epochs" in scaled:
        scaled["epochs"] = max(1, round(scaled["epochs"] * scale))
    return scaled
