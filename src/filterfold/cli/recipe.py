"""`filterfold recipe`: the rows of a paper's table as commands."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from .compare import default_folder, exit_code
from .display import say, table
from .figures import Figures
from .options import DATA_HELP, DataOptions, EngineOptions, Precision, Width, listed
from .weights import StartOptions

if TYPE_CHECKING:
    from ..bench.recipes import CountedTrial, PruningRecipe
    from ..bench.report.table import Table


LIST_EXAMPLES = """
Examples:

  filterfold recipe list
"""


SHOW_EXAMPLES = """
Examples:

  filterfold recipe show resnet56-b

  filterfold recipe show resnet34-c > mine.toml
"""


RUN_EXAMPLES = """
Examples:

  filterfold recipe run vgg16-a --data cifar10 --device cuda --precision bf16-mixed --seeds 0,1,2

  filterfold recipe run resnet56-b --weights resnet56.safetensors --normalization imagenet --retrain cosine

  filterfold recipe run vgg16-a --width 0.25 --epochs-scale 0.02 --train-limit 5000

  filterfold recipe run resnet34-a --data path/to/imagenet --stop-after 9m

  filterfold recipe run vgg16-a --seeds 0,1,2,3,4 --parallel 2 --log tensorboard
"""


NAME_HELP = "A name of `filterfold recipe list`, or FILE.toml."


@dataclass(frozen=True)
class RecipeData(DataOptions):
    """Which images: the recipe's own unless another set is given."""

    data: Annotated[
        str,
        Option("--data", "-d", help=DATA_HELP, show_default="the recipe's", rich_help_panel="Data"),
    ] = ""


def list_() -> None:
    """List the recipes: networks, what is removed, and the paper's figures."""
    from ..bench.recipes import load, names

    rows = []
    for recipe in map(load, names()):
        ratios = ", ".join(f"{rule.ratio:.0%} of {' '.join(rule.layers)}" for rule in recipe.prune)
        paper = recipe.paper.pruned
        removed = "" if paper.macs_removed is None else f"{paper.macs_removed:.1f} %"
        error = "" if paper.error is None else f"{recipe.paper.dense.error:.2f} -> {paper.error:.2f} %"
        rows.append((recipe.name, ratios, recipe.data, removed, error))
    table("Recipes", ("name", "removed", "data", "MACs removed", "error (paper)"), rows, texts=3)
    say("filterfold recipe show NAME prints one as a file to start from; filterfold recipe run NAME runs it")


def show(name: Annotated[str, Argument(help=NAME_HELP)]) -> None:
    """Print a recipe as TOML."""
    from ..bench.recipes import load, to_toml

    typer.echo(to_toml(load(name)), nl=False)


def run(
    name: Annotated[str, Argument(help=NAME_HELP)],
    images: RecipeData,
    running: EngineOptions,
    epochs_scale: Annotated[float, Option(help="All numbers of epochs times this, at least one each.")] = 1.0,
    width: Width = 1.0,
    seeds: Annotated[str, Option(help="Comma-separated: one run of everything for each.")] = "0",
    retrain: Annotated[
        str | None, Option(help="Which retraining: paper (constant .001) or cosine.", show_default="the first")
    ] = None,
    weights: Annotated[
        Path | None, Option("--weights", "-w", help="A trained dense network, instead of base training.")
    ] = None,
    scratch: Annotated[bool, Option(help="Also train the small network from scratch.")] = True,
    precision: Precision = "32-true",
    channels_last: Annotated[bool, Option("--channels-last", help="Memory format.")] = False,
    compile_: Annotated[bool, Option("--compile", help="Use torch.compile.")] = False,
    batch_size: Annotated[int | None, Option(help="Images a step.", show_default="the recipe's")] = None,
    out: Annotated[Path | None, Option(help="Run folder.", show_default="runs/NAME-DATA")] = None,
) -> Figures:
    """Train, prune, retrain, and train the small twin from scratch; then the paper's table with ours beside it.

    Done a second time, it goes on from where it was. Exit code 3: stopped in time with work left.
    """
    from ..bench.recipes import load
    from ..bench.recipes.trials import comparison, counted, setting
    from ..bench.trials.context import RunContext

    recipe = load(name)
    training: dict[str, Any] = {"precision": precision, "channels_last": channels_last, "compile": compile_}
    if batch_size is not None:
        training["batch_size"] = batch_size
    start, images = StartOptions(weights).settle(recipe.model, images)
    chosen = setting(
        recipe,
        data=images.data or None,
        data_options=images.keywords(),
        width=width,
        epochs_scale=epochs_scale,
        retrain=retrain,
        start=replace(start, tune=False) if start.given else None,
        training=training,
    )
    folder = out or default_folder(replace(chosen, model=recipe.name))
    trials = comparison(recipe, chosen, seeds=listed(seeds, "--seeds", int), scratch=scratch)
    outcome = running.run(trials, folder, cache_dir=images.cache_dir)
    context = RunContext(chosen, folder, running.device, cache_dir=images.cache_dir)
    found = counted(recipe, outcome.records, context)
    written = _write(recipe, found, folder) if found else None

    def show() -> None:
        if written is not None:
            _show(written)
        for record in outcome.failed:
            say(f"failed: {record['label']} seed {record['seed']}: {record['reason']}")
        say(f"records, networks and table: {folder} (filterfold report {folder} makes a page with plots and tests)")
        if not outcome.complete:
            say("stopped in time; the same command goes on from here" if not outcome.failed else "some trials failed")

    rows = [[cell.value for cell in row] for row in written.rows] if written is not None else []
    heads = list(written.columns) if written is not None else []
    return Figures({"recipe": recipe.name, "columns": heads, "rows": rows, "folder": folder}, show, exit_code(outcome))


def _write(recipe: PruningRecipe, found: list[CountedTrial], folder: Path) -> Table:
    from ..bench.report.paper_table import paper_table
    from ..utils.io import write_text

    result = paper_table(recipe, found)
    write_text(folder / "paper_table.csv", result.csv())
    write_text(folder / "paper_table.md", result.markdown())
    return result


def _show(result: Table) -> None:
    """On a terminal without the absolute counts; they are in the files."""
    heads = (
        "Network",
        "n",
        "error %",
        "best val. error %",
        "paper's (best)",
        "MACs cut",
        "paper's",
        "weights cut",
        "paper's",
    )
    places = (0, 1, 2, 3, 4, 6, 7, 9, 10)
    table(result.title, heads, [[row[place].text for place in places] for row in result.rows])
    for note in result.notes:
        say(note)
