"""Rules for operations that pick positions of an axis, or put them in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..dispatch import Call, Walk
from ..labels import FIXED, Layout
from . import rule, site


@rule("index_select", "gather", "take_along_dim", "sort", "topk", "kthvalue", "index_add", "index_copy", "scatter")
@rule("roll_along", "scatter_add", "argsort", "index_fill", "unfold_copy")
def picked(walk: Walk, call: Call) -> Any:
    """Positions picked along one axis: that axis can't shrink, the others pass."""
    x = call["self"]
    dim = (call["dim"] if call["dim"] is not None else -1) % max(x.ndim, 1)
    layout = walk.layout(x)
    walk.ledger.freeze(layout[dim], f"picked by position in {site(call)}")
    rest = (*layout[:dim], FIXED, *layout[dim + 1 :])
    return [rest] * len(call.out) if isinstance(call.out, tuple | list) else rest


@rule("index")
def index(walk: Walk, call: Call) -> Layout:
    """Advanced indexing: indexed axes can't shrink, the others pass where their place is plain."""
    x, indices = call["self"], list(call["indices"])
    layout = walk.layout(x)
    used = [place for place, entry in enumerate(indices) if entry is not None]
    for place in used:
        span = indices[place].ndim if indices[place].dtype == torch.bool else 1
        for axis in layout[place : place + span]:
            walk.ledger.freeze(axis, f"picked by position in {site(call)}")
    if len(used) == 1 and indices[used[0]].ndim == 1:
        place = used[0]
        return (*layout[:place], FIXED, *layout[place + 1 :])
    plain = used and all(indices[place].dtype != torch.bool for place in used)
    if plain and used == list(range(used[0], used[-1] + 1)):
        tail = layout[used[-1] + 1 :]
        lead = call.out.ndim - len(tail) - used[0]
        return (*layout[: used[0]], *(FIXED,) * lead, *tail)
    for axis in layout:
        walk.ledger.freeze(axis, f"picked by position in {site(call)}")
    return (FIXED,) * int(call.out.ndim)


@rule("flip")
def flip(walk: Walk, call: Call) -> Layout:
    """Axes in reverse order."""
    layout = walk.layout(call["self"])
    dims = {dim % len(layout) for dim in call["dims"]}
    return tuple(
        tuple(np.ascontiguousarray(vector[::-1]) for vector in axis) if axis and place in dims else axis
        for place, axis in enumerate(layout)
    )


@rule("roll")
def roll(walk: Walk, call: Call) -> Layout:
    """A circular shift: by a fixed number of positions, which is another shift once some are gone."""
    layout = walk.layout(call["self"])
    dims = call["dims"] or range(len(layout))
    for dim in dims:
        walk.ledger.freeze(layout[dim], f"shifted by a fixed number in {site(call)}")
    return layout
