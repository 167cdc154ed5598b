"""The commands put together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from . import compare as comparing
from . import evaluate as evaluating
from . import inspect as inspecting
from . import latency as timing
from . import prune as pruning
from . import recipe as recipes
from . import report as reporting
from . import sensitivity as sensing
from . import train as training
from . import watch as watching
from .errors import refusing
from .spread import spread

app = typer.Typer(
    name="filterfold",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """Entry point of the `filterfold` command. Under torchrun rank 0 runs it, and the other ranks train along."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        app()
        return
    from ..training.company import lead_or_follow
    from ..training.loop import work

    lead_or_follow(app, work)


def _show_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"filterfold {__version__}")
        raise typer.Exit


@app.callback()
def _everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Make ConvNets small and fast: cut filters while training or afterwards, and prove what it cost.

    Start with `filterfold demo`: a whole comparison on handwritten digits in about two minutes.
    """


def _add(
    command: Callable[..., None], examples: str, interrupted: str, to: typer.Typer = app, name: str | None = None
) -> None:
    to.command(name, epilog=examples)(refusing(interrupted)(spread(command)))


_RESUME = "the same command goes on from here"
_NOTHING = "nothing is left half-written"

_add(comparing.demo, comparing.DEMO_EXAMPLES, _RESUME)
_add(training.train, training.EXAMPLES, _RESUME)
_add(evaluating.evaluate, evaluating.EXAMPLES, _NOTHING)
_add(pruning.prune, pruning.EXAMPLES, _RESUME)
_add(sensing.sensitivity, sensing.EXAMPLES, _RESUME)
_add(comparing.compare, comparing.EXAMPLES, _RESUME)
_add(watching.watch, watching.EXAMPLES, "the run itself goes on")
_add(inspecting.inspect, inspecting.EXAMPLES, _NOTHING)
_add(timing.latency, timing.EXAMPLES, _NOTHING)
_add(reporting.report, reporting.EXAMPLES, _RESUME)

_recipes = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Whole experiments of a paper by name.")
_add(recipes.list_, recipes.LIST_EXAMPLES, _NOTHING, _recipes, "list")
_add(recipes.show, recipes.SHOW_EXAMPLES, _NOTHING, _recipes)
_add(recipes.run, recipes.RUN_EXAMPLES, _RESUME, _recipes)
app.add_typer(_recipes, name="recipe")
