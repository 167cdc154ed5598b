"""Options that several commands share: dataclasses whose fields become command-line options.

A command asks for a whole family by a parameter of the dataclass's type, and `spread` puts the fields in its place:
every option is written down once, with its help.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints


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
