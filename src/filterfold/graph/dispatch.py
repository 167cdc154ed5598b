"""The walk: run the model once on real inputs and see every operation that it calls.

Under `torch.inference_mode()` the dispatcher hands over operations as the user wrote them
(`conv2d`, `flatten`, `chunk`, a `view` with its -1), before autograd would take them apart. The
walk runs each one for real and lets the rule for it say how the labels go through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from .labels import FIXED, FREE, Axis, LabelTable, Layout, Vector

_MARK = "_filterfold_mark"


Region = tuple[NDArray[np.int64] | None, ...]
"""For each axis of a base tensor the positions that a view of it shows; None where it shows all."""


@dataclass(slots=True)
class Mark:
    """What the walk knows about one tensor.

    `weight`: made from parameters and buffers only. `base`, `region`, `axes`: the tensor that it is
    a view of, the part that it shows, and the base's axis behind each of its own axes.
    """

    layout: Layout
    weight: bool = False
    base: Tensor | None = None
    region: Region | None = None
    axes: tuple[int, ...] = ()


@dataclass(slots=True)
class Call:
    """One operation: its name without overload, its arguments by name, its result, and where it was called."""

    op: str
    args: dict[str, Any]
    out: Any
    where: str

    def __getitem__(self, name: str) -> Any:
        return self.args.get(name)


@dataclass(frozen=True, slots=True)
class Shaped:
    """Shape and layout of one tensor."""

    shape: tuple[int, ...]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Step:
    """What is needed to tell later whether an operation of the pruned network has the sizes it should have.

    `stack`: qualified names of the running modules, outermost first; `numbers`: the integers among the
    arguments, by name; `source`: the first tensor argument; `outputs`: the results.
    """

    op: str
    stack: tuple[str, ...]
    numbers: dict[str, Any]
    source: Shaped | None
    outputs: tuple[Shaped, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """A reshape that splits an axis: its labels, the parts that could shrink (best guess first), the one that does."""

    labels: Vector
    options: tuple[int, ...]
    chosen: int


Rule = Callable[["Walk", Call], Any]


@dataclass(slots=True)
class Walk:
    """The state of one walk: the ledger, what is known about each tensor, and the module stack.

    Some reshapes split an axis so that either part could shrink. `splits` lists them in the order in
    which they are met; `choices` says for some of them, by place in that list, which part to take instead
    of the best guess.
    """

    ledger: LabelTable
    rules: Mapping[str, Rule]
    choices: Mapping[int, int] = field(default_factory=dict)
    splits: list[Split] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    known: dict[int, tuple[Tensor, Mark]] = field(default_factory=dict)
    met: set[int] = field(default_factory=set)
    saved: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Qualified name of the module that is running."""
        return self.stack[-1] if self.stack else ""

    def know(self, tensor: Tensor, mark: Mark) -> None:
        """Register a tensor that exists before the walk."""
        self.known[id(tensor)] = (tensor, mark)

    def mark(self, tensor: Tensor) -> Mark:
        """What is known about a tensor; one that was not made during the walk has a fixed size."""
        entry = self.known.get(id(tensor))
        if entry is not None:
            self.met.add(id(tensor))
            return entry[1]
        mark: Mark | None = getattr(tensor, _MARK, None)
        if mark is None or len(mark.layout) != tensor.ndim:
            mark = Mark((FIXED,) * tensor.ndim)
            self.know(tensor, mark)
        return mark

    def layout(self, tensor: Tensor | None) -> Layout:
        """The layout of a tensor; empty for None."""
        return () if tensor is None else self.mark(tensor).layout

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor was made from parameters and buffers only."""
        return self.mark(tensor).weight

    def put(self, tensor: Tensor, mark: Mark) -> None:
        """Remember the mark of a result."""
        entry = self.known.get(id(tensor))
        if entry is not None:
            self.known[id(tensor)] = (tensor, mark)
        else:
            setattr(tensor, _MARK, mark)

    @contextmanager
    def undoing_writes(self) -> Iterator[None]:
        """Give the tensors in `saved` their old values back on leaving."""
        try:
            yield
        finally:
            for tensor, value in self.saved.values():
                with torch.no_grad():
                    tensor.copy_(value)

    def freeze(self, layout: Layout, reason: str) -> None:
        """Freeze every label of a layout."""
        for axis in layout:
            self.ledger.freeze(axis, reason)


def find_rule(func: torch._ops.OpOverload, rules: Mapping[str, Rule]) -> tuple[str, Rule | None]:
    """An operation's name without namespace and overload, and its rule, if there is one."""
    op = func._schema.name.removeprefix("aten::")
    found = rules.get(op) or rules.get(op.removesuffix("_"))
    if found is None and torch.Tag.pointwise in func.tags:
        found = rules["pointwise"]
    return op, found


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # the base class has no annotations
    """Runs every operation, then the rule for it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and the default imports torch._dynamo (over a second)

    def __init__(self, walk: Walk) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.walk = walk

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch for every operation."""
        walk, kwargs = self.walk, kwargs or {}
        op, rule = find_rule(func, walk.rules)
        if rule is None:
            with self:
                pieces = func.decompose(*args, **kwargs)
            if pieces is not NotImplemented:
                return pieces
            rule = walk.rules["unknown"]
        bound = bind(func, args, kwargs)
        tensors = list(tensors_in(bound.values()))
        before = [walk.mark(tensor) for tensor in tensors]
        written = self._written(func, op, bound)
        out = func(*args, **kwargs)
        call = Call(op, bound, out, walk.where)
        result = rule(walk, call)
        weight = bool(before) and all(mark.weight for mark in before)
        self._store(func, call, result, weight, written)
        return out

    def _written(self, func: torch._ops.OpOverload, op: str, bound: dict[str, Any]) -> Tensor | None:
        """The argument that the operation writes to, if any; what belongs to the model is saved first."""
        names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if op in ("batch_norm", "instance_norm", "cudnn_batch_norm"):
            names += [name for name in ("running_mean", "running_var") if bound.get("training", True)]
        target = None
        for name in names:
            tensor = bound.get(name)
            if isinstance(tensor, Tensor):
                if id(tensor) in self.walk.known and id(tensor) not in self.walk.saved:
                    self.walk.saved[id(tensor)] = (tensor, tensor.clone())
                if not name.startswith("running_"):
                    target = tensor
        return target

    def _store(
        self, func: torch._ops.OpOverload, call: Call, result: Any, weight: bool, written: Tensor | None
    ) -> None:
        walk = self.walk
        outputs: list[Shaped] = []
        arguments = list(tensors_in(call.args.values()))
        source = Shaped(tuple(arguments[0].shape), walk.layout(arguments[0])) if arguments else None
        layouts = result if isinstance(result, list) else [result]
        for place, tensor in enumerate(tensors_in([call.out])):
            layout = layouts[place] if place < len(layouts) else None
            if layout is None or len(layout) != tensor.ndim:
                layout = (FIXED,) * tensor.ndim
            outputs.append(Shaped(tuple(tensor.shape), layout))
            if written is not None and tensor is written:
                _write(walk, tensor, layout)
            elif not any(tensor is argument for argument in arguments):
                mark = Mark(layout, weight)
                if func._schema.returns and func._schema.returns[0].alias_info is not None:
                    _link(walk, mark, call, tensor, place)
                walk.put(tensor, mark)
        walk.steps.append(Step(call.op, tuple(walk.stack), numbers_in(call.args), source, tuple(outputs)))


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


