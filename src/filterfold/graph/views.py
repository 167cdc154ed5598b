"""Writing in place, also through a view: what it does to the labels of the tensor behind the view.

`buffer[:, :8] = x` runs as two operations: a `slice` that makes a view, and a `copy_` into it. Labels are kept per
tensor object, so the `copy_` changes those of the view only; the buffer, which is what the network reads afterwards,
must change with it. So every view remembers its *base* (the tensor whose memory it shows), which positions of each
of the base's axes it shows (its *region*), and which axis of the base is behind each of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from .labels import FIXED, FREE, Axis, Layout, Vector, same_layout

if TYPE_CHECKING:
    from .dispatch import Call, Tracer

Region = tuple[Vector | None, ...]
"""For each axis of a base the positions that a view of it shows; None where it shows all."""


_PIECES = ("chunk", "split", "split_with_sizes", "tensor_split")


def view_of(tracer: Tracer, call: Call, place: int) -> tuple[Tensor | None, Region | None, tuple[int, ...]]:
    """Base, region and axes of a view; `place`: which of the results of `call` it is.

    A view that can't be described that way (a transpose, a reshape) has a base but no region. What has memory of its
    own is no view, though its operation could have made one (`to`).
    """
    if not call.tensors:
        return None, None, ()
    source, view = call.tensors[0], call.outputs[place]
    if source.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
        return None, None, ()
    parent = tracer.labels_of(source)
    base, region, axes = parent.base, parent.region, parent.axes
    if base is None:
        base, region, axes = source, (None,) * source.ndim, tuple(range(source.ndim))
    if region is None or (view.shape == source.shape and view.stride() == source.stride()):
        return base, region, axes
    positions = _positions(call, source, place)
    if positions is None:
        return base, None, ()
    dim = (call["dim"] or 0) % source.ndim
    axis, size = axes[dim], base.shape[axes[dim]]
    # A view of a view: positions count within what the first one shows.
    shown = np.arange(size)[positions] if (before := region[axis]) is None else before[positions]
    part = None if len(shown) == size else shown
    left = tuple(a for d, a in enumerate(axes) if not (call.op == "select" and d == dim))
    return base, tuple(part if a == axis else r for a, r in enumerate(region)), left


def _positions(call: Call, source: Tensor, place: int) -> slice | list[int] | None:
    """Which positions of the source's axis `dim` a view shows; None where that can't be said."""
    if call.op == "slice":
        return slice(call["start"], call["end"], call["step"] or 1)
    if call.op == "select":
        return [call["index"]]
    if call.op == "narrow":
        start = call["start"] % source.shape[call["dim"]]
        return slice(start, start + call["length"])
    if call.op in _PIECES:
        sizes = [piece.shape[(call["dim"] or 0) % source.ndim] for piece in call.outputs]
        return slice(sum(sizes[:place]), sum(sizes[: place + 1]))
    return None


def write_in_place(tracer: Tracer, tensor: Tensor, layout: Layout) -> None:
    """An in-place operation gave `tensor` a new layout; the tensor that it is a view of gets it too."""
    labels = tracer.labels_of(tensor)
    before, labels.layout = labels.layout, layout
    labels.weight = False
    if labels.base is None or same_layout(before, layout):
        return
    base = tracer.labels_of(labels.base)
    if labels.region is None:
        reason = f"written in place through a view at {tracer.where or 'the model'}"
        tracer.freeze(base.layout, reason)
        tracer.freeze(layout, reason)
        return
    merged = list(base.layout)
    for axis, part in enumerate(labels.region):
        # `select` drops its axis from the view: the one position that it shows gets no labels.
        new = layout[labels.axes.index(axis)] if axis in labels.axes else FIXED
        if part is None:
            merged[axis] = tracer.table.join_axes([merged[axis], new], tracer.where)
        elif axis in labels.axes:
            merged[axis] = _overwritten(tracer, merged[axis], new, part, labels.base.shape[axis])
    base.layout = tuple(merged)


def _overwritten(tracer: Tracer, old: Axis, new: Axis, part: Vector, size: int) -> Axis:
    """The base's axis after its positions `part` were given the labels `new`.

    `zeros(n)` that is filled piece by piece is the usual case: the labels of each piece take the place of constants,
    as in a concatenation, and constants remain where nothing was written. A position that had a label already gets
    joined with the new one instead: other parts of the base's memory may have been read under the old label.
    """
    table, where = tracer.table, tracer.where or "the model"
    if not new and not old:
        return FIXED if FIXED in (old, new) else FREE
    before = old or (table.constants(size, f"positions that are never written at {where}"),)
    values = new or (table.constants(len(part), f"made by no layer at {where}"),)
    if len(before) != 1 or len(values) != 1:
        table.freeze(before, "written in place where two axes were merged")
        table.freeze(values, "written in place where two axes were merged")
        return before
    replaced = before[0][part]
    labelled = ~table.is_constant(replaced)
    if labelled.any():
        table.join(replaced[labelled], values[0][labelled])
    vector = before[0].copy()
    vector[part] = values[0]
    return (vector,)
