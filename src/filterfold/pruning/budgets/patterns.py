"""Which groups an option names, and what is refused, for `prune`, `select` and online clustering alike."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from ...errors import ConfigError, SelectionError
from ...plan import ChannelGroup

T = TypeVar("T")


def matching(pattern: str, groups: Sequence[ChannelGroup], option: str) -> list[ChannelGroup]:
    """The groups that a name or glob pattern means: one of the layers that make their channels matches it.

    A name also stands for everything inside the module of that name.

    **Raises:** `SelectionError` if no layer of any kind matches.
    """
    matched, names = [], set()
    for group in groups:
        makers = {group.name} | {part.tensor.rpartition(".")[0] for part in group.producers if part.role == "filter"}
        names |= makers | {part.tensor.rpartition(".")[0] for part in (*group.producers, *group.consumers)}
        if any(_fits(name, pattern) for name in makers):
            matched.append(group)
    if not matched and not any(_fits(name, pattern) for name in names):
        known = {group.name for group in groups if group.frozen is None} or {group.name for group in groups}
        raise SelectionError(f"{option}: {pattern!r} matches no layer{suggestion(pattern, known)}")
    return matched


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the names most like the one that is not there."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def by_group(groups: Sequence[ChannelGroup], option: str, value: T | Mapping[str, T]) -> dict[str, T]:
    """Group name → its value: one for all, or by name or glob pattern, where the last pattern that matches counts.

    Groups that no pattern matches are left out.
    """
    if not isinstance(value, Mapping):
        return {group.name: value for group in groups}
    found: dict[str, T] = {}
    for pattern, own in value.items():
        found |= {group.name: own for group in matching(pattern, groups, option)}
    return found


def cuttable(groups: Sequence[ChannelGroup], ignore: Sequence[str]) -> tuple[list[ChannelGroup], list[str]]:
    """The groups that may be cut, and the names of those that are ignored."""
    if isinstance(ignore, str):
        raise SelectionError(f"ignore={ignore!r}: must be a list of names; write [{ignore!r}]")
    ignored = {group.name for pattern in ignore for group in matching(pattern, groups, "ignore")}
    return [group for group in groups if group.frozen is None and group.name not in ignored], sorted(ignored)


def check_shares(**options: Any) -> None:
    """Refuse what is no share in (0, 1]; an option that is None was not given, a mapping holds shares by pattern."""
    for name, share in _single(options):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise SelectionError(f"{name}={share!r} is no share: it must lie above 0 and be at most 1")


def check_counts(**options: Any) -> None:
    """Refuse what is no whole number of at least 1; None and mappings as in `check_shares`."""
    for name, number in _single(options):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise SelectionError(f"{name}={number!r}: must be a whole number of at least 1")


def check_floor(min_keep: Any) -> None:
    """Refuse what is neither a whole number of at least 1 nor a share below 1."""
    if isinstance(min_keep, float) and min_keep < 1:
        check_shares(min_keep=min_keep)
    else:
        check_counts(min_keep=min_keep)


def _single(options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            if not value:
                raise SelectionError(f"{name}={{}} names no layer: give at least one, such as {{'*': ...}}")
            yield from ((f"{name}[{pattern!r}]", own) for pattern, own in value.items())
        elif value is not None:
            yield name, value


def check_one_budget(*kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The budget that was given, by name. Budgets of one kind can be combined; of several kinds one must be given.

    >>> check_one_budget({"keep": None}, {"macs": 0.5, "parameters": None})
    {'macs': 0.5}
    """
    given = [{name: value for name, value in kind.items() if value is not None} for kind in kinds]
    given = [kind for kind in given if kind]
    if not given:
        *others, last = [f"{name}=" for kind in kinds for name in kind]
        raise SelectionError(f"no budget: say how much may remain with {', '.join(others)} or {last}")
    if len(given) > 1:
        first, second = (next(iter(kind)) for kind in given[:2])
        raise SelectionError(f"{first}= can't be combined with {second}=: give one or the other")
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in given[0].items()}


O = TypeVar("O")  # noqa: E741


def merged(options: O, **direct: Any) -> O:
    """An options object with the values that were given directly; those that equal the defaults were not given.

    **Raises:** `ConfigError` if a value is given in both places and they differ.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    given = {name: value for name, value in direct.items() if not _equal(value, defaults[name])}
    for name, value in given.items():
        own = getattr(options, name)
        if not _equal(own, defaults[name]) and not _equal(own, value):
            raise ConfigError(f"{name}= is given directly and in {type(options).__name__}: give it once")
    return dataclasses.replace(options, **given)  # type: ignore[type-var]


def _equal(value: Any, other: Any) -> bool:
    return value is other or (
        type(value) is type(other) and isinstance(value, str | int | float | tuple) and value == other
    )
