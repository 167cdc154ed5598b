"""The two passes of `repair`: the uncut network says what each layer should give, the cut one is solved on the way."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import PlanError
from ...surgery.index_maps import Edit
from ...utils.dispatch import Function, tensors_in
from .calibration import ReachedError
from .least_squares import RIDGES, Equations, Problem, best_ridge, exact
from .operations import Key, Products
from .products import Product, Sample

_ROWS, _FEW, _WIDE = 20_000, 4096, 4608
"""Rows that a layer is solved on, at most and at least; the latter also where it has more than `_WIDE` inputs, so that
they are fewer than those."""


_PER_INPUT = 32
"""Rows for each of its inputs, between these bounds."""


_UNCHANGED = 1e-5
"""A layer that does not read cut channels and whose outputs are this near to the uncut network's is not solved."""


def rows_for(features: int) -> int:
    """How many rows of a layer with so many inputs are looked at."""
    return _FEW if features > _WIDE else min(_ROWS, max(_FEW, _PER_INPUT * features))


@dataclass(frozen=True, slots=True)
class Target:
    """What one call of a layer should give.

    **Arguments:**

    - `sample`: which rows.
    - `shape`: `shape_of` the product.
    - `wanted`: what the cut makes of the uncut layer's rows, without bias: shape `(rows, outputs)` or
      `(rows, groups, outputs)`.
    """

    sample: Sample
    shape: tuple[int, ...]
    wanted: Tensor


def shape_of(product: Product) -> tuple[int, ...]:
    """The shape of what it gives, without channels."""
    return (product.images, *product.space)


@dataclass(slots=True)
class Layer:
    """What the uncut network says of a layer.

    **Arguments:**

    - `reason`: why it can't be solved, or None.
    - `parameters`: what its kernel is computed from and may be changed for it; none where it is a parameter itself.
    - `size`: norm of what the cut leaves of its outputs' kernels, times the root of the number of inputs.
    - `targets`: one for each call.
    """

    reason: str | None = None
    parameters: tuple[str, ...] = ()
    size: float = 0.0
    targets: list[Target] = field(default_factory=list)


