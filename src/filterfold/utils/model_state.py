"""Context managers that give a model back as it was: mode, hooks, buffers, gradients, data type."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .modules import named_tensors


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put every module of the models into eval mode, and each back into its own mode afterwards.

    >>> net = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(net):
    ...     print(net.training, net[0].training)
    False False
    >>> net.training, net[0].training, net[1].training
    (True, True, False)
    """
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in before:
            if module.training is not training:
                module.training = training


_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers"}


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """`evaluating`, and what modules keep in attributes and buffers while they run is given back as well.

    Some networks cache what they compute from their weights (attention biases in LeViT, say) and
    clear it in their own `train()`: left behind, a cache would be used after the weights changed.

    >>> class Caching(nn.Module):
    ...     def forward(self, x):
    ...         self.cache = x
    >>> net = Caching()
    >>> with undisturbed(net):
    ...     net(1)
    >>> hasattr(net, "cache")
    False
    """
    before = [(module, _own(module)) for model in models for module in model.modules()]
    with evaluating(*models):
        try:
            yield
        finally:
            for module, own in before:
                _give_back(module, own)


def _own(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes, with a shallow copy of those that can grow."""
    return {
        name: (value, copy.copy(value) if type(value) in (dict, list) else None)
        for name, value in vars(module).items()
        if name not in _INTERNAL
    }


def _give_back(module: nn.Module, own: Mapping[str, tuple[Any, Any]]) -> None:
    attributes = vars(module)
    for name in [name for name in attributes if name not in own and name not in _INTERNAL]:
        del attributes[name]
    for name, (value, content) in own.items():
        attributes[name] = value
        if isinstance(content, dict):
            value.clear()
            value.update(content)
        elif isinstance(content, list):
            value[:] = content


@contextmanager
def attention_in_steps() -> Iterator[None]:
    """Have `nn.MultiheadAttention` and the layers around it run step by step, not as one opaque operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


TINY = 1e-3
"""Parameters below this hide what they scale: float32 outputs agree to 1e-4 whatever lies behind them."""


@contextmanager
def borrowed(model: nn.Module, *, dtype: torch.dtype | None = None, generic: bool = False) -> Iterator[None]:
    """Put a model into eval mode, without gradients, for the length of a `with` block.

    On leaving, every tensor has its old data, every gradient is back, and caches that modules keep in
    attributes are as they were.

    **Arguments:**

    - `dtype`: if given, all floating-point parameters and buffers have this type inside.
    - `generic`: if true, constant and tiny parameters get seeded random values inside.

    >>> net = nn.BatchNorm2d(4)
    >>> with borrowed(net, dtype=torch.float64, generic=True):
    ...     net.weight.dtype, bool(net.weight.std() > 0)
    (torch.float64, True)
    >>> net.weight.tolist(), net.weight.dtype, net.training
    ([1.0, 1.0, 1.0, 1.0], torch.float32, True)
    """
    tensors = {id(tensor): (name, tensor) for name, tensor in named_tensors(model)}
    before = [(tensor, tensor.data, tensor.grad if tensor.is_leaf else None) for _, tensor in tensors.values()]
    generator = torch.Generator().manual_seed(0)
    with undisturbed(model):
        try:
            for name, tensor in tensors.values():
                if tensor.is_leaf:
                    tensor.grad = None
                if tensor.is_floating_point():
                    data = _generic(name, tensor, generator) if generic else tensor.data
                    tensor.data = data if dtype is None else data.to(dtype)
            yield
        finally:
            for tensor, data, grad in before:
                if tensor.is_leaf:
                    tensor.grad = None
                tensor.data = data
                if grad is not None:
                    tensor.grad = grad


def _generic(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor's data, or random data where it is constant or tiny."""
    data = tensor.data
    kind = name.rpartition(".")[2]
    if data.numel() == 0 or not (isinstance(tensor, nn.Parameter) or kind in ("running_mean", "running_var")):
        return data
    vector = data.numel() == max(data.shape, default=1)
    first, last = data[(0,) * data.dim()], data[(-1,) * data.dim()]
    if bool(first != last) and not (vector and abs(float(first)) < TINY):
        return data  # neither constant nor tiny, and that without a look at all of it
    low, high = (float(bound) for bound in torch.aminmax(data))
    constant, size = low == high and data.numel() > 1, max(abs(low), abs(high))

    def uniform(start: float, end: float) -> Tensor:
        return torch.empty(data.shape).uniform_(start, end, generator=generator).to(data)

    if vector and size < TINY and kind != "running_var":
        return uniform(0.1, 0.5)
    if constant and size >= TINY:
        return data * uniform(0.75, 1.25)
    if constant and not vector:
        inputs = data[0].numel()
        noise: Tensor = torch.randn(data.shape, generator=generator) / inputs**0.5
        return noise.to(data)
    return data
