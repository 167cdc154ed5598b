"""Rules of the user's own, for operations that Filterfold doesn't know."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError, TraceError
from ..dispatch import Call, Rule, Tracer
from ..labels import Layout
from . import RULES, rule


def tracing_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of your own, so that channels can be followed, and cut, through them.

    An operation without a rule is decomposed into those that have one; where PyTorch can't do that, as for a custom
    operation, the channels that it touches are frozen ("no rule for ..."). The decorated function is called as
    `function(tracer, call)` after the operation has run, and returns the layout of the result: one axis of labels for
    each axis of the tensor. `call["x"]` is the argument named `x`, `call.out` the result, and `call.site` says where
    it happened, for reasons. What a rule is made of:

    - `tracer.layout(tensor)`: the layout of an argument. Permute its axes as the operation permutes them.
    - `filterfold.graph.FIXED`: an axis whose size can't change; `FREE`: one whose size follows.
    - `tracer.table.join_axes([a, b], call.site)`: the axes are one and the same from now on; returns it.
    - `tracer.table.assign(axis, role)`: a parameter's axis makes channels (`"filter"`), reads them (`"kernel"`) or
      goes with them (`"norm"`, `"bias"`).
    - `tracer.table.mark_inexact(axis, reason)`: the operation mixes the channels of this axis (a mean, a norm).
    - `tracer.freeze(layout, reason)`: nothing of this can be cut.

    **Arguments:**

    - `names`: `"namespace::name"` without overload; the same rule serves all.

    **Raises:** `ConfigError` for names that PyTorch doesn't know or that have a rule, and for a function that doesn't
    take (tracer, call). While tracing, `TraceError` if the rule gives a layout that doesn't fit the result.

    ```python
    >>> @torch.library.custom_op("docs::shift", mutates_args=())
    ... def shift(x: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    ...     return x + amount[:, None, None]
    >>> @tracing_rule("docs::shift")
    ... def follow_shift(tracer, call):
    ...     layout, entries = tracer.layout(call["x"]), tracer.layout(call["amount"])[0]
    ...     tracer.table.assign(entries, "bias")
    ...     tracer.table.join_axes([layout[1], entries], call.site)
    ...     return layout
    >>> RULES.pop("docs::shift").__name__
    'follow_shift'

    ```
    """
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError('tracing_rule needs the names of operations: write @tracing_rule("namespace::name")')
    keys = [name.removeprefix("aten::") for name in names]
    for key in keys:
        _check_name(key)

    def register(function: Rule) -> Rule:
        try:
            inspect.signature(function).bind(None, None)
        except TypeError as error:
            raise ConfigError(f"the rule for {keys[0]} must take (tracer, call): {error}") from error
        rule(*keys)(_checked(function))
        return function

    return register


def _check_name(name: str) -> None:
    namespace, _, op = name.rpartition("::")
    if "." in name:
        raise ConfigError(f"tracing_rule: {name!r} names an overload; one rule serves all: {name.partition('.')[0]!r}")
    if not hasattr(getattr(torch.ops, namespace or "aten"), op):
        raise ConfigError(f"tracing_rule: PyTorch knows no operation {name!r}; define it before its rule")
    if name in RULES:
        raise ConfigError(f"tracing_rule: {name!r} has a rule already; remove it from graph.rules.RULES to replace it")


def _checked(function: Rule) -> Rule:
    """The rule, with an error where its layouts don't fit; a wrong layout would cut the wrong channels."""

    def checked(tracer: Tracer, call: Call) -> Any:
        result = function(tracer, call)
        layouts = result if isinstance(result, list) else [result] * len(call.outputs)
        for layout, out in zip(layouts, call.outputs, strict=False):
            if layout is not None and not _fits(layout, out):
                raise TraceError(
                    f"the tracing rule for {call.site} gives a layout that does not fit its result of shape "
                    f"{list(out.shape)}: one entry per axis, each with as many labels as the axis is long"
                )
        return result

    checked.__name__ = getattr(function, "__name__", "rule")
    return checked


def _fits(layout: Layout, out: Tensor) -> bool:
    return len(layout) == out.ndim and all(
        len(vector) == size for axis, size in zip(layout, out.shape, strict=True) for vector in axis or ()
    )
