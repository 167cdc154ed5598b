"""Rules for reductions, products of matrices, and attention."""

from __future__ import annotations

from typing import Any

from ..dispatch import Call, Tracer
from ..labels import FIXED, FREE, Axis, Layout
from . import rule

# What ATen calls the axes that an operation goes over.
_DIM_NAMES = ("dim", "dims", "axis")


_SUMS = frozenset({"sum", "norm", "linalg_vector_norm", "frobenius_norm", "linalg_norm", "nansum", "count_nonzero"})
"""Reductions to which a zero adds nothing."""


_PLACES = frozenset({"argmax", "argmin"})
"""Reductions that result in the number of a position."""


def _dims(call: Call, ndim: int) -> list[int]:
    """The axes that a reduction goes over."""
    found = next((call[name] for name in _DIM_NAMES if call[name] is not None), None)
    if found is None or found == []:
        return list(range(ndim))
    return [dim % max(ndim, 1) for dim in ([found] if isinstance(found, int) else found)]


@rule("mean", "sum", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm")
@rule("logsumexp", "any", "all", "argmax", "argmin", "prod", "median", "nansum", "nanmean", "aminmax", "mode")
@rule("frobenius_norm", "nuclear_norm", "linalg_norm", "count_nonzero")
def reduce(tracer: Tracer, call: Call) -> Any:
    """Over an axis without labels: nothing. Over a labelled one: its units are not mask-exact."""
    if isinstance(call["other"], type(call["self"])):
        return tracer.rules["pointwise"](tracer, call)
    x = call["self"] if call["self"] is not None else call.tensors[0]
    layout, dims = tracer.layout(x), _dims(call, x.ndim)
    if call.op in _PLACES:
        for dim in dims:
            tracer.table.freeze(layout[dim], f"counted by position in {call.site}")
    zeros_count = tracer.is_weight(x) or call.op not in _SUMS
    mark = tracer.table.mark_inexact if zeros_count else tracer.table.mark_summed
    for dim in dims:
        if x.shape[dim] > 1:
            mark(layout[dim], f"reduced over in {call.site}")
    keepdim = bool(call["keepdim"])
    result = tuple(
        FIXED if place in dims else axis for place, axis in enumerate(layout) if keepdim or place not in dims
    )
    outs = call.out if isinstance(call.out, tuple | list) else [call.out]
    return [result] * len(outs)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "softmin", "logcumsumexp", "gumbel_softmax")
def softmax(tracer: Tracer, call: Call) -> Layout:
    """Every position depends on all others along the axis."""
    x = call.tensors[0]
    layout = tracer.layout(x)
    tracer.table.mark_inexact(layout[call["dim"]], f"normalised over in {call.site}")
    return layout


@rule("cumsum", "cumprod", "cummax", "cummin")
def cumulate(tracer: Tracer, call: Call) -> Any:
    """Every position depends on those before it."""
    layout = tracer.layout(call["self"])
    tracer.table.mark_inexact(layout[call["dim"]], f"accumulated over in {call.site}", ordered=True)
    return [layout] * len(call.out) if isinstance(call.out, tuple | list) else layout


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(tracer: Tracer, call: Call) -> Layout:
    """A Fourier transform over some axes; the others pass."""
    layout, dims = tracer.layout(call["self"]), _dims(call, call["self"].ndim)
    for dim in dims:
        tracer.table.freeze(layout[dim], f"transformed over in {call.site}")
    return tuple(FIXED if place in dims else axis for place, axis in enumerate(layout))


@rule("view_as_real", "view_as_complex")
def pairs(tracer: Tracer, call: Call) -> Layout:
    """Real and imaginary parts as a last axis of two."""
    layout = tracer.layout(call["self"])
    return (*layout, FIXED) if call.op == "view_as_real" else layout[:-1]


@rule("glu")
def glu(tracer: Tracer, call: Call) -> Layout:
    """The first half of an axis gated by the second."""
    x = call["self"]
    layout, dim = tracer.layout(x), call["dim"] % x.ndim
    halves = []
    for vector in layout[dim] or ():
        parts = vector.reshape(2, -1)
        tracer.table.join(parts[0], parts[1])
        halves.append(parts[0])
    return (*layout[:dim], tuple(halves) if layout[dim] is not None else FREE, *layout[dim + 1 :])