def bind(func: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    schema = func._schema.arguments
    bound = {argument.name: value for argument, value in zip(schema, args, strict=False)}
    for argument in schema[len(args) :]:
        bound[argument.name] = kwargs.get(argument.name, argument.default_value)
    return bound


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _link(walk: Walk, mark: Mark, call: Call, view: Tensor, place: int) -> None:
    """Note which part of which tensor a view shows, where that is simple enough to say."""
    source = next((value for value in call.args.values() if isinstance(value, Tensor)), None)
    if source is None:
        return
    parent = walk.mark(source)
    base: Tensor
    region: Region
    if parent.base is None:
        base, region, axes = source, (None,) * source.ndim, tuple(range(source.ndim))
    elif parent.region is None:
        mark.base = parent.base
        return
    else:
        base, region, axes = parent.base, parent.region, parent.axes
    mark.base = base
    shown = _show(call, source, view, region, axes, base.shape, place)
    if shown is not None:
        mark.region, mark.axes = shown


def _show(
    call: Call,
    source: Tensor,
    view: Tensor,
    region: Region,
    axes: tuple[int, ...],
    shape: Sequence[int],
    place: int,
) -> tuple[Region, tuple[int, ...]] | None:
    if call.op in ("alias", "detach", "view_as") or (call.op == "view" and view.shape == source.shape):
        return region, axes
    if call.op not in ("slice", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split"):
        return None
    dim = (call["dim"] or 0) % source.ndim
    positions = np.arange(source.shape[dim])
    if call.op == "slice":
        positions = positions[call["start"] : call["end"] : call["step"] or 1]
    elif call.op == "select":
        positions = positions[[call["index"]]]
    elif call.op == "narrow":
        positions = positions[call["start"] :][: call["length"]]
    else:
        before = sum(piece.shape[dim] for piece in call.out[:place])
        positions = positions[before : before + view.shape[dim]]
    axis = axes[dim]
    shown = region[axis]
    whole = np.arange(shape[axis]) if shown is None else shown
    part: NDArray[np.int64] | None = whole[positions]
    if part is not None and len(part) == shape[axis]:
        part = None
    kept = tuple(a for d, a in enumerate(axes) if not (call.op == "select" and d == dim))
    return tuple(part if a == axis else r for a, r in enumerate(region)), kept


def _write(walk: Walk, tensor: Tensor, layout: Layout) -> None:
    """An in-place operation gave `tensor` a new layout; what it is a view of gets it too."""
    mark = walk.mark(tensor)
    before, mark.layout = mark.layout, layout
    mark.weight = False
    if mark.base is None or _same(before, layout):
        return
    base = walk.mark(mark.base)
    if mark.region is None:
        reason = f"written in place through a view at {walk.where or 'the model'}"
        walk.freeze(base.layout, reason)
        walk.freeze(layout, reason)
        return
    merged = list(base.layout)
    for axis, part in enumerate(mark.region):
        new = layout[mark.axes.index(axis)] if axis in mark.axes else FIXED
        if part is None:
            merged[axis] = walk.ledger.join_axes([merged[axis], new], walk.where)
        elif axis in mark.axes:
            merged[axis] = _overwrite(walk, merged[axis], new, part, mark.base.shape[axis])
    base.layout = tuple(merged)


def _overwrite(walk: Walk, axis: Axis, new: Axis, part: NDArray[np.int64], size: int) -> Axis:
    ledger = walk.ledger
    if not new and not axis:
        return FIXED if FIXED in (axis, new) else FREE
    reason = f"positions that are never written at {walk.where or 'the model'}"
    old = axis or (ledger.constants(size, reason),)
    values = new or (ledger.constants(len(part), f"made by no layer at {walk.where or 'the model'}"),)
    if len(old) != 1 or len(values) != 1:
        ledger.freeze(old, "written in place where two axes were merged")
        ledger.freeze(values, "written in place where two axes were merged")
        return old
    replaced = old[0][part]
    real = ~ledger.is_constant(replaced)
    if real.any():
        ledger.join(replaced[real], values[0][real])
    vector = old[0].copy()
    vector[part] = values[0]
    return (vector,)


def _same(first: Layout, second: Layout) -> bool:
    return all(a is b or (a == FIXED and b == FIXED) for a, b in zip(first, second, strict=True))


@contextmanager
def module_stack(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the qualified name of the running module on top of `stack`."""
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _inputs: Any) -> None:
        stack.append(names.get(id(module), stack[-1] if stack else ""))

    def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        stack.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        stack.clear()
