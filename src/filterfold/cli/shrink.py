"""`filterfold shrink`: one pretrained network, a family of smaller ones."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ..training.recipe import Recipe
from .display import count, live, say, table
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
    settings,
    use_threads,
)
from .prune import RETRAINED, Retraining
from .teacher import DistillationOptions
from .weights import WeightOptions

if TYPE_CHECKING:
    from ..bench.report.family import Loading
    from ..data import ImageData
    from ..online import Child


EXAMPLES = """
Examples:

  filterfold shrink resnet56 -w resnet56.safetensors -d cifar10 --normalization imagenet --macs 0.8,0.6,0.4

  filterfold shrink vgg16 -w vgg16.safetensors -d cifar10 --macs 0.5,0.25 --epochs 20 --distill --onnx
"""


BATCH = 128
"""Training images at a time, to score filters and to repair on."""


_made = partial(Option, rich_help_panel="Children")


@dataclass(frozen=True)
class FamilyOptions:
    """How the children are cut."""

    macs: Annotated[str, _made(help="Shares of the MACs that may remain, one for each child.")] = "0.8,0.6,0.4"
    criterion: Annotated[
        str | None,
        _made(
            help="reconstruction, reconstruction-then-train, l1, taylor, random, …",
            show_default="reconstruction; with --epochs reconstruction-then-train",
        ),
    ] = None
    scope: Annotated[str, _made(help="Rank filters all together or by layer: global, layer.")] = "global"
    round_to: Annotated[int, _made(help="Keep multiples of so many filters.")] = 1
    min_keep: Annotated[int, _made(help="Keep at least so many in each group.")] = 1
    ignore: Annotated[list[str] | None, _made(help="Groups to leave alone, with * and ?.")] = None
    remedy: Annotated[
        str, _made(help="After each cut: kernels (solved anew), norms (batch norms measured anew) or none.")
    ] = "kernels"
    images: Annotated[
        int, _made(help="Training images to score and repair on; their labels are not needed.", min=1)
    ] = 1024
    seed: Annotated[int, _made(help="Of the choice of images, random scores and training.")] = 0

    def settings(self) -> dict[str, Any]:
        """What children depend on, for the family's record."""
        names = ("criterion", "scope", "round_to", "min_keep", "ignore", "remedy", "images", "seed")
        return {name: getattr(self, name) for name in names}

    def keywords(self, data: ImageData, device: str) -> dict[str, Any]:
        """Keyword arguments of `filterfold.shrink`."""
        from ..data import batches
        from ..pruning.budgets import Selection
        from ..pruning.scored import Scoring

        size = min(BATCH, self.images)
        feed = batches(data.train, size, shuffle=True, seed=self.seed, device=device)
        calibration = list(islice(feed, -(-self.images // size)))
        return {
            "criterion": self.criterion,
            "selection": Selection(self.scope, self.round_to, self.min_keep, tuple(self.ignore or ())),  # type: ignore[arg-type]
            "scoring": Scoring(seed=self.seed),
            "remedy": None if self.remedy == "none" else self.remedy,
            "calibration": calibration,
            "batches": len(calibration),
        }


def _trainer(
    recipe: Recipe | None, data: ImageData, device: str
) -> Callable[[Child, Path, dict[str, Any]], None] | None:
    """What trains a child, with its teacher if it has one, and notes what came of it; None without a recipe."""
    if recipe is None:
        return None
    from ..bench.trials.costs import STEP, images_of
    from ..online import DistillationCallback
    from ..training import train

    def trained(child: Child, checkpoint: Path, notes: dict[str, Any]) -> None:
        callbacks = [] if child.distillation is None else [DistillationCallback(child.distillation)]
        history = train(
            child.network, data, recipe, callbacks=callbacks, checkpoint=checkpoint, device=device, phase="retrain"
        )
        macs = sum(STEP * row["macs"] + row.get("extra_macs", 0) for row in history.rows)
        macs *= images_of(len(data.train), recipe.batch_size)
        notes["training"] = {"epochs": recipe.epochs, "seconds": history.seconds, "macs": macs}

    return trained


def shrink(
    model: Annotated[str, Argument(help=MODEL_HELP)],
    source: DataOptions,
    cut: FamilyOptions,
    trained: WeightOptions,
    retraining: Annotated[Retraining, RETRAINED],
    teaching: DistillationOptions,
    width: Width = 1.0,
    batch: Annotated[
        list[int] | None, Option(help="Images a call in timing; several times.", show_default="1, 64")
    ] = None,
    onnx: Annotated[bool, Option("--onnx", help="Also write ONNX files, checked in ONNX Runtime.")] = False,
    out: Annotated[Path | None, Option("--out", "-o", help="Folder.", show_default="runs/shrink-MODEL")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = None,
) -> Figures:
    """Make several smaller networks of one: scored once, each cut, repaired, with --epochs trained, proved and timed.

    Each child is written when it is done. After Ctrl-C or a power cut the same command goes on; with more --macs it
    adds children. The page shows accuracy and agreement with the uncut network against measured speed.
    """
    from ..bench.family import Family, Making
    from ..bench.report.family import build_family
    from ..bench.trials.context import resolve
    from ..utils.io import check_output

    use_threads(threads)
    shares = listed(cut.macs, "--macs", float)
    folder = out or Path("runs") / f"shrink-{Path(model.replace(':', '-')).name}"
    place, chosen, recipe = resolve(device), ModelOptions(model, width), retraining.seeded(cut.seed)
    teaching.check(recipe is not None)
    if cut.criterion is None:
        cut = replace(cut, criterion="reconstruction" if recipe is None else "reconstruction-then-train")
    check_output(folder, folder=True)
    with live():
        begun = trained.network(chosen, source, place)
        network, data, source = begun.model, begun.data, begun.images
        about = {
            **vars(chosen),
            "weights": begun.fingerprint,
            "images": data.fingerprint,
            "data": source.data,
            "data_options": source.keywords(),
            **cut.settings(),
            "training": settings(recipe) if recipe else None,
            "teacher": teaching.setting() if teaching.distill else None,
        }
        family = Family(folder, about, network, data)
        if overwrite:
            family.clear()
        teacher = teaching.distillation(network, chosen, data)
        making = Making(
            cut.keywords(data, place) | {"distillation": teacher},
            _trainer(recipe, data, place),
            onnx,
            list(dict.fromkeys(batch or (1, 64))),
        )
        found = family.make(shares, making)
        page = build_family(found, folder, _loading(model, width, source, data), f"{model} on {data.name}, shrunk")
    return Figures(found, partial(_show, found)).adding(networks=folder / "macs-*.safetensors", page=page)


def _loading(model: str, width: float, source: DataOptions, data: ImageData) -> Loading:
    """How to load a child: the network's code comes from where the uncut one's came from."""
    sizes = {"classes": len(data.classes), "channels": data.channels, "width": width, "image_size": data.image_size}
    arguments = ", ".join([repr(model), *(f"{name}={value}" for name, value in sizes.items())])
    # the normalization is noted in the file
    asked = {name: value for name, value in source.keywords().items() if name != "normalization"}
    asked |= {"width": width} if width != 1 else {}
    options = [text for key, value in sorted(asked.items()) for text in (f"--{key.replace('_', '-')}", str(value))]
    command = ["filterfold", "evaluate", "--model", model, "--data", source.data, *options]

    def lines(file: Path) -> tuple[str, str]:
        return (
            "import filterfold as ff\nfrom filterfold.zoo import build\n"
            f"network = ff.load({str(file)!r}, lambda: build({arguments}))",
            shlex.join([*command, "--weights", str(file)]),
        )

    return lines


def _show(found: dict[str, Any]) -> None:
    from ..bench.report.family import comparison

    shown = comparison(found)
    table(shown.title, shown.columns, [[cell.text for cell in row] for row in shown.rows])
    for child in found["children"]:
        say(f"{child['name']}: {count(child['macs'])} MACs; {child['verified']}")
        for name, reason in child["left_whole"].items():
            say(f"{child['name']}: left whole: {name}: {reason}")
    for warning in found["timing"]["warnings"]:
        say(f"warning: {warning}")
