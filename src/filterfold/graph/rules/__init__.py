"""The table of rules: how labels go through each operation.

A rule is a function `(tracer, call) -> layout` (a list of layouts where the operation has several
results; None where the results carry no labels). Operations are named as ATen names them, without
overload; an in-place operation has the rule of its plain form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..dispatch import Call, Rule, Tracer
from ..labels import FIXED, FREE, Axis, Layout

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule for these operations."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def freeze_all(tracer: Tracer, call: Call, why: str) -> None:
    """Freeze every label of every argument."""
    for tensor in call.tensors:
        tracer.freeze(tracer.layout(tensor), f"{why} ({call.site})")


@rule("unknown")
def unknown(tracer: Tracer, call: Call) -> Any:
    """An operation without a rule: refused by name, if it touches labels at all."""
    labelled = [tensor for tensor in call.tensors if any(tracer.layout(tensor))]
    if labelled:
        freeze_all(tracer, call, f"no rule for {call.op}")
    made = [out for out in (call.out if isinstance(call.out, list | tuple) else [call.out]) if isinstance(out, Tensor)]
    free = not call.tensors
    return [((FREE if free else FIXED),) * out.ndim for out in made]


def broadcast(tracer: Tracer, call: Call, tensors: list[Tensor], ndim: int) -> Layout:
    """The layout of an element-wise result: aligned axes are joined, size-one axes are gates."""
    layouts = [(tracer.layout(tensor), tensor.shape) for tensor in tensors]
    axes = []
    where = call.site
    for place in range(-ndim, 0):
        aligned = [(layout[place], shape[place]) for layout, shape in layouts if -place <= len(shape)]
        size = max((size for _, size in aligned), default=1)
        if size == 1:
            ones = [axis for axis, _ in aligned if axis]
            axes.append(tracer.table.join_axes(ones, where) if ones else FIXED)
        else:
            axes.append(tracer.table.join_axes([axis for axis, length in aligned if length == size], where))
    return tuple(axes)


@rule("pointwise", "dropout", "feature_dropout", "alpha_dropout", "native_dropout", "relu6", "prelu_kernel")
@rule("complex", "polar")
def pointwise(tracer: Tracer, call: Call) -> Layout | None:
    """Element by element, with broadcasting."""
    if not isinstance(call.out, Tensor):
        return None
    layout = broadcast(tracer, call, call.tensors, call.out.ndim)
    if not _keeps_zeros(tracer, call):
        tracer.table.alive += [vector for axis in layout for vector in axis or ()]
    return layout


_KEEPS_ZEROS = frozenset(
    """abs asin atan bernoulli ceil celu dropout elu erf expm1 floor gelu hardswish hardtanh leaky_relu log1p mish mul
    neg prelu_kernel relu relu6 round selu sgn sign silu sin sinh softshrink softsign sqrt square tan tanh
    trunc""".split()  # noqa: SIM905
)
"""Element-wise operations that give zero for zero."""


def _keeps_zeros(tracer: Tracer, call: Call) -> bool:
    """Whether an element-wise result is zero where all labelled operands are."""
    op = call.op.removesuffix("_")
    if op == "div":
        return any(tracer.layout(call.tensors[0]))
    if op in ("add", "sub"):  # of channels, not of a constant
        return len(call.tensors) == 2 and all(any(tracer.layout(tensor)) for tensor in call.tensors)
    return op in _KEEPS_ZEROS


@rule("clone", "contiguous", "to", "_to_copy", "type_as", "detach", "alias", "lift", "pin_memory", "cpu", "cuda")
@rule("float", "double", "half", "bfloat16", "resolve_conj", "resolve_neg", "_conj", "positive", "requires_grad")
@rule("softshrink", "celu", "elu", "hardtanh", "hardswish", "hardsigmoid", "mish", "selu", "silu", "gelu", "rrelu")
def same(tracer: Tracer, call: Call) -> Layout:
    """One tensor in, the same layout out."""
    layout = tracer.layout(call.tensors[0])
    if call.op.removesuffix("_") == "hardsigmoid":  # the only one of these that makes something of zero
        tracer.table.alive += [vector for axis in layout for vector in axis or ()]
    return layout


@rule("copy")
def copy(tracer: Tracer, call: Call) -> Layout:
    """Overwrite a tensor; where nothing but constants stood along an axis, the new labels take their place."""
    target, source = call.tensors[:2]
    old, new = tracer.layout(target), tracer.layout(source)
    lead = target.ndim - source.ndim
    axes = list(old)
    for place, axis in enumerate(new, start=max(lead, 0)):
        if source.shape[place - lead] == target.shape[place]:
            axes[place] = overwritten(tracer, old[place], axis, call.site)
    return tuple(axes)


def overwritten(tracer: Tracer, old: Axis, new: Axis, where: str) -> Axis:
    """An axis after values with other labels were written to it."""
    if old and new and all(tracer.table.is_constant(vector).all() for vector in old):
        return new
    return tracer.table.join_axes([old, new], where)


@rule("lift_fresh")
def literal(_tracer: Tracer, call: Call) -> Layout:
    """A tensor written as a literal in the code: its size is fixed."""
    return (FIXED,) * int(call.out.ndim)


@rule("bernoulli", "normal", "poisson", "binomial")
def drawn(tracer: Tracer, call: Call) -> Layout:
    """Random numbers, each by the parameters at its place, if those are tensors."""
    ndim = int(call.out.ndim)
    tracer.table.alive += [vector for tensor in call.tensors for axis in tracer.layout(tensor) for vector in axis or ()]
    return broadcast(tracer, call, call.tensors, ndim) if call.tensors else (FREE,) * ndim


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like", "new_zeros")
@rule("new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty", "arange", "rand", "randn")
@rule(
    "linspace", "eye", "scalar_tensor", "randperm", "normal_", "uniform_", "bernoulli_", "exponential_", "tril_indices"
)
@rule("empty_strided", "new_empty_strided", "randint", "triu_indices", "zero_", "fill_")
def made(tracer: Tracer, call: Call) -> Layout:
    """Tensors made from sizes and constants: they follow the sizes that they are made from."""
    if call.op.endswith("_") and call.tensors:
        return tracer.layout(call.tensors[0])
    return (FREE,) * int(call.out.ndim)
