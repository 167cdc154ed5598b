"""Borrowing a model for a while: what is changed on the way in is given back on the way out."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model on example inputs: a tuple is spread over the arguments, a mapping over the keywords.

    >>> call(nn.Identity(), (3,))
    3
    """
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(inputs)


@contextmanager
def attention_in_steps() -> Iterator[None]:
    """Have `nn.MultiheadAttention` and the layers around it run step by step, not as one opaque operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def examples(inputs: Any, count: int = 1) -> Any:
    """The first example of a batch, repeated; the batch is the first axis of the first tensor.

    Tensors whose first axis has another length, and what is no tensor, are left as they are.

    >>> import torch
    >>> examples((torch.zeros(4, 3), torch.ones(2), "name"), 5)[0].shape
    torch.Size([5, 3])
    """
    values, batch = _values(inputs), batch_of(inputs)

    def repeated(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch:
            return value
        return value[:1] if count == 1 else value[:1].repeat(count, *[1] * (value.dim() - 1))

    values = [repeated(value) for value in values]
    if isinstance(inputs, Mapping):
        return dict(zip(inputs, values, strict=True))
    return tuple(values) if isinstance(inputs, tuple) else values[0]


def batch_of(inputs: Any) -> int | None:
    """How many examples the inputs are: the length of the first axis of the first tensor; None without one."""
    return next((value.shape[0] for value in _values(inputs) if isinstance(value, Tensor) and value.dim() > 0), None)


def _values(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]