def _contract(tracer: Tracer, call: Call, left: Axis, right: Axis, weights: tuple[bool, bool]) -> None:
    """Sum over an axis of both operands: a weight's axis reads the other's channels."""
    if weights == (False, False):
        for axis in (left, right):
            tracer.table.mark_summed(axis, f"multiplied and summed over in {call.site}")
    if weights[0] != weights[1]:
        tracer.table.assign(left if weights[0] else right, "kernel")
    tracer.table.join_axes([left, right], call.site)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "linalg_matmul")
def matmul(tracer: Tracer, call: Call) -> Layout:
    """Matrix products; leading axes are broadcast."""
    a, b = call.tensors[:2]
    left, right = tracer.layout(a), tracer.layout(b)
    weights = (tracer.is_weight(a), tracer.is_weight(b))
    inner = right[-2] if b.ndim > 1 else right[-1]
    _contract(tracer, call, left[-1], inner, weights)
    outer: list[Axis] = [left[-2]] if a.ndim > 1 else []
    if b.ndim > 1:
        outer.append(right[-1])
    if weights == (False, True) and b.ndim > 1:
        tracer.table.assign(right[-1], "filter", maybe=True)
    if weights == (True, False) and a.ndim > 1:
        tracer.table.assign(left[-2], "filter", maybe=True)
    lead = []
    for place in range(-call.out.ndim, -len(outer)):
        offset = place + len(outer)
        sides = [
            (layout[offset - 2], tensor.shape[offset - 2])
            for layout, tensor in ((left, a), (right, b))
            if tensor.ndim >= 2 - offset
        ]
        size = max(length for _, length in sides)
        lead.append(tracer.table.join_axes([axis for axis, length in sides if length == size], call.site))
    return (*lead, *outer)


@rule("addmm", "baddbmm", "addbmm")
def addmm(tracer: Tracer, call: Call) -> Layout:
    """A matrix product added to something."""
    first, second = ("mat1", "mat2") if call.op == "addmm" else ("batch1", "batch2")
    product = Call("matmul", {"self": call[first], "other": call[second]}, call.out, call.where)
    layout = matmul(tracer, product)
    added, bias = tracer.layout(call["self"]), call["self"]
    axes = list(layout)
    for place in range(-min(len(axes), bias.ndim), 0):
        if bias.shape[place] == call.out.shape[place] and bias.shape[place] > 1:
            if tracer.is_weight(bias):
                tracer.table.assign(added[place], "bias")
            axes[place] = tracer.table.join_axes([axes[place], added[place]], call.site)
    return tuple(axes)


@rule("scaled_dot_product_attention")
def attention(tracer: Tracer, call: Call) -> Layout:
    """softmax(q kᵀ · scale) v; without a given scale, it follows from the size of a head."""
    query, key, value = (tracer.layout(call[name]) for name in ("query", "key", "value"))
    table, where = tracer.table, call.site
    for axis in (query[-1], key[-1]):
        table.mark_summed(axis, f"multiplied and summed over in {where}")
        if call["scale"] is None:
            table.freeze(axis, f"the scale of {where} follows from their number")
    table.join_axes([query[-1], key[-1]], where)
    table.mark_inexact(key[-2], f"normalised over in {where}")
    table.join_axes([key[-2], value[-2]], where)
    lead = [table.join_axes(axes, where) for axes in zip(query[:-2], key[:-2], value[:-2], strict=False)]
    mask = call["attn_mask"]
    if mask is not None:
        scores = [*lead, query[-2], key[-2]]
        for place in range(-min(mask.ndim, len(scores)), 0):
            if mask.shape[place] > 1:
                table.join_axes([scores[place], tracer.layout(mask)[place]], where)
    return (*lead, query[-2], value[-1])


@rule("cosine_similarity", "pairwise_distance", "cdist", "cross_entropy", "nll_loss", "mse_loss", "cross_entropy_loss")
def frozen(tracer: Tracer, call: Call) -> None:
    """Comparisons of whole vectors: what they read stays."""
    for tensor in call.tensors:
        tracer.freeze(tracer.layout(tensor), f"compared as a whole in {call.site}")
