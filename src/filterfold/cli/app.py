"""The commands, their options from dataclasses, and one-line errors."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..errors import FilterfoldError, one_line, out_of_memory
from . import REFUSED, compare, export, latency, prune, recipe, report, sensitivity, shrink, train, watch
from . import inspect as inspecting
from .figures import reporting
from .options import MODEL

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""


def refusing(interrupted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a refusal of the library or of the file system into one line and exit code 2; Ctrl-C into one and 130.

    Anything else is a bug and keeps its traceback.

    **Arguments:**

    - `interrupted`: what to print after Ctrl-C.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(*arguments: Any, **options: Any) -> None:
            try:
                command(*arguments, **options)
            except FilterfoldError as error:
                typer.echo(f"filterfold: {' '.join(str(error).split())}", err=True)
                raise typer.Exit(REFUSED) from None
            except OSError as error:
                if error.filename is None:
                    raise
                typer.echo(f"filterfold: {error.filename}: {error.strerror}", err=True)
                raise typer.Exit(REFUSED) from None
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                typer.echo(
                    f"filterfold: out of memory ({one_line(error)}); a smaller --batch-size needs less", err=True
                )
                raise typer.Exit(REFUSED) from None
            except KeyboardInterrupt:
                typer.echo(f"filterfold: interrupted; {interrupted}", err=True)
                raise typer.Exit(INTERRUPTED) from None

        return wrapper

    return decorate


def spread(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replace a command's dataclass parameters by the dataclass's fields, as keyword-only parameters.

    `Annotated[SomeDataclass, {field: typer.Option(...)}]` shows just these fields; the others keep their defaults.

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
    families: dict[str, tuple[type, list[inspect.Parameter]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        family, shown = _family(hints[name])
        if family is not None:
            families[name] = family, _options(family, shown)
            parameters += families[name][1]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def wrapper(**values: Any) -> Any:
        for name, (family, options) in families.items():
            values[name] = family(**{option.name: values.pop(option.name) for option in options})
        return command(**values)

    wrapper.__signature__ = inspect.Signature(parameters, return_annotation=None)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__annotations__["return"] = command.__annotations__.get("return")
    return wrapper


def _family(hint: Any) -> tuple[type | None, dict[str, Any] | None]:
    """The dataclass that a parameter is annotated with, or None, and the options of the fields that are shown."""
    kind, shown = hint, None
    if get_origin(hint) is Annotated and isinstance(get_args(hint)[1], dict):
        kind, shown = get_args(hint)
    return (kind, shown) if isinstance(kind, type) and is_dataclass(kind) else (None, None)


def _options(family: type, shown: dict[str, Any] | None) -> list[inspect.Parameter]:
    """A dataclass's fields as parameters: all, which then are annotated with their options, or those shown."""
    hints = get_type_hints(family, include_extras=True)
    made = []
    for entry in fields(family):
        hint = hints[entry.name]
        if shown is not None:
            if entry.name not in shown:
                continue
            kind = str if get_origin(hint) is Literal else hint  # the dataclass refuses other values, in one line
            hint = Annotated[kind, shown[entry.name]]
        default = inspect.Parameter.empty if entry.default is MISSING else entry.default
        made.append(inspect.Parameter(entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint))
    return made


AT_LENGTH = {"methods": compare.METHODS, "model": MODEL}
"""What --help-all says of options of which --help says less."""


SHOWN_EXAMPLES = 2
"""Examples below --help; --help-all has all."""


def helped(command: Callable[..., Any], examples: str) -> Callable[..., Any]:
    """Give a command with rare options (hidden ones) `--help-all`, which shows them, every example, and more words."""
    parameters = inspect.signature(command).parameters.values()
    rare = sum(bool(getattr(entry, "hidden", False)) for p in parameters for entry in get_args(p.annotation)[1:])
    if not rare and examples == shortened(examples):
        return command

    def show(context: typer.Context, asked: bool) -> None:
        if asked:
            for parameter in context.command.params:
                parameter.hidden = False  # type: ignore[attr-defined]
                parameter.help = AT_LENGTH.get(parameter.name or "", parameter.help)  # type: ignore[attr-defined]
            context.command.epilog = examples
            context.get_help()  # Typer prints it
            raise typer.Exit

    @functools.wraps(command)
    def wrapper(**options: Any) -> Any:
        options.pop("help_all", None)
        return command(**options)

    said = f"Show {rare} more options and exit." if rare else "Show more examples and exit."
    asked = Annotated[bool, typer.Option("--help-all", callback=show, is_eager=True, help=said)]
    added = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=asked)
    wrapper.__signature__ = inspect.Signature([*parameters, added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {**command.__annotations__, "help_all": asked}
    return wrapper


def shortened(examples: str) -> str:
    """The first examples."""
    return "\n\n".join(examples.split("\n\n")[: SHOWN_EXAMPLES + 1])


app = typer.Typer(
    name="filterfold",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def run() -> None:
    """Run the command line. Under torchrun rank 0 runs it, and the other ranks take part in training."""
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

    Exit codes: 0 done; 1 done, but some trial failed; 2 refused, with the reason in one line; 3 stopped in time by
    --stop-after, the same command goes on; 130 interrupted by Ctrl-C.
    """


_recipes = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Whole experiments of a paper by name.")


RESUME = "the same command goes on from here"


NOTHING = "nothing is left half-written"
"""What is printed after Ctrl-C."""


for _group, _command, _examples, _interrupted in (
    (app, compare.demo, compare.DEMO_EXAMPLES, RESUME),
    (app, train.train, train.EXAMPLES, RESUME),
    (app, train.evaluate, train.EVALUATE_EXAMPLES, NOTHING),
    (app, prune.prune, prune.EXAMPLES, RESUME),
    (app, shrink.shrink, shrink.EXAMPLES, RESUME),
    (app, sensitivity.sensitivity, sensitivity.EXAMPLES, RESUME),
    (app, compare.compare, compare.EXAMPLES, RESUME),
    (app, watch.watch, watch.EXAMPLES, "the run itself goes on"),
    (app, inspecting.inspect, inspecting.EXAMPLES, NOTHING),
    (app, latency.latency, latency.EXAMPLES, NOTHING),
    (app, export.export, export.EXAMPLES, NOTHING),
    (app, report.report, report.EXAMPLES, RESUME),
    (_recipes, recipe.list_, recipe.LIST_EXAMPLES, NOTHING),
    (_recipes, recipe.show, recipe.SHOW_EXAMPLES, NOTHING),
    (_recipes, recipe.run, recipe.RUN_EXAMPLES, RESUME),
):
    _name = _command.__name__.rstrip("_")
    _ready = helped(reporting(spread(_command)), _examples)
    _group.command(_name, epilog=shortened(_examples))(refusing(_interrupted)(_ready))


app.add_typer(_recipes, name="recipe")
