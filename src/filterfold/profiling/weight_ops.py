"""Which weight every product of a network multiplies with, and how often."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.dispatch import Function, OperationMode, signature, tensors_in
from ..utils.modules import named_tensors

aten = torch.ops.aten


Use = tuple[Tensor, Tensor, int]
"""(data, weight, multiply-accumulates)."""


def _convolution(output: Tensor, data: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return data, weight, weight.numel() * (output.numel() // max(1, weight.shape[0]))


def _transposed(_output: Tensor, data: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return data, weight, weight.numel() * (data.numel() // max(1, weight.shape[0]))


def _linear(_output: Tensor, data: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return data, weight, weight.numel() * (data.numel() // max(1, weight.shape[-1]))


def _product(_output: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> Use:
    columns = right.shape[-1] if right.dim() > 1 else 1
    return left, right, left.numel() * columns


def _sum_product(output: Tensor, _sum: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> Use:
    return _product(output, left, right)


def _bilinear(output: Tensor, left: Tensor, _right: Tensor, weight: Tensor, *_: Any, **__: Any) -> Use:
    return left, weight, weight.numel() * (output.numel() // max(1, weight.shape[0]))


def _attention(_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Use:
    heads = query.numel() // max(1, query.shape[-1])
    return query, key, heads * key.shape[-2] * (query.shape[-1] + value.shape[-1])


LAYERS: dict[Any, Callable[..., Use]] = {
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _transposed,
    aten.conv_transpose2d: _transposed,
    aten.conv_transpose3d: _transposed,
    aten.linear: _linear,
    aten.bilinear: _bilinear,
}
"""Ops with a weight of their own: counted whenever that comes from a parameter or buffer."""


PRODUCTS: dict[Any, Callable[..., Use]] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.addmm: _sum_product,
    aten.baddbmm: _sum_product,
    aten.addmv: _sum_product,
    aten.scaled_dot_product_attention: _attention,
}
"""Products of two operands of equal standing: the weight is the one that comes from a parameter."""


def _packets(names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names.split())


READ_WITHOUT_PRODUCT = _packets("""
    cat stack embedding index index_put_ native_layer_norm native_group_norm native_batch_norm layer_norm group_norm
    batch_norm instance_norm copy_ copy where addcmul _prelu_kernel grid_sampler_2d expand_as view_as
""")
"""Ops that may read large parameters without a product per weight."""


WITHOUT_PRODUCT = _packets("""
    batch_norm layer_norm group_norm instance_norm max_pool2d adaptive_avg_pool2d avg_pool2d dropout relu relu_ relu6
    silu silu_ hardtanh_ hardswish hardswish_ gelu sigmoid add add_ mul cat mean flatten reshape view permute transpose
    contiguous chunk split
""")
"""Ops that often occur and hold no product: not worth the time to look into them."""


@dataclass(frozen=True, slots=True)
class WeightUse:
    """One product of data and a weight.

    **Arguments:**

    - `func`, `args`, `kwargs`, `output`: the op, what it was called with, and its result.
    - `data`, `weight`: its two operands.
    - `name`: qualified name of the parameter or buffer that the weight is made from; None where it is an activation.
    - `macs`: multiply-accumulates.
    """

    func: Function
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    data: Tensor
    weight: Tensor
    name: str | None
    macs: int

    @property
    def op(self) -> Any:
        """The op without overload, such as `torch.ops.aten.conv2d`."""
        return self.func.overloadpacket

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name."""
        return signature(self.func).bind(self.args, self.kwargs)


class WeightOps(OperationMode):
    """Watches a model's ops and tells which parameter or buffer each product multiplies with.

    A tensor computed from parameters and buffers alone belongs to the one among them that has its
    shape, or to the largest. To be entered together with `torch.inference_mode()`.

    **Arguments:**

    - `model`: the model whose parameters and buffers are followed.
    - `seen`: called for every product.
    """

    def __init__(self, model: nn.Module, seen: Callable[[WeightUse], None]) -> None:
        super().__init__()
        self.uncounted: set[str] = set()
        self._seen = seen
        # id -> (tensor, name): holding the tensor keeps its id from being used again
        self._owners: dict[int, tuple[Tensor, str | None]] = {}
        for name, tensor in named_tensors(model):
            self._owners.setdefault(id(tensor), (tensor, name))

    def rule_for(self, func: Function) -> Any:
        """How to count a product; whether there is none (False); None where that is to be found out."""
        packet = func.overloadpacket
        found = LAYERS.get(packet) or PRODUCTS.get(packet)
        return False if found is None and packet in WITHOUT_PRODUCT else found

    def run(self, func: Function, rule: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the op, report a product, and follow what is computed from parameters."""
        if signature(func).written:
            self.save_written(func, signature(func).bind(args, kwargs))
        output = func(*args, **kwargs)
        tensors = list(tensors_in((*args, *kwargs.values())))
        owned = [self._owners[id(tensor)] for tensor in tensors if id(tensor) in self._owners]
        if rule:
            self._report(func, rule(output, *args, **kwargs), args, kwargs, output)
        elif owned and len(owned) < len(tensors):
            self.meets_data(func, owned)
        if len(owned) == len(tensors):
            self._follow(output, owned)
        return output

    def _report(self, func: Function, use: Use, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> None:
        data, weight, macs = use
        name = self.name_of(weight)
        if func.overloadpacket in PRODUCTS:
            other = self.name_of(data)
            if name is not None and other is not None:
                return  # weights made from weights
            if name is None and other is not None:
                data, weight, name = weight, data, other
        self._seen(WeightUse(func, args, kwargs, out, data, weight, name, macs))

    def name_of(self, tensor: Tensor) -> str | None:
        """The parameter or buffer that a tensor is, or is made from; None for others."""
        return self._owners.get(id(tensor), (tensor, None))[1]

    def meets_data(self, func: Function, owned: list[tuple[Tensor, str | None]]) -> None:
        """Called for every other op that reads both data and what is computed from parameters."""
        large = any(name is not None and tensor.squeeze().dim() > 1 for tensor, name in owned)
        if large and torch.Tag.pointwise not in func.tags and func.overloadpacket not in READ_WITHOUT_PRODUCT:
            self.uncounted.add(str(func.overloadpacket))

    def _follow(self, output: Any, owned: list[tuple[Tensor, str | None]]) -> None:
        named = [(tensor, name) for tensor, name in owned if name is not None]
        for leaf in tensors_in((output,)):
            if id(leaf) not in self._owners:
                alike = [entry for entry in named if entry[0].shape == leaf.shape]
                best = max(alike or named, key=lambda entry: entry[0].numel(), default=(leaf, None))
                self._owners[id(leaf)] = (leaf, best[1])
