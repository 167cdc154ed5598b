"""Following labels through a network: one real forward pass, with a rule for every operation that it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..utils.dispatch import Function, OperationMode, signature, tensors_in
from .labels import FIXED, LabelTable, Layout, Vector
from .views import Region, view_of, write_in_place

_LABELS = "_filterfold_labels"
"""Attribute in which a tensor made by the network carries its labels; it goes away with the tensor."""


@dataclass(slots=True)
class TensorLabels:
    """What is known about one tensor.

    `weight`: made from parameters and buffers only. `base`, `region`, `axes`: the tensor that it is
    a view of, the part that it shows, and the base's axis behind each of its own axes (see `views.py`).
    """

    layout: Layout
    weight: bool = False
    base: Tensor | None = None
    region: Region | None = None
    axes: tuple[int, ...] = ()


@dataclass(slots=True)
class Call:
    """One call of an operation, as a rule sees it: `call["weight"]` is the argument of that name, or None.

    **Arguments:**

    - `op`: the operation's name without overload, such as `conv2d`, `add_` or `mylib::scale`.
    - `args`: all arguments by name, defaults filled in.
    - `out`: the result, a tensor or a tuple or list of them.
    - `where`: qualified name of the module that called it.
    - `tensors`, `outputs`: all tensors among the arguments and among the results, in order.
    """

    op: str
    args: dict[str, Any]
    out: Any
    where: str
    tensors: list[Tensor] = field(init=False)
    outputs: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        """Collect the tensors."""
        self.tensors, self.outputs = list(tensors_in(self.args.values())), list(tensors_in([self.out]))

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)

    @property
    def site(self) -> str:
        """The operation and its module, for reasons."""
        return f"{self.op} in {self.where}" if self.where else self.op


@dataclass(frozen=True, slots=True)
class SizedLayout:
    """Shape and layout of one tensor."""

    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Step:
    """What is needed to tell later whether an operation of the pruned network has the sizes that it should have.

    `stack`: qualified names of the running modules, outermost first; `numbers`: the integers among the
    arguments, by name; `scalars`: the numbers that it computes with; `source`: the first tensor argument; `outputs`:
    the results.
    """

    op: str
    stack: tuple[str, ...]
    numbers: dict[str, Any]
    scalars: dict[str, float]
    source: SizedLayout | None
    outputs: tuple[SizedLayout, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """A reshape that splits an axis: its labels, the parts that could shrink (best guess first), the one that does.

    `where`: the module that calls it.
    """

    labels: Vector
    options: tuple[int, ...]
    chosen: int
    where: str


Rule = Callable[["Tracer", Call], Any]
"""Gives the layout of an operation's result: a `Layout`, a list of them for several results, None without labels."""


