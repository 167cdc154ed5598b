"""How a command ends when it can't do what it was asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer

from ..errors import FilterfoldError

REFUSED = 2
INTERRUPTED = 130
"""Exit codes: refused (as for a wrong option), and Ctrl-C (128 + SIGINT)."""


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
