"""`filterfold sensitivity`: what each layer loses when it is pruned alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..errors import ConfigError, RecordError
from .display import live, say, table
from .figures import Figures
from .options import (
    MODEL_HELP,
    DataOptions,
    Device,
    ModelOptions,
    Overwrite,
    Threads,
    Width,
    listed,
    use_threads,
)
from .weights import WeightOptions

if TYPE_CHECKING:
    from torch import nn

    from ..bench.sensitivity import Sensitivity, Suggestion
    from ..data import ImageData


EXAMPLES = """
Examples:

  filterfold sensitivity resnet56 -w resnet56.safetensors -d cifar10 --layers 'layer*.conv1' --images 2000

  filterfold sensitivity vgg16 -w vgg16.safetensors -d cifar10 --criteria l1,random,largest,mean-std

  filterfold sensitivity resnet56 -w resnet56.safetensors --layers 'layer*.conv1' --suggest loss=1

  filterfold sensitivity vgg16 -w vgg16.safetensors --suggest macs=0.6
"""


_swept = partial(Option, rich_help_panel="Sweep")


@dataclass(frozen=True)
class SweepOptions:
    """What is pruned, and on what it is evaluated."""

    criteria: Annotated[str, _swept(help="Comma-separated: l1, l2, random, largest, fpgm, mean-std, …")] = "l1"
    ratios: Annotated[str | None, _swept(help="Shares to prune away.", show_default="0.1,0.2 … 0.9")] = None
    layers: Annotated[
        list[str] | None, _swept(help="Layers to prune, with * and ?; several times.", show_default="all")
    ] = None
    images: Annotated[int | None, _swept(help="Use so many.", show_default="all")] = None
    split: Annotated[str, _swept(help="validation, or test (then nothing may be chosen from it).")] = "validation"
    seed: Annotated[int, _swept(help="Of random scores, and of the choice of images.")] = 0

    def keywords(self) -> dict[str, Any]:
        """Arguments of `bench.sensitivity.sweep`, as lists, so that they can be written down."""
        from ..bench.sensitivity import RATIOS

        if self.split not in ("validation", "test"):
            raise ConfigError(f"--split {self.split}: give validation or test")
        return {
            "criteria": listed(self.criteria, "--criteria", str),
            "ratios": listed(self.ratios, "--ratios", float) or list(RATIOS),
            "layers": list(self.layers or ()),
            "images": self.images,
            "seed": self.seed,
        }


def sensitivity(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    source: DataOptions,
    sweeping: SweepOptions,
    trained: WeightOptions,
    width: Width = 1.0,
    suggest: Annotated[
        str | None,
        Option(help="Derive ratios and write a recipe: loss=POINTS for each layer alone, or macs=SHARE that remains."),
    ] = None,
    out: Annotated[Path | None, Option(help="Folder.", show_default="runs/sensitivity-MODEL")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = None,
) -> Figures:
    """Prune each layer alone at rising ratios, without retraining, and draw what it costs.

    Choose on the validation split, as the default does. A sweep that was stopped goes on with the same command; one
    that is done is shown again, and --suggest reads it.
    """
    from ..bench.report.sensitivity import sensitivity_table, write
    from ..bench.sensitivity import sweep
    from ..bench.trials.context import resolve
    from ..data import batches
    from ..graph import trace
    from ..utils.environment import describe
    from ..utils.io import check_output

    use_threads(threads)
    options, goal = sweeping.keywords(), _goal(suggest) if suggest else None
    folder = out or Path("runs") / f"sensitivity-{Path(model.replace(':', '-')).name}"
    place = resolve(device)
    check_output(folder, folder=True)
    with live():
        begun = trained.network(ModelOptions(model, width), source, place)
        network, data = begun.model, begun.data
        about = {"model": model, "width": width, "weights": trained.name, "data": f"{source.data}, {sweeping.split}"}
        about |= {"fingerprint": begun.fingerprint, "data_fingerprint": data.fingerprint}
        part = folder / "sensitivity.part"
        found = None if overwrite else _done(folder, about | options)
        if found is None:
            loader = list(islice(batches(data.train, 128, shuffle=True, seed=sweeping.seed, device=place), 10))
            groups, split = trace(network, data.example.to(place)), getattr(data, sweeping.split)
            measured = sweep(network, groups, split, loader=loader, path=part, **options)
            found = replace(measured, conditions=about | options | {"environment": describe(place)})
        write(found, folder)
        part.unlink(missing_ok=True)
        chosen = _suggested(network, data, found, goal) if goal else None
    document = {**asdict(found), "suggested": None if chosen is None else asdict(chosen)}
    shown = Figures(document, partial(_show, found, sensitivity_table(found).title)).adding(folder=folder)
    if chosen is None:
        return shown
    recipe = _write_recipe(chosen, found, model, source, data, folder)
    return shown.adding(*_stages(chosen), f"filterfold recipe run {recipe} --weights ... prunes by it", recipe=recipe)


def _done(folder: Path, asked: dict[str, Any]) -> Sensitivity | None:
    """The sweep that a folder holds, or None.

    **Raises:** `RecordError` if it is not the one that is asked for.
    """
    from ..bench.sensitivity import Sensitivity

    path = folder / "sensitivity.json"
    if not path.exists():
        return None
    found = Sensitivity.read(path)
    for key, value in asked.items():
        if key == "data_fingerprint" and key not in found.conditions:  # of a version that did not look at them
            continue
        if (known := found.conditions.get(key)) != value:
            raise RecordError(
                f"{folder} holds another sweep ({key} is {known!r} there); give another --out, or --overwrite"
            )
    return found


def _goal(text: str) -> dict[str, float]:
    """`loss=1` or `macs=0.6`.

    >>> _goal("macs=0.6")
    {'macs': 0.6}
    """
    name, _, number = text.partition("=")
    try:
        if name not in ("loss", "macs"):
            raise ValueError
        return {name: float(number)}
    except ValueError:
        raise ConfigError(
            f"--suggest {text}: give loss=POINTS, such as loss=1, or macs=SHARE, such as macs=0.6"
        ) from None


def _suggested(network: nn.Module, data: ImageData, found: Sensitivity, goal: dict[str, float]) -> Suggestion:
    from ..bench.sensitivity import suggest
    from ..graph import trace
    from ..profiling.macs import measure

    example = data.example.to(next(network.parameters()).device)
    groups, cost = trace(network, example), measure(network, example)
    return suggest(found, groups, cost, loss=goal.get("loss"), macs=goal.get("macs"))


def _show(found: Sensitivity, title: str) -> None:
    for criterion in found.criteria:
        rows = [
            (layer.group, str(layer.stage), *(f"{point.top1:.1f}" for point in layer.curve(criterion)))
            for layer in found.layers
        ]
        means = [f"{found.mean(criterion, ratio):.1f}" for ratio in found.ratios]
        heads = ("layer", "stage", *(f"{ratio:.0%}" for ratio in found.ratios))
        table(f"{title}: {criterion}", heads, [*rows, ("mean", "", *means)], texts=1)
    say(f"{found.seconds:.0f} s on the clock, {found.cpu_seconds:.0f} s of processor time, {found.images} images")


def _write_recipe(
    chosen: Suggestion, found: Sensitivity, model: str, source: DataOptions, data: ImageData, folder: Path
) -> Path:
    """The suggestion as a recipe; training and retraining are those of the recipes for CIFAR-10."""
    from ..bench.recipes import PruningRecipe, Rule, load, to_toml
    from ..utils.io import write_text

    rules = tuple(
        Rule(chosen.pruned[stage] + chosen.skipped[stage], ratio, chosen.skipped[stage])
        for stage, ratio in chosen.ratios.items()
        if ratio
    )
    if not rules:
        raise ConfigError(f"no layer bears a loss of {chosen.loss:g} points; allow more, or measure smaller ratios")
    usual = load("resnet56-b")
    recipe = PruningRecipe(
        name=f"{Path(model.replace(':', '-')).stem}-suggested",
        title=f"{model}, suggested",
        model=model,
        data=source.data,
        prune=rules,
        image_size=data.image_size,
        classes=len(data.classes),
        criterion=chosen.criterion,
        base=usual.base,
        retrain=usual.retrain,
        scratch={},
    )
    remarks = (
        f"Derived from a sweep over {found.images} images ({folder / 'sensitivity.json'}).\n"
        f"Each pruned layer alone loses at most {chosen.loss:.2f} points without retraining;\n"
        f"{chosen.macs:.1%} of the multiply-accumulates remain."
    )
    path = folder / "suggested.toml"
    write_text(path, to_toml(recipe, remarks))
    return path


def _stages(chosen: Suggestion) -> Iterator[str]:
    """A suggestion in words."""
    for stage, ratio in chosen.ratios.items():
        skipped = ", ".join(chosen.skipped[stage]) or "none"
        yield f"stage {stage}: prune {ratio:.0%} of {len(chosen.pruned[stage])} layers; left whole: {skipped}"
    yield f"{chosen.macs:.1%} of the MACs remain; each layer alone loses at most {chosen.loss:.2f} points"