@dataclass(slots=True)
class Tracer:
    """What is known during a trace: the table of labels, those of each tensor, and the running modules.

    Some reshapes split an axis so that either part could shrink. `splits` lists them in the order in
    which they are met; `choices` says for some of them, by place in that list, which part to take instead
    of the best guess.
    """

    rules: Mapping[str, Rule]
    choices: Mapping[int, int] = field(default_factory=dict)
    table: LabelTable = field(default_factory=LabelTable)
    splits: list[Split] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    known: dict[int, tuple[Tensor, TensorLabels]] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)
    received: dict[str, list[SizedLayout]] = field(default_factory=dict)
    returned: dict[str, list[SizedLayout]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Qualified name of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def know(self, tensor: Tensor, labels: TensorLabels) -> None:
        """Register a tensor that the network did not make: a parameter, a buffer, an input."""
        self.known[id(tensor)] = (tensor, labels)

    def labels_of(self, tensor: Tensor) -> TensorLabels:
        """What is known about a tensor; one that was not made during the trace has a fixed size."""
        entry = self.known.get(id(tensor))
        if entry is not None:
            self.met.add(id(tensor))
            return entry[1]
        labels: TensorLabels | None = getattr(tensor, _LABELS, None)
        if labels is None or len(labels.layout) != tensor.ndim:
            labels = TensorLabels((FIXED,) * tensor.ndim)
            self.know(tensor, labels)
        return labels

    def layout(self, tensor: Tensor | None) -> Layout:
        """The layout of a tensor; empty for None."""
        return () if tensor is None else self.labels_of(tensor).layout

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor was made from parameters and buffers only."""
        return self.labels_of(tensor).weight

    def note(self, module: str, value: Any, calls: dict[str, list[SizedLayout]]) -> None:
        """Remember what a module receives or returns, once for each of its calls; a shape of () for no tensor."""
        tensor = isinstance(value, Tensor)
        found = SizedLayout(tuple(value.shape), self.layout(value)) if tensor else SizedLayout((), ())
        calls.setdefault(module, []).append(found)

    def put(self, tensor: Tensor, labels: TensorLabels) -> None:
        """Remember the labels of a result."""
        if id(tensor) in self.known:
            self.know(tensor, labels)
        else:
            setattr(tensor, _LABELS, labels)

    def freeze(self, layout: Layout, reason: str) -> None:
        """Freeze every label of a layout: none of its channels can be cut, for that reason."""
        for axis in layout:
            self.table.freeze(axis, reason)


NO_STEP = ("detach", "detach_", "contiguous")
"""Operations that are no steps: PyTorch adds a `detach` where it likes, such as after an `arange` under a second mode,
and leaves `contiguous` out where there is nothing to do, as for the only head that is left."""


def find_rule(func: Function, rules: Mapping[str, Rule]) -> tuple[str, Rule | None]:
    """An operation's name without overload (and without `aten::`), and its rule, if there is one."""
    op = func._schema.name.removeprefix("aten::")
    found = rules.get(op) or rules.get(op.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        found = rules["pointwise"]
    return op, found


class Recorder(OperationMode):
    """Runs every operation, then the rule for it, and records the step."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def rule_for(self, func: Function) -> Rule | None:
        """The rule in the tracer's table."""
        return find_rule(func, self.tracer.rules)[1]

    def run(self, func: Function, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation, give its result the layout that the rule says, and record a `Step`."""
        tracer = self.tracer
        bound = signature(func).bind(args, kwargs)
        before = [tracer.labels_of(tensor) for tensor in tensors_in(bound.values())]
        self.save_written(func, bound)
        out = func(*args, **kwargs)
        call = Call(func._schema.name.removeprefix("aten::"), bound, out, tracer.where)
        layouts = (rule or tracer.rules["unknown"])(tracer, call)
        source = SizedLayout(tuple(call.tensors[0].shape), tracer.layout(call.tensors[0])) if before else None
        weight = bool(before) and all(labels.weight for labels in before)
        outputs = self._store(func, call, layouts, weight)
        if call.op in NO_STEP:
            return out
        numbers = numbers_in(bound), scalars_in(call.op, bound, out)
        tracer.steps.append(Step(call.op, tuple(tracer.stack), *numbers, source, outputs))
        return out

    def _store(self, func: Function, call: Call, result: Any, weight: bool) -> tuple[SizedLayout, ...]:
        """Give every result its labels, and what an in-place operation wrote to its new ones."""
        tracer, arguments = self.tracer, call.tensors
        layouts = result if isinstance(result, list) else [result]
        written = [call[name] for name in signature(func).written]
        returns = func._schema.returns
        is_view = bool(returns) and returns[0].alias_info is not None
        outputs = []
        for place, tensor in enumerate(call.outputs):
            layout = layouts[place] if place < len(layouts) else None
            if layout is None or len(layout) != tensor.ndim:
                layout = (FIXED,) * tensor.ndim
            outputs.append(SizedLayout(tuple(tensor.shape), layout))
            if any(tensor is argument for argument in written):
                write_in_place(tracer, tensor, layout)
            elif not any(tensor is argument for argument in arguments):
                view = view_of(tracer, call, place) if is_view else ()
                tracer.put(tensor, TensorLabels(layout, weight, *view))
        return tuple(outputs)


def numbers_in(args: Mapping[str, Any]) -> dict[str, Any]:
    """The integers, and lists of integers, among named arguments."""
    found: dict[str, Any] = {}
    for name, value in args.items():
        if isinstance(value, list | tuple):
            if value and all(type(item) is int for item in value):
                found[name] = tuple(value)
        elif type(value) is int:
            found[name] = value
    return found


_SCALARS = ("other", "self", "scale", "alpha", "beta", "value", "exponent", "fill_value", "s")


def scalars_in(op: str, args: Mapping[str, Any], out: Any) -> dict[str, float]:
    """The numbers that an operation computes with, by the names of its arguments; of a literal, its value as `out`.

    >>> scalars_in("add", {"self": torch.ones(2), "other": 4, "alpha": 0.5}, None)
    {'other': 4, 'alpha': 0.5}
    """
    if op == "lift_fresh":
        return {"out": float(out)} if out.numel() == 1 and not out.is_complex() else {}
    return {name: args[name] for name in _SCALARS if type(args.get(name)) in (int, float)}


@contextmanager
def module_stack(model: nn.Module, tracer: Tracer | None = None) -> Iterator[list[str]]:
    """Gives a list of the qualified names of the running modules, outermost first, and keeps it current.

    `tracer` notes what each module receives first, and what it returns.
    """
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []
    own = get_ident()  # the hooks are called in all threads

    def enter(module: nn.Module, inputs: Any) -> None:
        if get_ident() != own:
            return
        stack.append(names.get(id(module), stack[-1] if stack else ""))
        if tracer is not None and id(module) in names:
            tracer.note(names[id(module)], inputs[0] if inputs else None, tracer.received)

    def leave(module: nn.Module, _inputs: Any, outputs: Any) -> None:
        if get_ident() != own:
            return
        del stack[-1:]  # none is there if `enter` was interrupted
        if tracer is not None and id(module) in names:
            tracer.note(names[id(module)], outputs, tracer.returned)

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