class Record(Products):
    """Watches the uncut network, from the first layer on that reads cut channels.

    **Arguments:**

    - `model`: the uncut network.
    - `edits`: what the cut does to its tensors.
    - `readers`: tensors that read cut channels.
    - `images`: how many examples it runs on.
    """

    def __init__(self, model: nn.Module, edits: Mapping[str, Edit], readers: Collection[str], images: int) -> None:
        super().__init__(model)
        self.layers: dict[Key, Layer] = {}
        self.peak, self.images = 0, images
        self._edits, self._readers = edits, readers
        self.biases: dict[str, set[Key]] = {}
        self._claimed: dict[str, Key] = {}
        self._live = 0

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add up what lives of the activations."""
        output = super().run(func, rule, args, kwargs)
        inputs = {value.untyped_storage().data_ptr() for value in tensors_in((*args, *kwargs.values()))}
        for value in tensors_in((output,)):
            if value.untyped_storage().data_ptr() not in inputs:
                size = value.untyped_storage().nbytes()
                self._live += size
                weakref.finalize(value, self._freed, size)
        self.peak = max(self.peak, self._live)
        return output

    def _freed(self, size: int) -> None:
        self._live -= size

    def after(self, key: Key, product: Product, output: Tensor) -> None:
        """Take down what the layer gives."""
        if key[0] not in self._readers and not self.layers:
            return
        layer = self.layers.setdefault(key, Layer())
        layer.reason = layer.reason or self._unsolvable(key, layer, product)
        if layer.reason is not None:
            layer.targets.clear()
            return
        rows = rows_for(product.form(product.weight).shape[1])
        seed = 1000 * len(self.layers) + self.calls[key]
        sample = Sample.draw(product, rows, examples=self.images, seed=seed)
        values = product.outputs(output, sample)
        if product.bias is not None:
            self.biases.setdefault(self.name_of(product.bias) or "", set()).add(key)
            values = values - product.bias.reshape(values.shape[1:])
        weight = exact(product.weight)
        for axis, cut in self._edits.get(key[0], {}).items():
            place = self._place(key[0], axis, product.weight)
            if place is not None and place in product.out_axes:
                values = cut.apply(values, product.out_axes[place], "value")
                weight = cut.apply(weight, place, "value")
        layer.size = float(weight.norm()) * product.form(product.weight).shape[1] ** 0.5
        layer.targets.append(Target(sample, shape_of(product), values))

    def _unsolvable(self, key: Key, layer: Layer, product: Product) -> str | None:
        name, weight = key[0], product.weight
        if not isinstance(self.tensors[name], nn.Parameter):
            return "it is no parameter"
        if not self.is_part(weight):
            return self._uncomputable(key, layer, weight)
        for axis in self._edits.get(name, {}):
            place = self._place(name, axis, weight)
            if place is None:
                return "its axes are taken apart"
            if place in product.out_axes and weight.shape[place] != self.tensors[name].shape[axis]:
                return "the outputs of a part of it are cut"
        return None

    def _uncomputable(self, key: Key, layer: Layer, weight: Tensor) -> str | None:
        computation = self.computation(weight)
        if weight.shape != self.tensors[key[0]].shape or not computation.reproduces():
            return "its kernel is computed from it in a way that can't be followed"
        own = [name for name in computation.parameters if self._claimed.setdefault(name, key) == key]
        layer.parameters = tuple(own)
        return None if key[0] in own else "several kernels are computed from it"

    def _place(self, name: str, axis: int, weight: Tensor) -> int | None:
        """The axis of a kernel in which an axis of the parameter lies, of which the kernel is a view."""
        if weight is self.tensors[name] or not self.is_part(weight):  # which has its shape then
            return axis
        stride = self.tensors[name].stride(axis)
        sizes = zip(weight.stride(), weight.shape, strict=True)
        return next((place for place, (s, size) in enumerate(sizes) if s <= stride < max(s * size, s + 1)), None)


@dataclass(frozen=True, slots=True)
class RepairedLayer:
    """One layer's error ‖output - wanted‖ / ‖wanted‖ on the calibration images, with its inputs from the cut network.

    **Arguments:**

    - `name`: qualified name of the module whose `weight` was solved, or of the parameter where it is called otherwise.
    - `before`, `after`: the error with the kernels that the cut left, and with the new ones. In front of a batch norm
      outputs are taken without their means, which the batch norm takes away.
    - `ridge`: the weight of staying near the present kernels, relative to the inputs' mean square; infinite where no
      other held on images that it was not found on.
    """

    name: str
    before: float
    after: float
    ridge: float


class Solve(Products):
    """Watches the cut network, solves each layer when it is reached, and measures each batch norm.

    A layer that runs once goes on with its new kernel at once. One that runs several times can only be solved when all
    its inputs are known: what comes after its first call is left for another pass, which is asked for by a
    `ReachedError` at its last call.

    **Arguments:**

    - `model`: the cut network.
    - `record`: of the uncut one.
    - `readers`: tensors that read cut channels.
    - `ridge`: the same for all layers, or None.
    - `done`: the layers solved so far, in the order in which they were; None for one that needed no solving.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Record,
        readers: Collection[str],
        ridge: float | None,
        done: dict[Key, RepairedLayer | None],
    ) -> None:
        super().__init__(model)
        self._record, self._readers, self._ridge, self._done = record, readers, ridge, done
        self.waiting: tuple[Key, Equations] | None = None
        self._normed: dict[int, int] = {}

    def before(self, key: Key, product: Product) -> None:
        """Solve the layer, or add up what it reads."""
        layer = self._record.layers.get(key)
        if layer is None or layer.reason is not None or key in self._done:
            return
        if self.waiting is not None and self.waiting[0] != key:
            return
        calls, call = layer.targets, self.calls[key]
        if call >= len(calls) or shape_of(product) != calls[call].shape:
            layer.reason = "it runs on other shapes than in the uncut network"
            self.waiting = None
            return
        rows = sum(target.sample.rows for target in calls)
        equations = self.waiting[1] if self.waiting else Equations(product.form(product.weight).shape[1], rows)
        _add(equations, key[0], product, calls[call])
        if call < len(calls) - 1:
            self.waiting = key, equations
            return
        self._solve(key, layer, product, equations)
        self.waiting = None
        if len(calls) > 1:
            raise ReachedError

    def _solve(self, key: Key, layer: Layer, product: Product, equations: Equations) -> None:
        bias = product.bias if self.is_part(product.bias) and self._owns_bias(product.bias) else None
        centred = bias is not None or key in self._record.normed
        name = key[0].removesuffix(".weight")
        before, _ = equations.errors(equations.problem(centred=False).shift(inf), centred=False, bias=False)
        if key[0] not in self._readers and before < _UNCHANGED:
            self._done[key] = None
            return
        old = exact(product.form(product.weight)).clone()
        problem = equations.problem(centred=centred)
        ridge = self._ridge
        if ridge is None:
            ridge = best_ridge(equations.problems(centred=centred))
            if key not in self._record.normed:
                ridge = _bounded(problem, ridge, old, layer.size / old.shape[1] ** 0.5)
        if layer.parameters:
            self._fit(layer, product, problem, ridge)
            shift = problem.coordinates(exact(product.form(product.weight)) - old)
        else:
            shift = problem.shift(ridge)
            product.write(old + problem.whole(shift))
        if bias is not None:
            bias.copy_(exact(bias) + equations.offset(shift).reshape(bias.shape))
        before, after = equations.errors(shift, centred=centred, bias=bias is not None)
        self._done[key] = RepairedLayer(name, before, after, ridge)

    def _owns_bias(self, bias: Tensor | None) -> bool:
        """Whether no other layer adds it."""
        name = None if bias is None else self.name_of(bias)
        return name is not None and len(self._record.biases.get(name, ())) == 1

    def _fit(self, layer: Layer, product: Product, problem: Problem, ridge: float) -> None:
        """Change the parameters that a kernel is computed from, and the kernel that was computed."""
        if ridge == inf:
            return
        computation = self.computation(product.weight)
        values = computation.fit(problem, ridge, layer.parameters, product.form)
        for name, value in values.items():
            self.tensors[name].copy_(value)
        product.weight.copy_(computation.again(values))

    def norm(self, given: dict[str, Any]) -> None:
        """Set the running statistics to those of the inputs, averaged over the calls."""
        mean, var, data = given["running_mean"], given["running_var"], given["input"]
        if mean is None or given["training"] or self.name_of(mean) is None or data.numel() <= data.shape[1]:
            return
        self._normed[id(mean)] = calls = self._normed.get(id(mean), 0) + 1
        new_mean, new_var = _moments(data)
        for old, new in ((mean, new_mean), (var, new_var)):
            old.copy_(new if calls == 1 else old + (new - old) / calls)


