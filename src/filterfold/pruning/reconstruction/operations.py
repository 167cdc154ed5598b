"""Watching the products of a network: which parameter each multiplies with, before and after it is computed."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...profiling.weight_ops import WeightOps
from ...utils.dispatch import Function, signature, tensors_in
from ...utils.modules import named_tensors
from .computed import Computation, Step
from .products import KINDS, Product

aten = torch.ops.aten

Key = tuple[str, int]
"""A kernel: the name of the parameter that it is or is made from, and which of the kernels made from that it is."""


class Products(WeightOps):
    """Sees each product of data and a kernel, and each batch norm. To be entered together with `inference_mode`.

    `others` holds what else reads parameters: name → operation; `calls` how often each kernel has been used so far;
    `normed` those that a batch norm follows directly, which takes away the mean of what they give; `steps` what is
    computed from parameters and buffers alone.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, lambda _use: None)
        self.tensors: dict[str, Tensor] = {}
        self.others: dict[str, str] = {}
        self.calls: Counter[Key] = Counter()
        self.normed: set[Key] = set()
        self._last: tuple[Any, Key] | None = None
        self.steps: list[Step] = []
        self._kernels: dict[str, list[Any]] = {}
        known: set[int] = set()
        for name, tensor in named_tensors(model):
            if id(tensor) not in known:
                known.add(id(tensor))
                self.tensors[name] = tensor

    def before(self, key: Key, product: Product) -> None:
        """Called before a product is computed; `calls` does not count it yet."""

    def after(self, key: Key, product: Product, output: Tensor) -> None:
        """Called after a product is computed."""

    def norm(self, given: dict[str, Any]) -> None:
        """Called before a batch norm is computed."""

    def meets_data(self, func: Function, owned: list[tuple[Tensor, str | None]]) -> None:
        """Take down what else reads the parameters."""
        self.others.update({name: func.overloadpacket.__name__ for _, name in owned if name is not None})

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and call the method that is for it."""
        found = self._product(func, args, kwargs) if rule else None
        if func.overloadpacket is aten.batch_norm:
            given = signature(func).bind(args, kwargs)
            if self._last is not None and self._last[0]() is given["input"]:
                self.normed.add(self._last[1])
            self.norm(given)
        if found is None:
            output = super().run(func, rule, args, kwargs)
            if any(id(tensor) in self._owners for tensor in tensors_in((output,))):
                self.steps.append((func, args, kwargs, output))
            return output
        key, product = found
        self.before(key, product)
        output = super().run(func, rule, args, kwargs)
        self.after(key, product, output)
        self.calls[key] += 1
        self._last = weakref.ref(output), key
        return output

    def _product(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, Product] | None:
        """A product of data and a kernel."""
        tensors = list(tensors_in((*args, *kwargs.values())))
        names = [name for name in map(self.name_of, tensors) if name is not None]
        if not names or len(names) == len(tensors):
            return None  # of data alone, or of parameters alone
        make = KINDS.get(func.overloadpacket)
        bound = signature(func).bind(args, kwargs)
        product = make(bound, lambda tensor: self.name_of(tensor) is not None) if make else None
        name = None if product is None else self.name_of(product.weight)
        if product is None or name is None:
            self.others.update(dict.fromkeys(names, func.overloadpacket.__name__))
            return None
        return (name, self._number(name, func, product.weight)), product

    def _number(self, name: str, func: Function, weight: Tensor) -> int:
        """Which of the kernels that are made from a parameter it is, in the order of their first use."""
        place = (weight.storage_offset(), weight.stride()) if self.is_part(weight) else None
        kernels = self._kernels.setdefault(name, [])
        if (entry := (func.overloadpacket, weight.shape, place)) not in kernels:
            kernels.append(entry)
        return kernels.index(entry)

    def overlap(self, name: str) -> bool:
        """Whether several kernels are made from the same values of a parameter."""
        spans = []
        for _, shape, place in self._kernels[name]:
            if place is None:
                return len(self._kernels[name]) > 1
            reach = sum((size - 1) * stride for size, stride in zip(shape, place[1], strict=True))
            spans.append((place[0], place[0] + reach))
        spans.sort()
        return any(first[1] >= second[0] for first, second in pairwise(spans))

    def is_part(self, tensor: Tensor | None) -> bool:
        """Whether writing to a tensor changes a parameter, and each value of it once."""
        name = None if tensor is None else self.name_of(tensor)
        if tensor is None or name is None or not isinstance(self.tensors[name], nn.Parameter):
            return False
        spread = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        whole = self.tensors[name].untyped_storage().data_ptr()
        return not spread and tensor.untyped_storage().data_ptr() == whole and tensor.dtype == self.tensors[name].dtype

    def computation(self, kernel: Tensor) -> Computation:
        """How a kernel comes from parameters."""
        parameters = {name: value for name, value in self.tensors.items() if isinstance(value, nn.Parameter)}
        return Computation.of(kernel, self.steps, parameters)
