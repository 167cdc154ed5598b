"""Rules for operations that pick positions of an axis, or put them in another order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..dispatch import Call, Tracer
from ..labels import FIXED, Layout
from . import broadcast, overwritten, rule


@rule("index_select", "gather", "take_along_dim", "sort", "topk", "kthvalue", "index_add", "index_copy", "scatter")
@rule("roll_along", "scatter_add", "argsort", "index_fill", "unfold_copy")
def picked(tracer: Tracer, call: Call) -> Any:
    """Positions picked along one axis: that axis can't shrink, the others pass."""
    x = call["self"]
    dim = (call["dim"] if call["dim"] is not None else -1) % max(x.ndim, 1)
    layout = tracer.layout(x)
    tracer.table.freeze(layout[dim], f"picked by position in {call.site}")
    rest = (*layout[:dim], FIXED, *layout[dim + 1 :])
    return [rest] * len(call.out) if isinstance(call.out, tuple | list) else rest


@rule("index")
def index(tracer: Tracer, call: Call) -> Layout:
    """Advanced indexing: indexed axes can't shrink, the others pass where their place is plain."""
    x, indices = call["self"], list(call["indices"])
    layout = tracer.layout(x)
    used = [place for place, entry in enumerate(indices) if entry is not None]
    for place in used:
        span = indices[place].ndim if indices[place].dtype == torch.bool else 1
        for axis in layout[place : place + span]:
            tracer.table.freeze(axis, f"picked by position in {call.site}")
    if len(used) == 1 and indices[used[0]].ndim == 1:
        place = used[0]
        return (*layout[:place], FIXED, *layout[place + 1 :])
    plain = used and all(indices[place].dtype != torch.bool for place in used)
    if plain and used == list(range(used[0], used[-1] + 1)):
        tail = layout[used[-1] + 1 :]
        lead = call.out.ndim - len(tail) - used[0]
        return (*layout[: used[0]], *(FIXED,) * lead, *tail)
    for axis in layout:
        tracer.table.freeze(axis, f"picked by position in {call.site}")
    return (FIXED,) * int(call.out.ndim)


@rule("index_put", "_index_put_impl")
def index_put(tracer: Tracer, call: Call) -> Layout:
    """Advanced indexing that writes: indexed axes can't shrink, those behind them are those of the values."""
    x, values, indices = call["self"], call["values"], list(call["indices"])
    used = [place for place, entry in enumerate(indices) if entry is not None]
    masks = [indices[place] for place in used if indices[place].dtype == torch.bool]
    if masks and masks[0].ndim == x.ndim and values.numel() == 1:  # x[x < 0] = 0
        tracer.table.alive += [vector for axis in tracer.layout(x) for vector in axis or ()]
        return broadcast(tracer, call, [x, masks[0]], x.ndim)
    layout, new = tracer.layout(x), tracer.layout(values)
    behind = used[-1] + (masks[-1].ndim if masks and masks[-1] is indices[used[-1]] else 1)
    tail = min(x.ndim - behind, values.ndim)
    fixed = (*layout[:behind], *new[: values.ndim - tail])
    tracer.freeze(fixed, f"written by position in {call.site}")
    written = [
        overwritten(tracer, layout[-place], new[-place], call.site)
        if values.shape[-place] == x.shape[-place]
        else layout[-place]
        for place in range(tail, 0, -1)
    ]
    return (*layout[: x.ndim - tail], *written)


@rule("flip")
def flip(tracer: Tracer, call: Call) -> Layout:
    """Axes in reverse order."""
    layout = tracer.layout(call["self"])
    dims = {dim % len(layout) for dim in call["dims"]}
    return tuple(
        tuple(np.ascontiguousarray(vector[::-1]) for vector in axis) if axis and place in dims else axis
        for place, axis in enumerate(layout)
    )


@rule("roll")
def roll(tracer: Tracer, call: Call) -> Layout:
    """A circular shift: by a fixed number of positions, which is another shift once some are gone."""
    layout = tracer.layout(call["self"])
    dims = call["dims"] or range(len(layout))
    for dim in dims:
        tracer.table.freeze(layout[dim], f"shifted by a fixed number in {call.site}")
    return layout