def _bounded(problem: Problem, ridge: float, kernels: Tensor, size: float) -> float:
    """The weakest ridge from `ridge` on whose kernels are no larger than `size`, or than they are.

    Where outputs keep their scale, as logits do, a far larger kernel gives them from small differences of its inputs.
    It may do so on other images as well; but a step of training that changes those inputs throws it off, and a network
    trains worse with it than without repair. To do the same with F′ instead of F inputs, the norm grows by √(F / F′).
    """
    limit = max(size, float(kernels.norm()))
    for stronger in (one for one in RIDGES[::-1] if one >= ridge):
        if float((kernels + problem.whole(problem.shift(stronger))).norm()) <= limit:
            return stronger
    return inf


def _moments(data: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel; by sums, which is 10 times faster, unless means are large."""
    maps, count = data.flatten(2) if data.dim() > 2 else data[:, :, None], data.numel() // data.shape[1]
    mean = exact(maps.sum(2)).sum(0) / count
    square = exact(torch.linalg.vector_norm(maps, dim=2)).square().sum(0) / count
    if bool((square < 100 * (square - mean.square())).all()):
        return mean, (square - mean.square()) * count / (count - 1)
    var, mean = torch.var_mean(maps, (0, 2))
    return mean, var


def _add(equations: Equations, name: str, product: Product, target: Target) -> None:
    """Add the rows of one call."""
    kernel = exact(product.form(product.weight))
    groups, _, outputs = kernel.shape
    bias = None if product.bias is None else exact(product.bias).reshape(groups, 1, outputs)
    if prod(target.wanted.shape[1:]) != groups * outputs:
        text = f"the plan gives outputs of {prod(target.wanted.shape[1:])} channels, the pruned network"
        raise PlanError(f"{name}: {text} {groups * outputs}")
    for piece, data in product.inputs(target.sample):
        x = exact(data)
        wanted = exact(target.wanted[piece.rows]).reshape(-1, groups, outputs).permute(1, 0, 2)
        given = wanted if bias is None else wanted + bias
        equations.add(x, wanted - x @ kernel, given, second=piece.second)
