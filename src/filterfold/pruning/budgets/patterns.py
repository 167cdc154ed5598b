"""What is refused, in one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ...errors import SelectionError
from ...plan import ChannelGroup
from ...profiling.macs import Cost


def check_budget(
    keep: Any, macs: float | None, parameters: float | None, cost: Cost | None, scope: str
) -> dict[str, Any]:
    """Exactly one kind of budget, with shares in (0, 1]; returned as asked, for the notes."""
    given = {"keep": keep, "macs": macs, "parameters": parameters}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        raise SelectionError("no budget: say how much may remain with keep=, macs= or parameters=")
    if keep is not None and len(asked) > 1:
        raise SelectionError("keep= can't be combined with macs= or parameters=: give one or the other")
    if keep is None and cost is None:
        raise SelectionError("macs= and parameters= need cost=filterfold.profiling.macs.measure(model, example_inputs)")
    if isinstance(keep, Mapping) and scope == "global":
        raise SelectionError('keep= for single layers needs scope="layer"')
    named = {f"keep[{name!r}]": share for name, share in keep.items()} if isinstance(keep, Mapping) else asked
    for name, share in named.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise SelectionError(f"{name}={share!r} is no share: it must lie above 0 and be at most 1")
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in asked.items()}


def check_options(scope: str, round_to: int, min_keep: int, normalize: str, norms: Iterable[str]) -> None:
    """The other options of `select`."""
    for name, value in (("round_to", round_to), ("min_keep", min_keep)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SelectionError(f"{name}={value!r}: must be a whole number of at least 1")
    if scope not in ("layer", "global"):
        raise SelectionError(f'scope={scope!r}: must be "layer" or "global"')
    if normalize not in norms:
        raise SelectionError(f"normalize={normalize!r}: must be one of {', '.join(norms)}")


def matching(pattern: str, groups: Sequence[ChannelGroup], option: str) -> list[ChannelGroup]:
    """The groups one of whose filter-making layers matches; an error if no layer of any kind does."""
    matched, names = [], set()
    for group in groups:
        makers = {group.name} | {part.tensor.rpartition(".")[0] for part in group.producers if part.role == "filter"}
        names |= makers | {part.tensor.rpartition(".")[0] for part in (*group.producers, *group.consumers)}
        if any(_fits(name, pattern) for name in makers):
            matched.append(group)
    if not matched and not any(_fits(name, pattern) for name in names):
        raise SelectionError(f"{option}: {pattern!r} matches no layer{suggestion(pattern, names)}")
    return matched


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the names most like the one that is not there."""
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""
