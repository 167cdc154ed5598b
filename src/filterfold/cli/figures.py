"""What a command found: shown on the terminal, or printed as JSON."""

from __future__ import annotations

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from .display import say


@dataclass(frozen=True)
class Figures:
    """What a command that reports figures returns.

    - `document`: everything that it found, for JSON.
    - `show`: prints it for people.
    - `code`: exit code.
    """

    document: Mapping[str, Any]
    show: Callable[[], None]
    code: int = 0

    def adding(self, *lines: str, **places: Path) -> Figures:
        """The same, with lines for people behind it, and where files were written."""

        def show() -> None:
            self.show()
            for line in (*lines, *(f"{name}: {path}" for name, path in places.items())):
                say(line)

        return replace(self, document={**self.document, **places}, show=show)


def reporting(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that returns `Figures` the option `--json`; others stay as they are.

    With it the document is all that goes to standard output, the command line that made it included; progress and
    messages go to standard error.
    """
    if "Figures" not in str(command.__annotations__.get("return")):
        return command

    @functools.wraps(command)
    def wrapper(*, as_json: bool = False, **options: Any) -> None:
        if not as_json:
            found = command(**options)
            found.show()
        else:
            with redirect_stdout(sys.stderr):
                found = command(**options)
            typer.echo(as_text(found.document))
        if found.code:
            raise typer.Exit(found.code)

    asked = Annotated[bool, Option("--json", help="Print nothing but the figures, as JSON.")]
    own = inspect.signature(command).parameters.values()
    added = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=asked)
    wrapper.__signature__ = inspect.Signature([*own, added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {**command.__annotations__, "as_json": asked, "return": None}
    return wrapper


def as_text(document: Mapping[str, Any]) -> str:
    """A document as strict JSON, with the command that made it.

    >>> print(as_text({"top1": float("nan"), "widths": (1, 2)}))
    {
      "command": ...,
      "top1": null,
      "widths": [
        1,
        2
      ]
    }
    """
    from ..utils.environment import command

    return json.dumps(_plain({"command": command(), **document}), indent=2, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Values that JSON knows; figures that are none become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
