"""The command line's entry: its commands, one-line errors, and running in every process of a launch."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import FilterfoldError
from . import REFUSED
from . import compare as comparing
from . import inspect as inspecting
from . import latency as timing
from . import prune as pruning
from . import recipe as recipes
from . import report as reporting
from . import sensitivity as sensing
from . import train as training
from . import watch as watching

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def refusing(
    interrupted: str = "nothing is left half-written",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a refusal of the library into one line and exit code 2; Ctrl-C into one line and exit code 130.

    Anything else is a bug and keeps its traceback.

    **Arguments:**

    - `interrupted`: what to tell somebody who pressed Ctrl-C.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(*arguments: Any, **options: Any) -> None:
            try:
                command(*arguments, **options)
            except FilterfoldError as error:
                typer.echo(f"filterfold: {' '.join(str(error).split())}", err=True)
                raise typer.Exit(REFUSED) from None
            except KeyboardInterrupt:
                typer.echo(f"filterfold: interrupted; {interrupted}", err=True)
                raise typer.Exit(INTERRUPTED) from None

        return wrapper

    return decorate


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's dataclass parameters by the dataclass's fields, as keyword-only parameters.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Colour:
    ...     hue: int = 3
    >>> @spread
    ... def paint(name: str, colour: Colour) -> None:
    ...     print(name, colour)
    >>> inspect.signature(paint)
    <Signature (*, name: str, hue: int = 3) -> None>
    >>> paint(name="wall", hue=5)
    wall Colour(hue=5)
    """
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    families = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in families:
            parameters += _parameters(families[parameter.name])
        else:
            hint = hints[parameter.name]
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        for name, family in families.items():
            values[name] = family(**{field.name: values.pop(field.name) for field in fields(family)})
        command(**values)

    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return wrapper


def _parameters(family: type) -> list[inspect.Parameter]:
    hints = get_type_hints(family, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(family)
    ]


app = typer.Typer(
    name="filterfold",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def run() -> None:
    """Run the command line. Under torchrun rank 0 runs it, and the other ranks train along."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        app()
        return
    from ..training.fabric import lead_or_follow
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


_add(training.evaluate, training.EVALUATE_EXAMPLES, _NOTHING)


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
