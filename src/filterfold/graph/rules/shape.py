"""Rules for operations that move, split and merge axes without computing anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..dispatch import Call, Split, Tracer
from ..labels import FIXED, FREE, Axis, Layout, Vector
from . import broadcast, rule


def reshape(tracer: Tracer, layout: Layout, old: Sequence[int], new: Sequence[int], hint: int | None) -> Layout:
    """The layout after a reshape from `old` to `new`; `hint` is the new axis whose size was left open (-1)."""
    result: list[Axis] = [FIXED] * len(new)
    if 0 in old:
        return tuple(result)
    for sources, targets in _stretches(old, new):
        axes = [layout[axis] for axis in sources]
        if len(sources) == 1 and len(targets) == 1:
            result[targets[0]] = axes[0]
            continue
        if not any(axes):
            kind = FREE if all(axis is FREE for axis in axes) else FIXED
            for target in targets:
                result[target] = kind
            continue
        sizes = [old[axis] for axis in sources]
        shape = [new[axis] for axis in targets]
        chosen = targets.index(hint) if hint in targets else None
        for place, axis in enumerate(axes):
            for vector in axis or ():
                # Lay one old axis's labels out over the whole block, give it the new shape, and see where they vary.
                spread = vector.reshape([-1 if p == place else 1 for p in range(len(sizes))])
                block = np.broadcast_to(spread, sizes).reshape(shape)
                target, kept = _varying_axis(tracer, block, chosen)
                if kept is not None:
                    result[targets[target]] = (*(result[targets[target]] or ()), kept)
    return tuple(result)


def _stretches(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and new axes that hold the same elements; axes of size one are left out unless they match."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j] == 1:
            runs.append(([i], [j]))
            i, j = i + 1, j + 1
        elif i < len(old) and old[i] == 1:
            i += 1
        elif j < len(new) and new[j] == 1:
            j += 1
        else:
            sources, targets = [i], [j]
            before, after = old[i], new[j]
            i, j = i + 1, j + 1
            while before != after:
                if before < after:
                    sources.append(i)
                    before *= old[i]
                    i += 1
                else:
                    targets.append(j)
                    after *= new[j]
                    j += 1
            runs.append(
                ([axis for axis in sources if old[axis] > 1], [axis for axis in targets if new[axis] > 1]),
            )
    return runs


def _varying_axis(
    tracer: Tracer, block: np.ndarray[Any, np.dtype[np.int64]], chosen: int | None
) -> tuple[int, Vector | None]:
    """Along which axis of a block the labels vary, and the labels along it.

    Where they vary along several, as when one axis of channels is split into (heads, size), a unit that leaves would
    leave a hole. One axis is chosen to shrink, and labels at equal places of it are joined, so that whole slices leave.
    """
    varying = [a for a in range(block.ndim) if (np.take(block, [0], a) != block).any()]
    if not varying:
        return 0, None
    if len(varying) == 1:
        axis = varying[0]
    else:
        options = sorted(varying, key=lambda a: (a == chosen, block.shape[a], a), reverse=True)
        axis = tracer.choices.get(len(tracer.splits), options[0])
        tracer.splits.append(Split(block.ravel(), tuple(options), axis, tracer.where))
    rows = np.moveaxis(block, axis, 0).reshape(block.shape[axis], -1)
    vector = np.ascontiguousarray(rows[:, 0])
    if len(varying) > 1:
        tracer.table.join(vector[:, None], rows)
    return axis, vector


def _open_axis(sizes: Any) -> int | None:
    return list(sizes).index(-1) if sizes is not None and -1 in list(sizes) else None


@rule("view", "reshape", "_unsafe_view", "_reshape_alias", "view_copy")
def view(tracer: Tracer, call: Call) -> Layout | None:
    """Reshape to the given sizes."""
    if call["dtype"] is not None:
        return tracer.layout(call["self"])
    x = call["self"]
    sizes = call["size"] if call["size"] is not None else call["shape"]
    # An open first axis says nothing: it holds the batch.
    return reshape(tracer, tracer.layout(x), x.shape, call.out.shape, _open_axis(sizes) or None)


@rule("flatten", "ravel", "reshape_as", "view_as")
def flatten(tracer: Tracer, call: Call) -> Layout:
    """Merge axes."""
    x = call["self"]
    return reshape(tracer, tracer.layout(x), x.shape, call.out.shape, None)


@rule("unflatten")
def unflatten(tracer: Tracer, call: Call) -> Layout:
    """Split one axis."""
    x = call["self"]
    dim, place = call["dim"] % x.ndim, _open_axis(call["sizes"])
    return reshape(tracer, tracer.layout(x), x.shape, call.out.shape, None if place is None else dim + place)


@rule("permute")
def permute(tracer: Tracer, call: Call) -> Layout:
    """Reorder axes."""
    layout = tracer.layout(call["self"])
    return tuple(layout[dim] for dim in call["dims"])


@rule("transpose", "swapaxes", "swapdims")
def transpose(tracer: Tracer, call: Call) -> Layout:
    """Swap two axes."""
    layout = list(tracer.layout(call["self"]))
    first = next(call[name] for name in ("dim0", "axis0") if call[name] is not None)
    second = next(call[name] for name in ("dim1", "axis1") if call[name] is not None)
    layout[first], layout[second] = layout[second], layout[first]
    return tuple(layout)


@rule("t", "numpy_T", "mT", "adjoint", "mH")
def turned(tracer: Tracer, call: Call) -> Layout:
    """Swap the last two axes, or all."""
    layout = tracer.layout(call.tensors[0])
    if len(layout) < 2 or call.op == "numpy_T":
        return layout[::-1]
    return (*layout[:-2], layout[-1], layout[-2])


@rule("squeeze")
def squeeze(tracer: Tracer, call: Call) -> Layout:
    """Drop axes of size one."""
    x, dim = call["self"], call["dim"]
    layout = tracer.layout(x)
    dims = range(x.ndim) if dim is None else [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    return tuple(axis for place, axis in enumerate(layout) if place not in dims or x.shape[place] != 1)


@rule("unsqueeze")
def unsqueeze(tracer: Tracer, call: Call) -> Layout:
    """A new axis of size one."""
    layout = tracer.layout(call["self"])
    dim = call["dim"] % (len(layout) + 1)
    return (*layout[:dim], FIXED, *layout[dim:])


@rule("expand", "expand_as", "broadcast_to")
def expand(tracer: Tracer, call: Call) -> Layout:
    """Axes of size one grow; their size follows whatever they are expanded for."""
    x = call["self"]
    layout, lead = tracer.layout(x), call.out.ndim - x.ndim
    old = (1,) * lead + tuple(x.shape)
    axes = (FIXED,) * lead + layout
    grown = [size == 1 and new > 1 for size, new in zip(old, call.out.shape, strict=True)]
    return tuple(FREE if grows else axis for grows, axis in zip(grown, axes, strict=True))


@rule("repeat", "tile")
def repeat(tracer: Tracer, call: Call) -> Layout:
    """Copies side by side."""
    x = call["self"]
    lead = call.out.ndim - x.ndim
    layout = (FREE,) * lead + tracer.layout(x)
    old = (1,) * lead + tuple(x.shape)
    axes: list[Axis] = []
    for axis, size, new in zip(layout, old, call.out.shape, strict=True):
        if new == size:
            axes.append(axis)
        else:
            axes.append(tuple(np.tile(vector, new // size) for vector in axis) if axis and size > 1 else FREE)
    return tuple(axes)


@rule("repeat_interleave")
def repeat_interleave(tracer: Tracer, call: Call) -> Layout | None:
    """Every position several times in a row."""
    x, times, dim = call["self"], call["repeats"], call["dim"]
    layout = list(tracer.layout(x))
    if not isinstance(times, int) or dim is None:
        tracer.freeze(tuple(layout), f"repeated by data in {call.site}")
        return None
    axis = layout[dim]
    layout[dim] = tuple(np.repeat(vector, times) for vector in axis) if axis and x.shape[dim] > 1 else FREE
    return tuple(layout)


@rule("cat", "concat", "concatenate")
def concatenate(tracer: Tracer, call: Call) -> Layout:
    """Pieces end to end along one axis; all other axes are joined."""
    pieces = [piece for piece in call["tensors"] if piece.ndim > 1 or piece.numel()]
    ndim = call.out.ndim
    dim = (call["dim"] if call["dim"] is not None else call["axis"]) % ndim
    where = call.site
    layouts = [tracer.layout(piece) for piece in pieces]
    result = [
        FIXED if place == dim else tracer.table.join_axes([layout[place] for layout in layouts], where)
        for place in range(ndim)
    ]
    along = [layout[dim] for layout in layouts]
    if any(along):
        result[dim] = _end_to_end(tracer, along, [int(piece.shape[dim]) for piece in pieces], where)
    elif all(axis is FREE for axis in along):
        result[dim] = FREE
    return tuple(result)


def _end_to_end(tracer: Tracer, axes: list[Axis], sizes: list[int], where: str) -> Axis:
    parts: list[Vector] = []
    for axis, size in zip(axes, sizes, strict=True):
        if axis and len(axis) > 1:
            tracer.table.freeze(axis, f"two channel axes merged into one before {where}")
        if not axis or len(axis) > 1:
            parts.append(tracer.table.constants(size, f"tied to positions of {where} that no layer makes"))
        else:
            parts.append(axis[0])
    return (np.concatenate(parts),)


@rule("stack")
def stack(tracer: Tracer, call: Call) -> Layout:
    """Pieces along a new axis; all their axes are joined."""
    joined = broadcast(tracer, call, list(call["tensors"]), call.out.ndim - 1)
    dim = call["dim"] % call.out.ndim
    return (*joined[:dim], FIXED, *joined[dim:])


@rule("chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split", "split_with_sizes", "hsplit", "vsplit")
def split(tracer: Tracer, call: Call) -> list[Layout]:
    """Pieces along one axis: of equal size, their places are tied; of given sizes, each is its own."""
    x = call.tensors[0]
    dim = (call["dim"] or 0) % x.ndim
    layout = tracer.layout(x)
    axis = layout[dim]
    sizes = [int(piece.shape[dim]) for piece in call.out]
    if not axis:
        return [layout] * len(sizes)
    if len(axis) > 1:
        tracer.table.freeze(axis, f"two channel axes merged into one before {call.site}")
        return [(*layout[:dim], FIXED, *layout[dim + 1 :])] * len(sizes)
    vectors = np.split(axis[0], np.cumsum(sizes)[:-1])
    if len(set(sizes)) == 1:
        tracer.table.join(vectors[0][None], np.stack(vectors))
    elif call.op == "split_with_sizes":
        tracer.table.pieces += vectors
    else:
        tracer.table.freeze(axis, f"cut into pieces of unequal size by {call.site}")
    return [(*layout[:dim], (vector,), *layout[dim + 1 :]) for vector in vectors]


@rule("slice", "narrow")
def narrow(tracer: Tracer, call: Call) -> Layout:
    """Positions from a start to an end."""
    x = call["self"]
    dim = (call["dim"] or 0) % x.ndim
    layout = tracer.layout(x)
    axis = layout[dim]
    if not axis or call.out.shape[dim] == x.shape[dim]:
        return layout
    if call.op == "slice":
        chosen = slice(call["start"], call["end"], call["step"] or 1)
    else:
        start = int(call["start"]) % x.shape[dim]
        chosen = slice(start, start + call["length"])
    taken = tuple(vector[chosen] for vector in axis)
    tracer.table.pieces += taken
    return (*layout[:dim], taken, *layout[dim + 1 :])


@rule("select", "unbind")
def select(tracer: Tracer, call: Call) -> Any:
    """One position of an axis, or each of them."""
    x = call["self"]
    dim = (call["dim"] or 0) % x.ndim
    layout = tracer.layout(x)
    if x.shape[dim] > 1:
        tracer.table.freeze(layout[dim], f"picked by position in {call.site}")
    rest = (*layout[:dim], *layout[dim + 1 :])
    return [rest] * len(call.out) if call.op == "unbind" else rest


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def shuffle(tracer: Tracer, call: Call) -> Layout:
    """Channels into space, space into channels, or channels interleaved."""
    x = call.tensors[0]
    layout = tracer.layout(x)
    if not layout[-3]:
        return layout
    if call.op == "pixel_shuffle":
        squared = int(call["upscale_factor"]) ** 2
        channels = int(call.out.shape[-3])
        if channels == 1:
            tracer.table.freeze(layout[-3], f"all of them make one channel in {call.site}")
        split_ = reshape(tracer, (layout[-3],), (x.shape[-3],), (channels, squared), 0)
        return (*layout[:-3], split_[0], FIXED, FIXED)
    if call.op == "pixel_unshuffle":
        squared = int(call["downscale_factor"]) ** 2
        return (*layout[:-3], tuple(np.repeat(vector, squared) for vector in layout[-3]), FIXED, FIXED)
    groups, channels = int(call["groups"]), int(x.shape[-3])
    parts = reshape(tracer, (layout[-3],), (channels,), (groups, channels // groups), 1)
    merged = tuple(np.repeat(vector, groups) for vector in parts[1] or ())
    return (*layout[:-3], merged, *layout[-2:])


@rule("pad", "constant_pad_nd")
def pad(tracer: Tracer, call: Call) -> Layout:
    """Padding: along a channel axis the new positions belong to no layer."""
    x = call["self"]
    layout = list(tracer.layout(x))
    amounts = list(call["pad"])
    for pair in range(len(amounts) // 2):
        before, after, dim = int(amounts[2 * pair]), int(amounts[2 * pair + 1]), x.ndim - 1 - pair
        if not (before or after):
            continue
        axis = layout[dim]
        if axis and len(axis) == 1 and min(before, after) >= 0 and x.shape[dim] > 1:
            reason = f"tied to constant padding by {call.site}"
            ends = [tracer.table.constants(count, reason) for count in (before, after)]
            layout[dim] = (np.concatenate([ends[0], axis[0], ends[1]]),)
        else:
            tracer.table.freeze(axis, f"padded by {call.site}")
            layout[dim] = FIXED
    return tuple(layout)


@rule("im2col", "unfold", "col2im")
def unfold(tracer: Tracer, call: Call) -> Layout:
    """Sliding windows: `x.unfold(dim, …)` slides along an axis, `F.unfold` moves windows into channels."""
    x = call["self"]
    layout = tracer.layout(x)
    if call.op == "unfold":
        dim = call["dimension"] % x.ndim
        tracer.table.freeze(layout[dim], f"{call.site} slides over them")
        return (*layout[:dim], FIXED, *layout[dim + 1 :], FIXED)
    squared = math.prod(call["kernel_size"])
    axis = layout[-3] if call.op == "im2col" else layout[-2]
    if call.op == "im2col":
        spread = tuple(np.repeat(vector, squared) for vector in axis) if axis else axis
        return (*layout[:-3], spread, FIXED)
    channels = int(call.out.shape[-3])
    parts = reshape(tracer, (axis,), (x.shape[-2],), (channels, squared), 0)
    return (*layout[:-2], parts[0], FIXED, FIXED)
